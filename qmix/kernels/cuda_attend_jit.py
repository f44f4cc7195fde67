"""Device code, in Triton: attention of a few tokens, split over the positions, and of many (Dao et al. 2022, 2023).

A few tokens may bring their keys and values with them. One program then writes a token's key and value of a head into
the cache, and no program of that launch reads from the cache what the launch writes: each takes the new keys and values
from where the projections are, rotated and rounded as they are written.

The softmax is taken in pieces: each keeps its largest score and the sums of weights relative to that, and pieces are
rescaled to the larger of their scores when they are put together. Scores are in powers of two. A piece that has seen
nothing has the score LOWEST, which is finite, so that no difference is NaN. What a model does not have, sinks or a cap
of scores, is None: it leaves nothing in the code that is compiled.

T tokens, Q query heads, KV key-value heads, D head size, S positions of the cache.
"""

# mypy: disable-error-code="assignment"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

from math import e, log2

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(log2(e))
TINY = tl.constexpr(1e-30)  # kv_codes.TINY
ROUND = tl.constexpr(1.5 * 2**23)  # added to a number below 2^22, it leaves no digit behind the point


@triton.jit
def rotated(head, cos_sin, at, size, turned, ROPE: tl.constexpr):
    """D numbers at `head`; where ROPE, dimension i of the first R turned with i + R/2; turned: R; cos_sin: R/2 cosines,
    then the sines. The one rounding of each product is asked for, so that a key has the same bits wherever it is
    rotated."""
    own = tl.load(head + at, mask=at < size, other=0.0)
    if ROPE:
        half = turned // 2
        low = at < half
        partner = tl.where(low, at + half, at - half)
        angle = tl.where(low, at, partner)
        other = tl.load(head + partner, mask=at < turned, other=0.0)
        cos = tl.load(cos_sin + angle, mask=at < turned, other=1.0)
        sin = tl.load(cos_sin + half + angle, mask=at < turned, other=0.0)
        own = tl.where(at < turned, tl.fma(own, cos, other * tl.where(low, -sin, sin)), own)
    return own


@triton.jit
def coded(row):
    """(Codes of D numbers, as fp32; their scale): see kv_codes.py. A row with a NaN has the scale NaN. Adding ROUND
    rounds a code to the nearest whole number, of two to the even one. Product and sum are one fused operation, so that
    a row has the same codes wherever they are made."""
    largest = tl.max(tl.abs(row), axis=0)
    largest = tl.where(tl.max(tl.where(row == row, 0, 1), axis=0) == 0, largest, float("nan"))
    codes = tl.fma(row, 127.0 / tl.maximum(largest, TINY), ROUND) - ROUND
    return tl.where(largest < float("inf"), codes, 0.0), largest * (1 / 127)


