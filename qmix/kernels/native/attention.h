/* One query's attention over the cache of one key-value head, once for all instruction sets; products.h includes it.
 *
 * The positions of a head are cut into pieces, by their number alone (native.c), which threads take in any order. Within
 * a piece they come in chunks of CHUNK. Of each chunk first all scores are made, then its part of the sum of values, with
 * the largest score so far taken off every exponent; a chunk with a larger one scales down what was summed before
 * (Milakov & Gimelshein 2018). Whoever finishes the last piece of a head joins all of them in their order. So the bits
 * depend on the positions and on nothing else.
 *
 * Query heads go through a chunk up to TOGETHER at a time, so that a key or value is read and converted once for them.
 * While keys are multiplied, the values of the chunk are fetched into the second cache, and meanwhile the values the keys
 * of the next: a chunk of values is read several times, from there. The scale of an int8 key multiplies its score, that
 * of a value its weight.
 *
 * A head's sink (Xiao et al. 2023, arXiv 2309.17453) is one score more, joined after the pieces: it adds to the sum of
 * weights and to nothing else.
 *
 * D head size, a multiple of 16. G query heads of the key-value head. A row is one position's key or value.
 */
#include <stdatomic.h>

enum { CHUNK = 64, TOGETHER = 4, LINE = 64 };
_Static_assert(CHUNK % L == 0 && SUB % 2 == 0, "chunks are whole vectors, values are read in pairs of them");

/* What a piece leaves, one after another: sum of weighted values [G, D], largest score [G], sum of weights [G]. */
ALWAYS float *part_of_head(const qmix_pieces *work, int64_t head, int64_t piece) {
    int64_t heads = work->job->query_heads / work->job->kv_heads;
    return work->parts + (head * work->count + piece) * heads * (work->job->head_dim + 2);
}

static size_t attend_bytes(const qmix_attention *job) { /* the query heads [G, D], scores [TOGETHER, CHUNK] */
    return 4 * (size_t)(job->query_heads / job->kv_heads * job->head_dim + TOGETHER * CHUNK);
}

ALWAYS float read_number(int32_t type, const void *from, int64_t at) {
    return type == QMIX_FP32 ? ((const float *)from)[at] : from_bf16(((const uint16_t *)from)[at]);
}

ALWAYS vflt load_cached(const int type, const void *from, int64_t at) {
    return type == QMIX_KV_INT8 ? load_i8((const int8_t *)from + at) : load_bf16((const uint16_t *)from + at);
}

/* 2L numbers; with EVEN_ODD those of bf16 at even places first, which takes half the instructions. */
ALWAYS void load_two(const int type, const void *from, int64_t at, vflt *two) {
#ifdef EVEN_ODD
    if (type == QMIX_KV_BF16) {
        load_even_odd((const uint16_t *)from + at, two);
        return;
    }
#endif
    two[0] = load_cached(type, from, at);
    two[1] = load_cached(type, from, at + L);
}

/* to[j] of 2L numbers: from[j] in the order in which load_two has them, or back. */
ALWAYS void reorder(const int back, const float *from, float *to) {
    UNROLL for (int j = 0; j < 2 * L; j++) {
        int ordered = j % 2 * L + j / 2;
        to[back ? j : ordered] = from[back ? ordered : j];
    }
}

/* [D] numbers as load_two has them, or back; in place. */
static void reorder_all(const qmix_attention *job, const int back, float *numbers) {
#ifdef EVEN_ODD
    for (int64_t d = 0; job->kv_type == QMIX_KV_BF16 && d + 2 * L <= job->head_dim; d += 2 * L) {
        float some[2 * L];
        memcpy(some, numbers + d, sizeof some);
        reorder(back, some, numbers + d);
    }
#else
    (void)job, (void)back, (void)numbers;
#endif
}

/* A number that stays in its register: gcc would read it from memory for every use. */
ALWAYS vflt held(vflt x) {
#ifdef __x86_64__
    __asm__("" : "+v"(x));
#endif
    return x;
}

ALWAYS void fetch(const char *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += LINE)
        __builtin_prefetch(from + at, 0, 2);
}

/* Store one vector [D] at position `at`. int8: x = code * scale to half a scale; kernels/kv_codes.py does the same to
 * the bit. */
static void store_vector(const qmix_attention *job, int32_t type, const void *from, int64_t head, void *cached,
                         float *scales, int64_t at) {
    int64_t size = job->head_dim, first = head * size, to = (head * job->capacity + at) * size;
    if (job->kv_type == QMIX_KV_BF16) {
        for (int64_t d = 0; d < size; d++)
            ((uint16_t *)cached)[to + d] = to_bf16(read_number(type, from, first + d));
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
        ((int8_t *)cached)[to + d] = (int8_t)((int32_t)float_bits(code + 12582912.0f) - 0x4b400000);
    }
    scales[head * job->capacity + at] = largest / 127;
}

