/* The products, once for all instruction sets. A level's file defines its vectors and includes this.
 *
 *   LEVEL            suffix of its names
 *   L                lanes: 32-bit numbers in a vector; rows of W that are computed side by side
 *   SUB, WIDTH       the inner product keeps SUB vectors of rows x WIDTH tokens of sums in registers
 *   vint, vflt       vectors of L int32 and L fp32, with load, store, broadcast and arithmetic as named below
 *   unpack_codes     4 columns of a block of int4, int3 or int2 -> vectors of rows, lane = the 4 codes of a row, as int4's
 *                    (uint8 each): a code of fewer bits plus what keeps its distance from the middle; of E2M1, what
 *                    E2M1_CODES has for each code
 *   load_e8m0        L scales of mxfp4, powers of two, as fp32
 *   load_f16         L fp16 as fp32
 *   table_of_16, look_up  a table of 16 bytes, and the bytes at the places 0..15 of each byte
 *   dot4             sum += 4 products of codes 0..63 with int8 activations, per lane
 *   dot4_signed      the same with int8 weights, stored in the tile as `signed_codes` makes them, which leaves
 *                    SIGNED_OFFSET too much in each
 *   WORDS            bf16 activations: words (of 32 bits) that 4 columns take: 2 with bf16 dot products, else 4
 *   part_of, fdot    bf16 activations: word i of a lane's 4 weights less a middle (0: signed), and sum += its products
 *   DIRECT           int4 weights go from memory to registers where one panel holds all tokens (direct.h)
 *   DIRECT_INT8      int8 rows do so for this many tokens with int8 activations, by `dot_rows` or (OWN_INT8_ROWS) by a loop
 *                    of the level's own
 *   DIRECT_PAIRS     the grouped formats do so for a few tokens with int8 activations (pairs_direct.h, 256 bits only)
 *   COMPACT          loops over the 16 vectors of a block of ggml's formats stay loops, and only one token meets them
 *                    straight from memory: unrolled, they would be half of the library and of the time to build it, and
 *                    slower
 *   PAIRS            the grouped formats are multiplied with int8 activations in pairs of columns (pairs.h, AVX2 only)
 *
 * A block of B rows is unpacked into a tile that fits the first cache, some columns at a time, and meets all panels of
 * tokens there. The weights of a group share scale and zero, so sums over a group are taken with the bare codes, and
 * y += (sum (q - 8) x) * scale + (sum x) * zero once per group. With int8 activations, x = code * step within a group
 * of columns, that sum is exact in integers.
 *
 * A row of a panel's tokens meets the same operations in the same order however many tokens and panels there are.
 */
#include <math.h>
#include <string.h>

#include "level.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define VECTORS (64 / L) /* of a block of 64 rows */
enum { AHEAD = 1024, AHEAD_INT8 = 1024, FAR_AHEAD = 8192 }; /* bytes that weights are prefetched ahead of their use */

#include "activations.h"
#include "gates.h"

/* Calls `call` with `n` (1..WIDTH) as a constant. */
#define WITH_COUNT(n, call) \
    switch (n) { \
    case 1: { const int count = 1; call; } break; \
    case 2: { const int count = 2; call; } break; \
    case 3: { const int count = 3; call; } break; \
    case 4: { const int count = 4; call; } break; \
    case 5: { const int count = WIDTH < 5 ? WIDTH : 5; call; } break; \
    default: { const int count = WIDTH < 6 ? WIDTH : 6; call; } break; \
    }

/* Calls `call` with the bits of a grouped format as the constant `width`. */
#define WITH_BITS(n, call) \
    switch (n) { \
    case 2: { const int width = 2; call; } break; \
    case 3: { const int width = 3; call; } break; \
    default: { const int width = 4; call; } break; \
    }

#include "tiles.h"
#ifdef PAIRS
#include "pairs.h"
#elif defined(DIRECT_PAIRS)
#include "fours.h"
#endif
#ifdef DIRECT_PAIRS
#include "pairs_direct.h"
#endif
#ifdef MATRICES
#include "neon_matrices.h"
#endif
#ifdef DIRECT_COLUMNS
#include "neon_direct.h"
#endif
#if defined(DIRECT) || defined(DIRECT_INT8)
#include "direct.h"
#endif
#ifdef OWN_INT8_ROWS
#include "x86_512_rows.h"
#endif
#include "carried.h"

