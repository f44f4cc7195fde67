"""nf4 and fp4: bitsandbytes' own 4-bit formats, block size 64 along the input dimension.

Formula   w = table[code] * absmax(block of 64); the two tables are bitsandbytes' constants
qweight   uint8 [N*K/2, 1]: two codes a byte, row after row; the first of a pair is the high nibble
absmax    fp32 [N*K/64]; with double quantization uint8 [N*K/64] codes of bitsandbytes' dynamic 8-bit
          table in blocks of 256: absmax = dynamic[code] * nested_absmax(block) + offset
Sizes     N * K / 2 bytes and N * K / 16 bytes (double quantization: about N * K / 64)
Padding   K is padded to 64 with zeros: at K = 32, 96 or 160 bitsandbytes' CPU decoder is silently wrong
          (0.50.2)
Source    QLoRA, Dettmers et al. 2023 (arXiv 2305.14314); bitsandbytes.functional

N rows, K padded columns.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qmix.errors import QmixError
from qmix.formats.packed import Packed, gather, refuse_nonfinite, row_tiles
from qmix.sizes import BNB_BLOCK, BNB_NESTED_BLOCK, MatrixSpec

COMPILE = torch.compile
IMPORTING = threading.Lock()  # what is hidden during the import is hidden from the whole process


def functional() -> ModuleType:
    """bitsandbytes.functional, imported at the first need; QmixError where it is not installed.

    The optional package `kernels` stays hidden meanwhile: with it bitsandbytes would fetch code from
    the network while it is imported, and without it would advise to install it. Safe from several
    threads: the quantizer's all come here first.
    """
    with IMPORTING:
        _import()
    from bitsandbytes import functional as found
    return found


def _import() -> None:
    if "bitsandbytes" not in sys.modules:
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        level, known, compiler = logger.level, sys.modules.get("kernels"), torch.compile
        logger.setLevel(logging.ERROR)
        sys.modules["kernels"] = None  # type: ignore[assignment]
        torch.compile = _compile_later  # type: ignore[assignment]
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as e:
            raise QmixError(f"nf4 and fp4 need the package bitsandbytes, which cannot be imported: {e}",
                            "pip install bitsandbytes, or use --format int4") from None
        finally:
            torch.compile = compiler
            logger.setLevel(level)
            if known is None:
                del sys.modules["kernels"]
            else:
                sys.modules["kernels"] = known


def _compile_later(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """torch.compile, once the function is called. bitsandbytes decorates functions with it that qmix never calls, and
    to import torch's compiler for them takes a second."""
    compiled = cache(lambda: COMPILE(function, **how))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)


def pack(weight: Tensor, spec: MatrixSpec) -> Packed:
    """Quantize `weight` [rows, cols] (any float dtype) in tiles of rows; blocks never cross a row, so the
    bytes are those of `quantize_4bit` on the whole padded matrix in fp32.
    QmixError for inf and NaN."""
    f = functional()
    k = spec.padded_cols
    qweight = torch.empty(spec.padded_rows * k // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(spec.padded_rows * k // BNB_BLOCK)
    for start, row, rows in row_tiles(spec):
        piece = weight[start:start + rows].float()
        refuse_nonfinite(piece, start)
        piece = torch.nn.functional.pad(piece, (0, k - spec.cols)).contiguous()
        codes, state = f.quantize_4bit(piece, blocksize=BNB_BLOCK, quant_type=spec.format)
        qweight[row * k // 2:(row + rows) * k // 2] = codes
        absmax[row * k // BNB_BLOCK:(row + rows) * k // BNB_BLOCK] = state.absmax
    if not spec.double_quant:
        return Packed.of(spec, {"qweight": qweight, "absmax": absmax}, "nf4.pack")
    offset = absmax.mean()
    codes, nested = f.quantize_blockwise(absmax - offset, blocksize=BNB_NESTED_BLOCK)
    return Packed.of(spec, {"qweight": qweight, "absmax": codes, "nested_absmax": nested.absmax,
                            "offset": offset.view(1)}, "nf4.pack")


def scales(packed: Packed) -> Tensor:
    """absmax fp32 [N*K/64], its second quantization undone where there is one."""
    if not packed.spec.double_quant:
        return packed["absmax"]
    absmax = functional().dequantize_blockwise(packed["absmax"], absmax=packed["nested_absmax"],
                                               blocksize=BNB_NESTED_BLOCK)
    return absmax.add_(packed["offset"])


def tiles(packed: Packed, dtype: torch.dtype = torch.float32, tile_bytes: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Decode tile by tile with bitsandbytes, where the matrix lies: (first logical row, `dtype` [n, cols]).
    tile_bytes: see `row_tiles`."""
    f, spec = functional(), packed.spec
    k, qweight, absmax = spec.padded_cols, packed["qweight"], scales(packed)
    for start, row, rows in row_tiles(spec, dtype.itemsize, tile_bytes):
        state = f.QuantState(absmax[row * k // BNB_BLOCK:(row + rows) * k // BNB_BLOCK], shape=(rows, k),
                             blocksize=BNB_BLOCK, quant_type=spec.format, dtype=dtype)
        yield start, f.dequantize_4bit(qweight[row * k // 2:(row + rows) * k // 2], state)[:, :spec.cols]


def unpack(packed: Packed) -> Tensor:
    """The whole matrix, fp32 [rows, cols]."""
    return gather(packed.spec, tiles(packed))
