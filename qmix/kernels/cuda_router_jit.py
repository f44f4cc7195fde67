"""Device code, in Triton: routers of a few tokens: their logits, and which experts they choose with which weights
(spec.Router has the formulas). See cuda_router.py.

T tokens, H hidden, E experts, K chosen per token, L routers that are asked together.
"""

# mypy: disable-error-code="assignment, misc"
# (tuples of tensors grow here, which is how Triton has a number of them that is known when it compiles)

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.cuda_layer_jit import normed_row


@triton.jit
def logits(residual, weight, router, weights, routers, normed, out, eps, hidden, experts, r_stride, w_stride,
           routers_stride, n_stride, OWN: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, KEEP: tl.constexpr,
           WIDTH: tl.constexpr):
    """Of token t, asked of router d: its norm, and the logit of one expert, summed in fp64 and rounded to fp32.

    residual fp32 [T, H], normed already unless NORM; the layer's own router, d = 0, where OWN: weight fp32 [H], none
    unless WEIGHT, router [E, H] of any float dtype, and where KEEP the norm goes into normed fp32 [T, H], which is not
    the residual; later ones, d = OWN and on: weights [L - OWN, H], routers [L - OWN, E, H]; out fp32 [T, L, E]. Each
    expert has a program, though each makes the norm anew: cards for games have few units of fp64, and one
    multiprocessor's would be long about all experts. Grid: T, L * E.
    """
    token = tl.program_id(0)
    place = tl.program_id(1)
    layer = place // experts
    if layer >= OWN:
        weight = weights + (layer - OWN) * w_stride
        router = routers + (layer - OWN).to(tl.int64) * routers_stride
    at = tl.arange(0, WIDTH)
    value = tl.load(residual + token * r_stride + at, mask=at < hidden, other=0.0)
    if NORM:
        value = normed_row(value, weight, at, eps, hidden, WEIGHT)
    if KEEP:
        tl.store(normed + token * n_stride + at, value, mask=at < tl.where(place == 0, hidden, 0))
    row = tl.load(router + place % experts * hidden + at, mask=at < hidden, other=0.0)
    logit = tl.sum(value.to(tl.float64) * row.to(tl.float64), axis=0)
    tl.store(out + token * tl.num_programs(1) + place, logit.to(tl.float32))


