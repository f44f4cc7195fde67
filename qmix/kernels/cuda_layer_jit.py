"""Device code, in Triton: what decoding does to a few tokens beside products and attention. See cuda_ops.py.

A program has all of one token's numbers at once, WIDTH of them, a power of two.
T tokens, H hidden, E experts, K chosen per token, L later layers, Q query heads, KV key-value heads, S positions.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed(tokens, embedding, residual, hidden, e_stride, r_stride, SIZE: tl.constexpr):
    """Row tokens[t] of embedding [V, H] into residual fp32 [T, H]. Grid: T, pieces of H."""
    token = tl.program_id(0)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    row = tl.load(tokens + token).to(tl.int64)
    value = tl.load(embedding + row * e_stride + at, mask=at < hidden)
    tl.store(residual + token * r_stride + at, value.to(tl.float32), mask=at < hidden)


@triton.jit
def normed_row(value, weight, at, eps, hidden):
    """value / sqrt(mean(value^2) + eps) * weight; what is beyond `hidden` is 0 and stays 0."""
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=0) / hidden + eps)
    return value * inverse * tl.load(weight + at, mask=at < hidden, other=0.0)


@triton.jit
def norm(residual, weight, out, rows, gains, eps, hidden, r_stride, out_stride, rows_token, rows_rank, gains_stride,
         K: tl.constexpr, WIDTH: tl.constexpr):
    """Where K, the sum of rows [T, K, H] times gains [T, K], in the order of K, is added to residual [T, H], in place;
    its norm goes into out [T, H]. All fp32. Grid: T."""
    token = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    value = tl.load(residual + token * r_stride + at, mask=at < hidden, other=0.0)
    if K:
        total = tl.zeros((WIDTH,), tl.float32)
        for k in tl.static_range(K):
            row = tl.load(rows + token * rows_token + k * rows_rank + at, mask=at < hidden, other=0.0)
            total += row * tl.load(gains + token * gains_stride + k)
        value += total
        tl.store(residual + token * r_stride + at, value, mask=at < hidden)
    tl.store(out + token * out_stride + at, normed_row(value, weight, at, eps, hidden), mask=at < hidden)


@triton.jit
def logits(residual, weight, router, weights, routers, normed, out, eps, hidden, experts, r_stride, w_stride,
           routers_stride, n_stride, WIDTH: tl.constexpr):
    """Of token t, asked of layer d: its norm, and the logit of one expert, summed in fp64 and rounded to fp32.

    residual fp32 [T, H]; the layer's own, d = 0: weight fp32 [H], router fp64 [E, H], and the norm into normed fp32
    [T, H], which is not the residual; those of L later ones, d = 1 to L: weights [L, H], routers [L, E, H]; out fp32
    [T, 1 + L, E]. Each expert has a program, though each makes the norm anew: cards for games have few units of fp64,
    and one multiprocessor's would be long about all experts. Grid: T, (1 + L) * E.
    """
    token = tl.program_id(0)
    place = tl.program_id(1)
    layer = place // experts
    if layer > 0:
        weight = weights + (layer - 1) * w_stride
        router = routers + (layer - 1).to(tl.int64) * routers_stride
    at = tl.arange(0, WIDTH)
    value = tl.load(residual + token * r_stride + at, mask=at < hidden, other=0.0)
    value = normed_row(value, weight, at, eps, hidden)
    tl.store(normed + token * n_stride + at, value, mask=at < tl.where(place == 0, hidden, 0))
    row = tl.load(router + place % experts * hidden + at, mask=at < hidden, other=0.0)
    logit = tl.sum(value.to(tl.float64) * row.to(tl.float64), axis=0)
    tl.store(out + token * tl.num_programs(1) + place, logit.to(tl.float32))


@triton.jit
def choose(logits, ids, gains, ahead, more_ids, more_gains, experts, ids_stride, gains_stride, ahead_token, ahead_layer,
           more_ids_stride, more_gains_stride, K: tl.constexpr, GUESSES: tl.constexpr, EXPERTS: tl.constexpr,
           MORE: tl.constexpr):
    """The largest logits of token t, asked of layer d, the largest first, of equals the lower number.

    logits fp32 [T, 1 + L, E]. Of the layer's own, d = 0, K into ids [T, K], and softmax over them into gains fp32
    [T, K]; where MORE, both a second time. Of later ones GUESSES into ahead [T, L, GUESSES]. NaN counts as the largest:
    ids are always numbers of experts, each once. EXPERTS: E as a power of two. Grid: T, 1 + L.
    """
    token = tl.program_id(0)
    layer = tl.program_id(1)
    number = tl.arange(0, EXPERTS)
    left = number < experts
    values = tl.load(logits + (token * tl.num_programs(1) + layer) * experts + number, mask=left, other=0.0)
    keys = tl.where(values == values, values, float("inf"))
    if layer > 0:
        for k in tl.static_range(GUESSES):
            chosen = largest(keys, left, number)
            left = left & (number != chosen)
            tl.store(ahead + token * ahead_token + (layer - 1) * ahead_layer + k, chosen.to(ahead.dtype.element_ty))
    else:
        tops = ()
        for k in tl.static_range(K):
            chosen = largest(keys, left, number)
            left = left & (number != chosen)
            tl.store(ids + token * ids_stride + k, chosen.to(ids.dtype.element_ty))
            if MORE:
                tl.store(more_ids + token * more_ids_stride + k, chosen.to(more_ids.dtype.element_ty))
            tops += (tl.sum(tl.where(number == chosen, values, 0.0), axis=0),)
        total = tl.exp(tops[0] - tops[0])
        for k in tl.static_range(1, K):
            total += tl.exp(tops[k] - tops[0])
        for k in tl.static_range(K):
            gain = tl.exp(tops[k] - tops[0]) / total
            tl.store(gains + token * gains_stride + k, gain)
            if MORE:
                tl.store(more_gains + token * more_gains_stride + k, gain)


@triton.jit
def largest(keys, left, number):
    """Which of those left is the largest, of equals the lower number."""
    most = tl.max(tl.where(left, keys, float("-inf")), axis=0)
    return tl.min(tl.where(left & (keys == most), number, 2147483647), axis=0)


@triton.jit
def rope_cos_sin(positions, inv_freq, out, out_stride, half, WIDTH: tl.constexpr):
    """Cosines of position * inv_freq, then their sines, into out fp32 [T, D]. See keep. Grid: T."""
    token = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    position = tl.load(positions + token).to(tl.float32)
    angle = (position * tl.load(inv_freq + at, mask=at < half, other=0.0)).to(tl.float64)
    tl.store(out + token * out_stride + at, tl.cos(angle).to(tl.float32), mask=at < half)
    tl.store(out + token * out_stride + half + at, tl.sin(angle).to(tl.float32), mask=at < half)


@triton.jit
def keep(qkv, inv_freq, positions, keys, values, query, qkv_stride, k_head, k_position, v_head, v_position,
         query_stride, queries, kv_heads, half, WIDTH: tl.constexpr):
    """A head of a token: queries and keys turned by position * inv_freq, dimension i with i + D/2; keys and values to
    their place in the cache, cast to its dtype.

    The angle is a product in fp32, as the model was trained with; its cosine is taken in fp64, so that it is right
    however large the angle.
    qkv fp32 [T, (Q + 2 KV) * D]; inv_freq fp32 [D/2]; keys, values [KV, S, D]; query fp32 [T, Q, D]; half: D/2; WIDTH:
    that as a power of two. Grid: T, Q + 2 KV.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.arange(0, WIDTH)
    here = at < half
    source = qkv + token * qkv_stride + head * 2 * half + at
    low = tl.load(source, mask=here, other=0.0)
    high = tl.load(source + half, mask=here, other=0.0)
    position = tl.load(positions + token).to(tl.int64)
    if head >= queries + kv_heads:
        value = values + (head - queries - kv_heads).to(tl.int64) * v_head + position * v_position + at
        tl.store(value, low.to(values.dtype.element_ty), mask=here)
        tl.store(value + half, high.to(values.dtype.element_ty), mask=here)
    else:
        angle = (position.to(tl.float32) * tl.load(inv_freq + at, mask=here, other=0.0)).to(tl.float64)
        cos = tl.cos(angle).to(tl.float32)
        sin = tl.sin(angle).to(tl.float32)
        turned_low = low * cos - high * sin
        turned_high = high * cos + low * sin
        if head < queries:
            asking = query + token * query_stride + head * 2 * half + at
            tl.store(asking, turned_low, mask=here)
            tl.store(asking + half, turned_high, mask=here)
        else:
            key = keys + (head - queries).to(tl.int64) * k_head + position * k_position + at
            tl.store(key, turned_low.to(keys.dtype.element_ty), mask=here)
            tl.store(key + half, turned_high.to(keys.dtype.element_ty), mask=here)


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
