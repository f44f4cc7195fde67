"""Device code, in Triton: the state of a gated delta net, of a session's few tokens. See cuda_delta.py.

T tokens, C channels of q, k and v side by side, J taps, A key heads, B value heads, K and V their sizes.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(x, past, row, at, channels, x_stride, taps):
    """Row `row` of x [T, C], or, where that is negative, of the J - 1 rows of `past`."""
    inside = at < channels
    new = tl.load(x + row * x_stride + at, mask=inside & (row >= 0), other=0.0)
    old = tl.load(past + (row + taps - 1) * channels + at, mask=inside & (row < 0), other=0.0)
    return new + old


@triton.jit
def conv(x, weight, pasts, side, out, tokens, channels, x_stride, out_stride, TAPS: tl.constexpr, SIZE: tl.constexpr):
    """out [T, C] = silu(sum_j weight[c, j] * row t - J + 1 + j of x), and the last J - 1 rows go to the other side of
    pasts [2, J - 1, C] than side [1] names, where those before the first token are. Grid: pieces of C."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    now = tl.load(side)
    past = pasts + now * (TAPS - 1) * channels
    after = pasts + (1 - now) * (TAPS - 1) * channels
    for token in range(0, tokens):
        total = tl.zeros((SIZE,), tl.float32)
        for j in tl.static_range(TAPS):
            value = row_of(x, past, token + j - (TAPS - 1), at, channels, x_stride, TAPS)
            total += value * tl.load(weight + at * TAPS + j, mask=at < channels, other=0.0)
        tl.store(out + token * out_stride + at, total / (1.0 + tl.exp(-total)), mask=at < channels)
    for j in tl.static_range(TAPS - 1):
        value = row_of(x, past, tokens + j - (TAPS - 1), at, channels, x_stride, TAPS)
        tl.store(after + j * channels + at, value, mask=at < channels)


@triton.jit
def delta(x, a, b, a_log, dt_bias, states, side, out, tokens, x_stride, a_stride, b_stride, out_stride, key_heads,
          value_heads, key_dim, value_dim, scale, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """ops.Delta for the tokens of a session, one after the other: x [T, 2 A K + B V], q, k and v side by side; a, b
    [T, B]; a_log, dt_bias fp32 [B]; out [T, B V]. The state is read once, from that side of states [2, B, K, V] which
    side [1] names, and goes to the other. scale: 1 / sqrt(K); KEYS: K as a power of two. Grid: B, pieces of V."""
    head, key_head = tl.program_id(0), tl.program_id(0) // (value_heads // key_heads)
    i, j = tl.arange(0, KEYS), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    inside = (i < key_dim)[:, None] & (j < value_dim)[None, :]
    now, size = tl.load(side), value_heads * key_dim * value_dim
    place = head * key_dim * value_dim + i[:, None] * value_dim + j[None, :]
    state = tl.load(states + now * size + place, mask=inside, other=0.0)
    rate = tl.exp(tl.load(a_log + head).to(tl.float64)).to(tl.float32)
    bias = tl.load(dt_bias + head)
    keys = key_heads * key_dim
    for token in range(0, tokens):
        row = x + token * x_stride
        q = tl.load(row + key_head * key_dim + i, mask=i < key_dim, other=0.0)
        k = tl.load(row + keys + key_head * key_dim + i, mask=i < key_dim, other=0.0)
        v = tl.load(row + 2 * keys + head * value_dim + j, mask=j < value_dim, other=0.0)
        q *= 1.0 / tl.sqrt_rn(tl.sum(q * q, axis=0) + 1e-6)
        k *= 1.0 / tl.sqrt_rn(tl.sum(k * k, axis=0) + 1e-6)
        by = (tl.load(a + token * a_stride + head) + bias).to(tl.float64)
        soft = tl.where(by > 20.0, by, tl.log(1.0 + tl.exp(tl.minimum(by, 20.0)))).to(tl.float32)
        strength = 1.0 / (1.0 + tl.exp(-tl.load(b + token * b_stride + head)))
        state *= tl.exp(-rate * soft)
        wrong = v - tl.sum(state * k[:, None], axis=0)
        state += k[:, None] * (strength * wrong)[None, :]
        found = tl.sum(state * (q * scale)[:, None], axis=0)
        tl.store(out + token * out_stride + head * value_dim + j, found, mask=j < value_dim)
    tl.store(states + (1 - now) * size + place, state, mask=inside)
