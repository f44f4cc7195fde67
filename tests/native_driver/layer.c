/* Norm, router, rotary embedding, the weighted sum of experts' rows, activations, biases, and a sequence of calls.
 *
 * T tokens, H hidden, E experts, K chosen, D head size.
 */
#include "driver.h"

enum { T = 3, H = 200, E = 11, K = 4, D = 32, HEADS = 3, KV = 1 };

static const float EPS = 1e-5f;

/* The sum of H squares errs by H * U, half of which reaches its root; then a few operations. */
static void check_norm(int32_t level) {
    float x[T * H], weight[H], out[T * H];
    uint16_t narrow[T * H];
    double worst = 0;
    fill(x, T * H, 3), fill(weight, H, 2);
    qmix_norm job = {x, weight, out, NULL, 1, H, EPS, INFINITY, QMIX_FP32, QMIX_FP32, 0}, other = job;
    other.out = narrow, other.out_type = QMIX_BF16;
    if (qmix_norms(level, &job, T) || qmix_norms(level, &other, T))
        worst = NAN;
    for (int t = 0; t < T; t++) {
        double sum = 0;
        for (int i = 0; i < H; i++)
            sum += (double)x[t * H + i] * x[t * H + i];
        for (int i = 0; i < H; i++) {
            double want = x[t * H + i] / sqrt(sum / H + EPS) * weight[i];
            compare(out[t * H + i], want, (H / 2 + 8) * U * fabs(want), &worst);
            compare(narrow[t * H + i], to_bf16(out[t * H + i]), 0.5, &worst);
        }
    }
    report(level, "norm", worst);
}

/* The chosen experts have the largest logits, up to what the norm's rounding moves these; so have their weights. */
static void check_route(int32_t level) {
    float x[T * H], weight[H], normed[T * H], weights[T * K];
    float router[E * H];
    double logits[E], worst = 0;
    int64_t ids[T * K];
    fill(x, T * H, 3), fill(weight, H, 2);
    for (int i = 0; i < E * H; i++)
        router[i] = (float)uniform(-0.2, 0.2);
    qmix_route job = {.norm = {x, weight, normed, NULL, 1, H, EPS, INFINITY, QMIX_FP32, QMIX_FP32, 0},
                      .router = router, .ids = ids, .weights = weights, .ids_stride = K, .experts = E, .chosen = K,
                      .groups = 1, .top_groups = 1, .scale = 1};
    if (qmix_routes(level, &job, T, 2))
        worst = NAN;
    for (int t = 0; t < T; t++) {
        double off = 0, total = 0, least = INFINITY;
        for (int e = 0; e < E; e++) { /* from the norm that was written: the sums are in double on both sides */
            double terms = logits[e] = 0;
            for (int i = 0; i < H; i++) {
                logits[e] += (double)normed[t * H + i] * router[e * H + i];
                terms += fabs((double)normed[t * H + i] * router[e * H + i]);
            }
            off = fmax(off, U * fabs(logits[e]) + H * 0x1p-53 * terms);
        }
        const int64_t *mine = ids + t * K;
        for (int k = 0; k < K; k++) {
            total += exp(logits[mine[k]] - logits[mine[0]]);
            least = fmin(least, logits[mine[k]]);
            if (k && logits[mine[k]] > logits[mine[k - 1]] + 2 * off)
                worst = NAN;
        }
        for (int k = 0; k < K; k++) {
            double want = exp(logits[mine[k]] - logits[mine[0]]) / total, spread = logits[mine[0]] - least;
            compare(weights[t * K + k], want, (4 * off + (spread + K + 8) * U) * want, &worst);
        }
        for (int e = 0; e < E; e++) {
            int chosen = 0;
            for (int k = 0; k < K; k++)
                chosen += mine[k] == e;
            if (chosen > 1 || (!chosen && logits[e] > least + 2 * off))
                worst = NAN;
        }
    }
    report(level, "router", worst);
}