@triton.jit
def choose(logits, logit_bias, logit_biases, choice_bias, choice_biases, expert_scale, ids, topk_weights, ahead,
           more_ids, more_topk_weights, experts, eps, scale, lb_stride, cb_stride, ids_stride, w_stride, ahead_token,
           ahead_layer, more_ids_stride, more_w_stride, OWN: tl.constexpr, K: tl.constexpr, GUESSES: tl.constexpr,
           EXPERTS: tl.constexpr, MORE: tl.constexpr, SIGMOID: tl.constexpr, OVER_CHOSEN: tl.constexpr,
           NORMALIZE: tl.constexpr, LOGIT_BIAS: tl.constexpr, CHOICE_BIAS: tl.constexpr, EXPERT_SCALE: tl.constexpr,
           GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """The best experts of token t by router d, the best first, of equals the lower number.

    logits fp32 [T, L, E]; logit_bias, choice_bias [E] of the layer's own router, d = 0, where OWN; logit_biases,
    choice_biases [L - OWN, E] of later ones, d = OWN and on. Of the layer's own K into ids [T, K], and their weights
    into topk_weights fp32 [T, K], by expert_scale [E]; where MORE, both a second time. Of later ones GUESSES into ahead
    [T, L - OWN, GUESSES]. NaN counts as the largest: ids are always numbers of experts, each once. EXPERTS: E as a
    power of two. Grid: T, L.
    """
    token = tl.program_id(0)
    layer = tl.program_id(1)
    number = tl.arange(0, EXPERTS)
    given = number < experts
    if layer >= OWN:
        logit_bias = logit_biases + (layer - OWN) * lb_stride
        choice_bias = choice_biases + (layer - OWN) * cb_stride
    values = tl.load(logits + (token * tl.num_programs(1) + layer) * experts + number, mask=given, other=0.0)
    if LOGIT_BIAS:
        values += tl.load(logit_bias + number, mask=given, other=0.0)
    scores = values
    if not OVER_CHOSEN or CHOICE_BIAS or GROUPS > TOP_GROUPS:
        scores = scores_of(values, given, SIGMOID)
    ranked = values
    if CHOICE_BIAS:
        ranked = scores + tl.load(choice_bias + number, mask=given, other=0.0)
    elif GROUPS > TOP_GROUPS:
        ranked = scores
    keys = tl.where(ranked == ranked, ranked, float("inf"))
    if GROUPS > TOP_GROUPS:
        keys = in_best_groups(keys, given, number, experts // GROUPS, GROUPS, TOP_GROUPS, TOP2)
    if layer >= OWN:
        for k in tl.static_range(GUESSES):
            chosen = largest(keys, given, number)
            given = given & (number != chosen)
            tl.store(ahead + token * ahead_token + (layer - OWN) * ahead_layer + k, chosen.to(ahead.dtype.element_ty))
    else:
        all_chosen = ()
        found = ()
        for k in tl.static_range(K):
            chosen = largest(keys, given, number)
            given = given & (number != chosen)
            tl.store(ids + token * ids_stride + k, chosen.to(ids.dtype.element_ty))
            if MORE:
                tl.store(more_ids + token * more_ids_stride + k, chosen.to(more_ids.dtype.element_ty))
            all_chosen += (chosen,)
            found += (tl.sum(tl.where(number == chosen, values if OVER_CHOSEN else scores, 0.0), axis=0),)
        if OVER_CHOSEN:
            top = found[0]
            if CHOICE_BIAS or GROUPS > TOP_GROUPS:  # else the first is the largest
                for k in tl.static_range(1, K):
                    top = tl.maximum(top, found[k])
            powers = ()
            for k in tl.static_range(K):
                powers += (tl.exp(found[k] - top),)
            total = powers[0]
            for k in tl.static_range(1, K):
                total += powers[k]
            found = ()
            for k in tl.static_range(K):
                found += (powers[k] / total,)
        divisor = 1.0
        if NORMALIZE:
            divisor = found[0]
            for k in tl.static_range(1, K):
                divisor += found[k]
            divisor += eps
        for k in tl.static_range(K):
            gain = (found[k] / divisor if NORMALIZE else found[k]) * scale
            if EXPERT_SCALE:
                gain *= tl.load(expert_scale + all_chosen[k])
            tl.store(topk_weights + token * w_stride + k, gain)
            if MORE:
                tl.store(more_topk_weights + token * more_w_stride + k, gain)


@triton.jit
def scores_of(values, given, SIGMOID: tl.constexpr):
    """Of all experts: sigmoid or softmax of their logits."""
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-values))
    else:
        top = tl.max(tl.where(given, values, float("-inf")), axis=0)
        powers = tl.where(given, tl.exp(values - top), 0.0)
        scores = powers / tl.sum(powers, axis=0)
    return scores


@triton.jit
def in_best_groups(keys, given, number, size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """keys, -inf outside the TOP_GROUPS best of GROUPS groups of `size` neighbours, by their largest key, or by the sum
    of their two largest where TOP2; of equal groups the first. GROUPS and on have what is no expert."""
    group = number // size
    of_group = keys  # of an expert its group's score
    for g in tl.static_range(GROUPS):
        inside = group == g
        best = largest(keys, inside, number)
        score = tl.sum(tl.where(number == best, keys, 0.0), axis=0)
        if TOP2:
            score += tl.max(tl.where(inside & (number != best), keys, float("-inf")), axis=0)
        of_group = tl.where(inside, score, of_group)
    of_group = tl.where(of_group == of_group, of_group, float("inf"))
    left = given
    for _ in tl.static_range(TOP_GROUPS):
        best = largest(of_group, left, number) // size
        left = left & (group != best)
    return tl.where(left, float("-inf"), keys)


@triton.jit
def largest(keys, left, number):
    """Which of those left is the largest, of equals the lower number."""
    most = tl.max(tl.where(left, keys, float("-inf")), axis=0)
    return tl.min(tl.where(left & (keys == most), number, 2147483647), axis=0)
