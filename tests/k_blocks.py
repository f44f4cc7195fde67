"""A small quantizer to ggml's K types and to IQ4_NL and IQ4_XS, which the package gguf can only read: simple scales,
ggml's bytes."""

from __future__ import annotations

import gguf
import numpy as np

SIMPLE = {"Q4_K": 15, "Q5_K": 31}
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # kvalues_iq4nl


def quantize(weight: np.ndarray, kind: str) -> np.ndarray:
    """fp32 [.., cols], a multiple of 256, -> uint8 [.., bytes of a row]; K types here, the others by the package."""
    if kind not in (*SIMPLE, "Q6_K", "Q3_K", "IQ4_NL", "IQ4_XS"):
        return gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    blocks = weight.reshape(-1, 32 if kind == "IQ4_NL" else 256).astype(np.float64)
    own = {"Q6_K": _q6_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs}
    found = own.get(kind, lambda b: _with_minima(b, SIMPLE[kind]))(blocks)
    return found.reshape(*weight.shape[:-1], -1)


def _in_table(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Groups [.., 32] of x over scale as places of the nearest numbers, two a byte: uint8 [.., 16]."""
    of = np.divide(x, scale[..., None], out=np.zeros_like(x), where=scale[..., None] != 0)
    codes = np.abs(of[..., None] - IQ4).argmin(-1).astype(np.uint8)
    return codes[..., :16] | codes[..., 16:] << 4


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    d = (np.abs(blocks).max(1) / 113).astype(np.float16).astype(np.float64)
    return np.concatenate((_half(d), _in_table(blocks, d)), 1)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 8, 32)
    scale = np.abs(groups).max(2) / 113
    d = (scale.max(1) / 31).astype(np.float16).astype(np.float64)
    s = _rounded(scale, d[:, None] + 0 * scale, -32, 31)
    codes = _in_table(groups, d[:, None] * s).reshape(len(blocks), -1)
    six = (s + 32).astype(np.uint8)
    low = six[:, 0::2] & 15 | (six[:, 1::2] & 15) << 4
    high = sum((six[:, i::4] >> 4) << 2 * i for i in range(4)).astype(np.uint8)
    return np.concatenate((_half(d), high, low, codes), 1)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)[:, None].view(np.uint8)


def _rounded(x: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.round(np.divide(x, step, out=np.zeros_like(x), where=step != 0)), low, high)


def _runs(codes: np.ndarray, run: int, width: int) -> np.ndarray:
    """Codes [n, 256] into runs of `run` bytes, lowest bits first."""
    parts = codes.astype(np.uint8).reshape(len(codes), -1, 8 // width, run)
    return sum(parts[:, :, i] << width * i for i in range(8 // width)).astype(np.uint8).reshape(len(codes), -1)


def _with_minima(blocks: np.ndarray, most: int) -> np.ndarray:
    """Q4_K and Q5_K: w = d s q - dmin m."""
    groups = blocks.reshape(-1, 8, 32)
    minimum = np.maximum(-groups.min(2), 0)
    scale = (groups.max(2) + minimum) / most
    d, dmin = (x.max(1, initial=0).astype(np.float16).astype(np.float64) for x in (scale / 63, minimum / 63))
    s, m = (_rounded(x, y[:, None] + 0 * x, 0, 63).astype(np.uint8) for x, y in ((scale, d), (minimum, dmin)))
    q = _rounded(groups + (dmin[:, None] * m)[..., None], (d[:, None] * s)[..., None] + 0 * groups, 0, most)
    q = q.reshape(-1, 256).astype(np.uint8)
    both = s[:, 4:] & 15 | m[:, 4:] << 4
    six = np.concatenate((s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, both), 1)
    upper = [_runs(q >> 4, 32, 1)] if most > 15 else []
    return np.concatenate((_half(d), _half(dmin), six, *upper, _runs(q & 15, 32, 4)), 1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 16, 16)
    scale = np.abs(groups).max(2) / 31
    d = (scale.max(1) / 127).astype(np.float16).astype(np.float64)
    s = _rounded(scale, d[:, None] + 0 * scale, -128, 127)
    q = _rounded(groups, (d[:, None] * s)[..., None] + 0 * groups, -32, 31).reshape(-1, 256).astype(np.int64) + 32
    return np.concatenate((_runs(q & 15, 64, 4), _runs(q >> 4, 32, 2), s.astype(np.int8).view(np.uint8), _half(d)), 1)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, 16, 16)
    scale = np.abs(groups).max(2) / 3
    d = (scale.max(1) / 31).astype(np.float16).astype(np.float64)
    s = _rounded(scale, d[:, None] + 0 * scale, -32, 31).astype(np.int64)
    q = _rounded(groups, (d[:, None] * s)[..., None] + 0 * groups, -4, 3).reshape(-1, 256).astype(np.int64) + 4
    six = (s + 32).astype(np.uint8)
    low = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    high = sum((six[:, 4 * i:4 * i + 4] >> 4) << 2 * i for i in range(4)).astype(np.uint8)
    return np.concatenate((_runs(q >> 2, 32, 1), _runs(q & 3, 32, 2), low, high, _half(d)), 1)
