/* The products, once for all instruction sets. A level's file defines its vectors and includes this.
 *
 *   LEVEL            suffix of its names
 *   L                lanes: 32-bit numbers in a vector; rows of W that are computed side by side
 *   SUB, WIDTH       the inner product keeps SUB vectors of rows x WIDTH tokens of sums in registers
 *   vint, vflt       vectors of L int32 and L fp32, with load, store, broadcast and arithmetic as named below
 *   unpack_codes     4 columns of a block of int4, int3 or int2 -> vectors of rows, lane = the 4 codes of a row, as int4's
 *                    (uint8 each): a code of fewer bits plus what keeps its distance from the middle
 *   dot4             sum += 4 products of codes 0..15 with int8 activations, per lane
 *   dot4_signed      the same with int8 weights, stored in the tile as `signed_codes` makes them, which leaves
 *                    SIGNED_OFFSET too much in each
 *   WORDS            bf16 activations: words (of 32 bits) that 4 columns take: 2 with bf16 dot products, else 4
 *   part_of, fdot    bf16 activations: word i of a lane's 4 weights, and sum += its products
 *   DIRECT           int4 weights go from memory to registers where one panel holds all tokens
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
enum { AHEAD = 1024, AHEAD_INT8 = 1024 }; /* bytes that weights are prefetched ahead of their use */

ALWAYS float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

ALWAYS uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS uint16_t to_bf16(float value) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits = float_bits(value);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* ---- activations: from rows of x into a panel of C tokens ----
 * int8: int32 codes [K/4][C], 4 in each; int32 start [K/g][C]; fp32 step, sum [K/g][C]
 * bf16: words [K/4][WORDS][C]; fp32 sum [K/g][C] */

static int64_t token_bytes(int32_t act, const qmix_job *job) {
    int64_t columns = job->padded_cols, groups = columns / job->group;
    return act == QMIX_ACT_INT8 ? columns + 12 * groups : columns * WORDS + 4 * groups;
}

static void read_group(const qmix_job *job, int64_t token, int64_t column, float *out) {
    int64_t row = job->x_rows ? job->x_rows[token] : token, start = row * job->x_stride + column;
    int64_t count = job->cols - column < job->group ? job->cols - column : job->group;
    for (int i = 0; i < job->group; i++)
        out[i] = 0;
    if (job->x_type == QMIX_FP32)
        for (int i = 0; i < count; i++)
            out[i] = ((const float *)job->x)[start + i];
    else
        for (int i = 0; i < count; i++)
            out[i] = from_bf16(((const uint16_t *)job->x)[start + i]);
}

/* Codes of one group, x = code * step to half a step; and their sum. Not finite: every code 0, and 0 * step is NaN. */
ALWAYS float quantize_group(const float *x, int group, int8_t *codes, int32_t *sum) {
    uint32_t peak = 0;
    for (int i = 0; i < group; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7fffffff; /* ordered as |x| is */
        peak = bits > peak ? bits : peak;
    }
    float largest, step;
    memcpy(&largest, &peak, 4);
    step = largest / 127;
    float inverse = peak >= 0x7f800000 || step < 1e-35f ? 0 : 127 / largest;
    int32_t total = 0;
    for (int i = 0; i < group; i++) {
        /* 1.5 * 2^23 leaves the nearest integer in the low bits. */
        int32_t code = (int32_t)float_bits((peak >= 0x7f800000 ? 0 : x[i]) * inverse + 12582912.0f) - 0x4b400000;
        codes[i] = (int8_t)code;
        total += code;
    }
    *sum = total;
    return step;
}

static void pack_int8(const qmix_job *job, int64_t first, int64_t count, char *panel) {
    int64_t columns = job->padded_cols, group = job->group, groups = columns / group;
    int32_t *words = (int32_t *)panel, *start = words + columns / 4 * count;
    float *step = (float *)(start + groups * count), *sum = step + groups * count;
    float x[128];
    int8_t codes[128];
    for (int64_t c = 0; c < count; c++)
        for (int64_t g = 0; g < groups; g++) {
            int32_t total;
            read_group(job, first + c, g * group, x);
            float width = quantize_group(x, (int)group, codes, &total);
            start[g * count + c] = -total * (job->bits == 8 ? SIGNED_OFFSET : 8);
            step[g * count + c] = width;
            sum[g * count + c] = width * (float)total;
            for (int64_t k = 0; k < group / 4; k++)
                memcpy(&words[(g * group / 4 + k) * count + c], codes + 4 * k, 4);
        }
}

