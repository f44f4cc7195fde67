"""Device code, in Triton: what decoding does to a few tokens beside products and attention. See cuda_ops.py.

A program has all of one token's numbers at once, WIDTH of them, a power of two.
T tokens, N numbers of each, H hidden, E experts, K chosen per token, R dimensions of a head that rotate.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(tokens, embedding, residual, scale, hidden, e_stride, r_stride, SIZE: tl.constexpr):
    """Row tokens[t] of embedding [V, H], times scale, into residual fp32 [T, H]. Grid: T, pieces of H."""
    token = tl.program_id(0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    row = tl.load(tokens + token).to(tl.int64)
    value = tl.load(embedding + row * e_stride + at, mask=at < hidden)
    tl.store(residual + token * r_stride + at, value.to(tl.float32) * scale, mask=at < hidden)


@triton.jit
def normed_row(value, weight, at, eps, hidden, WEIGHT: tl.constexpr):
    """value / sqrt(mean(value^2) + eps), times weight where WEIGHT; what is beyond `hidden` is 0 and stays 0."""
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / hidden + eps)
    value *= inverse
    if WEIGHT:
        value *= tl.load(weight + at, mask=at < hidden, other=0.0)
    return value


@triton.jit
def norm(residual, weight, out, rows, topk_weights, eps, hidden, r_stride, out_stride, rows_token, rows_rank,
         w_stride, K: tl.constexpr, WEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Where K, the sum of rows [T, K, H] times topk_weights [T, K], in the order of K, is added to residual [T, H], in
    place; its norm goes into out [T, H], times weight [H] where WEIGHT. All fp32. Grid: T."""
    token = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    value = tl.load(residual + token * r_stride + at, mask=at < hidden, other=0.0)
    if K:
        total = tl.zeros((WIDTH,), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(rows + token * rows_token + k * rows_rank + at, mask=at < hidden, other=0.0)
            total += row * tl.load(topk_weights + token * w_stride + k)
        value += total
        tl.store(residual + token * r_stride + at, value, mask=at < hidden)
    tl.store(out + token * out_stride + at, normed_row(value, weight, at, eps, hidden, WEIGHT), mask=at < hidden)


@triton.jit
def combine(rows, topk_weights, out, hidden, rows_token, rows_rank, w_stride, out_stride, K: tl.constexpr,
            SIZE: tl.constexpr):
    """The sum of rows [T, K, H] times topk_weights [T, K], in the order of K, into out [T, H]; all fp32. Grid: T,
    pieces of H."""
    token = tl.program_id(0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + token * rows_token + k * rows_rank + at, mask=at < hidden, other=0.0)
        total += row * tl.load(topk_weights + token * w_stride + k)
    tl.store(out + token * out_stride + at, total, mask=at < hidden)


@triton.jit
def head_norm(x, weight, eps, clip, x_stride, size, NORM: tl.constexpr, WEIGHT: tl.constexpr, CLIP: tl.constexpr,
              WIDTH: tl.constexpr):
    """Each `size` neighbours of x fp32 [T, N] in place: normed where NORM, by weight fp32 [size] where WEIGHT; then
    clamped to [-clip, clip] where CLIP. NaN stays. WIDTH: size as a power of two. Grid: T, N / size."""
    at = tl.arange(0, WIDTH)
    row = x + tl.program_id(0) * x_stride + tl.program_id(1) * size + at
    value = tl.load(row, mask=at < size, other=0.0)
    if NORM:
        value = normed_row(value, weight, at, eps, size, WEIGHT)
    if CLIP:
        value = tl.where(value > clip, clip, tl.where(value < -clip, -clip, value))
    tl.store(row, value, mask=at < size)


@triton.jit
def combined(x, y, out, x_stride, y_stride, y_column, out_stride, size, factor, limit, KIND: tl.constexpr,
             SIZE: tl.constexpr):
    """out[t, i] of x[t, i] and y[t, i], all fp32, out perhaps x or y. KIND: "swiglu" silu(x) * y, "geglu" gelu(x) * y
    by tanh, "swiglu_clamped" with alpha in factor and its limit, which is None elsewhere (spec.Activation), "silu"
    x * silu(y), "sigmoid" x * sigmoid(y), "add" x + y, "scale" x * y * factor, "factor" x * factor, "softcap"
    factor * tanh(x / factor). y_column: 0 where y has one number a token; y_stride: 0 where all tokens have the same.
    Grid: T, pieces of `size`."""
    token = tl.program_id(0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + token * x_stride + at, mask=at < size, other=0.0)
    if KIND == "factor":
        value *= factor
    elif KIND == "softcap":
        value = factor * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * value / factor)))
    else:
        other = tl.load(y + token * y_stride + at * y_column, mask=at < size, other=0.0)
        if KIND == "swiglu":
            value = value / (1.0 + tl.exp(-value)) * other
        elif KIND == "geglu":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
            twice = 1.5957691216057308 * (value + 0.044715 * value * value * value)
            value = value / (1.0 + tl.exp(-twice)) * other
        elif KIND == "swiglu_clamped":
            value = tl.where(value > limit, limit, value)
            other = tl.where(other > limit, limit, tl.where(other < -limit, -limit, other))
            value = value / (1.0 + tl.exp(-factor * value)) * (other + 1.0)
        elif KIND == "silu":
            value *= other / (1.0 + tl.exp(-other))
        elif KIND == "sigmoid":
            value *= 1.0 / (1.0 + tl.exp(-other))
        elif KIND == "add":
            value += other
        else:
            value = value * other * factor
    tl.store(out + token * out_stride + at, value, mask=at < size)


