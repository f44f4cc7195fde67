"""Decoders of every packed format, written a second time from the formats' definitions: numpy, float64,
one weight after another where it matters, nothing of qmix's own decoding. What they return is exact.
"""

from __future__ import annotations

import numpy as np
import torch

from qmix.formats import Packed

# QLoRA (arXiv 2305.14314), appendix E: the NF4 values.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]
# FP4: a sign bit, then eight magnitudes over twelve, in the order of bitsandbytes' bit patterns.
FP4_MAGNITUDES = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
FP4 = [sign * m / 12.0 for sign in (1, -1) for m in FP4_MAGNITUDES]


def numbers(t: torch.Tensor) -> np.ndarray:
    """A tensor of any dtype as numpy float64 (exact) or, for integers, int64."""
    return t.double().numpy() if t.is_floating_point() else t.to(torch.int64).numpy()


def decode(m: Packed) -> np.ndarray:
    """float64 [rows, cols], logical."""
    name = m.spec.format
    if name in ("int4", "int3", "int2"):
        return decode_int4(m)
    if name in ("nf4", "fp4"):
        return decode_bnb(m)
    if name == "mxfp4":
        return decode_mxfp4(m)
    if name in GGML:
        return decode_ggml(m)
    if name == "int8":
        return (numbers(m["qweight"]) * numbers(m["scale"])[:, None])[:, :m.spec.cols]
    return numbers(m["weight"])


# bits of a code, columns of a group and of a block, and what is taken off a code.
GGML = {"q8_0": (8, 32, 32, 0), "q4_0": (4, 32, 32, 8), "q4_1": (4, 32, 32, 0), "q5_0": (5, 32, 32, 16),
        "q5_1": (5, 32, 32, 0), "q4_k": (4, 32, 256, 0), "q5_k": (5, 32, 256, 0), "q6_k": (6, 16, 256, 32),
        "iq4_nl": (4, 32, 32, 0), "iq4_xs": (4, 32, 256, 0)}