static void pack_float(const qmix_job *job, int64_t first, int64_t count, char *panel) {
    int64_t columns = job->padded_cols, group = job->group, groups = columns / group;
    uint32_t *words = (uint32_t *)panel;
    float *sum = (float *)(words + columns / 4 * WORDS * count);
    float x[128];
    for (int64_t c = 0; c < count; c++)
        for (int64_t g = 0; g < groups; g++) {
            float total = 0;
            read_group(job, first + c, g * group, x);
            for (int64_t i = 0; i < group; i++) {
                x[i] = from_bf16(to_bf16(x[i]));
                total += x[i];
            }
            sum[g * count + c] = total;
            for (int64_t k = 0; k < group / 4; k++)
                for (int w = 0; w < WORDS; w++) {
                    const float *from = x + 4 * k + w;
                    uint32_t word = WORDS == 4 ? float_bits(from[0])
                                               : float_bits(from[0]) >> 16 | (float_bits(from[2]) & 0xffff0000);
                    words[((g * group / 4 + k) * WORDS + w) * count + c] = word;
                }
        }
}

static void pack(int32_t act, const qmix_job *job, int64_t first, int64_t count, void *panel) {
    (act == QMIX_ACT_INT8 ? pack_int8 : pack_float)(job, first, count, panel);
}

/* ---- weights: a piece of a block of rows into a tile ----
 * [rows / (SUB * L)][columns / 4][words][SUB] vectors */

ALWAYS void unpack_int4(int bits, const uint8_t *from, int block, int words, int64_t columns, vint *tile) {
    int vectors = block / L, sub = vectors < SUB ? vectors : SUB;
    for (int64_t k = 0; k < columns / 4; k++) {
        vint codes[VECTORS];
        __builtin_prefetch(from + AHEAD);
        if (block == 64)
            __builtin_prefetch(from + AHEAD + 64);
        unpack_codes(bits, from, block, codes);
        from += block * bits / 2;
        UNROLL for (int v = 0; v < vectors; v++) {
            vint *to = tile + ((v / sub * (columns / 4) + k) * words) * sub + v % sub;
            UNROLL for (int w = 0; w < words; w++)
                to[w * sub] = words == 1 ? codes[v] : part_of(codes[v], w, 0);
        }
    }
}

ALWAYS void unpack_int8(const int8_t *from, int64_t stride, int64_t left, int words, int64_t columns, vint *tile) {
    for (int v = 0; v < VECTORS; v++) {
        const int8_t *rows[L];
        for (int i = 0; i < L; i++) {
            int64_t row = v * L + i < left ? v * L + i : left - 1; /* rows past the end repeat the last one */
            rows[i] = from + row * stride;
        }
        for (int64_t k = 0; k < columns; k += 64) {
            vint codes[16];
            for (int i = 0; i < L; i++)
                __builtin_prefetch(rows[i] + k + AHEAD_INT8, 0, 2); /* rows 4 KiB apart share sets of the first cache */
            transpose(rows, k, codes);
            UNROLL for (int i = 0; i < 16; i++) {
                vint *to = tile + ((v / SUB * (columns / 4) + k / 4 + i) * words) * SUB + v % SUB;
                UNROLL for (int w = 0; w < words; w++)
                    to[w * SUB] = words == 1 ? signed_codes(codes[i]) : part_of(codes[i], w, 1);
            }
        }
    }
}

/* Scale and zero of rows [row, row + block) in `groups` groups from `first` on: fp32 [groups][64]. */
static void read_params(const qmix_job *job, int64_t row, int64_t first, int64_t groups, float *scale, float *zero) {
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < job->block; i += L) {
            float *s = scale + g * 64 + i, *z = zero + g * 64 + i;
            if (job->bits != 8)
                split_params(job->params + ((first + g) * job->padded_rows + row + i) * 2, s, z);
            else
                for (int j = 0; j < L; j++) {
                    int64_t at = row + i + j < job->padded_rows ? row + i + j : job->padded_rows - 1;
                    s[j] = from_bf16(job->params[at]);
                }
        }
}