/* acc fp32 [tokens][block] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void block_rows(const int act, const int bits, const int block, const qmix_job *job, int64_t row,
                       const char *panels, int64_t panel, int64_t last, char *scratch, float *acc) {
    int64_t group = job->group, words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    if (qmix_carried(bits)) {
        rows_of_carried[job->bits - QMIX_Q8_0](act, job, row, panels, panel, last, scratch, acc);
        return;
    }
#ifdef DIRECT_PAIRS
    if (bits != 8 && act == QMIX_ACT_INT8 && job->tokens <= DIRECT_TOKENS(job->bits)) {
        rows_directly(job, row, panels, acc);
        return;
    }
#endif
#ifdef PAIRS
    if (bits != 8 && act == QMIX_ACT_INT8) {
        if (bits == QMIX_E2M1)
            rows_by_tiles(bits, block, job, row, panels, panel, last, scratch, acc);
        else
            WITH_BITS(job->bits, rows_by_tiles(width, block, job, row, panels, panel, last, scratch, acc))
        return;
    }
#endif
#ifdef DIRECT_COLUMNS
    if (bits != 8 && act == QMIX_ACT_INT8 && job->tokens <= DIRECT_TOKENS) {
        rows_of_columns(job, row, panels, acc);
        return;
    }
#endif
#ifdef MATRICES
    if (act == QMIX_ACT_INT8 && job->tokens > 1) {
        if (bits != 4)
            rows_by_matrices(bits, 64, job, row, panels, panel, last, scratch, acc);
        else
            WITH_BITS(job->bits, rows_by_matrices(width, block, job, row, panels, panel, last, scratch, acc))
        return;
    }
#endif
#ifdef DIRECT
    if (bits != 8 && job->tokens <= WIDTH) {
        panel_view x = view_panel(act, job, panels, job->tokens, 0);
        if (bits == 4 && act == QMIX_ACT_INT8)
            WITH_COUNT(job->tokens, WITH_BITS(job->bits, direct(count, act, bits, width, block, job, row, x, acc)))
        else
            WITH_COUNT(job->tokens, direct(count, act, bits, job->bits, block, job, row, x, acc))
        return;
    }
#endif
#ifdef DIRECT_INT8
    if (bits == 8 && act == QMIX_ACT_INT8 && job->tokens <= DIRECT_INT8) {
        (job->tokens == 1 ? one_by_int8 : few_by_int8)(job, row, panels, acc);
        return;
    }
#endif
    int64_t most = 256 / words / group * group;
    most = most < group ? group : most;
    float *scale = (float *)(scratch + 32768), *zero = scale + 8 * 64;
    for (int64_t column = 0; column < job->padded_cols; column += most) {
        int64_t columns = job->padded_cols - column < most ? job->padded_cols - column : most;
        block_piece(act, bits, block, job, row, column, columns, panels, panel, last, (vint *)scratch, scale, zero, acc);
    }
}

#include "results.h"

ALWAYS void unit_of(const int act, const int bits, const int block, const qmix_job *job, int64_t unit,
                    const char *panels, char *scratch) {
    int64_t total = (job->tokens + WIDTH - 1) / WIDTH, step = TOKEN_BLOCK / WIDTH;
    float *acc = (float *)(scratch + 32768 + 2 * 64 * 8 * 4);
    for (int64_t panel = 0; panel < total; panel += step) {
        int64_t last = panel + step < total ? panel + step : total;
        int64_t first = qmix_panel(job->tokens, WIDTH, panel), tokens = qmix_panel(job->tokens, WIDTH, last) - first;
        memset(acc, 0, 4 * (size_t)(tokens * block * (job->gated ? 2 : 1)));
        for (int64_t part = 0; part <= job->gated; part++)
            block_rows(act, bits, block, job, unit * block + part * job->padded_rows / 2, panels, panel, last, scratch,
                       acc + part * tokens * block);
        write_unit(job, unit, first, tokens, acc, acc + tokens * block);
    }
}

static void unit_rows(int32_t act, const qmix_job *job, int64_t unit, const char *panels, void *scratch) {
    if (job->bits == 8) {
        if (act == QMIX_ACT_INT8)
            unit_of(QMIX_ACT_INT8, 8, 64, job, unit, panels, scratch);
        else
            unit_of(QMIX_ACT_BF16, 8, 64, job, unit, panels, scratch);
    } else if (job->bits == QMIX_E2M1) {
        if (act == QMIX_ACT_INT8)
            unit_of(QMIX_ACT_INT8, QMIX_E2M1, 64, job, unit, panels, scratch);
        else
            unit_of(QMIX_ACT_BF16, QMIX_E2M1, 64, job, unit, panels, scratch);
    } else if (qmix_carried(job->bits)) {
        unit_of(act, QMIX_Q8_0, 64, job, unit, panels, scratch); /* any of them */
    } else if (job->block == 64) {
        if (act == QMIX_ACT_INT8)
            unit_of(QMIX_ACT_INT8, 4, 64, job, unit, panels, scratch);
        else
            unit_of(QMIX_ACT_BF16, 4, 64, job, unit, panels, scratch);
    } else {
        if (act == QMIX_ACT_INT8)
            unit_of(QMIX_ACT_INT8, 4, 32, job, unit, panels, scratch);
        else
            unit_of(QMIX_ACT_BF16, 4, 32, job, unit, panels, scratch);
    }
}

