"""The byte contract that every tier and kernel shares: one file per format.

Each format has `pack` (for the grouped formats it takes codes, which quantize/methods.py chooses), `tiles`, which
decodes a matrix in pieces of at most 4 MiB, and `unpack`. This module finds them by the name in a spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from qmix.config import BESIDE, CARRIED_NAMES, GROUPED_BITS
from qmix.errors import UsageError
from qmix.formats import beside, carried, grouped, int8, mxfp4, nf4, plain
from qmix.formats.packed import TORCH_DTYPES, Packed, gather, memory, pad, view
from qmix.sizes import PLAIN_DTYPES, MatrixSpec

__all__ = ["TORCH_DTYPES", "Packed", "carry", "memory", "module", "pack", "pad", "tiles", "unpack", "view"]


def module(name: str) -> ModuleType:
    """The module of a format; UsageError names an unknown one."""
    if BESIDE in name:
        return beside
    found = {**dict.fromkeys(GROUPED_BITS, grouped), "nf4": nf4, "fp4": nf4, "int8": int8, "mxfp4": mxfp4,
             **dict.fromkeys(CARRIED_NAMES, carried), **dict.fromkeys(PLAIN_DTYPES, plain)}
    if name not in found:
        raise UsageError(f"format: got {name!r}, want " + " or ".join(found))
    return found[name]


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Pack `weight` [rows, cols], any float dtype, in a format with nothing to choose: all but the grouped ones."""
    if spec.bits:
        raise UsageError(f"{spec.format} needs a method to choose its codes", "use quantize.methods.quantize")
    return module(spec.format).pack(weight, spec)


def carry(blocks: mxfp4.Blocks | carried.Blocks | beside.Blocks | grouped.Blocks, spec: MatrixSpec) -> Packed:
    """A matrix that a checkpoint has in a format of a store, in qmix's layout, bit for bit."""
    if isinstance(blocks, grouped.Blocks):
        return grouped.carry(blocks, spec)
    if isinstance(blocks, beside.Blocks):
        return beside.carry(blocks, spec)
    return mxfp4.carry(blocks, spec) if isinstance(blocks, mxfp4.Blocks) else carried.carry(blocks, spec)


def tiles(packed: Packed) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile: (first logical row, fp32 [n, cols]), in the order of the rows."""
    return module(packed.spec.format).tiles(packed)


def unpack(packed: Packed) -> Tensor:
    """Decode the whole matrix: fp32 [rows, cols], padding and gaps between parts removed."""
    return gather(packed.spec, tiles(packed))
