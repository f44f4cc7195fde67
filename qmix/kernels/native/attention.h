/* One query's attention over the cache of one key-value head, once for all instruction sets; products.h includes it.
 *
 * Positions come in chunks of CHUNK. Of each chunk first all scores are made, then its part of the sum of values, with
 * the largest score so far taken off every exponent; a chunk with a larger one scales down what was summed before
 * (Milakov & Gimelshein 2018). Query heads go through a chunk up to TOGETHER at a time, so that a key or value is
 * converted once for them. The scale of an int8 key multiplies its score, that of a value its weight.
 *
 * D head size, a multiple of L. G query heads of the key-value head.
 */

enum { CHUNK = 128, TOGETHER = 4 };

typedef struct { /* in scratch */
    float *query;  /* [G, D], times 1 / sqrt(D) */
    float *sum;    /* [G, D] of the values */
    float *top;    /* [G] largest score so far */
    float *total;  /* [G] of the weights */
    float *scores; /* [TOGETHER, CHUNK] */
} attention_view;

static size_t attend_bytes(const qmix_attention *job) {
    int64_t heads = job->query_heads / job->kv_heads;
    return 4 * (size_t)(2 * heads * (job->head_dim + 1) + TOGETHER * CHUNK);
}

ALWAYS float read_number(int32_t type, const void *from, int64_t at) {
    return type == QMIX_FP32 ? ((const float *)from)[at] : from_bf16(((const uint16_t *)from)[at]);
}

ALWAYS vflt load_kept(const int type, const void *from, int64_t at) {
    return type == QMIX_KV_INT8 ? load_i8((const int8_t *)from + at) : load_bf16((const uint16_t *)from + at);
}

/* Store one vector [D] at position `at`. int8: x = code * scale to half a scale; qmix/model/kvint8.py does the same to
 * the bit. */
static void keep_vector(const qmix_attention *job, int32_t type, const void *from, int64_t head, void *kept,
                        float *scales, int64_t at) {
    int64_t size = job->head_dim, first = head * size, to = (head * job->capacity + at) * size;
    if (job->kv_type == QMIX_KV_BF16) {
        for (int64_t d = 0; d < size; d++)
            ((uint16_t *)kept)[to + d] = to_bf16(read_number(type, from, first + d));
        return;
    }
    uint32_t peak = 0;
    for (int64_t d = 0; d < size; d++) {
        uint32_t bits = float_bits(read_number(type, from, first + d)) & 0x7fffffff; /* ordered as |x| is, NaN on top */
        peak = bits > peak ? bits : peak;
    }
    float largest;
    memcpy(&largest, &peak, 4);
    float inverse = 1 / (largest < 1e-30f ? 1e-30f : largest);
    inverse = inverse * 127;
    for (int64_t d = 0; d < size; d++) {
        float code = read_number(type, from, first + d) * inverse; /* a statement of its own, so that it is rounded */
        ((int8_t *)kept)[to + d] = (int8_t)((int32_t)float_bits(code + 12582912.0f) - 0x4b400000);
    }
    scales[head * job->capacity + at] = largest / 127;
}

/* scores[c][i] = query[c] . key i, for C query heads and `length` positions; up to a multiple of L the last repeats. */
ALWAYS void score(const int count, const int type, const float *query, int64_t size, const void *keys, int64_t first,
                  int64_t length, float *scores) {
    for (int64_t i = 0; i < length; i += L) {
        vflt sums[TOGETHER][L];
        for (int64_t j = 0; j < L; j++) {
            int64_t at = (first + (i + j < length ? i + j : length - 1)) * size;
            vflt dots[TOGETHER];
            UNROLL for (int c = 0; c < count; c++)
                dots[c] = set_f(0);
            for (int64_t d = 0; d < size; d += L) {
                vflt key = load_kept(type, keys, at + d);
                UNROLL for (int c = 0; c < count; c++)
                    dots[c] = fma_f(key, load_f(query + c * size + d), dots[c]);
            }
            UNROLL for (int c = 0; c < count; c++)
                sums[c][j] = dots[c];
        }
        UNROLL for (int c = 0; c < count; c++)
            store_f(scores + c * CHUNK + i, row_sums(sums[c]));
    }
}

/* scores [CHUNK], padded with -INFINITY, become weights; their sum is added to *total, and the return is what all that
 * was summed before must be multiplied with. */
