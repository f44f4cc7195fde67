/* The C ABI of qmix's CPU kernels, called through ctypes: products with packed weights, attention over a KV cache,
 * and what else a layer does to a few tokens.
 *
 * Formats (qmix/formats/grouped.py and int8.py have the byte contract):
 *   int4   w = (q - 8) * scale + zero, blocks of 32 or 64 rows, groups of 32, 64 or 128 columns
 *   int8   w = q * scale, one scale a row
 *   mxfp4  w = e2m1[q] * 2^(s - 127), blocks of 64 rows, groups of 32 columns (qmix/formats/mxfp4.py)
 *   q8_0, q4_k and so on: ggml's, blocks of 64 rows, groups of 32 columns, of q6_k 16 (qmix/formats/carried.py)
 *
 * T tokens, N padded rows (outputs), K padded columns (inputs), B rows per block, g columns per group.
 */
#ifndef QMIX_NATIVE_H
#define QMIX_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define QMIX_ABI 15

enum { QMIX_FP32 = 0, QMIX_BF16 = 1, QMIX_FP16 = 2 }; /* types of numbers; fp16 of a router's weights alone */
enum { QMIX_E2M1 = 5 }; /* mxfp4, in the place of a format's bits */
enum { QMIX_Q8_0 = 16, QMIX_Q4_0, QMIX_Q4_1, QMIX_Q5_0, QMIX_Q5_1, QMIX_Q4_K, QMIX_Q5_K, QMIX_Q6_K, QMIX_IQ4_NL,
       QMIX_IQ4_XS }; /* the same */
enum { QMIX_ACT_INT8 = 0, QMIX_ACT_BF16 = 1 };  /* what the products see of the activations */

/* What joins gate g and up u (qmix/spec/layers.py's Activation): silu(g) * u; gelu by tanh of g, times u; or with g
 * clamped from above to `limit` and u to both sides g * sigmoid(alpha * g) * (u + 1). */
enum { QMIX_SWIGLU = 0, QMIX_GEGLU = 1, QMIX_SWIGLU_CLAMPED = 2 };
typedef struct {
    int32_t kind;
    float alpha, limit;
} qmix_activation;

/* One product y[y_rows] = x[x_rows] W^T + bias; with `gated`, W = [Wgate; Wup], y = activation(x Wgate^T + bias of gate,
 * x Wup^T + bias of up). Strides are in elements. */
typedef struct {
    const uint8_t *weight;  /* int4, int3, int2: [N/B, K, bits * B/8]; int8: [N, K]; mxfp4: as int4; q8_0 and so on:
                             * [N/64, K/8, 64 * bits] */
    const uint16_t *params; /* bf16 [K/g, N, 2], scale and zero; int8: bf16 [N]; mxfp4: bytes [K/g, N]; q8_0 and so on:
                             * bytes [N/64, K/columns, 64 * each] */
    const float *bias;      /* [parts * rows], or NULL */
    const void *x;          /* [*, x_stride], of which `cols` columns count */
    const int64_t *x_rows;  /* [T] rows of x, or NULL for 0..T-1 */
    void *y;                /* [*, y_stride] */
    const int64_t *y_rows;  /* [T] rows of y, or NULL for 0..T-1 */
    int64_t x_stride, y_stride;
    int64_t tokens;         /* T */
    int64_t padded_rows;    /* N */
    int64_t padded_cols;    /* K */
    int64_t rows;           /* rows wanted of each part; its padding is dropped */
    int64_t cols;           /* columns of x; the padded ones count as 0 */
    int32_t bits;           /* 4, 3, 2, 8, QMIX_E2M1, QMIX_Q8_0 and so on */
    int32_t block;          /* B; 64 for int8 */
    int32_t group;          /* g; 64 for int8 */
    int32_t parts;          /* W's parts, each padded to N / parts rows */
    int32_t gated;
    int32_t x_type, y_type;
    int32_t add;            /* to what y has; fp32 only */
    int32_t activation;     /* of a gated product */
    float alpha, limit;     /* of QMIX_SWIGLU_CLAMPED */
    const uint8_t *up_weight; /* a gated product's up where its format is not the gate's, else NULL: then those above */
    const uint16_t *up_params; /* are of the gate, N / 2 rows; in blocks of B rows both */
    int64_t up_padded_cols;
    int32_t up_bits, up_group;
} qmix_job;

