"""Reads a tensor of the model from the files of a checkpoint, as its Source says: the steps of qmix/models/source.py,
done to values.

Steps that select what lies in one piece (an expert of a tensor that holds all, its gate, its up) move no data: only
those bytes are read. So an expert of a fused tensor of 100 GB costs the memory of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qmix import lowbit
from qmix.formats import TORCH_DTYPES, ggml, grouped
from qmix.formats.carried import Blocks as CarriedBlocks
from qmix.formats.ggml.tables import mxfp4_blocks
from qmix.formats.mxfp4 import Blocks
from qmix.gguf.types import BY_NAME
from qmix.lowbit import Matrix
from qmix.models import Source, Step
from qmix.models.source import (
    ARITHMETIC,
    ColumnsPerHead,
    Index,
    LogOfNegative,
    OneRow,
    Pairs,
    PerHead,
    Plus,
    Rows,
    Squeeze,
    Strided,
    Transpose,
)
from qmix.shards import Location
from qmix.sizes import CARRIED

EXP = 2.0**-22  # more than exp in fp32 is off by, as a part of the number


def read(location: Location | Matrix, source: Source, out: Tensor | None = None,
         dtype: torch.dtype | None = None) -> Tensor:
    """The model's tensor in `dtype`, by default the file's: in `out`, uint8 of its bytes, by default in fresh memory.
    location: of the tensor `source.name`, whose shape `source` was checked for."""
    if isinstance(location, Matrix):
        return _decoded_matrix(location, source.steps, out, dtype or torch.float32)
    entry = location.entry
    first, shape, rest = narrow(entry.shape, source.steps)
    if dtype is not None and (source.computes or TORCH_DTYPES.get(entry.dtype) != dtype):
        return _decoded(location, first, shape, rest, out, dtype)
    dtype = TORCH_DTYPES[entry.dtype]
    item, count = dtype.itemsize, prod(shape)
    data = location.shard.read(entry, first * item, count * item, None if rest else out)
    found = data.view(dtype).view(shape)
    if not rest:
        return found
    found = apply(found, rest)
    if out is None:
        return found.contiguous()
    target = out.view(dtype).view(found.shape)
    return target.copy_(found)


def _decoded_matrix(matrix: Matrix, steps: tuple[Step, ...], out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `read`, of quantized weights: the matrix is decoded as a whole, then the steps are done to it."""
    at, steps = _entry_and_steps(matrix, steps)
    if not steps:
        return matrix.read(at, dtype, None if out is None else out.view(dtype).view(matrix.entry.shape[-2:]))
    found = apply(matrix.read(at, dtype), steps)
    return found.contiguous() if out is None else out.view(dtype).view(found.shape).copy_(found)


def _entry_and_steps(matrix: Matrix, steps: tuple[Step, ...]) -> tuple[int | None, tuple[Step, ...]]:
    """(which entry of a tensor of three dimensions is asked for, None of a matrix; the steps that are left)."""
    if len(matrix.entry.shape) == 2:
        return None, steps
    first, *rest = steps
    assert isinstance(first, Index)
    return first.at, tuple(rest)


