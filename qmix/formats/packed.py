"""A packed matrix: its description and its tensors, checked once before any kernel sees them. Also what the formats
share: padding, and the walk over a matrix in tiles.

No format decodes a whole matrix at once unless asked to (`gather`): a tile is at most 4 MiB.
N rows (out), K columns (in).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from qmix.errors import ModelFileError, QmixError
from qmix.sizes import HALVES, MatrixSpec, TensorSpec, tile_rows
from qmix.sizes import TILE_BYTES as TILE_BYTES

TORCH_DTYPES = MappingProxyType({"U8": torch.uint8, "I8": torch.int8, "BF16": torch.bfloat16,
                                 "F16": torch.float16, "F32": torch.float32})


@dataclass(frozen=True, slots=True)
class Packed:
    """A [rows, cols] matrix in the format that `spec` names.

    tensors: {spec.tensors[i].name: Tensor}, contiguous, exactly the specified dtypes and shapes, usually
    views into a record buffer. Made through `of` or `view`, which check; torch's packed CPU ops do not.
    """

    spec: MatrixSpec
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, spec: MatrixSpec, tensors: Mapping[str, Tensor], where: str = "matrix") -> Packed:
        """Check `tensors` against `spec`; ModelFileError names `where`, the tensor and what is wrong."""
        for want in spec.tensors:
            got = tensors.get(want.name)
            if got is None:
                raise ModelFileError(f"{where}: {want.name}: missing")
            if got.dtype != TORCH_DTYPES[want.dtype] or tuple(got.shape) != want.shape:
                raise ModelFileError(f"{where}: {want.name}: got {got.dtype} {list(got.shape)}, "
                                     f"want {TORCH_DTYPES[want.dtype]} {list(want.shape)}")
            if not got.is_contiguous():
                raise ModelFileError(f"{where}: {want.name}: not contiguous, strides {got.stride()}")
        extra = set(tensors) - {t.name for t in spec.tensors}
        if extra:
            raise ModelFileError(f"{where}: {sorted(extra)[0]}: not a tensor of {spec.format}")
        return cls(spec, tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def halves(self) -> tuple[Packed, ...]:
        """Gate and up, views of this, where their formats differ; else nothing."""
        specs = self.spec.halves
        biases = self["bias"].chunk(2) if specs and self.spec.bias else ()
        found = [{t.name: self[f"{part}.{t.name}"] for t in spec.without_bias.tensors}
                 for part, spec in zip(HALVES, specs, strict=False)]
        for tensors, bias in zip(found, biases, strict=False):
            tensors["bias"] = bias
        return tuple(Packed(spec, tensors) for spec, tensors in zip(specs, found, strict=True))

    def to(self, device: torch.device) -> Packed:
        """Itself, or a copy of it on another device."""
        return Packed(self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()})


def stacked(matrices: Sequence[Packed]) -> Packed | None:
    """Matrices with equal columns as one, the rows of each after those of the one before, copied; None where their
    formats differ, or padding would come to lie between them."""
    specs = [m.spec for m in matrices]
    first = specs[0]
    if any(replace(spec, rows=first.rows) != first or spec.rows != spec.padded_rows or spec.parts > 1 or
           spec.format in ("nf4", "fp4", "mxfp4") for spec in specs):
        return None
    along = {"qparams": 1}  # everything else begins with the rows
    tensors = {name: torch.cat([m[name] for m in matrices], along.get(name, 0)) for name in matrices[0].tensors}
    return Packed.of(replace(first, rows=sum(spec.rows for spec in specs)), tensors, "stacked matrices")


def view(buffer: Tensor, offset: int, spec: TensorSpec) -> Tensor:
    """`spec` as a view into `buffer` (uint8, one dimension) at byte `offset`; nothing is copied.

    Raises ValueError where the bytes lie outside the buffer or the offset does not suit the dtype.
    """
    if not 0 <= offset <= offset + spec.nbytes <= buffer.numel():
        raise ValueError(f"{spec.name}: bytes [{offset}, {offset + spec.nbytes}) of {buffer.numel()}")
    return buffer[offset:offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable; torch gives none without numpy. The caller keeps
    the tensor alive."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def pad(weight: Tensor, spec: MatrixSpec, value: float = 0.0) -> Tensor:
    """`weight` [rows, cols] as [padded_rows, padded_cols], same dtype, gaps filled with `value`.

    Each of the spec's parts is padded alone: int4, 2 x 80 rows, block 64 -> row 80 lands on row 128.
    Returns `weight` itself where nothing has to be padded.
    """
    rows, cols = spec.padded_rows, spec.padded_cols
    if weight.shape == (rows, cols):
        return weight
    padded = weight.new_full((rows, cols), value)
    inner = padded.view(spec.parts, -1, cols)[:, :spec.rows // spec.parts, :spec.cols]
    inner.copy_(weight.reshape(spec.parts, -1, spec.cols))
    return padded


def row_tiles(spec: MatrixSpec, item_bytes: int = 4, tile_bytes: int = 0) -> Iterator[tuple[int, int, int]]:
    """Walk the rows of a matrix in tiles: (first logical row, first padded row, rows of the tile).

    A tile lies within one part, starts on a block, and takes at most `tile_bytes` (0: TILE_BYTES) when decoded to
    `item_bytes` a weight (but at least one block of rows, or one row where there are no blocks).
    """
    step = tile_rows(spec, item_bytes, tile_bytes or TILE_BYTES)
    rows, padded = spec.rows // spec.parts, spec.padded_rows // spec.parts
    for part in range(spec.parts):
        for start in range(0, rows, step):
            yield part * rows + start, part * padded + start, min(step, rows - start)


def gather(spec: MatrixSpec, tiles: Iterable[tuple[int, Tensor]], device: torch.device | None = None) -> Tensor:
    """Put (first logical row, [n, cols]) tiles together into an fp32 [rows, cols] matrix. device: theirs, None = the
    CPU."""
    whole = torch.empty(spec.rows, spec.cols, device=device)
    for start, tile in tiles:
        whole[start:start + len(tile)] = tile
    return whole


def refuse_nonfinite(weight: Tensor, first_row: int = 0, first_col: int = 0) -> None:
    """QmixError naming the position of the first inf or NaN in `weight` [n, cols], if there is one."""
    if torch.isfinite(weight).all():
        return
    bad = torch.isfinite(weight).logical_not_().nonzero()
    row, col = bad[0].tolist()
    raise QmixError(f"weight[{first_row + row}, {first_col + col}] is {weight[row, col].item()}, which no "
                    f"quantized format can hold ({len(bad)} such values nearby)",
                    "the checkpoint is damaged: fetch it again")