/* ---- the inner products: SUB or fewer vectors of rows x C tokens, over `groups` groups of 4 * fours columns ---- */

typedef struct {
    const uint32_t *words; /* where the panel's activations of these columns begin */
    const int32_t *start;
    const float *step, *sum;
} panel_view;

ALWAYS void finish_group(const int count, const int sub, const int act, const int bits, vint sums[][SUB],
                         vflt fsums[][SUB], const float *scale, const float *zero, const float *step, const float *sum,
                         float *y, int64_t y_stride) {
    UNROLL for (int v = 0; v < sub; v++) {
        vflt s = load_f(scale + v * L);
        UNROLL for (int c = 0; c < count; c++) {
            float *to = y + c * y_stride + v * L;
            vflt value = load_f(to);
            if (act == QMIX_ACT_INT8)
                value = fma_f(mul_f(to_f(sums[c][v]), s), set_f(step[c]), value);
            else
                value = fma_f(fsums[c][v], s, value);
            if (bits == 4)
                value = fma_f(load_f(zero + v * L), set_f(sum[c]), value);
            store_f(to, value);
        }
    }
}

ALWAYS void inner(const int count, const int sub, const int act, const int bits, int64_t groups, int64_t fours,
                  const vint *tile, panel_view x, const float *scale, const float *zero, float *y, int64_t y_stride) {
    for (int64_t g = 0; g < groups; g++) {
        vint sums[WIDTH][SUB];
        vflt fsums[WIDTH][SUB];
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < sub; v++) {
                if (act == QMIX_ACT_INT8)
                    sums[c][v] = set_i(x.start[c]);
                else
                    fsums[c][v] = set_f(0);
            }
        for (int64_t k = 0; k < fours * (act == QMIX_ACT_INT8 ? 1 : WORDS); k += 2) {
            UNROLL for (int twice = 0; twice < 2; twice++) {
                UNROLL for (int c = 0; c < count; c++) {
                    vint word = set_i((int32_t)x.words[c]);
                    UNROLL for (int v = 0; v < sub; v++) {
                        if (act != QMIX_ACT_INT8)
                            fsums[c][v] = fdot(fsums[c][v], tile[v], word);
                        else if (bits == 4)
                            sums[c][v] = dot4(sums[c][v], tile[v], word);
                        else
                            sums[c][v] = dot4_signed(sums[c][v], tile[v], word);
                    }
                }
                tile += sub, x.words += count;
            }
        }
        finish_group(count, sub, act, bits, sums, fsums, scale, zero, x.step, x.sum, y, y_stride);
        x.start += count, x.step += count, x.sum += count, scale += 64, zero += 64;
    }
}

#ifdef DIRECT
/* Blocks of int4, int3 or int2, of SUB vectors, straight from memory, for one panel: the codes never see the cache twice. */
ALWAYS void direct(const int count, const int act, const int block, const qmix_job *job, int64_t row, panel_view x,
                   float *y) {
    const int sub = block / L;
    int64_t columns = job->padded_cols, groups = columns / job->group;
    const int bits = job->bits;
    const uint8_t *from = job->weight + row / block * columns * (block * bits / 8);
    for (int64_t g = 0; g < groups; g++) {
        vint sums[WIDTH][SUB];
        vflt fsums[WIDTH][SUB];
        float scale[64], zero[64];
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < sub; v++) {
                if (act == QMIX_ACT_INT8)
                    sums[c][v] = set_i(x.start[c]);
                else
                    fsums[c][v] = set_f(0);
            }
        const uint16_t *params = job->params + (g * job->padded_rows + row) * 2;
        for (int i = 0; i < block * 4; i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + 4 * job->padded_rows) + i);
        for (int64_t k = 0; k < job->group / 4; k++) {
            vint codes[VECTORS];
            __builtin_prefetch(from + AHEAD, 0, 2); /* into the first cache it would cost a third of one core's rate */
            if (block == 64)
                __builtin_prefetch(from + AHEAD + 64, 0, 2);
            unpack_codes(bits, from, block, codes);
            from += block * bits / 2;
            if (act == QMIX_ACT_INT8) {
                UNROLL for (int c = 0; c < count; c++) {
                    vint word = set_i((int32_t)x.words[c]);
                    UNROLL for (int v = 0; v < sub; v++)
                        sums[c][v] = dot4(sums[c][v], codes[v], word);
                }
                x.words += count;
            } else
                UNROLL for (int w = 0; w < WORDS; w++) {
                    UNROLL for (int c = 0; c < count; c++) {
                        vint word = set_i((int32_t)x.words[c]);
                        UNROLL for (int v = 0; v < sub; v++)
                            fsums[c][v] = fdot(fsums[c][v], part_of(codes[v], w, 0), word);
                    }
                    x.words += count;
                }
        }
        UNROLL for (int v = 0; v < sub; v++)
            split_params(params + v * 2 * L, scale + v * L, zero + v * L);
        finish_group(count, sub, act, 4, sums, fsums, scale, zero, x.step, x.sum, y, block);
        x.start += count, x.step += count, x.sum += count;
    }
}
#endif

