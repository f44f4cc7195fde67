"""Where every byte of a store lies: computed from the two configs alone, the same for writing and reading.

A region is written, read and checksummed as one piece: one expert's record, on a 4096-byte boundary, or one dense
tensor, on a 64-byte boundary. Files hold their regions one after the other. Bytes between tensors are U8 tensors named
`*.pad`, since safetensors files have no holes.

    dense.safetensors        the tensors of names.dense_tensors; plain ones keep their names, a packed matrix
                             X.weight becomes X.qweight, X.scale and so on
    experts-LL.safetensors   one per layer: layers.{l}.experts.{e}.{w13|w2}.{qweight|qparams|...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmix.config import DTYPES, ExpertKey, ModelConfig, QuantConfig
from qmix.names import DenseTensor, dense_tensors
from qmix.sizes import (
    PLAIN_DTYPES,
    RECORD_ALIGN,
    TENSOR_ALIGN,
    MatrixSpec,
    Placed,
    RecordLayout,
    TensorSpec,
    dense_spec,
    record_layouts,
    round_up,
)
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
    def of(cls, config: ModelConfig, quant: QuantConfig) -> StoreLayout:
        """ConfigError where `quant` mixes formats for a model of another shape."""
        quant.check_model(config)
        kinds = record_layouts(config, quant)
        kind_of = {key: quant.kind_of(key) for key in config.expert_keys}
        specs = {t.name: dense_spec(config, quant, t) for t in dense_tensors(config)}
        drafts = [_dense_draft(config, t, specs[t.name]) for t in dense_tensors(config)]
        dense_file, regions = _place(DENSE_FILE, drafts)
        dense = dict(zip(specs, regions, strict=True))
        files = {DENSE_FILE: dense_file}
        records: dict[ExpertKey, Region] = {}
        for layer in range(config.num_layers):
            keys = [ExpertKey(layer, e) for e in range(config.num_experts)]
            drafts = [_record_draft(key, kinds[kind_of[key]]) for key in keys]
            file, regions = _place(expert_file(config, layer), drafts)
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


def expert_file(config: ModelConfig, layer: int) -> str:
    """experts-07.safetensors; two digits, more where there are more than a hundred layers."""
    return f"experts-{layer:0{max(2, len(str(config.num_layers - 1)))}}.safetensors"


def record_name(key: ExpertKey) -> str:
    return f"layers.{key.layer}.experts.{key.expert}"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A region that has no offset yet; labels are the tensors' names in the file."""

    name: str
    labels: tuple[str, ...]
    tensors: tuple[Placed, ...]
    nbytes: int

    @property
    def segments(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the tensors and of the pads that fill what lies between them."""
        end, last = 0, self.name
        for label, placed in zip(self.labels, self.tensors, strict=True):
            if placed.offset > end:
                yield last + ".pad", "U8", (placed.offset - end,)
            yield label, placed.tensor.dtype, placed.tensor.shape
            end, last = placed.offset + placed.tensor.nbytes, label
        if self.nbytes > end:
            yield self.name + ".pad", "U8", (self.nbytes - end,)


def _dense_draft(config: ModelConfig, tensor: DenseTensor, spec: MatrixSpec | None) -> _Draft:
    plain = TensorSpec("weight", PLAIN_DTYPES[DTYPES[config.dtype]], tensor.shape)
    placed, end = [], 0
    for part in (plain,) if spec is None else spec.tensors:
        placed.append(Placed("", part, end))
        end = round_up(end + part.nbytes, TENSOR_ALIGN)
    stem = tensor.name.removesuffix("weight")
    return _Draft(tensor.name, tuple(stem + p.tensor.name for p in placed), tuple(placed), end)


def _record_draft(key: ExpertKey, record: RecordLayout) -> _Draft:
    name, placed = record_name(key), record.placed
    return _Draft(name, tuple(f"{name}.{p.matrix}.{p.tensor.name}" for p in placed), placed, record.nbytes)


def _place(file: str, drafts: Sequence[_Draft]) -> tuple[FileLayout, list[Region]]:
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