/* Cosine and sine are those of libm in double, rounded; a turned number is two products and a sum. */
static void check_rotate(int32_t level) {
    float inverse[D / 2], c[T * D], s[T * D], queries[T * HEADS * D], keys[T * KV * D], out[T * (HEADS + KV) * D];
    int64_t positions[T] = {0, 17, 123456};
    double angles = 0, worst = 0;
    for (int d = 0; d < D / 2; d++)
        inverse[d] = (float)pow(10000, -2.0 * d / D);
    fill(queries, T * HEADS * D, 2), fill(keys, T * KV * D, 2);
    qmix_angles first = {positions, inverse, c, s, D, 1};
    qmix_rotate second = {queries, keys, c, s, out, HEADS, KV, D, D, QMIX_FP32, QMIX_FP32};
    if (qmix_angles_of(level, &first, T) || qmix_rotations(level, &second, T))
        worst = NAN;
    for (int t = 0; t < T; t++)
        for (int d = 0; d < D; d++) {
            double angle = (float)positions[t] * inverse[d % (D / 2)], sign = d < D / 2 ? -1 : 1;
            compare(c[t * D + d], cos(angle), 1.001 * U, &angles);
            compare(s[t * D + d], sign * sin(angle), 1.001 * U, &angles);
            for (int h = 0; h < HEADS + KV; h++) {
                const float *from = h < HEADS ? queries + (t * HEADS + h) * D : keys + (t * KV + h - HEADS) * D;
                double straight = (double)from[d] * c[t * D + d];
                double across = (double)from[(d + D / 2) % D] * s[t * D + d];
                compare(out[(t * (HEADS + KV) + h) * D + d], straight + across,
                        2.001 * U * (fabs(straight) + fabs(across)), &worst);
            }
        }
    report(level, "angles", angles);
    report(level, "rotary embedding", worst);
}

static void check_combine(int32_t level) {
    float rows[T * K * H], weights[T * K], out[T * H];
    double worst = 0;
    fill(rows, T * K * H, 2), fill(weights, T * K, 1);
    qmix_combine job = {rows, weights, out, K, H};
    if (qmix_combines(level, &job, T))
        worst = NAN;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < H; i++) {
            double want = 0, terms = 0;
            for (int k = 0; k < K; k++) {
                double term = (double)weights[t * K + k] * rows[(t * K + k) * H + i];
                want += term, terms += fabs(term);
            }
            compare(out[t * H + i], want, (K + 0.001) * U * terms, &worst);
        }
    report(level, "weighted sum", worst);
}

/* An exponential has 8 roundings and n more in its argument a, each of which moves it by |a| * U; the rest is 6. */
static void check_activation(int32_t level, const char *what, qmix_activation by, int type) {
    float gate[T * H], up[T * H], out[T * H];
    uint16_t narrow[2][T * H];
    double worst = 0;
    fill(gate, T * H, 8), fill(up, T * H, 8);
    for (int i = 0; type == QMIX_BF16 && i < T * H; i++) {
        gate[i] = from_bf16(narrow[0][i] = to_bf16(gate[i]));
        up[i] = from_bf16(narrow[1][i] = to_bf16(up[i]));
    }
    qmix_join job = {type ? (void *)narrow[0] : (void *)gate, type ? (void *)narrow[1] : (void *)up, out, H, by, type};
    if (qmix_joins(level, &job, T))
        worst = NAN;
    for (int i = 0; i < T * H; i++) {
        int clamped = by.kind == QMIX_SWIGLU_CLAMPED, gelu = by.kind == QMIX_GEGLU;
        double g = clamped ? fmin(gate[i], by.limit) : gate[i];
        double u = clamped ? fmax(fmin(up[i], by.limit), -by.limit) + 1 : up[i];
        double a = gelu ? 2 * sqrt(2 / acos(-1)) * (g + 0.044715 * g * g * g) : clamped ? by.alpha * g : g;
        double want = g / (1 + exp(-a)) * u, roundings = gelu ? 8 : clamped ? 2 : 0;
        double least = 0x1.6p-126 * fabs(g * u); /* exp(-87), beyond which it stays */
        compare(out[i], want, (14 + roundings * fmin(fabs(a), 88)) * U * fabs(want) + least, &worst);
    }
    char line[64];
    snprintf(line, sizeof line, "%s of %s", what, type ? "bf16" : "fp32");
    report(level, line, worst);
}