enum { QMIX_KV_INT8 = 0, QMIX_KV_BF16 = 1 };    /* how keys and values are kept */

/* Attention of one query position over positions [begin, end) of a KV cache, end - 1 being its own:
 * out = softmax(query keys^T * scale) values; query head h reads key-value head h / (Q / KV). With a softcap a score s is
 * softcap * tanh(s / softcap) first. With sinks each head has one score more in its softmax, which brings no value.
 *
 * Q query heads, KV key-value heads, D head size, a multiple of 16. */
typedef struct {
    const void *query;       /* [Q, D] */
    const void *new_keys;    /* [KV, D] of position end - 1, stored before anything is read, */
    const void *new_values;  /* or NULL where they are in the cache already */
    void *keys, *values;     /* [KV, capacity, D], int8 or bf16 */
    float *key_scales;       /* [KV, capacity] of int8: key = code * scale */
    float *value_scales;
    void *out;               /* [Q, D] of query's type */
    int64_t capacity, begin, end, query_heads, kv_heads, head_dim;
    int32_t kv_type, query_type, key_type, value_type; /* the last three: of query, new_keys and new_values */
    const float *sinks;      /* [Q], or NULL */
    float scale, softcap;    /* 0: 1 / sqrt(D); 0: none */
} qmix_attention;

/* What a layer does to its tokens besides. T tokens, H hidden, E experts, K chosen, D head size, R rotary dimension. */

/* out = clamp(x / sqrt(mean(x^2) + eps) * weight, -clip, clip), for each of a token's N rows; x fp32 or bf16. */
typedef struct {
    const void *x;       /* [T, N, H] */
    const float *weight; /* [H], or NULL for 1 */
    void *out;           /* [T, N, H], or NULL; may be x where both are fp32 */
    float *wide;         /* the same before it is rounded to out_type, or NULL */
    int64_t rows, size;  /* N, H */
    float eps, clip;     /* clip: INFINITY for none */
    int32_t x_type, out_type;
    int32_t bare;        /* x is not normed, only clamped */
} qmix_norm;

/* The experts of each token and their weights (qmix/spec/layers.py's Router has the meaning of each number):
 * logits = router norm(x), summed in fp64 and rounded, + logit_bias; score = softmax or sigmoid of them. */
enum { QMIX_SOFTMAX_CHOSEN = 0, QMIX_SOFTMAX_ALL = 1, QMIX_SIGMOID = 2 };
typedef struct {
    qmix_norm norm;           /* of one row; bare where x is normed already */
    const void *router;       /* [E, H] */
    const float *logit_bias;  /* [E], or NULL */
    const float *choice_bias; /* [E], or NULL: added to scores for the choice alone */
    const float *expert_scale; /* [E], or NULL: multiplies the weights */
    int64_t *ids;             /* [T, K], the best first, rows ids_stride apart */
    float *weights;           /* [T, K], or NULL */
    int64_t ids_stride, experts, chosen;
    int64_t groups, top_groups; /* only experts of the top_groups best groups are chosen */
    float eps, scale;         /* weights / (their sum + eps) where `normalize`; then times scale */
    int32_t router_type, score, normalize;
    int32_t top2;             /* a group's score is the sum of its two best, else its best */
} qmix_route;

/* Rotary embedding of queries and keys: dimension d with d + R/2, for the first R of a head; the others are copied. */
typedef struct {
    const void *queries, *keys; /* [T, Q, D], [T, KV, D] */
    const float *cos, *sin;     /* [T, R], sin with the sign it is added with */
    float *out;                 /* [T, Q + KV, D] */
    int64_t query_heads, kv_heads, head_dim, rotary_dim;
    int32_t query_type, key_type;
} qmix_rotate;

/* What rotates at a position p: the cosine and the signed sine of p * inverse, the product in fp32, times factor. */
typedef struct {
    const int64_t *positions; /* [T] */
    const float *inverse;     /* [R / 2] */
    float *cos, *sin;         /* [T, R] */
    int64_t rotary_dim;
    float factor;
} qmix_angles;