/* sums[c][k]: its lanes' sum is query[c] . row k, for C query heads. ahead: as many rows, fetched meanwhile. */
ALWAYS void score_keys(const int count, const int keys, const int type, const float *query, int64_t size,
                       const char *const *rows, const char *ahead, vflt (*sums)[L]) {
    const int64_t some = 2 * L * keys * (type == QMIX_KV_INT8 ? 1 : 2);
    vflt dots[8][TOGETHER];
    UNROLL for (int k = 0; k < keys; k++)
        UNROLL for (int c = 0; c < count; c++)
            dots[k][c] = set_f(0);
    int64_t d = 0;
    for (; d + 2 * L <= size; d += 2 * L) {
        vflt two[8][2];
        fetch(ahead + d / (2 * L) * some, some);
        UNROLL for (int k = 0; k < keys; k++)
            load_two(type, rows[k], d, two[k]);
        UNROLL for (int v = 0; v < 2; v++)
            UNROLL for (int c = 0; c < count; c++) {
                vflt q = held(load_f(query + c * size + d + v * L));
                UNROLL for (int k = 0; k < keys; k++)
                    dots[k][c] = fma_f(two[k][v], q, dots[k][c]);
            }
    }
    for (; d < size; d += L)
        UNROLL for (int k = 0; k < keys; k++) {
            vflt key = load_cached(type, rows[k], d);
            UNROLL for (int c = 0; c < count; c++)
                dots[k][c] = fma_f(key, load_f(query + c * size + d), dots[k][c]);
        }
    UNROLL for (int k = 0; k < keys; k++)
        UNROLL for (int c = 0; c < count; c++)
            sums[c][k] = dots[k][c];
}

/* scores[c][i] = query[c] . key i, for C query heads and `length` positions; up to a multiple of L the last repeats.
 * ahead: as many rows, fetched meanwhile. */
ALWAYS void score(const int count, const int type, const float *query, int64_t size, const char *keys, int64_t length,
                  const char *ahead, float *scores) {
    const int sums_at_once = count == 1 ? 8 : count == 2 ? 4 : 2; /* times C, so that they need not wait for each other */
    const int together = sums_at_once < L ? sums_at_once : L;
    int64_t row = size * (type == QMIX_KV_INT8 ? 1 : 2);
    for (int64_t i = 0; i < length; i += L) {
        vflt sums[TOGETHER][L];
        for (int j = 0; j < L; j += together) {
            const char *rows[8];
            UNROLL for (int k = 0; k < together; k++)
                rows[k] = keys + (i + j + k < length ? i + j + k : length - 1) * row;
            vflt found[TOGETHER][L];
            score_keys(count, together, type, query, size, rows, ahead + (i + j) * row, found);
            UNROLL for (int c = 0; c < count; c++)
                UNROLL for (int k = 0; k < together; k++)
                    sums[c][j + k] = found[c][k];
        }
        UNROLL for (int c = 0; c < count; c++)
            store_f(scores + c * CHUNK + i, row_sums(sums[c]));
    }
}

typedef int32_t lanes __attribute__((vector_size(4 * L)));
typedef float float_lanes __attribute__((vector_size(4 * L)));

ALWAYS vflt larger(vflt a, vflt b) { /* b where a is NaN */
    lanes mask = (lanes)((float_lanes)a > (float_lanes)b);
    return (vflt)(((lanes)a & mask) | ((lanes)b & ~mask));
}

/* exp_of of lanes that are at most 0, in vectors: compilers leave the comparisons of exp_of as branches. */
ALWAYS vflt exp_lanes(vflt x) {
    vflt a = larger(set_f(-87.0f), x);
    float_lanes shifted = (float_lanes)fma_f(a, set_f(1.44269504f), set_f(12582912.0f));
    vflt n = (vflt)(shifted - 12582912.0f);
    vflt r = fma_f(n, set_f(2.12194440e-4f), fma_f(n, set_f(-0.693359375f), a));
    vflt p = fma_f(set_f(1.9875691500e-4f), r, set_f(1.3981999507e-3f));
    p = fma_f(p, r, set_f(8.3334519073e-3f));
    p = fma_f(p, r, set_f(4.1665795894e-2f));
    p = fma_f(p, r, set_f(1.6666665459e-1f));
    p = fma_f(p, r, set_f(5.0000001201e-1f));
    p = fma_f(mul_f(p, r), r, (vflt)((float_lanes)r + 1.0f));
    return mul_f(p, (vflt)(((lanes)shifted - 0x4b400000 + 127) << 23));
}

