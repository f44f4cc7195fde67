"""A checkpoint in Hugging Face layout, or a GGUF file, read one tensor at a time.

Opening reads config.json and the headers only, and accounts for every tensor: each one is used, or named in `skipped`,
or the checkpoint is refused by that tensor's name. Tensors are then read with pread into fresh memory, never mapped and
never unpickled, and their pages are given back to the system at once. So streaming 94 GB neither grows the process nor
empties the page cache.

A file that changes or disappears while it is read is an error, not a wrong model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qmix import modelfiles, sources
from qmix.checkpoint.account import nbytes_of, shares
from qmix.checkpoint.consolidated import open_consolidated
from qmix.checkpoint.folder import open_folder
from qmix.config import BESIDE, ExpertKey
from qmix.errors import CheckpointError, ConfigError
from qmix.formats import beside, grouped
from qmix.formats.carried import Blocks as CarriedBlocks
from qmix.formats.mxfp4 import LARGEST, Blocks
from qmix.gguf.header import is_gguf
from qmix.gguf_checkpoint import Opened, open_gguf
from qmix.lowbit import Matrix, fits, mxfp4_blocks
from qmix.models import Source
from qmix.models.consolidated import is_consolidated
from qmix.models.source import Index
from qmix.shards import REFETCH, Location, sample_of
from qmix.sizes import CARRIED


class Checkpoint:
    """An open checkpoint. Use as a context manager, or close it.

    Tensors are asked for by their canonical names (Model.tensors), whatever the files call them.
    path: the folder, or the GGUF file; folder: where config.json and the tokenizer are. model: what it holds, `dtype`
    as the files have it whatever config.json says.
    raw_config: config.json as it stands. nbytes: bytes of all used weights. expert_format: "mxfp4" where experts are
    MXFP4 already; they are read as numbers of `dtype`, exactly, or as `expert_blocks`. Else None. lowbit: whether it is
    a folder with other quantized weights, which are read as numbers of `dtype`, or as `blocks` where `carriable`.
    has_mtp_head: whether the files have a multi-token-prediction head that qmix knows, the model's or left out.
    skipped: names of tensors and weight files that the model does not need. notes: lines on what the folder says
    and qmix does not follow.
    """

    def __init__(self, path: Path, found: Opened, opened: ExitStack):
        self.path = path
        self.has_mtp_head = found.has_mtp_head
        self.folder = found.folder
        self.raw_config = found.raw_config
        self.model = found.model
        self.skipped = found.skipped
        self.notes = found.notes
        self.nbytes = sum(map(nbytes_of, found.locations.values()))
        self.expert_format = found.carried
        self.lowbit = any(isinstance(location, Matrix) for location in found.locations.values())
        self._types = found.types
        self._dtype: torch.dtype = getattr(torch, found.model.dtype)
        self._gguf = found.gguf
        self._locations = found.locations
        self._table = found.table
        self._shares = shares(found.model, found.table, found.locations)
        self._opened = opened
        self._widened = {tensor.name for tensor in found.model.tensors() if found.model.is_wide(tensor)}

    @classmethod
    def open(cls, path: Path | str, mtp: bool = True) -> Checkpoint:
        """Open and account for every tensor; CheckpointError names file, tensor or key, and the cure. mtp: with the
        multi-token-prediction head, where there is one that qmix knows; without, its tensors are among the skipped."""
        path = Path(path)
        with ExitStack() as opened:
            try:
                found = open_gguf(path, opened) if is_gguf(path) else open_consolidated(path, opened) \
                    if is_consolidated(path) else open_folder(path, opened, mtp)
            except ConfigError as e:
                raise CheckpointError(f"{path}: {e.message}", e.cure) from None
            except OSError as e:
                raise CheckpointError(f"{e.filename or path}: {e.strerror}",
                                      "check the path and its permissions") from None
            return cls(path, found, opened.pop_all())

    @property
    def types(self) -> Mapping[str, str]:
        """What a checkpoint of quantized weights has, by the model's names: types of ggml's, of a safetensors file also
        those into which its numbers fit exactly, and INT4G64 and the like; else the title of the scheme. Empty where
        nothing is quantized. Reads scales when it is asked for first."""
        if not self._types and self.lowbit:
            experts = {tensor.name for key in self.model.expert_keys for tensor in self.model.expert_tensors(key)}
            wanted = {(source.name, name in experts) for name, source in self._table.items()}
            kinds = {(name, expert): _type_of(self._locations[name], expert) for name, expert in wanted}
            self._types = {name: kinds[source.name, name in experts] for name, source in self._table.items()}
        return self._types

    def dense(self, name: str) -> Tensor:
        """A tensor of Model.tensors, in fresh memory and the file's dtype (of a GGUF file, the model's), or fp32
        (Model.is_wide)."""
        if name in self._widened:
            return self._tensor(name, dtype=torch.float32).float()
        return self._tensor(name)

    def published(self, name: str) -> str:
        """What the checkpoint calls a tensor of the model, or the tensor that it is a part of."""
        return self._table[name].name

    def nbytes_of(self, name: str) -> int:
        """Of a tensor of the model, as the file has it; its share of the file's tensor."""
        return self._shares[name]

    def expert(self, key: ExpertKey) -> tuple[Tensor, Tensor, Tensor]:
        """w1 (gate) [F, H], w2 (down) [H, F], w3 (up) [F, H], in the file's dtype and fresh memory."""
        w1, w3, w2 = (self._tensor(tensor.name) for tensor in self.model.expert_tensors(key)[:3])
        return w1, w2, w3

    def carriable(self, *names: str) -> str | None:
        """The format of a store that all these tensors of the model have in the file, in whole blocks, so that
        `blocks` reads them; of a gate and an up in different ones of ggml's both, "q4_k+q6_k"; else None."""
        found = [self._carriable(name) for name in names]
        if len({*found}) == 1:
            return found[0]
        several = [kind for kind in found if kind is not None and kind in CARRIED]
        return BESIDE.join(several) if len(several) == len(found) == 2 else None

    def _carriable(self, name: str) -> str | None:
        kind = self.types.get(name, "").lower()
        if kind in CARRIED:
            columns = CARRIED[kind].columns
        elif kind.startswith("int4g"):
            columns = int(kind.removeprefix("int4g"))
        else:
            return None
        return kind if sources.keeps_blocks(self._table[name], columns) else None

    def blocks(self, *names: str) -> CarriedBlocks | beside.Blocks | grouped.Blocks:
        """`carriable` matrices of the model, one below the other, as the file has them. CheckpointError for a scale
        that no weight has."""
        found = [self._carried(name) for name in names]
        first = found[0]
        if isinstance(first, grouped.Blocks):
            several = [blocks for blocks in found if isinstance(blocks, grouped.Blocks)]
            return grouped.Blocks(torch.cat([b.codes for b in several]), torch.cat([b.scales for b in several]),
                                  first.group)
        same = [blocks for blocks in found if isinstance(blocks, CarriedBlocks)]
        if len({blocks.kind for blocks in same}) > 1:
            return beside.Blocks(*same)
        return CarriedBlocks(first.kind, torch.cat([blocks.raw for blocks in same]))

    def _carried(self, name: str) -> CarriedBlocks | grouped.Blocks:
        location = self._locations[self._table[name].name]
        found = sources.read_carried(location, self._table[name], self.types[name].lower())
        if isinstance(found, CarriedBlocks) and found.nonfinite():
            raise CheckpointError(f"{location.shard.file.path}: {location.entry.name}: holds a scale that is not a "
                                  "number: no working model has such a weight", REFETCH)
        return found

    def stacked_expert(self, key: ExpertKey, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """An expert as a record has it: w13 [2F, H], the gate above w3, and w2 [H, F], in the file's dtype; read
        into `buffer`, uint8 of an expert's bytes, and views into it."""
        return self.stacked_w13(key, buffer), self.w2(key, buffer)

    def stacked_w13(self, key: ExpertKey, buffer: Tensor) -> Tensor:
        """The first matrix of `stacked_expert`."""
        part = self._expert_part
        w1, _ = (self._tensor(tensor.name, buffer[i * part:(i + 1) * part])
                 for i, tensor in enumerate(self.model.expert_tensors(key)[:2]))
        return buffer[:2 * part].view(w1.dtype).view(2 * w1.shape[0], w1.shape[1])

    def w2(self, key: ExpertKey, buffer: Tensor) -> Tensor:
        """The second one, behind the first in `buffer`."""
        return self._tensor(self.model.expert_tensors(key)[2].name, buffer[2 * self._expert_part:3 * self._expert_part])

    @property
    def _expert_part(self) -> int:
        """Bytes of a third of an expert, in the model's dtype."""
        return self.model.hidden * self.model.expert_inner * self._dtype.itemsize

    def expert_blocks(self, key: ExpertKey) -> tuple[Blocks, Blocks]:
        """w13 and w2 of an expert in MXFP4, codes and scales as the checkpoint has them."""
        gate, up, down = (self._table[tensor.name] for tensor in self.model.expert_tensors(key)[:3])
        first, second = self._blocks(gate, up)
        w13 = Blocks(torch.cat((first.codes, second.codes)), torch.cat((first.scales, second.scales)))
        return w13, self._blocks(down)[0]

    def _blocks(self, *of: Source) -> list[Blocks]:
        """Of sources in one tensor, or in GGUF's. CheckpointError for a scale that no weight has."""
        if isinstance(self._locations[of[0].name], Matrix):
            return [mxfp4_blocks(matrix) for s in of if isinstance(matrix := self._locations[s.name], Matrix)]
        if self._gguf:
            found, scales = [sources.read_mxfp4(self._file(s.name), s) for s in of], self._file(of[0].name)
        else:
            codes, scales = self._file(of[0].name), self._file(of[0].scales)
            found = sources.read_blocks(codes, scales, of)
        if (largest := max(int(blocks.scales.max()) for blocks in found)) > LARGEST:
            part = ", ".join(str(step.at) for step in of[0].steps if isinstance(step, Index))
            raise CheckpointError(f"{scales.shard.file.path}: {scales.entry.name}[{part}]: holds {largest}, want at "
                                  f"most {LARGEST}: no weight is as large", REFETCH)
        return found

    def expert_locations(self, key: ExpertKey) -> list[Location]:
        """The tensors of the files in which an expert lies, each once; other experts may lie there too. Of a quantized
        matrix the codes alone: `types` reads scales, zero points and order, and a run that resumes asks for it."""
        names = dict.fromkeys(name for tensor in self.model.expert_tensors(key)
                              for name in self._table[tensor.name].names)
        found: list[Location] = []
        for location in (self._locations[name] for name in names):
            found.append(location.parts["codes"] if isinstance(location, Matrix) else location)
        return found

    def expert_nbytes(self, key: ExpertKey) -> int:
        """Of an expert's share of the files."""
        return sum(self._shares[tensor.name] for tensor in self.model.expert_tensors(key))

    def expert_biases(self, key: ExpertKey) -> tuple[Tensor, Tensor] | None:
        """Of w13 [2F], the gate's before the up's, and of w2 [H], fp32; None where experts have none."""
        names = [tensor.name for tensor in self.model.expert_tensors(key)[3:]]
        if not names:
            return None
        gate, up, down = (self._tensor(name, dtype=torch.float32).float() for name in names)
        return torch.cat((gate, up)), down

    def read_into(self, name: str, out: Tensor) -> None:
        """Any tensor of the model, into memory of its dtype and shape."""
        if not out.is_contiguous():
            out.copy_(self._tensor(name))
            return
        found = self._tensor(name, out.view(-1).view(torch.uint8))
        assert found.shape == out.shape

    def _tensor(self, name: str, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: in which quantized weights, and all of a GGUF file, are decoded, the model's by default; others stay
        as they are."""
        source = self._table[name]
        if not source.scales:
            location = self._locations[source.name]
            decoded = (dtype or self._dtype) if self._gguf or isinstance(location, Matrix) else None
            return sources.read(location, source, out, decoded)
        exact = self._blocks(source)[0].numbers(torch.float32)
        found = exact.to(self._dtype)
        if self._dtype == torch.float16 and not torch.equal(found.float(), exact):
            raise CheckpointError(f"{self.path}: {source.name}: has numbers that {self.model.dtype} does not have",
                                  "keep the experts as they are (leave --format out), or give a checkpoint in bf16")
        return found if out is None else out.view(found.dtype).view(found.shape).copy_(found)

    @property
    def extra_files(self) -> list[str]:
        """Names of tokenizer, chat template and generation defaults in `folder`, as far as they are there."""
        return list(modelfiles.present(self.folder))

    def fingerprint(self) -> str:
        """Hex digest of the content: config, every tensor's name, shape and location, and a sample of its
        bytes. Independent of path and time; reads 4 KiB a tensor."""
        digest = hashlib.blake2b(json.dumps(self.raw_config, sort_keys=True).encode(), digest_size=16)
        for name, location in sorted(self._files()):
            entry, size = location.entry, location.shard.file.size
            digest.update(repr((name, entry.dtype, entry.shape, entry.offset, entry.nbytes, size)).encode())
            digest.update(bytes(location.shard.read(entry, *sample_of(entry)).tolist()))
        return digest.hexdigest()

    def _file(self, name: str) -> Location:
        """Of a tensor that is one in the files."""
        location = self._locations[name]
        assert isinstance(location, Location)
        return location

    def _files(self) -> Iterator[tuple[str, Location]]:
        """Every tensor of the files that is used, by its name there."""
        for name, location in self._locations.items():
            if isinstance(location, Matrix):
                yield from ((part.entry.name, part) for part in location.parts.values())
            else:
                yield name, location

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()




def _type_of(location: Location | Matrix, grouped_too: bool) -> str:
    """As Checkpoint.types has it."""
    if isinstance(location, Matrix):
        return fits(location, grouped_too) or location.scheme.title
    return location.entry.dtype