static float weigh(float *scores, float *top, float *total) {
    float lanes[16], largest = *top, sum = 0;
    for (int j = 0; j < 16; j++)
        lanes[j] = largest;
    for (int i = 0; i < CHUNK; i += 16)
        for (int j = 0; j < 16; j++)
            lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
    for (int j = 0; j < 16; j++)
        largest = lanes[j] > largest ? lanes[j] : largest;
    for (int i = 0; i < CHUNK; i++)
        scores[i] = exp_of(scores[i] - largest);
    for (int j = 0; j < 16; j++)
        lanes[j] = 0;
    for (int i = 0; i < CHUNK; i += 16)
        for (int j = 0; j < 16; j++)
            lanes[j] += scores[i + j];
    for (int j = 0; j < 16; j++)
        sum += lanes[j];
    float before = exp_of(*top - largest);
    *top = largest;
    *total = *total * before + sum;
    return before;
}

/* sum[c] += weights[c][i] * value i, over V vectors of dimensions from d on. */
ALWAYS void add_values(const int count, const int vectors, const int type, const float *weights, const void *values,
                       int64_t first, int64_t length, int64_t size, int64_t d, float *sum) {
    vflt sums[TOGETHER][SUB];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[c][v] = load_f(sum + c * size + d + v * L);
    for (int64_t i = 0; i < length; i++) {
        vflt value[SUB];
        UNROLL for (int v = 0; v < vectors; v++)
            value[v] = load_kept(type, values, (first + i) * size + d + v * L);
        UNROLL for (int c = 0; c < count; c++) {
            vflt weight = set_f(weights[c * CHUNK + i]);
            UNROLL for (int v = 0; v < vectors; v++)
                sums[c][v] = fma_f(value[v], weight, sums[c][v]);
        }
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            store_f(sum + c * size + d + v * L, sums[c][v]);
}

/* Query heads [g, g + C) through positions [first, first + length) of the cache of key-value heads, at most CHUNK. */
ALWAYS void chunk_of(const int count, const int type, const qmix_attention *job, const attention_view *view, int64_t g,
                     int64_t first, int64_t length) {
    int64_t size = job->head_dim, d = 0;
    float *sum = view->sum + g * size, *scores = view->scores;
    score(count, type, view->query + g * size, size, job->keys, first, length, scores);
    for (int c = 0; c < count; c++) {
        float *own = scores + c * CHUNK;
        if (type == QMIX_KV_INT8)
            for (int64_t i = 0; i < length; i++)
                own[i] *= job->key_scales[first + i];
        for (int64_t i = length; i < CHUNK; i++)
            own[i] = -INFINITY;
        float before = weigh(own, view->top + g + c, view->total + g + c);
        for (int64_t i = 0; i < size; i++)
            sum[c * size + i] *= before;
        if (type == QMIX_KV_INT8)
            for (int64_t i = 0; i < length; i++)
                own[i] *= job->value_scales[first + i];
    }
    for (; d + SUB * L <= size; d += SUB * L)
        add_values(count, SUB, type, scores, job->values, first, length, size, d, sum);
    for (; d < size; d += L)
        add_values(count, 1, type, scores, job->values, first, length, size, d, sum);
}

ALWAYS void chunks_of(const int type, const qmix_attention *job, const attention_view *view, int64_t heads,
                      int64_t row) {
    for (int64_t at = job->begin; at < job->end; at += CHUNK) {
        int64_t length = job->end - at < CHUNK ? job->end - at : CHUNK, first = row + at;
        int64_t g = 0;
        for (; g + 4 <= heads; g += 4)
            chunk_of(4, type, job, view, g, first, length);
        for (; g < heads; g++)
            chunk_of(1, type, job, view, g, first, length);
    }
}

static void attend_head(const qmix_attention *job, int64_t head, void *scratch) {
    int64_t heads = job->query_heads / job->kv_heads, size = job->head_dim, from = head * heads * size;
    float *query = scratch, scale = 1 / sqrtf((float)size);
    attention_view view = {query, query + heads * size, query + 2 * heads * size, query + 2 * heads * size + heads,
                           query + 2 * heads * (size + 1)};
    if (job->new_keys)
        keep_vector(job, job->key_type, job->new_keys, head, job->keys, job->key_scales, job->end - 1);
    if (job->new_values)
        keep_vector(job, job->value_type, job->new_values, head, job->values, job->value_scales, job->end - 1);
    for (int64_t i = 0; i < heads * size; i++) {
        query[i] = read_number(job->query_type, job->query, from + i) * scale;
        view.sum[i] = 0;
    }
    for (int64_t g = 0; g < heads; g++) {
        view.top[g] = -INFINITY;
        view.total[g] = 0;
    }
    if (job->kv_type == QMIX_KV_INT8)
        chunks_of(QMIX_KV_INT8, job, &view, heads, head * job->capacity);
    else
        chunks_of(QMIX_KV_BF16, job, &view, heads, head * job->capacity);
    for (int64_t i = 0; i < heads * size; i++) {
        float value = view.sum[i] / view.total[i / size];
        if (job->query_type == QMIX_FP32)
            ((float *)job->out)[from + i] = value;
        else
            ((uint16_t *)job->out)[from + i] = to_bf16(value);
    }
}