static void check_bias(int32_t level) {
    float y[T * H], before[T * H], bias[H];
    uint16_t narrow[T * H], old[T * H];
    double worst = 0;
    fill(before, T * H, 3), fill(bias, H, 2);
    memcpy(y, before, sizeof y);
    for (int i = 0; i < T * H; i++)
        old[i] = narrow[i] = to_bf16(before[i]);
    qmix_bias job = {y, bias, H, QMIX_FP32}, other = {narrow, bias, H, QMIX_BF16};
    if (qmix_biases(level, &job, T) || qmix_biases(level, &other, T))
        worst = NAN;
    for (int i = 0; i < T * H; i++) {
        compare(y[i], before[i] + bias[i % H], 0, &worst);
        compare(narrow[i], to_bf16(from_bf16(old[i]) + bias[i % H]), 0.5, &worst);
    }
    report(level, "biases", worst);
}

static void check_scale(int32_t level) {
    float y[T * H], before[T * H], weight[H], factor = 1.3f;
    double worst = 0;
    fill(before, T * H, 3), fill(weight, H, 2);
    for (int kind = 0; kind < 3; kind++) { /* a number a column, one number, none */
        memcpy(y, before, sizeof y);
        qmix_scaling job = {y, kind == 2 ? NULL : weight, H, factor, kind == 1};
        if (qmix_scale(&job, T))
            worst = NAN;
        for (int i = 0; i < T * H; i++) {
            float weighted = kind == 2 ? before[i] : before[i] * weight[kind ? 0 : i % H];
            compare(y[i], (double)weighted * factor, U * fabs((double)weighted * factor), &worst);
        }
    }
    report(level, "scales", worst);
}

/* One call of several gives the bits of the calls. */
static void check_sequence(int32_t level) {
    float x[T * H], weight[H], out[T * H], y[T * H], alone[T * H], sum[T * H];
    double worst = 0;
    fill(x, T * H, 3), fill(weight, H, 2), fill(y, T * H, 2);
    qmix_norm norm = {x, weight, out, NULL, 1, H, EPS, INFINITY, QMIX_FP32, QMIX_FP32, 0}, other = norm;
    other.out = alone;
    memcpy(sum, y, sizeof y);
    qmix_addition add = {out, sum, H};
    qmix_call calls[2] = {{&norm, QMIX_NORM, T}, {&add, QMIX_ADD, T}};
    if (qmix_sequence(level, QMIX_ACT_INT8, calls, 2, 2) || qmix_norms(level, &other, T) ||
        memcmp(out, alone, sizeof out))
        worst = NAN;
    for (int i = 0; i < T * H; i++)
        compare(sum[i], (double)y[i] + out[i], U * fabs((double)y[i] + out[i]), &worst);
    report(level, "a sequence of calls", worst);
}

void check_layer(int32_t level) {
    check_norm(level);
    check_route(level);
    check_rotate(level);
    check_combine(level);
    for (int type = QMIX_FP32; type <= QMIX_BF16; type++) {
        check_activation(level, "SwiGLU", (qmix_activation){QMIX_SWIGLU, 0, 0}, type);
        check_activation(level, "GEGLU", (qmix_activation){QMIX_GEGLU, 0, 0}, type);
        check_activation(level, "clamped SwiGLU", (qmix_activation){QMIX_SWIGLU_CLAMPED, 1.702f, 5}, type);
    }
    check_bias(level);
    check_scale(level);
    check_sequence(level);
}