#ifdef PAIRS
#define BARE_DOT add_pairs /* as many products, in 16 bits */
#elif defined(MATRICES)
#define BARE_DOT dot_matrices
#define BARE_PRODUCTS 8
#else
#define BARE_DOT dot4
#endif
#ifndef BARE_PRODUCTS
#define BARE_PRODUCTS 4 /* in a lane */
#endif

/* `turns` rounds of the products of a full set of registers, each with a word of activations read anew, as everywhere
 * above; how many operations that is: what a core could do if nothing else were to be done. */
ALWAYS int64_t peak_of(const int act, int64_t turns, const uint32_t *words, float *out) {
    vint sums[WIDTH][SUB], codes[SUB];
    vflt fsums[WIDTH][SUB], total = set_f(0);
    UNROLL for (int v = 0; v < SUB; v++)
        codes[v] = set_i((int32_t)words[v]);
    UNROLL for (int c = 0; c < WIDTH; c++)
        UNROLL for (int v = 0; v < SUB; v++) {
            sums[c][v] = set_i(0);
            fsums[c][v] = set_f(0);
        }
    for (int64_t turn = 0; turn < turns; turn++) {
        __asm__ volatile("" ::: "memory"); /* or the compiler would see that the words stay the same */
        UNROLL for (int c = 0; c < WIDTH; c++) {
            vint word = set_i((int32_t)words[c]);
            UNROLL for (int v = 0; v < SUB; v++)
                if (act == QMIX_ACT_INT8)
                    sums[c][v] = BARE_DOT(sums[c][v], codes[v], word);
                else
                    fsums[c][v] = fdot(fsums[c][v], codes[v], word);
        }
    }
    UNROLL for (int c = 0; c < WIDTH; c++)
        UNROLL for (int v = 0; v < SUB; v++)
            total = fma_f(set_f(1), act == QMIX_ACT_INT8 ? to_f(sums[c][v]) : fsums[c][v], total);
    store_f(out, total);
    return 2 * turns * WIDTH * SUB * L * (act == QMIX_ACT_INT8 ? BARE_PRODUCTS : 4 / WORDS);
}

static int64_t peak(int32_t act, int64_t turns, const uint32_t *words, float *out) {
    return act == QMIX_ACT_INT8 ? peak_of(QMIX_ACT_INT8, turns, words, out)
                                : peak_of(QMIX_ACT_BF16, turns, words, out);
}

#include "attention.h"
#include "layer.h"
#include "router.h"
#include "delta.h"

const qmix_level JOIN(qmix, LEVEL) = {NAME, supported, WIDTH, token_bytes, pack, unit_rows, write_joined, attend_bytes,
                                       attend_head, norm_token, logits_of_experts, choose_experts, rotate_token, angles_of_token,
                                       combine_token, join_token, bias_token, gate_token, convolve_token, delta_head, peak};