/* out = sum_k weights[k] * rows[k], in order. */
typedef struct {
    const float *rows;    /* [T, K, H] */
    const float *weights; /* [T, K] */
    float *out;           /* [T, H] */
    int64_t chosen, size;
} qmix_combine;

/* out = what joins a token's gate and up; fp32 or bf16, out is fp32. */
typedef struct {
    const void *gate, *up; /* [T, F] */
    float *out;            /* [T, F] */
    int64_t size;          /* F */
    qmix_activation by;
    int32_t type;          /* of gate and up */
} qmix_join;

/* y = y + bias, in fp32 and rounded to y's type */
typedef struct {
    void *y;           /* [T, N] */
    const float *bias; /* [N] */
    int64_t size;      /* N */
    int32_t type;      /* of y */
} qmix_bias;

/* out = x weight^T, summed in fp64 and rounded: for the few rows that decide something. */
typedef struct {
    const void *x;      /* [T, H] of x_type */
    const void *weight; /* [N, H] of weight_type, as a router's */
    float *out;         /* [T, N] */
    int64_t size, rows; /* H, N */
    int32_t x_type, weight_type;
} qmix_exact;

/* y *= f(by), in fp32 and rounded to y's type; f: sigmoid, or silu */
typedef struct {
    void *y;             /* [T, N] */
    const void *by;      /* [T, N], or [T, 1] where `one` */
    int64_t size;        /* N */
    int32_t type, by_type, silu, one;
} qmix_gate;

/* A token's short convolution, each channel with its own taps, over three sources side by side, then silu:
 * out[c] = silu(sum_j weight[j, c] * x[j, c]), where x are J - 1 rows of `past` and the sources. J taps, C channels. */
enum { QMIX_SOURCES = 3 };
typedef struct {
    const float *past;   /* [J - 1, C] */
    float *after;        /* [J - 1, C], the last rows of x; not `past` */
    const float *weight; /* [J, C] */
    const void *sources[QMIX_SOURCES];
    float *out[QMIX_SOURCES];
    int64_t sizes[QMIX_SOURCES]; /* channels of each */
    int64_t channels, taps;
    int32_t types[QMIX_SOURCES];
} qmix_conv;

/* The gated delta rule on a token (kernels/ops/mixers.py's Delta). A key heads, B value heads, K and V their sizes. */
typedef struct {
    const float *state;  /* [B, K, V] */
    float *after;        /* [B, K, V], not `state` */
    const float *q, *k;  /* [A, K] */
    const float *v;      /* [B, V] */
    const float *a, *b, *a_log, *dt_bias; /* [B] */
    float *out;          /* [B, V] */
    int64_t key_heads, value_heads, key_dim, value_dim;
} qmix_delta;

/* y += x */
typedef struct {
    const float *x; /* [T, H] */
    float *y;
    int64_t size;   /* H */
} qmix_addition;

/* y = y * weight * factor, in this order */
typedef struct {
    float *y;            /* [T, H] */
    const float *weight; /* [H]; or one number, where `one`; or NULL for 1 */
    int64_t size;        /* H */
    float factor;
    int32_t one;
} qmix_scaling;

/* A matrix in an expert's record: where its tensors lie, and what a product says of it (qmix_job). */
typedef struct {
    int64_t weight, params; /* bytes from the record's start */
    int64_t bias;           /* likewise, 0 for none: a record begins with weights */
    int64_t padded_rows, padded_cols, rows, cols;
    int32_t bits, block, group, parts, activation;
    float alpha, limit;
    int64_t up_weight, up_params, up_padded_cols; /* as of qmix_job, 0 for none */
    int32_t up_bits, up_group;
} qmix_matrix;

/* How all records of a kind are laid out. */
typedef struct {
    qmix_matrix gate_up, down; /* gate over up [2F, H]; [H, F] */
} qmix_record;

/* The chosen experts of T tokens and their weighted sum: rows[t, k] = down(activation(gate(x), up(x))) of expert ids[t, k],
 * out[t] = sum_k weights[t, k] * rows[t, k], in order. A record that `records` does not have is missing: then nothing
 * is computed, and whoever called brings it. */
