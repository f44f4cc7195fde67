/* Attention of one position over a cache of keys and values in int8 and bf16, without and with sinks, a scale and a cap of
 * its own, and what is stored of the new ones.
 *
 * Q query heads, KV key-value heads, D head size.
 */
#include "driver.h"

enum { KV = 2, CAPACITY = 310, MOST_D = 80, MOST_Q = 5 * KV };
static const float SCALE = 0.2f, SOFTCAP = 3; /* where they are not the usual ones */

typedef struct {
    int64_t size, heads, begin, end; /* heads: of a key-value head */
    int kv_type, query_type, own; /* own: with sinks, scale and softcap */
    float sinks[MOST_Q];
    uint16_t query16[MOST_Q * MOST_D];
    float query[MOST_Q * MOST_D], new_rows[2][KV * MOST_D];
    int8_t codes[2][KV * CAPACITY * MOST_D]; /* of keys and of values */
    uint16_t halves[2][KV * CAPACITY * MOST_D];
    float scales[2][KV * CAPACITY];
    float out[MOST_Q * MOST_D];
    uint16_t out16[MOST_Q * MOST_D];
} scene;

static void prepare(scene *s) {
    fill(s->sinks, MOST_Q, 6);
    for (int64_t i = 0; i < KV * s->heads * s->size; i++) {
        s->query[i] = (float)uniform(-2, 2);
        if (s->query_type == QMIX_BF16)
            s->query[i] = from_bf16(s->query16[i] = to_bf16(s->query[i]));
    }
    for (int which = 0; which < 2; which++) {
        fill(s->new_rows[which], KV * s->size, 2);
        for (int64_t i = 0; i < KV * CAPACITY * s->size; i++) {
            s->codes[which][i] = (int8_t)((int)(draw() % 255) - 127);
            s->halves[which][i] = to_bf16((float)uniform(-2, 2));
        }
        for (int64_t i = 0; i < KV * CAPACITY; i++)
            s->scales[which][i] = (float)uniform(0, 2.0 / 127);
    }
}

static int run(int32_t level, scene *s, int32_t threads) {
    int int8 = s->kv_type == QMIX_KV_INT8, narrow = s->query_type == QMIX_BF16;
    qmix_attention job = {.query = narrow ? (void *)s->query16 : (void *)s->query, .new_keys = s->new_rows[0],
                          .new_values = s->new_rows[1], .keys = int8 ? (void *)s->codes[0] : (void *)s->halves[0],
                          .values = int8 ? (void *)s->codes[1] : (void *)s->halves[1], .key_scales = s->scales[0],
                          .value_scales = s->scales[1], .out = narrow ? (void *)s->out16 : (void *)s->out,
                          .capacity = CAPACITY, .begin = s->begin, .end = s->end, .query_heads = KV * s->heads,
                          .kv_heads = KV, .head_dim = s->size, .kv_type = s->kv_type, .query_type = s->query_type,
                          .key_type = QMIX_FP32, .value_type = QMIX_FP32, .sinks = s->own ? s->sinks : NULL,
                          .scale = s->own ? SCALE : 0, .softcap = s->own ? SOFTCAP : 0};
    return qmix_attend(level, &job, threads);
}

static double kept(const scene *s, int which, int64_t head, int64_t position, int64_t d) {
    int64_t at = head * CAPACITY + position, i = at * s->size + d;
    return s->kv_type == QMIX_KV_INT8 ? (double)s->codes[which][i] * s->scales[which][at]
                                      : from_bf16(s->halves[which][i]);
}

/* The new key and value in bf16, rounded, or in int8, to half a step and some roundings of it. */
static void check_stored(const scene *s, double *worst) {
    for (int which = 0; which < 2; which++)
        for (int64_t head = 0; head < KV; head++) {
            const float *row = s->new_rows[which] + head * s->size;
            float largest = 0;
            for (int64_t d = 0; d < s->size; d++)
                largest = fabsf(row[d]) > largest ? fabsf(row[d]) : largest;
            double step = s->kv_type == QMIX_KV_INT8 ? largest / 127 * (0.5 + 4 * 127 * U) : 0;
            for (int64_t d = 0; d < s->size; d++)
                compare(kept(s, which, head, s->end - 1, d), row[d], step ? step : U_BF16 * fabs(row[d]), worst);
        }
}

