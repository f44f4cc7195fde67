/* What each instruction set provides to native.c. */
#ifndef QMIX_LEVEL_H
#define QMIX_LEVEL_H

#include "native.h"

#define ALWAYS static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
#define ONCE _Pragma("GCC unroll 1")

/* Compile what follows for an instruction set that the rest of the library does without. */
#if defined(__clang__)
#define TARGET(features) _Pragma(QMIX_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define TARGET(features) _Pragma(QMIX_STRING(GCC target(features)))
#define END_TARGET
#endif
#define QMIX_STRING(text) #text

#if defined(__aarch64__) && defined(__linux__) && !defined(__AARCH64EB__)
#define QMIX_NEON /* Linux says what an ARM processor can do */
#endif

#define E2M1_CODES 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 /* 12 + twice the number of each code */

#define IQ4_CODES -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 /* ggml's kvalues_iq4nl */

/* One call of attention, its positions cut for the pool. */
typedef struct {
    const qmix_attention *job;
    int64_t length, count;     /* positions of a piece, of which the last may have fewer; pieces */
    float *parts;              /* what each piece of each head leaves: see attention.h */
    _Atomic int32_t *missing;  /* [KV] pieces that are not done */
} qmix_pieces;

typedef struct {
    const char *name;
    int (*supported)(void);
    int64_t width;  /* tokens of a panel, at most */
    int64_t (*token_bytes)(int32_t act, const qmix_job *job);  /* of a panel, for each of its tokens */
    /* Tokens [first, first + count) of the job, as the products read them. */
    void (*pack)(int32_t act, const qmix_job *job, int64_t first, int64_t count, void *panel);
    /* All tokens through one block of rows, or, if gated, through the block of both parts. */
    void (*unit)(int32_t act, const qmix_job *job, int64_t unit, const char *panels, void *scratch);
    /* What joins a token's gate and up, computed apart, to where a gated job wants it; gate is overwritten. */
    void (*join_apart)(const qmix_job *job, int64_t token, float *gate, const float *up);
    size_t (*attend_bytes)(const qmix_attention *job);  /* of scratch that attend_head takes */
    void (*attend_head)(const qmix_pieces *work, int64_t head, int64_t piece, void *scratch);
    void (*norm)(const qmix_norm *job, int64_t token, float *scratch); /* scratch [H], the last row is left there */
    /* Of experts [first, last) for all tokens' rows x [T, H], into logits [T, E]. */
    void (*logits)(const qmix_route *job, int64_t tokens, const double *x, int64_t first, int64_t last, float *logits);
    void (*choose)(const qmix_route *job, int64_t token, float *logits, float *scratch); /* scratch [2 E + groups + K] */
    void (*rotate)(const qmix_rotate *job, int64_t token);
    void (*angles)(const qmix_angles *job, int64_t token);
    void (*combine)(const qmix_combine *job, int64_t token);
    void (*join)(const qmix_join *job, int64_t token, float *scratch); /* scratch [F] */
    void (*bias)(const qmix_bias *job, int64_t token);
    void (*gate)(const qmix_gate *job, int64_t token);
    void (*convolve)(const qmix_conv *job);
    void (*delta)(const qmix_delta *job, int64_t head, float *scratch); /* scratch [2 K + V] */
    int64_t (*peak)(int32_t act, int64_t turns, const uint32_t *words, float *out); /* words [8], out [16] */
} qmix_level;

extern const qmix_level qmix_avx512bf16, qmix_avx512vnni, qmix_avx512, qmix_avx2vnni, qmix_avx2, qmix_neoni8mm,
    qmix_neondot, qmix_portable;

enum { TOKEN_BLOCK = 256, SCRATCH = 32768 + 2 * 64 * 8 * 4 + 2 * 64 * TOKEN_BLOCK * 4 };

/* Whether it is one of ggml's formats (carried.h). */
static inline int qmix_carried(int bits) { return bits >= QMIX_Q8_0; }

/* Whether codes are places in a table, of IQ4_CODES. */
static inline int qmix_table(int bits) { return bits == QMIX_IQ4_NL || bits == QMIX_IQ4_XS; }

/* Bits of a code in memory. */
static inline int qmix_code_bits(int bits) {
    switch (bits) {
    case QMIX_Q8_0:
        return 8;
    case QMIX_Q6_K:
        return 6;
    case QMIX_Q5_0: case QMIX_Q5_1: case QMIX_Q5_K:
        return 5;
    case QMIX_E2M1: case QMIX_Q4_0: case QMIX_Q4_1: case QMIX_Q4_K: case QMIX_IQ4_NL: case QMIX_IQ4_XS:
        return 4;
    }
    return bits;
}

/* What stored codes are above the numbers that they stand for, once they are unpacked: with E2M1, bytes of 12 more than
 * twice the number, which is whole. Halves are undone in the activations. */
static inline int qmix_middle(int bits) {
    if (qmix_carried(bits))
        return bits == QMIX_Q6_K ? 32 : bits == QMIX_Q5_0 ? 16 : bits == QMIX_Q4_0 ? 8 : 0;
    return bits == QMIX_E2M1 ? 12 : bits == 8 ? 0 : 8;
}

/* Where parameters lie: 16-bit numbers before those of row `row`, of rows counted through all groups. */
static inline int64_t qmix_params(int bits, int64_t row) { return bits == QMIX_E2M1 ? row / 2 : row * 2; }

static inline int64_t qmix_units(const qmix_job *job) {
    int64_t rows = job->gated ? job->padded_rows / 2 : job->padded_rows;
    return (rows + job->block - 1) / job->block;
}

/* The first token of panel p, of all panels' equal share of the tokens. */
static inline int64_t qmix_panel(int64_t tokens, int64_t width, int64_t p) {
    int64_t panels = (tokens + width - 1) / width;
    return tokens * p / panels;
}

#endif