/* scores [CHUNK], padded with -INFINITY, become weights; their sum is added to *total, and the return is what all that
 * was summed before must be multiplied with. */
ALWAYS float weigh(float *scores, float *top, float *total) {
    float each[L], largest = *top, sum = 0;
    vflt most = set_f(largest), sums = set_f(0);
    for (int i = 0; i < CHUNK; i += L)
        most = larger(load_f(scores + i), most);
    store_f(each, most);
    for (int j = 0; j < L; j++)
        largest = each[j] > largest ? each[j] : largest;
    for (int i = 0; i < CHUNK; i += L) {
        vflt weights = exp_lanes((vflt)((float_lanes)load_f(scores + i) - largest));
        store_f(scores + i, weights);
        sums = (vflt)((float_lanes)sums + (float_lanes)weights);
    }
    store_f(each, sums);
    for (int j = 0; j < L; j++)
        sum += each[j];
    float before = exp_of(*top - largest);
    *top = largest;
    *total = *total * before + sum;
    return before;
}

/* sum[c] = sum[c] * before[c] + the sum of weights[c][i] * value i, over V vectors of dimensions from d on. ahead: V * L
 * numbers for each of the rows, fetched meanwhile. */
ALWAYS void add_values(const int count, const int vectors, const int type, const float *weights, const float *before,
                       const char *values, int64_t length, int64_t size, int64_t d, const char *ahead, float *sum) {
    const int64_t item = type == QMIX_KV_INT8 ? 1 : 2, some = vectors * L * item;
    vflt sums[TOGETHER][SUB];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[c][v] = mul_f(load_f(sum + c * size + d + v * L), set_f(before[c]));
    for (int64_t i = 0; i < length; i++) {
        const char *row = values + (i * size + d) * item;
        vflt value[SUB];
        if (i * some % LINE == 0)
            fetch(ahead + i * some, some);
        if (vectors > 1)
            UNROLL for (int v = 0; v < vectors; v += 2)
                load_two(type, row, v * L, value + v);
        else
            value[0] = load_cached(type, row, 0);
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

/* Query heads [g, g + C) through `length` positions of the caches' rows from `first` on, at most CHUNK. */
ALWAYS void chunk_of(const int count, const int type, const qmix_attention *job, int64_t first, int64_t length,
                     const char *next_keys, const float *query, float *scores, float *sum, float *top, float *total) {
    const int64_t size = job->head_dim, row = size * (type == QMIX_KV_INT8 ? 1 : 2);
    const char *keys = (const char *)job->keys + first * row, *values = (const char *)job->values + first * row;
    float before[TOGETHER];
    score(count, type, query, size, keys, length, values, scores);
    for (int c = 0; c < count; c++) {
        float *own = scores + c * CHUNK;
        if (type == QMIX_KV_INT8)
            for (int64_t i = 0; i < length; i++)
                own[i] *= job->key_scales[first + i];
        if (job->softcap > 0)
            for (int64_t i = 0; i < length; i++)
                own[i] = job->softcap * tanhf(own[i] / job->softcap);
        for (int64_t i = length; i < CHUNK; i++)
            own[i] = -INFINITY;
        before[c] = weigh(own, top + c, total + c);
        if (type == QMIX_KV_INT8)
            for (int64_t i = 0; i < length; i++)
                own[i] *= job->value_scales[first + i];
    }
    int64_t d = 0;
    for (; d + SUB * L <= size; d += SUB * L)
        add_values(count, SUB, type, scores, before, values, length, size, d, next_keys + d * (row / size) * CHUNK, sum);
    for (; d + 2 * L <= size; d += 2 * L) /* in the order of load_two, as everywhere */
        add_values(count, 2, type, scores, before, values, length, size, d, next_keys + d * (row / size) * CHUNK, sum);
    for (; d < size; d += L)
        add_values(count, 1, type, scores, before, values, length, size, d, next_keys + d * (row / size) * CHUNK, sum);
}

#define CHUNK_OF(count, type, name) \
    APART void name(const qmix_attention *job, int64_t first, int64_t length, const char *next_keys, \
                    const float *query, float *scores, float *sum, float *top, float *total) { \
        chunk_of(count, type, job, first, length, next_keys, query, scores, sum, top, total); \
    }
CHUNK_OF(1, QMIX_KV_BF16, chunk_1_bf16)
CHUNK_OF(2, QMIX_KV_BF16, chunk_2_bf16)
CHUNK_OF(3, QMIX_KV_BF16, chunk_3_bf16)
CHUNK_OF(4, QMIX_KV_BF16, chunk_4_bf16)
CHUNK_OF(1, QMIX_KV_INT8, chunk_1_int8)
CHUNK_OF(2, QMIX_KV_INT8, chunk_2_int8)
CHUNK_OF(3, QMIX_KV_INT8, chunk_3_int8)
CHUNK_OF(4, QMIX_KV_INT8, chunk_4_int8)
#undef CHUNK_OF

typedef void chunk_function(const qmix_attention *, int64_t, int64_t, const char *, const float *, float *, float *,
                            float *, float *);
static chunk_function *const chunks_of[2][TOGETHER] = {
    {chunk_1_int8, chunk_2_int8, chunk_3_int8, chunk_4_int8}, /* QMIX_KV_INT8 */
    {chunk_1_bf16, chunk_2_bf16, chunk_3_bf16, chunk_4_bf16}, /* QMIX_KV_BF16 */
};

/* out [G, D] of a head: the sums of its pieces over their weights, in the order of the positions. */
static void join_pieces(const qmix_pieces *work, int64_t head) {
    const qmix_attention *job = work->job;
    int64_t heads = job->query_heads / job->kv_heads, size = job->head_dim, from = head * heads * size;
    float *sum = part_of_head(work, head, 0); /* of all that came before, at last of all */
    for (int64_t g = 0; g < heads; g++) {
        float *top = sum + heads * size + g, *total = top + heads;
        for (int64_t piece = 1; piece < work->count; piece++) {
            const float *part = part_of_head(work, head, piece), *part_top = part + heads * size + g;
            float largest = *part_top > *top ? *part_top : *top;
            float before = exp_of(*top - largest), now = exp_of(*part_top - largest);
            *top = largest;
            *total = *total * before + part_top[heads] * now;
            for (int64_t d = 0; d < size; d++)
                sum[g * size + d] = sum[g * size + d] * before + part[g * size + d] * now;
        }
        if (job->sinks) {
            float sink = job->sinks[head * heads + g], largest = sink > *top ? sink : *top;
            float before = exp_of(*top - largest);
            *total = *total * before + exp_of(sink - largest);
            for (int64_t d = 0; d < size; d++)
                sum[g * size + d] *= before;
        }
        reorder_all(job, 1, sum + g * size);
        for (int64_t d = 0; d < size; d++) {
            float value = sum[g * size + d] / *total;
            int64_t at = from + g * size + d;
            if (job->query_type == QMIX_FP32)
                ((float *)job->out)[at] = value;
            else
                ((uint16_t *)job->out)[at] = to_bf16(value);
        }
    }
}

/* One piece of the positions of a head; whoever is the last of the head's joins them. */
static void attend_head(const qmix_pieces *work, int64_t head, int64_t piece, void *scratch) {
    const qmix_attention *job = work->job;
    int64_t heads = job->query_heads / job->kv_heads, size = job->head_dim, row = size * (job->kv_type == QMIX_KV_INT8 ? 1 : 2);
    int64_t at = job->begin + piece * work->length, end = at + work->length < job->end ? at + work->length : job->end;
    float *query = scratch, *scores = query + heads * size, scale = job->scale > 0 ? job->scale : 1 / sqrtf((float)size);
    float *sum = part_of_head(work, head, piece), *top = sum + heads * size, *total = top + heads;
    if (job->new_keys && end == job->end)
        store_vector(job, job->key_type, job->new_keys, head, job->keys, job->key_scales, end - 1);
    if (job->new_values && end == job->end)
        store_vector(job, job->value_type, job->new_values, head, job->values, job->value_scales, end - 1);
    for (int64_t g = 0; g < heads; g++) {
        for (int64_t d = 0; d < size; d++)
            query[g * size + d] = read_number(job->query_type, job->query, (head * heads + g) * size + d) * scale;
        reorder_all(job, 0, query + g * size);
        top[g] = -INFINITY;
        total[g] = 0;
    }
    memset(sum, 0, 4 * (size_t)(heads * size));
    for (; at < end; at += CHUNK) {
        int64_t length = end - at < CHUNK ? end - at : CHUNK, first = head * job->capacity + at;
        int64_t next = at + CHUNK < job->end ? first + CHUNK : first; /* also of the next piece */
        for (int64_t g = 0, count; g < heads; g += count) {
            count = heads - g < TOGETHER ? heads - g : TOGETHER;
            chunks_of[job->kv_type][count - 1](job, first, length, (const char *)job->keys + next * row,
                                               query + g * size, scores, sum + g * size, top + g, total + g);
        }
    }
    if (atomic_fetch_sub(work->missing + head, 1) == 1)
        join_pieces(work, head);
}
