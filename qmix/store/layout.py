"""Where every byte of a store lies: computed from the two configs alone, the same for writing and reading.

A region is written, read and checksummed as one piece: one expert's record, on a 4096-byte boundary, or one dense
tensor, on a 64-byte boundary. Files hold their regions one after the other. Bytes between tensors are U8 tensors named
`*.pad`, since safetensors files have no holes.

    dense.safetensors        the tensors of Model.tensors(); a packed matrix layers.0.attention.q becomes
                             layers.0.attention.q.qweight, .scale and so on (other names in version 1, see version1.py)
    experts-LL.safetensors   one per layer: layers.{l}.experts.{e}.{w13|w2}.{qweight|qparams|...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmix.config import ExpertKey, QuantConfig
from qmix.sizes import (
    PLAIN_DTYPES,
    RECORD_ALIGN,
    TENSOR_ALIGN,
    MatrixSpec,
    Placed,
    RecordLayout,
    TensorSpec,
    dense_spec,
    plain_format,
    record_layouts,
    round_up,
)
from qmix.spec import Model, Tensor
from qmix.tensorfile import Entry, build_header

MANIFEST = "qmix.json"
CONFIG = "config.json"
DENSE_FILE = "dense.safetensors"
JOURNAL = "journal.jsonl"  # only in a folder that is still being written


@dataclass(frozen=True, slots=True)
class Region:
    """nbytes at `offset` of `file`; each tensor lies `placed.offset` bytes into the region."""

    name: str
    file: str
    offset: int
    nbytes: int
    tensors: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A safetensors file: its header and tensors, pads included; size in bytes."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        last = self.entries[-1]
        return last.offset + last.nbytes


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """kinds: what a record may be, mostly one; kind_of: which it is. specs: how each dense tensor is
    packed, None where it stays plain."""

    kinds: tuple[RecordLayout, ...]
    kind_of: Mapping[ExpertKey, int]
    files: Mapping[str, FileLayout]
    records: Mapping[ExpertKey, Region]
    dense: Mapping[str, Region]
    specs: Mapping[str, MatrixSpec | None]

    @classmethod
    def of(cls, model: Model, quant: QuantConfig, labels: Mapping[str, str] | None = None) -> StoreLayout:
        """labels: the dense tensors' names in the file, by canonical name; None = these themselves. ConfigError where
        `quant` mixes formats for a model of another shape."""
        quant.check_model(model)
        kinds = record_layouts(model, quant)
        kind_of = {key: quant.kind_of(key) for key in model.expert_keys}
        tensors = model.tensors()
        specs = {t.name: dense_spec(model, quant, t) for t in tensors}
        drafts = [_dense_draft(model, t, specs[t.name], t.name if labels is None else labels[t.name]) for t in tensors]
        dense_file, regions = _lay_out(DENSE_FILE, drafts)
        dense = dict(zip(specs, regions, strict=True))
        files = {DENSE_FILE: dense_file}
        records: dict[ExpertKey, Region] = {}
        for layer in model.paged_layers:
            keys = [ExpertKey(layer, e) for e in range(model.experts_in(layer))]
            drafts = [_record_draft(key, kinds[kind_of[key]]) for key in keys]
            file, regions = _lay_out(expert_file(model, layer), drafts)
            files[file.name] = file
            records.update(zip(keys, regions, strict=True))
        return cls(kinds, kind_of, files, records, dense, specs)

    @property
    def record_bytes(self) -> int:
        """Of the largest record."""
        return max(kind.nbytes for kind in self.kinds)

    def record(self, key: ExpertKey) -> RecordLayout:
        """How the record of `key` is laid out."""
        return self.kinds[self.kind_of[key]]

    @property
    def regions(self) -> Iterator[Region]:
        """Every region, in the order in which it is written."""
        yield from self.dense.values()
        yield from self.records.values()

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size for file in self.files.values())


def expert_file(model: Model, layer: int) -> str:
    """experts-07.safetensors; two digits, more where there are more than a hundred layers."""
    return f"experts-{layer:0{max(2, len(str(model.num_layers - 1)))}}.safetensors"


def record_name(key: ExpertKey) -> str:
    return f"layers.{key.layer}.experts.{key.expert}"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A region that has no offset yet; labels: the tensors' names in the file; pad: what a pad behind all is called
    after."""

    name: str
    pad: str
    labels: tuple[str, ...]
    tensors: tuple[Placed, ...]
    nbytes: int

    @property
    def segments(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the tensors and of the pads that fill what lies between them."""
        end, last = 0, self.pad
        for label, placed in zip(self.labels, self.tensors, strict=True):
            if placed.offset > end:
                yield last + ".pad", "U8", (placed.offset - end,)
            yield label, placed.tensor.dtype, placed.tensor.shape
            end, last = placed.offset + placed.tensor.nbytes, label
        if self.nbytes > end:
            yield self.pad + ".pad", "U8", (self.nbytes - end,)


def _dense_draft(model: Model, tensor: Tensor, spec: MatrixSpec | None, label: str) -> _Draft:
    plain = TensorSpec("weight", PLAIN_DTYPES[plain_format(model, tensor)], tensor.shape)
    placed, end = [], 0
    for part in (plain,) if spec is None else spec.tensors:
        placed.append(Placed("", part, end))
        end = round_up(end + part.nbytes, TENSOR_ALIGN)
    stem = label.removesuffix(".weight")
    labels = (label,) if spec is None else tuple(f"{stem}.{p.tensor.name}" for p in placed)
    return _Draft(tensor.name, label, labels, tuple(placed), end)


def _record_draft(key: ExpertKey, record: RecordLayout) -> _Draft:
    name, placed = record_name(key), record.placed
    return _Draft(name, name, tuple(f"{name}.{p.matrix}.{p.tensor.name}" for p in placed), placed, record.nbytes)


def _lay_out(file: str, drafts: Sequence[_Draft]) -> tuple[FileLayout, list[Region]]:
    """Lay drafts out one after the other behind a header of whole 4096-byte blocks."""
    header, entries = build_header(_chain(drafts), RECORD_ALIGN)
    regions, offset = [], len(header)
    for draft in drafts:
        regions.append(Region(draft.name, file, offset, draft.nbytes, draft.tensors))
        offset += draft.nbytes
    return FileLayout(file, header, tuple(entries)), regions


def _chain(drafts: Iterable[_Draft]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for draft in drafts:
        yield from draft.segments
