"""Random matrices in the block types of GGUF. Blocks lie along the input, of 32 or, with K in the name, 256 weights
(ggml-common.h):

  Q4_0   fp16 d, 16 bytes: w = (q - 8) d
  Q8_0   fp16 d, 32 int8: w = q d
  MXFP4  a scale e (E8M0), 16 bytes of E2M1 codes: w = e2m1[q] 2^(e - 127)
  Q4_K   fp16 d and m, 12 bytes of 6-bit scales s and minima t, 128 bytes: w = q s d - t m; here all s = t = 32
  Q5_K   the same with 32 bytes of fifth bits before the 128
  Q6_K   192 bytes, 16 int8 scales s, fp16 d: w = (q - 32) s d; here s is 8 or -8 at random, which makes the mean 0
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from synthetic_recipe import E2M1_LENGTH, microscales

Bytes = NDArray[np.uint8]

# Type -> weights and bytes of a block, where its random bytes are, deviation of a weight over d.
BLOCKS = {"Q4_0": (32, 18, slice(2, 18), (2 * 140 / 16) ** 0.5),  # q - 8 uniform in -7..7 with 0 twice
          "Q8_0": (32, 34, slice(2, 34), (127 * 128 / 3) ** 0.5),  # q uniform in -127..127
          "MXFP4": (32, 17, slice(1, 17), E2M1_LENGTH),
          "Q4_K": (256, 144, slice(16, 144), 32 * (255 / 12) ** 0.5),
          "Q5_K": (256, 176, slice(16, 176), 32 * (1023 / 12) ** 0.5),
          "Q6_K": (256, 210, slice(0, 192), 8 * (4095 / 12) ** 0.5)}
ITEMS = {"F32": 4, "F16": 2, "BF16": 2}
MEAN = {"Q4_K": 7.5, "Q5_K": 15.5}
# Any byte -> a byte whose nibbles are 1..15, mean 8: nibble 0 becomes 8.
CENTRED = np.array([(b & 15 or 8) | (b >> 4 or 8) << 4 for b in range(256)], np.uint8)
THIRTY_TWOS = np.array([0xA0] * 8 + [0] * 4, np.uint8)  # eight scales and eight minima of 32, as Q4_K packs them


def matrix(random: np.random.Generator, kind: str, shape: Sequence[int], spread: float) -> Bytes:
    """[..., N, bytes of a row] of random blocks whose weights have mean 0 and deviation `spread`."""
    weights, nbytes, where, deviation = BLOCKS[kind]
    blocks = np.empty((prod(shape) // weights, nbytes), np.uint8)
    payload = blocks[:, where]
    for piece in np.array_split(payload, max(1, blocks.nbytes >> 24)):
        piece[:] = random.integers(0, 2**64, piece.size // 8, dtype=np.uint64).view(np.uint8).reshape(piece.shape)
    if kind == "MXFP4":
        blocks[:, 0] = microscales(random, (len(blocks),), spread)
        return blocks.reshape(*shape[:-1], -1)
    step = spread / deviation
    if kind == "Q6_K":
        blocks[:, 192:208] = random.choice(np.array([8, 248], np.uint8), (len(blocks), 16))
        blocks[:, 208:] = _fp16(step)
        return blocks.reshape(*shape[:-1], -1)
    blocks[:, :2] = _fp16(step)
    if kind == "Q4_0":
        for piece in np.array_split(payload, max(1, payload.size >> 24)):
            piece[:] = CENTRED[piece]
    elif kind == "Q8_0":
        payload[payload == 128] = 0  # -128
    else:
        blocks[:, 2:4], blocks[:, 4:16] = _fp16(step * MEAN[kind]), THIRTY_TWOS
    return blocks.reshape(*shape[:-1], -1)


def _fp16(x: float) -> Bytes:
    return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def tensor_bytes(kind: str, shape: Sequence[int]) -> int:
    if kind in ITEMS:
        return prod(shape) * ITEMS[kind]
    weights, nbytes, *_ = BLOCKS[kind]
    return prod(shape) // weights * nbytes