#ifdef DIRECT_INT8
/* int8 rows for one token with int8 activations: 16 rows at a time, each read from end to end. */
ALWAYS void direct_int8(const qmix_job *job, int64_t row, panel_view x, float *y) {
    int64_t columns = job->padded_cols;
    for (int v = 0; v < VECTORS && row + v * L < job->padded_rows; v++) {
        const int8_t *rows[L];
        float scale[L], zero[L];
        vint sums[WIDTH][SUB];
        panel_view at = x;
        for (int i = 0; i < L; i++) {
            int64_t mine = row + v * L + i < job->padded_rows ? row + v * L + i : job->padded_rows - 1;
            rows[i] = (const int8_t *)job->weight + mine * columns;
            scale[i] = from_bf16(job->params[mine]);
        }
        for (int64_t column = 0; column < columns; column += 64) {
            UNROLL for (int i = 0; i < L; i++)
                __builtin_prefetch(rows[i] + column + AHEAD_INT8, 0, 2); /* rows 4 KiB apart share sets of the first cache */
            sums[0][0] = dot_rows(rows, column, load_i(at.words));
            sums[0][0] = add_i(sums[0][0], set_i(*at.start));
            finish_group(1, 1, QMIX_ACT_INT8, 8, sums, NULL, scale, zero, at.step, at.sum, y + v * L, 0);
            at.words += 16, at.start++, at.step++;
        }
    }
}
#endif

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

static panel_view view_panel(int32_t act, const qmix_job *job, const char *panel, int64_t count, int64_t column) {
    int64_t columns = job->padded_cols, groups = columns / job->group, g = column / job->group * count;
    panel_view x = {0};
    int64_t words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    x.words = (const uint32_t *)panel + column / 4 * words * count;
    const char *after = panel + columns * words * count;
    if (act == QMIX_ACT_INT8) {
        x.start = (const int32_t *)after + g;
        x.step = (const float *)(after + 4 * groups * count) + g;
        x.sum = (const float *)(after + 8 * groups * count) + g;
    } else
        x.sum = (const float *)after + g;
    return x;
}

/* Columns [column, column + columns) of a block of rows, all tokens [first, last). */
ALWAYS void block_piece(const int act, const int bits, const int block, const qmix_job *job, int64_t row,
                        int64_t column, int64_t columns, const char *panels, int64_t panel, int64_t last, vint *tile,
                        float *scale, float *zero, float *acc) {
    const int words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    const int vectors = block / L, sub = vectors < SUB ? vectors : SUB;
    int64_t bytes = token_bytes(act, job), group = job->group, first = qmix_panel(job->tokens, WIDTH, panel);
    if (bits == 4)
        unpack_int4(job->bits, job->weight + (row / block * job->padded_cols + column) * (block * job->bits / 8), block,
                    words, columns, tile);
    else
        unpack_int8((const int8_t *)job->weight + row * job->padded_cols + column, job->padded_cols,
                    job->padded_rows - row, words, columns, tile);
    read_params(job, row, column / group, columns / group, scale, zero);
    for (; panel < last; panel++) {
        int64_t begin = qmix_panel(job->tokens, WIDTH, panel), n = qmix_panel(job->tokens, WIDTH, panel + 1) - begin;
        panel_view x = view_panel(act, job, panels + begin * bytes, n, column);
        for (int v = 0; v < vectors; v += sub)
            WITH_COUNT(n, inner(count, sub, act, bits, columns / group, group / 4, tile + v * (columns / 4) * words, x,
                                scale + v * L, zero + v * L, acc + (begin - first) * block + v * L, block))
    }
}