@triton.jit
def capped(score, softcap):
    """softcap * tanh(x), of a score that is 2 * log2(e) * x: softcap - 2 * softcap / (1 + e^2x). It errs by some
    roundings of softcap, also where x is small."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(score))


@triton.jit
def attend(query, cos_sin, keys, values, key_scales, value_scales, positions, partial, tops, totals, window, q_token,
           c_token, k_head, k_position, v_head, v_position, ks_head, vs_head, splits, size, turned, scale, softcap,
           GROUP: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
           NEW: tl.constexpr, ROPE: tl.constexpr, INT8: tl.constexpr):
    """SPLIT positions of a key-value head, STEP at a time, for GROUP of its query heads of one token, in fp32; PARTS
    programs have its Q / KV query heads together, since one has registers for few.

    Each place of a step has its own softmax, and they are merged once, at the end: no thread waits for another before.
    query fp32 [T, Q, D], rotated; or, where NEW, [T, Q + 2 KV, D], not rotated, with the keys and values of these T
    tokens after the queries; their positions follow each other, cos_sin [T, R] is as of `rotated`, by which heads turn
    where ROPE, and keys and values are written to their positions. keys, values [KV, S, D], where INT8 codes, with
    key_scales and value_scales fp32 [KV, S]; positions [T]; turned: R; scale: of the scores, with log2(e), and softcap
    likewise, as `capped` wants both, or None; partial fp32 [T, Q, splits, D]: weighted sums of values, tops and totals
    fp32 [T, Q, splits]: their largest score, and the sum of the weights. WIDTH: D as a power of two. Grid: KV * PARTS,
    splits, T; a split that a token does not see writes nothing.
    """
    part = tl.program_id(0)
    head = part // PARTS
    split = tl.program_id(1)
    token = tl.program_id(2)
    position = tl.load(positions + token).to(tl.int32)
    first = tl.maximum(position + 1 - window, 0)
    start = split * SPLIT
    if (start > position) | (start + SPLIT <= first):
        return
    heads = tl.num_programs(0) * GROUP
    at = tl.arange(0, WIDTH)
    inside = tl.arange(0, STEP)
    keys += head.to(tl.int64) * k_head
    values += head.to(tl.int64) * v_head
    if INT8:
        key_scales += head.to(tl.int64) * ks_head
        value_scales += head.to(tl.int64) * vs_head
    new = position + 1  # the first position that is not read from the cache
    if NEW:
        new = position - token
        own = query + (heads + head) * size  # the new keys of this head
        kv_size = tl.num_programs(0) // PARTS * size  # from a key to its value
        if (position < start + SPLIT) & (part % PARTS == 0):
            key_row = rotated(own + token * q_token, cos_sin + token * c_token, at, size, turned, ROPE)
            value_row = tl.load(own + token * q_token + kv_size + at, mask=at < size, other=0.0)
            if INT8:
                key_row, key_scale = coded(key_row)
                value_row, value_scale = coded(value_row)
                tl.store(key_scales + position, key_scale)
                tl.store(value_scales + position, value_scale)
            tl.store(keys + position * k_position + at, key_row.to(keys.dtype.element_ty), mask=at < size)
            tl.store(values + position * v_position + at, value_row.to(values.dtype.element_ty), mask=at < size)
    queries = ()
    top = ()
    total = ()
    sums = ()
    for g in tl.static_range(GROUP):
        asking = query + token * q_token + (part * GROUP + g) * size
        if NEW:
            queries += (rotated(asking, cos_sin + token * c_token, at, size, turned, ROPE) * scale,)
        else:
            queries += (tl.load(asking + at, mask=at < size, other=0.0) * scale,)
        top += (tl.full((STEP,), LOWEST, tl.float32),)
        total += (tl.zeros((STEP,), tl.float32),)
        sums += (tl.zeros((STEP, WIDTH), tl.float32),)
    for begin in range(start, tl.minimum(start + SPLIT, position + 1), STEP):
        where = begin + inside
        seen = (where >= first) & (where <= position)
        mask = (seen & (where < new))[:, None] & (at < size)[None, :]
        key = tl.load(keys + where[:, None] * k_position + at[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where[:, None] * v_position + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if INT8:
            key_scale = tl.load(key_scales + where, mask=seen & (where < new), other=0.0)
            value_scale = tl.load(value_scales + where, mask=seen & (where < new), other=0.0)
        if NEW:
            for other in range(tl.maximum(begin - new, 0), tl.minimum(begin + STEP - new, token + 1)):
                place = seen & (where == new + other)
                here = place[:, None]
                key_row = rotated(own + other * q_token, cos_sin + other * c_token, at, size, turned, ROPE)
                value_row = tl.load(own + other * q_token + kv_size + at, mask=at < size, other=0.0)
                if INT8:
                    key_row, own_scale = coded(key_row)
                    key_scale = tl.where(place, own_scale, key_scale)
                    value_row, own_scale = coded(value_row)
                    value_scale = tl.where(place, own_scale, value_scale)
                key = tl.where(here, key_row.to(keys.dtype.element_ty).to(tl.float32)[None, :], key)
                value = tl.where(here, value_row.to(values.dtype.element_ty).to(tl.float32)[None, :], value)
        new_top = ()
        new_total = ()
        new_sums = ()
        for g in tl.static_range(GROUP):
            score = tl.sum(key * queries[g][None, :], axis=1)
            if INT8:
                score *= key_scale
            if softcap is not None:
                score = capped(score, softcap)
            score = tl.where(seen, score, float("-inf"))
            new_top += (tl.maximum(top[g], score),)
            weight = tl.exp2(score - new_top[g])
            fade = tl.exp2(top[g] - new_top[g])
            new_total += (total[g] * fade + weight,)
            if INT8:
                weight *= value_scale
            new_sums += (sums[g] * fade[:, None] + value * weight[:, None],)
        top = new_top
        total = new_total
        sums = new_sums
    for g in tl.static_range(GROUP):
        largest = tl.max(top[g], axis=0)
        fade = tl.exp2(top[g] - largest)
        out = (token * heads + part * GROUP + g) * splits + split
        tl.store(tops + out, largest)
        tl.store(totals + out, tl.sum(total[g] * fade, axis=0))
        tl.store(partial + out.to(tl.int64) * size + at, tl.sum(sums[g] * fade[:, None], axis=0), mask=at < size)


@triton.jit
def merge(partial, tops, totals, sinks, positions, out, window, out_stride, splits, size, SPLIT: tl.constexpr,
          SPLITS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """The splits of one token and query head together, into out fp32 [T, Q * D]. sinks: fp32 [Q], or None. SPLITS: how
    many there are, as a power of two. Grid: T, Q."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    lowest = tl.maximum(position + 1 - window, 0) // SPLIT
    highest = position // SPLIT
    base = (token * tl.num_programs(1) + head) * splits
    number = tl.arange(0, SPLITS)
    given = (number >= lowest) & (number <= highest)
    top = tl.load(tops + base + number, mask=given, other=LOWEST)
    largest = tl.max(top, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.load(totals + base + number, mask=given, other=0.0) * tl.exp2(top - largest), axis=0)
    if sinks is not None:
        total += tl.exp2(sink - largest)
    at = tl.arange(0, WIDTH)
    inside = tl.arange(0, STEP)
    sums = tl.zeros((STEP, WIDTH), tl.float32)
    for begin in range(lowest // STEP * STEP, highest + 1, STEP):
        which = begin + inside
        here = (which >= lowest) & (which <= highest)
        weight = tl.exp2(tl.load(tops + base + which, mask=here, other=LOWEST) - largest)
        sums += weight[:, None] * tl.load(partial + (base + which).to(tl.int64)[:, None] * size + at[None, :],
                                          mask=here[:, None] & (at < size)[None, :], other=0.0)
    tl.store(out + token * out_stride + head * size + at, tl.sum(sums, axis=0) / total, mask=at < size)


@triton.jit(do_not_specialize=["window", "tokens", "past"])  # else compiled anew for some prompts
def attend_many(query, keys, values, sinks, out, window, q_token, q_head, k_head, k_position, v_head, v_position,
                out_token, tokens, past, group, size, scale, softcap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                WIDTH: tl.constexpr):
    """BLOCK_M tokens of one query head over what they see, BLOCK_N positions at a time: products in the dtype of keys
    and values, to which queries and weights are rounded, sums in fp32.

    query [T, Q, D], of the positions `past` and on; keys, values [KV, S, D]; sinks: fp32 [Q], or None; out [T, Q * D];
    scale, softcap: as of `attend`; group: Q / KV. Grid: pieces of T, the last first, since they see most; Q.
    """
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    token = piece * BLOCK_M + tl.arange(0, BLOCK_M)
    position = past + token
    at = tl.arange(0, WIDTH)
    inside = tl.arange(0, BLOCK_N)
    given = (token < tokens)[:, None] & (at < size)[None, :]
    rows = tl.load(query + token.to(tl.int64)[:, None] * q_token + head * q_head + at[None, :], mask=given, other=0.0)
    rows = rows.to(keys.dtype.element_ty)
    keys += (head // group).to(tl.int64) * k_head
    values += (head // group).to(tl.int64) * v_head
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.maximum(sink, LOWEST)
        total = tl.exp2(sink - top)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    end = past + tl.minimum(piece * BLOCK_M + BLOCK_M, tokens)
    first = tl.maximum(past + piece * BLOCK_M + 1 - window, 0)
    for begin in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        where = begin + inside
        key = tl.load(keys + where[None, :] * k_position + at[:, None],
                      mask=(where < end)[None, :] & (at < size)[:, None], other=0.0)
        score = tl.dot(rows, key, input_precision="ieee") * scale
        if softcap is not None:
            score = capped(score, softcap)
        seen = (where[None, :] <= position[:, None]) & (where[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(values + where[:, None] * v_position + at[None, :],
                        mask=(where < end)[:, None] & (at < size)[None, :], other=0.0)
        sums = sums * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = new_top
    result = sums / total[:, None]
    tl.store(out + token.to(tl.int64)[:, None] * out_token + head * size + at[None, :],
             result.to(out.dtype.element_ty), mask=given)