@triton.jit
def rope_cos_sin(positions, inv_freq, out, factor, out_stride, half, WIDTH: tl.constexpr):
    """Cosines of position * inv_freq, then their sines, times factor, into out fp32 [T, R]. The angle is a product in
    fp32, as the model was trained with; its cosine is taken in fp64, so that it is right however large the angle. half:
    R / 2; WIDTH: that as a power of two. Grid: T."""
    token = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    position = tl.load(positions + token).to(tl.float32)
    angle = (position * tl.load(inv_freq + at, mask=at < half, other=0.0)).to(tl.float64)
    tl.store(out + token * out_stride + at, tl.cos(angle).to(tl.float32) * factor, mask=at < half)
    tl.store(out + token * out_stride + half + at, tl.sin(angle).to(tl.float32) * factor, mask=at < half)


@triton.jit
def jobs(ids, table, slots, rows, places, first, count, tokens, k, ids_stride, M: tl.constexpr, PAIRS: tl.constexpr):
    """cuda.Jobs of experts ids [T, K] in slots `first` to first + count - 1 of table [E], all int32; M: T as a power of
    two. An expert is one job, so that its weights are read once, and what is in no such slot has -1.

    A job for each expert; or, where PAIRS, for each choice, of which those of an expert chosen before have nothing to
    do. Example: T 2, E 3, ids [[1, 2], [2, 0]], table [-1, 7, 5], first 5: slots [-1, 2, 0], rows [[-1, -1], [0, -1],
    [0, 1]], places [[-1, -1], [0, -1], [1, 2]]; as pairs slots [2, 0, -1, -1], rows [[0, -1], [0, 1], ...].
    Grid: E, or T * K.
    """
    job = tl.program_id(0)
    token = tl.arange(0, M)
    expert = job
    if PAIRS:
        expert = tl.load(ids + job // k * ids_stride + job % k)
    place = token * 0 - 1
    for rank in range(0, k):
        found = tl.load(ids + token * ids_stride + rank, mask=token < tokens, other=-1)
        place = tl.where(found == expert, token * k + rank, place)
    if PAIRS:
        earliest = tl.min(tl.where(place >= 0, place, job), axis=0)
        place = tl.where(earliest == job, place, -1)
    slot = tl.load(table + expert) - first
    slot = tl.where((slot >= 0) & (slot < count), slot, -1)
    wanted = (place >= 0) & (slot >= 0)
    tl.store(slots + job, tl.where(tl.max(place, axis=0) >= 0, slot, -1))
    tl.store(rows + job * M + token, tl.where(wanted, token, -1))
    tl.store(places + job * M + token, tl.where(wanted, place, -1))
