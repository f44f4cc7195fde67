"""Device code, in Triton: attention of a few tokens, split over the positions, and of many (Dao et al. 2022, 2023).

The softmax is taken in pieces: each keeps its largest score and the sums of weights relative to that, and pieces are
rescaled to the larger of their scores when they are put together. Scores are in powers of two. A piece that has seen
nothing has the score LOWEST, which is finite, so that no difference is NaN.

T tokens, Q query heads, KV key-value heads, D head size, S positions of the cache.
"""

# mypy: disable-error-code="assignment"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)


@triton.jit
def attend(query, keys, values, positions, partial, tops, totals, window, q_token, k_head, k_position, v_head,
           v_position, splits, size, scale, GROUP: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr,
           WIDTH: tl.constexpr):
    """SPLIT positions of a key-value head, STEP at a time, for its GROUP query heads of one token, in fp32.

    Each place of a step has its own softmax, and they are merged once, at the end: no thread waits for another before.
    query fp32 [T, Q, D]; keys, values [KV, S, D]; positions [T]; scale: of the scores, with log2(e); partial fp32
    [T, Q, splits, D]: weighted sums of values, tops and totals fp32 [T, Q, splits]: their largest score, and the sum of
    the weights. WIDTH: D as a power of two. Grid: KV, splits, T; a split that a token does not see writes nothing.
    """
    head = tl.program_id(0)
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
    queries = ()
    top = ()
    total = ()
    sums = ()
    for g in tl.static_range(GROUP):
        asking = query + token * q_token + (head * GROUP + g) * size + at
        queries += (tl.load(asking, mask=at < size, other=0.0) * scale,)
        top += (tl.full((STEP,), LOWEST, tl.float32),)
        total += (tl.zeros((STEP,), tl.float32),)
        sums += (tl.zeros((STEP, WIDTH), tl.float32),)
    keys += head.to(tl.int64) * k_head
    values += head.to(tl.int64) * v_head
    for begin in range(start, tl.minimum(start + SPLIT, position + 1), STEP):
        where = begin + inside
        seen = (where >= first) & (where <= position)
        mask = seen[:, None] & (at < size)[None, :]
        key = tl.load(keys + where[:, None] * k_position + at[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where[:, None] * v_position + at[None, :], mask=mask, other=0.0).to(tl.float32)
        new_top = ()
        new_total = ()
        new_sums = ()
        for g in tl.static_range(GROUP):
            score = tl.where(seen, tl.sum(key * queries[g][None, :], axis=1), float("-inf"))
            new_top += (tl.maximum(top[g], score),)
            weight = tl.exp2(score - new_top[g])
            fade = tl.exp2(top[g] - new_top[g])
            new_total += (total[g] * fade + weight,)
            new_sums += (sums[g] * fade[:, None] + value * weight[:, None],)
        top = new_top
        total = new_total
        sums = new_sums
    for g in tl.static_range(GROUP):
        largest = tl.max(top[g], axis=0)
        fade = tl.exp2(top[g] - largest)
        out = (token * heads + head * GROUP + g) * splits + split
        tl.store(tops + out, largest)
        tl.store(totals + out, tl.sum(total[g] * fade, axis=0))
        tl.store(partial + out.to(tl.int64) * size + at, tl.sum(sums[g] * fade[:, None], axis=0), mask=at < size)


@triton.jit
def merge(partial, tops, totals, positions, out, window, out_stride, splits, size, SPLIT: tl.constexpr,
          SPLITS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """The splits of one token and query head together, into out fp32 [T, Q * D]. SPLITS: how many there are, as a power
    of two. Grid: T, Q."""
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
    total = tl.sum(tl.load(totals + base + number, mask=given, other=0.0) * tl.exp2(top - largest), axis=0)
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
def attend_many(query, keys, values, out, window, q_token, q_head, k_head, k_position, v_head, v_position, out_token,
                tokens, past, group, size, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """BLOCK_M tokens of one query head over what they see, BLOCK_N positions at a time: products in the dtype of keys
    and values, to which queries and weights are rounded, sums in fp32.

    query [T, Q, D], of the positions `past` and on; keys, values [KV, S, D]; out [T, Q * D]; scale: of the scores, with
    log2(e); group: Q / KV. Grid: pieces of T, the last first, since they see most; Q.
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
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    end = past + tl.minimum(piece * BLOCK_M + BLOCK_M, tokens)
    first = tl.maximum(past + piece * BLOCK_M + 1 - window, 0)
    for begin in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        where = begin + inside
        key = tl.load(keys + where[None, :] * k_position + at[:, None],
                      mask=(where < end)[None, :] & (at < size)[:, None], other=0.0)
        score = tl.dot(rows, key, input_precision="ieee") * scale
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