def _decoded(location: Location, first: int, shape: tuple[int, ...], rest: tuple[Step, ...], out: Tensor | None,
             dtype: torch.dtype) -> Tensor:
    """As `read`, of numbers that the file has in another type of ggml's; read and decoded piece by piece."""
    kind = BY_NAME[location.entry.dtype]
    exact = torch.float32 if any(isinstance(step, ARITHMETIC) for step in rest) else dtype
    target = torch.empty(shape, dtype=exact) if rest or out is None else out.view(dtype).view(shape)
    flat, step = target.view(-1), ggml.PIECE // kind.weights * kind.weights
    for start in range(0, len(flat), step):
        piece = flat[start:start + step]
        raw = location.shard.read(location.entry, (first + start) // kind.weights * kind.nbytes,
                                  len(piece) // kind.weights * kind.nbytes)
        ggml.decode_into(kind.name, raw, piece)
    if not rest:
        return target
    found = apply(target, rest)
    return found.to(dtype).contiguous() if out is None else out.view(dtype).view(found.shape).copy_(found)


def read_mxfp4(location: Location, source: Source) -> Blocks:
    """A matrix that a GGUF file has in MXFP4, codes and scales as they are. Its steps select whole rows."""
    kind = BY_NAME[location.entry.dtype]
    first, shape, rest = narrow(location.entry.shape, source.steps)
    assert kind.name == "MXFP4" and not rest
    raw = location.shard.read(location.entry, first // kind.weights * kind.nbytes,
                              prod(shape) // kind.weights * kind.nbytes)
    return mxfp4_blocks(raw.view(shape[0], -1, kind.nbytes))


def keeps_blocks(source: Source, columns: int) -> bool:
    """Whether blocks of so many columns of the file's tensor are blocks of the model's: its rows are whole, and columns
    move only in whole blocks."""
    return all(isinstance(step, Index | Rows | Strided | Pairs | PerHead)
               or (isinstance(step, ColumnsPerHead) and all(size % columns == 0 for size in step.sizes))
               for step in source.steps)


def read_carried(location: Location | Matrix, source: Source, kind: str) -> CarriedBlocks | grouped.Blocks:
    """A matrix in a format `kind` that a store has too: a GGUF file's blocks as they are, or what fits it exactly.
    `keeps_blocks`."""
    if isinstance(location, Matrix):
        at, steps = _entry_and_steps(location, source.steps)
        if kind in CARRIED:
            found = lowbit.ggml_blocks(location, kind.upper(), at)
            return CarriedBlocks(kind, apply(found.raw, steps).contiguous())
        whole = lowbit.int4_blocks(location, at)
        return grouped.Blocks(apply(whole.codes, steps).contiguous(), apply(whole.scales, steps).contiguous(),
                              whole.group)
    return _carried_of_gguf(location, source)


def _carried_of_gguf(location: Location, source: Source) -> CarriedBlocks:
    kind = BY_NAME[location.entry.dtype]
    first, shape, rest = narrow(location.entry.shape, source.steps)
    raw = location.shard.read(location.entry, first // kind.weights * kind.nbytes,
                              prod(shape) // kind.weights * kind.nbytes)
    of_blocks = tuple(ColumnsPerHead(step.heads, tuple(size // kind.weights for size in step.sizes))
                      if isinstance(step, ColumnsPerHead) else step for step in rest)
    return CarriedBlocks(kind.name.lower(), apply(raw.view(shape[0], -1, kind.nbytes), of_blocks).contiguous())


def read_blocks(codes: Location, scales: Location, sources: Sequence[Source]) -> list[Blocks]:
    """MXFP4 matrices, as the checkpoint has them, of which each is a part of the same two tensors: gate and up, which
    take turns, are read together."""
    several = [source.steps[:-1] for source in sources]
    return [Blocks(*both) for both in zip(_parts(codes, several), _parts(scales, several), strict=True)]


def _parts(location: Location, several: Sequence[tuple[Step, ...]]) -> list[Tensor]:
    """What each of `several` steps makes of a tensor of bytes; the piece that leading steps select is read once."""
    first, shape, rest = narrow(location.entry.shape, several[0])
    done = len(several[0]) - len(rest)
    assert all(steps[:done] == several[0][:done] for steps in several)
    whole = location.shard.read(location.entry, first, prod(shape)).view(shape)
    return [apply(whole, steps[done:]).contiguous() for steps in several]


def narrow(shape: tuple[int, ...], steps: tuple[Step, ...]) -> tuple[int, tuple[int, ...], tuple[Step, ...]]:
    """(first element, shape) of the piece that the leading steps select, and the steps that are left.

    narrow((8, 4, 5), (Index(2, 8), Rows(2, 4, 4), Transpose())) -> (2 * 20 + 2 * 5, (2, 5), (Transpose(),))
    """
    first = 0
    for done, step in enumerate(steps):
        if isinstance(step, Index):
            first, shape = first + step.at * prod(shape[1:]), shape[1:]
        elif isinstance(step, Rows):
            first, shape = first + step.begin * prod(shape[1:]), (step.end - step.begin, *shape[1:])
        else:
            return first, shape, steps[done:]
    return first, shape, ()


def apply(tensor: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """What the steps make of a tensor; a view where that can be."""
    for step in steps:
        if isinstance(step, Index):
            tensor = tensor[step.at]
        elif isinstance(step, Rows):
            tensor = tensor[step.begin:step.end]
        elif isinstance(step, Strided):
            tensor = tensor[step.start::step.step]
        elif isinstance(step, Transpose):
            tensor = tensor.T
        elif isinstance(step, Pairs):
            tensor = tensor.unflatten(0, (step.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        elif isinstance(step, Squeeze):
            tensor = tensor.squeeze(step.dim)
        elif isinstance(step, OneRow):
            tensor = tensor.reshape(1, -1)
        elif isinstance(step, PerHead):
            tensor = torch.cat((tensor[:step.before], _per_head(tensor[step.before:], step)))
        elif isinstance(step, ColumnsPerHead):
            tensor = _per_head(tensor.transpose(0, 1), step).transpose(0, 1)
        elif isinstance(step, Plus):
            tensor = tensor + step.number
        elif isinstance(step, LogOfNegative):
            tensor = _log_of_negative(tensor)
    return tensor


def _per_head(rows: Tensor, step: PerHead | ColumnsPerHead) -> Tensor:
    heads = rows.unflatten(0, (step.heads, sum(step.sizes)))
    return torch.cat([part.flatten(0, 1) for part in heads.split(step.sizes, dim=1)])


def _log_of_negative(tensor: Tensor) -> Tensor:
    """fp32 [N]. exp rounds, so that several numbers have one exponential; of these the one that bfloat16 has, where it
    has one, as checkpoints in that dtype do."""
    found = torch.log(-tensor.double())
    short = found.bfloat16().double()
    same = (short.exp() / -tensor.double() - 1).abs() < EXP
    return torch.where(same, short, found).float()
