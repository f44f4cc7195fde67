/* A router: its logits, and which experts they choose with which weights, once for all instruction sets; products.h
 * includes it.
 *
 * T tokens, H hidden, E experts, K chosen. Every token is computed as it is alone.
 */

enum { ROUTER_LANES = 16 };

/* fp16 (IEEE 754 binary16), subnormal numbers and all; by masks, as compilers make no vectors of branches. */
ALWAYS float from_fp16(uint16_t bits) {
    uint32_t rest = bits & 0x7fff, special = -(uint32_t)(rest >= 0x7c00), small = -(uint32_t)(rest < 0x400);
    uint32_t normal = (rest << 13) + (112u << 23) + (special & (112u << 23)); /* special: infinity and NaN */
    uint32_t subnormal = float_bits((float)(int32_t)rest * 0x1p-24f);
    uint32_t wide = (subnormal & small) | (normal & ~small) | (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

enum { ROUTER_PIECE = 256 }; /* weights widened at a time, a multiple of ROUTER_LANES */

/* `count` weights from `at` on as fp32, which holds each of the three types: in a loop of its own, which compilers make
 * vectors of. */
ALWAYS const float *router_weights(const int32_t type, const void *row, int64_t at, int64_t count, float *wide) {
    if (type == QMIX_FP32)
        return (const float *)row + at;
    const uint16_t *from = (const uint16_t *)row + at;
    for (int64_t i = 0; i < count; i++)
        wide[i] = type == QMIX_BF16 ? from_bf16(from[i]) : from_fp16(from[i]);
    return wide;
}

/* Weights are widened here, so that memory gives the checkpoint's bytes and no fp64; both are the same numbers. */
ALWAYS float router_logit(const int32_t type, const double *x, const void *row, int64_t size) {
    double lanes[ROUTER_LANES] = {0}, sum = 0;
    float piece[ROUTER_PIECE];
    int64_t whole = size / ROUTER_LANES * ROUTER_LANES;
    for (int64_t at = 0; at < whole; at += ROUTER_PIECE) {
        int64_t count = whole - at < ROUTER_PIECE ? whole - at : ROUTER_PIECE;
        const float *wide = router_weights(type, row, at, count, piece);
        for (int64_t i = 0; i < count; i += ROUTER_LANES)
            for (int j = 0; j < ROUTER_LANES; j++)
                lanes[j] += x[at + i + j] * (double)wide[i + j];
    }
    const float *rest = router_weights(type, row, whole, size - whole, piece);
    for (int64_t i = whole; i < size; i++)
        lanes[0] += x[i] * (double)rest[i - whole];
    for (int j = 0; j < ROUTER_LANES; j++)
        sum += lanes[j];
    return (float)sum;
}

ALWAYS void logits_of_type(const int32_t type, const qmix_route *job, int64_t tokens, const double *x, int64_t first,
                           int64_t last, float *logits) {
    int64_t size = job->norm.size;
    for (int64_t e = first; e < last; e++)
        for (int64_t t = 0; t < tokens; t++)
            logits[t * job->experts + e] = router_logit(
                type, x + t * size, (const char *)job->router + e * size * type_bytes(type), size);
}

static void logits_of_experts(const qmix_route *job, int64_t tokens, const double *x, int64_t first, int64_t last,
                              float *logits) {
    if (job->router_type == QMIX_BF16)
        logits_of_type(QMIX_BF16, job, tokens, x, first, last, logits);
    else if (job->router_type == QMIX_FP16)
        logits_of_type(QMIX_FP16, job, tokens, x, first, last, logits);
    else
        logits_of_type(QMIX_FP32, job, tokens, x, first, last, logits);
}

/* As torch.topk orders: NaN above all; of equals, the first. */
static int above(float a, float b) { return a > b || (a != a && b == b); }

/* The `most` largest of `values`, sorted, into top, and where they stand into ids. */
static void largest(const float *values, int64_t count, int64_t most, float *top, int64_t *ids) {
    int64_t held = 0; /* ids[0..held) are the largest of those seen so far */
    for (int64_t e = 0; e < count; e++) {
        int64_t place = held;
        while (place > 0 && above(values[e], top[place - 1]))
            place--;
        if (place == most)
            continue;
        held += held < most;
        for (int64_t k = held - 1; k > place; k--) {
            top[k] = top[k - 1];
            ids[k] = ids[k - 1];
        }
        top[place] = values[e];
        ids[place] = e;
    }
}

static float highest(const float *values, int64_t count) {
    float best = values[0];
    for (int64_t e = 1; e < count; e++)
        best = above(values[e], best) ? values[e] : best;
    return best;
}

/* Of all experts. */
static void scores_of(const qmix_route *job, const float *logits, float *scores) {
    if (job->score == QMIX_SIGMOID) {
        for (int64_t e = 0; e < job->experts; e++)
            scores[e] = (float)(1 / (1 + exp(-(double)logits[e])));
        return;
    }
    float best = highest(logits, job->experts);
    double total = 0;
    for (int64_t e = 0; e < job->experts; e++)
        total += scores[e] = expf(logits[e] - best);
    for (int64_t e = 0; e < job->experts; e++)
        scores[e] = (float)(scores[e] / total);
}

/* ranked [E]: -infinity outside the best groups. best [groups] */
static void mask_groups(const qmix_route *job, float *ranked, float *best) {
    int64_t size = job->experts / job->groups;
    for (int64_t g = 0; g < job->groups; g++) {
        float two[2] = {0};
        int64_t where[2];
        largest(ranked + g * size, size, job->top2 ? 2 : 1, two, where);
        best[g] = two[0] + two[1];
    }
    for (int64_t g = 0; g < job->groups; g++) {
        int64_t better = 0; /* groups that come before this one */
        for (int64_t other = 0; other < job->groups; other++)
            better += above(best[other], best[g]) || (other < g && !above(best[g], best[other]));
        for (int64_t e = g * size; better >= job->top_groups && e < (g + 1) * size; e++)
            ranked[e] = -INFINITY;
    }
}

static void weights_of_chosen(const qmix_route *job, const int64_t *ids, const float *logits, const float *scores,
                              float *weights) {
    if (job->score == QMIX_SOFTMAX_CHOSEN) {
        float best = logits[ids[0]], total = 0;
        for (int64_t k = 1; k < job->chosen; k++)
            best = above(logits[ids[k]], best) ? logits[ids[k]] : best;
        for (int64_t k = 0; k < job->chosen; k++)
            total += weights[k] = expf(logits[ids[k]] - best);
        for (int64_t k = 0; k < job->chosen; k++)
            weights[k] /= total;
    } else
        for (int64_t k = 0; k < job->chosen; k++)
            weights[k] = scores[ids[k]];
    if (job->normalize) {
        float total = 0;
        for (int64_t k = 0; k < job->chosen; k++)
            total += weights[k];
        for (int64_t k = 0; k < job->chosen; k++)
            weights[k] /= total + job->eps;
    }
    for (int64_t k = 0; k < job->chosen; k++) {
        float scaled = weights[k] * job->scale;
        weights[k] = job->expert_scale ? scaled * job->expert_scale[ids[k]] : scaled;
    }
}

/* logits [E] of the token, changed; scratch [2 E + groups + K]. Experts are ranked by their logits where these order
 * them as their scores do: scores saturate, and equal ones would leave the choice open. */
static void choose_experts(const qmix_route *job, int64_t token, float *logits, float *scratch) {
    int64_t experts = job->experts, *ids = job->ids + token * job->ids_stride;
    float *scores = scratch, *ranked = scores + experts, *best = ranked + experts, *top = best + job->groups;
    int grouped = job->top_groups < job->groups, by_score = job->choice_bias || grouped;
    if (job->logit_bias)
        for (int64_t e = 0; e < experts; e++)
            logits[e] += job->logit_bias[e];
    if (by_score || (job->weights && job->score != QMIX_SOFTMAX_CHOSEN))
        scores_of(job, logits, scores);
    for (int64_t e = 0; e < experts && by_score; e++)
        ranked[e] = job->choice_bias ? scores[e] + job->choice_bias[e] : scores[e];
    if (grouped)
        mask_groups(job, ranked, best);
    largest(by_score ? ranked : logits, experts, job->chosen, top, ids);
    if (job->weights)
        weights_of_chosen(job, ids, logits, scores, job->weights + token * job->chosen);
}
