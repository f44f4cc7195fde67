"""Quantized weights as if they were plain tensors of the checkpoint: what `join` finds takes the place of its parts
among the locations, so that layouts and steps need not know of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.formats.mxfp4 import LARGEST
from qmix.lowbit.decode import Parts, numbers
from qmix.models import Misfit
from qmix.schemes import Fp4, PackedInts, Quantization, Scaled, Scheme
from qmix.schemes.record import FLOATS
from qmix.shards import REFETCH, Location, Shard
from qmix.tensorfile import Entry

PIECE = 2**21  # numbers that are decoded at a time
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "U8": torch.uint8,
          "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Scales of activations and of a KV cache: qmix computes and keeps these in its own way.
UNUSED = re.compile(r".+[._](?:input_scale|activation_scale|input_scale_inv|input_global_scale|input_zero_point|"
                    r"output_scale|(?:[kqv]|kv|prob)_scale|(?:k|v)_proj\.output_scale)")
UNFIT = "config.json and the weights do not belong together, or the file is damaged: fetch both again"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantized tensor of the model. entry: as it would be if it were plain, in the model's dtype; parts: where its
    tensors lie, by role; shape: of one matrix of it, [N, K]."""

    entry: Entry
    scheme: Scheme
    parts: Mapping[str, Location]

    @property
    def shard(self) -> Shard:
        return self.parts["codes"].shard

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return sum(location.entry.nbytes for location in self.parts.values())

    def read(self, at: int | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[N, K] in `dtype`, of the tensor's entry `at` where it has three dimensions; in `out`, by default in fresh
        memory. CheckpointError for scales that no weight has."""
        parts = self.load(at)
        rows, cols = self.entry.shape[-2:]
        out = torch.empty(rows, cols, dtype=dtype) if out is None else out
        step = max(1, PIECE // cols // 64) * 64
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            out[begin:end] = numbers(self.scheme, parts, (rows, cols), begin, end)
        return out

    def part(self, role: str) -> Tensor:
        """One of its tensors, as the file has it."""
        return self._part(role, None)

    def where(self, role: str) -> str:
        """File and tensor, for an error."""
        location = self.parts[role]
        return f"{location.shard.file.path}: {location.entry.name}"

    def load(self, at: int | None = None) -> Parts:
        """Its tensors, scales and zero points as matrices; checked."""
        found = {role: self._part(role, at) for role in self.parts if role != "shape"}
        if isinstance(self.scheme, Scaled) and found["scales"].dtype == torch.uint8:
            found["scales"] = found["scales"].view(torch.float8_e8m0fnu)
        for role in found.keys() & {"scales", "zeros"}:
            if found[role].ndim < 2:  # one for the matrix, or one a row
                found[role] = found[role].reshape(-1, 1)
        self._check(found)
        return found

    def _part(self, role: str, at: int | None) -> Tensor:
        location = self.parts[role]
        entry, dtype = location.entry, DTYPES[location.entry.dtype]
        if at is None:
            return location.shard.read(entry).view(dtype).view(entry.shape)
        each = entry.nbytes // entry.shape[0]
        return location.shard.read(entry, at * each, each).view(dtype).view(entry.shape[1:])

    def _check(self, found: Parts) -> None:
        """CheckpointError for what would decode to no number."""
        for role in found.keys() & {"scales", "global"}:
            scales = found[role]
            if scales.dtype == torch.uint8 or scales.dtype == torch.float8_e8m0fnu:
                good = int(scales.view(torch.uint8).max()) <= LARGEST
            else:
                good = bool(scales.float().isfinite().all())
            if not good:
                raise CheckpointError(f"{self.where(role)}: holds a scale that is not a number of a weight (NaN or "
                                      "inf)", REFETCH)
        if "global" in found and isinstance(self.scheme, Fp4) and self.scheme.divides and not found["global"].all():
            raise CheckpointError(f"{self.where('global')}: is 0, by which the scales are divided", REFETCH)
        if isinstance(self.scheme, PackedInts) and "zeros" in found and found["zeros"].dtype == torch.int8:
            least, most = map(int, found["zeros"].aminmax())
            half = 2 ** (self.scheme.bits - 1)
            if least < -half or most >= half:
                raise CheckpointError(f"{self.where('zeros')}: holds {least} to {most}, want zero points of "
                                      f"{self.scheme.bits} bits, {-half} to {half - 1}", REFETCH)
        if "order" in found:
            order, groups = found["order"], found["scales"].shape[1 if isinstance(self.scheme, PackedInts) else 0]
            if int(order.min()) < 0 or int(order.max()) >= groups:
                raise CheckpointError(f"{self.where('order')}: holds {int(order.min())} to {int(order.max())}, want "
                                      f"numbers of {groups} groups", REFETCH)


def join(quantization: Quantization,
         locations: Mapping[str, Location]) -> tuple[dict[str, Location | Matrix], list[str]]:
    """(`locations` with a Matrix in the place of the parts of each quantized tensor, names that are not needed).
    CheckpointError names the tensor that is missing or does not fit."""
    found: dict[str, Location | Matrix] = {}
    taken: set[str] = set()
    for name, location in locations.items():
        weight = _weight_of(quantization, name, location)
        if weight is None:
            continue
        matrix = _matrix(quantization, name, weight, locations)
        found[weight] = matrix
        taken.update(part.entry.name for part in matrix.parts.values())
    unused = [name for name in locations if name not in taken and UNUSED.fullmatch(name)]
    both = next((name for name in found if name in locations and name not in taken), None)
    if both is not None:
        raise CheckpointError(f"{locations[both].shard.file.path}: {both}: is there beside its quantized codes",
                              "remove the one that does not belong to the model")
    plain = {name: location for name, location in locations.items() if name not in taken and name not in unused}
    return plain | found, unused


def _weight_of(quantization: Quantization, name: str, location: Location) -> str | None:
    for scheme in quantization.schemes:
        weight = scheme.form.weight_of(name, location.entry.dtype)
        if weight is not None:
            return weight
    return None


def _matrix(quantization: Quantization, name: str, weight: str, locations: Mapping[str, Location]) -> Matrix:
    module = weight.rpartition(".")[0]
    codes = locations[name]
    where = f"{codes.shard.file.path}: {name}"
    said, scheme = quantization.apart.which(module), quantization.scheme_of(module)
    if said is not None:
        raise CheckpointError(f"{where}: is quantized, but quantization_config names {said!r:.80} among the modules "
                              "that are not", UNFIT)
    if scheme is None or scheme.form.weight_of(name, codes.entry.dtype) is None:
        raise CheckpointError(f"{where}: is quantized in a way that quantization_config does not say", UNFIT)
    parts = {"codes": codes}
    for part in scheme.parts:
        there = [n for n in part.names(weight) if n in locations]
        if not there and part.required:
            raise CheckpointError(f"{codes.shard.file.path}: {part.names(weight)[0]}: missing, the {part.role} of "
                                  f"{name}", REFETCH)
        if there:
            parts[part.role] = locations[there[0]]
            if locations[there[0]].entry.dtype not in part.dtypes:
                raise CheckpointError(f"{locations[there[0]].shard.file.path}: {there[0]}: got dtype "
                                      f"{locations[there[0]].entry.dtype}, want {' or '.join(part.dtypes)}", UNFIT)
    shapes = {role: location.entry.shape for role, location in parts.items()}
    if "shape" in parts:
        shapes["shape"] = _two(parts["shape"])
    try:
        shape = scheme.shape(shapes)
        if not prod(shape):
            raise Misfit(f"got {list(shape)}, want numbers")
    except Misfit as misfit:
        raise CheckpointError(f"{where}: {misfit} ({scheme.title})", UNFIT) from None
    return Matrix(Entry(weight, "LOW", shape, codes.entry.offset, codes.entry.nbytes), scheme, parts)


def is_zero(location: Location) -> bool:
    """Whether a tensor of floats holds zeros alone."""
    entry = location.entry
    return entry.dtype in FLOATS and not location.shard.read(entry).view(DTYPES[entry.dtype]).any()


def _two(location: Location) -> tuple[int, int]:
    """The two numbers of a weight_shape."""
    entry = location.entry
    if entry.shape != (2,):
        raise CheckpointError(f"{location.shard.file.path}: {entry.name}: got shape {list(entry.shape)}, want [2]",
                              UNFIT)
    n, k = location.shard.read(entry).view(DTYPES[entry.dtype]).tolist()
    return n, k