typedef struct {
    const int64_t *records;     /* [E] addresses, 0 where a record is not in memory, whole */
    const int32_t *kinds;       /* [E] of `layouts`, or NULL for 0 */
    const qmix_record *layouts;
    const void *x;              /* [T, H] of x_type */
    const int64_t *ids;         /* [T, K] */
    const float *weights;       /* [T, K] */
    float *between, *rows;      /* [T * K, F], [T, K, H]: what is computed on the way */
    float *out;                 /* [T, H] */
    int64_t chosen, hidden, inner;
    int32_t x_type;
} qmix_experts;

/* One call of those below: `count` jobs of a product, or tokens of the others (1 for attention, convolution and delta
 * rule). */
enum { QMIX_PRODUCTS = 0, QMIX_ATTEND, QMIX_NORM, QMIX_ROUTE, QMIX_ROTATE, QMIX_ANGLES, QMIX_COMBINE, QMIX_ADD,
       QMIX_EXPERTS, QMIX_JOIN, QMIX_BIASED, QMIX_EXACT, QMIX_GATED, QMIX_CONV, QMIX_DELTA, QMIX_SCALED };
typedef struct {
    const void *job;
    int32_t kind, count;
} qmix_call;

int32_t qmix_abi(void);
const char *qmix_level_name(int32_t level);     /* the best first; NULL past the last */
int32_t qmix_level_supported(int32_t level);    /* whether this processor has it */

/* Compute all jobs with at most `threads` threads, the caller's included. 0, or -1 where memory is lacking. The bits
 * of a row of y depend on its row of x, on W, `act` and the level: not on T, the other jobs or the threads. */
int32_t qmix_products(int32_t level, int32_t act, const qmix_job *jobs, int64_t count, int32_t threads);

/* 0, or -1 where memory is lacking. The bits do not depend on the threads. */
int32_t qmix_attend(int32_t level, const qmix_attention *job, int32_t threads);

/* 0, or -1 where memory is lacking. The bits of a token do not depend on the others, nor on the threads: the calling
 * one, as a few tokens are not worth waking another; for a router of many experts at most `threads`. */
int32_t qmix_routes(int32_t level, const qmix_route *job, int32_t tokens, int32_t threads);
int32_t qmix_norms(int32_t level, const qmix_norm *job, int32_t tokens);
int32_t qmix_rotations(int32_t level, const qmix_rotate *job, int32_t tokens);
int32_t qmix_angles_of(int32_t level, const qmix_angles *job, int32_t tokens);
int32_t qmix_combines(int32_t level, const qmix_combine *job, int32_t tokens);
int32_t qmix_joins(int32_t level, const qmix_join *job, int32_t tokens);
int32_t qmix_biases(int32_t level, const qmix_bias *job, int32_t tokens);
int32_t qmix_exacts(int32_t level, const qmix_exact *job, int32_t tokens, int32_t threads);
int32_t qmix_gates(int32_t level, const qmix_gate *job, int32_t tokens);
int32_t qmix_convolution(int32_t level, const qmix_conv *job);
int32_t qmix_delta_rule(int32_t level, const qmix_delta *job, int32_t threads); /* by value heads */
int32_t qmix_add(const qmix_addition *job, int32_t tokens);
int32_t qmix_scale(const qmix_scaling *job, int32_t tokens);

/* By at most `threads` threads. 0, -1 where memory is lacking, or QMIX_MISSING. The bits of a token do not depend on the
 * others, nor on the threads. */
enum { QMIX_MISSING = 1 };
int32_t qmix_chosen(int32_t level, int32_t act, const qmix_experts *job, int32_t tokens, int32_t threads);

/* One call after the other; stops at the first that fails. 0, -1 where memory is lacking, or, where records of call i are
 * missing, i + 1. */
int32_t qmix_sequence(int32_t level, int32_t act, const qmix_call *calls, int32_t count, int32_t threads);

/* Operations (a product and a sum are two) of `turns` rounds of bare dot products on each of `threads` threads: timed,
 * the processor's limit for `act`. */
int64_t qmix_peak(int32_t level, int32_t act, int64_t turns, int32_t threads);

#endif