# kvalues_iq4nl of ggml-common.h.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def decode_ggml(m: Packed) -> np.ndarray:
    """By the formulas of formats/carried.py, addressing the bits of each row; not rounded."""
    spec, codes = m.spec, m["qweight"].numpy().astype(int)
    bits, group, columns, middle = GGML[spec.format]
    scales = m["scales"].numpy()
    part_rows = spec.rows // spec.parts
    part_padded = -(-part_rows // 64) * 64
    whole = np.empty((spec.rows, spec.cols))
    for r in range(spec.rows):
        block, row = divmod(r // part_rows * part_padded + r % part_rows, 64)
        q = np.empty((codes.shape[1], 8))
        for column in range(8):
            half, j = divmod(column, 4)
            base = {8: 256, 6: 192}.get(bits, 128) * half
            code = codes[block, :, base + 4 * (row % 32) + j] >> (4 if row >= 32 else 0) & 15
            if bits == 8:
                raw = codes[block, :, base + 4 * row + j]
                code = np.where(raw > 127, raw - 256, raw)
            elif bits == 6:
                code = code + 16 * (codes[block, :, base + 128 + 4 * (row % 16) + j] >> 2 * (row // 16) & 3)
            elif bits == 5:
                code = code + 16 * (codes[block, :, 256 + 4 * (row % 16) + j] >> row // 16 + 4 * half & 1)
            q[:, column] = IQ4[code] if spec.format in ("iq4_nl", "iq4_xs") else code - middle
        q = q.reshape(-1)[:spec.cols]
        scale, minimum = np.empty(spec.cols // group), np.zeros(spec.cols // group)
        for g in range(len(scale)):
            of = scales[block, g * group // columns]
            inside = g % (columns // group)
            halves = of[:256].copy().view(np.float16).astype(np.float64)
            scale[g] = halves[row]
            if spec.format in ("q4_1", "q5_1"):
                minimum[g] = halves[64 + row]
            elif spec.format == "q6_k":
                scale[g] *= of[128 + 64 * inside + row].astype(np.int8)
            elif spec.format == "iq4_xs":
                low, upper = of[128 + 64 * (inside // 2) + row], of[384 + 64 * (inside // 4) + row]
                scale[g] *= (low >> 4 * (inside % 2) & 15) + 16 * (upper >> 2 * (inside % 4) & 3) - 32.0
            elif columns == 256:
                low, upper = of[256 + 64 * inside + row], of[768 + 64 * (inside // 2) + row] >> 4 * (inside % 2)
                scale[g] *= low % 16 + 16 * (upper % 4)
                minimum[g] = -halves[64 + row] * float(low // 16 + 16 * (upper // 4 % 4))
        whole[r] = q * np.repeat(scale, group) + np.repeat(minimum, group)
    return whole


# OCP Microscaling Formats v1.0, table 5: E2M1 by its bits.
MXFP4 = [sign * (1 + mantissa / 2) * 2.0**(exponent - 1) if exponent else sign * mantissa / 2
         for sign in (1, -1) for exponent in range(4) for mantissa in range(2)]


def decode_mxfp4(m: Packed) -> np.ndarray:
    """By the formula w = e2m1[code] * 2^(s - 127), addressing the nibble of each row."""
    spec, raw, scale = m.spec, numbers(m["qweight"]), numbers(m["scale"])
    part_rows = spec.rows // spec.parts
    part_padded = -(-part_rows // 64) * 64
    whole = np.empty((spec.rows, spec.cols))
    for r in range(spec.rows):
        row = r // part_rows * part_padded + r % part_rows
        block, inside = divmod(row, 64)
        codes = raw[block, :spec.cols, inside % 32].astype(int) >> 4 * (inside // 32) & 15
        whole[r] = np.array(MXFP4)[codes] * 2.0**(scale[np.arange(spec.cols) // 32, row] - 127.0)
    return whole


def decode_int4(m: Packed) -> np.ndarray:
    """By the formula w = (q - m) * scale + zero, addressing the bits of each row; int3 and int2 too."""
    spec, raw, params = m.spec, numbers(m["qweight"]), numbers(m["qparams"])
    part_rows = spec.rows // spec.parts
    part_padded = -(-part_rows // spec.block) * spec.block
    half = spec.block // 2
    whole = np.empty((spec.rows, spec.cols))
    group_of = np.arange(spec.cols) // spec.group_size
    for r in range(spec.rows):
        row = r // part_rows * part_padded + r % part_rows
        block, inside = divmod(row, spec.block)
        column = raw[block, :spec.cols].astype(int)
        quarter, eighth = spec.block // 4, spec.block // 8
        if spec.format == "int4":
            q = column[:, inside % half] >> (0 if inside < half else 4) & 15
        else:
            q = column[:, inside % quarter] >> 2 * (inside // quarter) & 3
        if spec.format == "int3":
            q = q + 4 * (column[:, quarter + inside % eighth] >> inside // eighth & 1)
        middle = {"int4": 8, "int3": 4, "int2": 2}[spec.format]
        whole[r] = (q - middle) * params[group_of, row, 0] + params[group_of, row, 1]
    return whole


def decode_bnb(m: Packed) -> np.ndarray:
    """table[code] * absmax, codes two a byte, high nibble first, one absmax per 64 weights of a row."""
    spec, table = m.spec, np.array(NF4 if m.spec.format == "nf4" else FP4)
    cols = -(-spec.cols // 64) * 64
    raw = numbers(m["qweight"]).ravel()
    codes = np.stack((raw // 16, raw % 16), axis=1).reshape(spec.rows, cols // 64, 64)
    absmax = numbers(m["absmax"])
    if spec.double_quant:
        dynamic = np.array(dynamic_table())
        nested = np.repeat(numbers(m["nested_absmax"]), 256)[:len(absmax)]
        absmax = dynamic[absmax] * nested + numbers(m["offset"])[0]
    return (table[codes] * absmax.reshape(spec.rows, -1, 1)).reshape(spec.rows, cols)[:, :spec.cols]


def dynamic_table() -> list[float]:
    """The signed dynamic 8-bit data type (Dettmers 2016; arXiv 2110.02861): each decade from 1e-6 to 1 is cut
    into 1, 2, 4, ... 64 equal pieces whose middles are values; with 0 and 1 they make 256."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        found += [sign * v for sign in (1, -1) for v in middles]
    return sorted(found)


def product(x: torch.Tensor, weight: np.ndarray) -> np.ndarray:
    """x [T, K] times the transpose of weight [N, K], in float64."""
    return (x.double() @ torch.from_numpy(weight).T).numpy()


def relative(got: torch.Tensor, want: np.ndarray) -> float:
    """Norm of the difference over norm of `want`."""
    return float(np.linalg.norm(numbers(got) - want) / np.linalg.norm(want))