/* A score sums D products of a query that was scaled (two roundings) and is multiplied by the key's scale; a cap makes it
 * no more wrong, but for 4 roundings of its own. Its error d moves a weight by a factor of e^d. exp errs by 4 U and by U
 * times its argument, which the scores bound. The sum of values has as many terms as positions, and what stands is scaled
 * once a chunk of 128, and for a sink. */
static void check_head(const scene *s, int64_t q, double *worst) {
    int64_t size = s->size, head = q / s->heads, length = s->end - s->begin;
    double scores[CAPACITY], scale = s->own ? SCALE : 1 / sqrt((double)size), score_off = 0;
    double top = s->own ? s->sinks[q] : -INFINITY, least = top, total = 0;
    for (int64_t p = 0; p < length; p++) {
        double sum = 0, terms = 0;
        for (int64_t d = 0; d < size; d++) {
            double term = s->query[q * size + d] * kept(s, 0, head, s->begin + p, d) * scale;
            sum += term, terms += fabs(term);
        }
        scores[p] = sum = s->own ? SOFTCAP * tanh(sum / SOFTCAP) : sum;
        top = sum > top ? sum : top;
        score_off = fmax(score_off, (double)(size + (s->own ? 10 : 6)) * U * terms);
    }
    least = s->own ? fmin(least, top) : top;
    total = s->own ? exp(s->sinks[q] - top) : 0;
    for (int64_t p = 0; p < length; p++) {
        least = fmin(least, scores[p]);
        total += scores[p] = exp(scores[p] - top);
    }
    double weight_off = 2 * (score_off + (4 + top - least) * U) + (2 * (double)length + 16) * U;
    for (int64_t d = 0; d < size; d++) {
        double want = 0, terms = 0;
        for (int64_t p = 0; p < length; p++) {
            double term = scores[p] / total * kept(s, 1, head, s->begin + p, d);
            want += term, terms += fabs(term);
        }
        int narrow = s->query_type == QMIX_BF16;
        double got = narrow ? from_bf16(s->out16[q * size + d]) : s->out[q * size + d];
        compare(got, want, weight_off * terms + (narrow ? U_BF16 * fabs(want) : 0), worst);
    }
}

static void check_scene(int32_t level, scene *s) {
    static const int64_t spans[][2] = {{0, 1}, {3, 100}, {0, 128}, {5, 300}};
    double worst = 0, stored = 0, threads = 0;
    prepare(s);
    for (int i = 0; i < 4; i++) {
        s->begin = spans[i][0], s->end = spans[i][1];
        if (run(level, s, 1))
            worst = NAN;
        check_stored(s, &stored);
        for (int64_t q = 0; q < KV * s->heads; q++)
            check_head(s, q, &worst);
    }
    scene *again = make(1, sizeof *again);
    *again = *s;
    if (run(level, again, 2) || memcmp(again->out, s->out, sizeof s->out) ||
        memcmp(again->out16, s->out16, sizeof s->out16))
        threads = NAN;
    free(again);
    char what[112];
    snprintf(what, sizeof what, "attention over %s, heads of %d, %d together, %s queries%s",
             s->kv_type == QMIX_KV_INT8 ? "int8" : "bf16", (int)s->size, (int)s->heads,
             s->query_type == QMIX_BF16 ? "bf16" : "fp32", s->own ? ", sinks, scale, cap" : "");
    report(level, what, worst);
    report(level, "  what is stored", stored);
    report(level, "  two threads give the bits of one", threads);
}

void check_attention(int32_t level) {
    scene *s = make(1, sizeof *s);
    for (s->kv_type = QMIX_KV_INT8; s->kv_type <= QMIX_KV_BF16; s->kv_type++)
        for (s->query_type = QMIX_FP32; s->query_type <= QMIX_BF16; s->query_type++) {
            s->heads = s->query_type == QMIX_FP32 ? 5 : 1;
            s->size = s->query_type == QMIX_FP32 ? 80 : 16; /* whole sets of vectors, and a rest of one */
            for (s->own = 0; s->own < 2; s->own++)
                check_scene(level, s);
        }
    free(s);
}