/* acc fp32 [tokens][block] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void block_rows(const int act, const int bits, const int block, const qmix_job *job, int64_t row,
                       const char *panels, int64_t panel, int64_t last, char *scratch, float *acc) {
    int64_t group = job->group, words = act == QMIX_ACT_INT8 ? 1 : WORDS;
#ifdef DIRECT
    if (bits == 4 && job->tokens <= WIDTH) {
        panel_view x = view_panel(act, job, panels, job->tokens, 0);
        WITH_COUNT(job->tokens, direct(count, act, block, job, row, x, acc))
        return;
    }
#endif
#ifdef DIRECT_INT8
    if (bits == 8 && act == QMIX_ACT_INT8 && job->tokens == 1) {
        direct_int8(job, row, view_panel(act, job, panels, 1, 0), acc);
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

/* ---- results ---- */

/* By a polynomial that is right to fp32's last bits; from -87 to 88, beyond which it stays what it is there. */
ALWAYS float exp_of(float a) {
    a = a > 88.0f ? 88.0f : a;
    a = a < -87.0f ? -87.0f : a;
    float shifted = a * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = (uint32_t)((int32_t)float_bits(shifted) - 0x4b400000 + 127) << 23;
    float two;
    memcpy(&two, &power, 4);
    return p * two;
}

/* silu(gate) * up over 64 numbers. */
static void silu_times(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++)
        gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

static void write_row(const qmix_job *job, int64_t token, int64_t column, int64_t count, const float *from) {
    int64_t row = job->y_rows ? job->y_rows[token] : token, start = row * job->y_stride + column;
    if (job->add)
        for (int64_t i = 0; i < count; i++)
            ((float *)job->y)[start + i] += from[i];
    else if (job->y_type == QMIX_FP32)
        memcpy((float *)job->y + start, from, 4 * (size_t)count);
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)job->y)[start + i] = to_bf16(from[i]);
}

/* Where the rows of a unit go: y has the parts side by side without their padding. Parts are whole blocks, or one. */
static void write_unit(const qmix_job *job, int64_t unit, int64_t first, int64_t tokens, float *acc, const float *up) {
    int64_t block = job->block, part_rows = job->padded_rows / job->parts, row = unit * block;
    int64_t part = job->gated ? 0 : row / part_rows, inside = row - part * part_rows;
    int64_t count = job->rows - inside < block ? job->rows - inside : block;
    if (count <= 0)
        return;
    for (int64_t t = 0; t < tokens; t++) {
        float *from = acc + t * block;
        if (job->gated)
            silu_times(from, up + t * block, (int)block);
        write_row(job, first + t, part * job->rows + inside, count, from);
    }
}

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
                    sums[c][v] = dot4(sums[c][v], codes[v], word);
                else
                    fsums[c][v] = fdot(fsums[c][v], codes[v], word);
        }
    }
    UNROLL for (int c = 0; c < WIDTH; c++)
        UNROLL for (int v = 0; v < SUB; v++)
            total = fma_f(set_f(1), act == QMIX_ACT_INT8 ? to_f(sums[c][v]) : fsums[c][v], total);
    store_f(out, total);
    return 2 * turns * WIDTH * SUB * L * (act == QMIX_ACT_INT8 ? 4 : 4 / WORDS);
}

static int64_t peak(int32_t act, int64_t turns, const uint32_t *words, float *out) {
    return act == QMIX_ACT_INT8 ? peak_of(QMIX_ACT_INT8, turns, words, out)
                                : peak_of(QMIX_ACT_BF16, turns, words, out);
}

#include "attention.h"
#include "layer.h"

const qmix_level JOIN(qmix, LEVEL) = {NAME, supported, WIDTH, token_bytes, pack, unit_rows, attend_bytes, attend_head,
                                       norm_token, route_token, rotate_token, angles_of_token, combine_token,
                                       peak};
