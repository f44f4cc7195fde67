/* int8 activations of two tokens and more where a processor multiplies matrices of bytes: 2 rows x 8 columns times
 * 8 columns x 2 tokens, all sums exact. A vector of codes has 8 columns of 2 rows, as neon_columns.h has them.
 *
 * B rows per block. A tile is [B/16][columns / 8][8] vectors: 16 rows at a time meet a panel of tokens.
 */

ALWAYS vint dot_matrices(vint sum, vint w, vint x) { /* lane 2 r + t: row r, token t */
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}

/* 8 columns of up to four tokens, two to a vector; of an odd number, what the last lanes have is not used. */
ALWAYS void token_pairs(const int count, const uint32_t *words, vint *x) {
    const int32_t *from = (const int32_t *)words;
    if (count > 2) { /* three: the word behind the last is still in the panel */
        vint first = vld1q_s32(from), second = vld1q_s32(from + count);
        x[0] = vzip1q_s32(first, second);
        x[1] = vzip2q_s32(first, second);
    } else if (count == 2) {
        vint both = vld1q_s32(from);
        x[0] = vzip1q_s32(both, vextq_s32(both, both, 2));
    } else
        x[0] = vcombine_s32(vld1_s32(from), vld1_s32(from));
}

/* What products of matrices made of 4 rows, for token c. */
ALWAYS vint rows_of_token(vint upper, vint lower, const int c, int32_t start) {
    return add_i(c % 2 ? vuzp2q_s32(upper, lower) : vuzp1q_s32(upper, lower), set_i(start));
}

ALWAYS void tile_of_rows(const qmix_job *job, int64_t row, int64_t column, int64_t columns, vint *tile) {
    const int8_t *weight = (const int8_t *)job->weight + column;
    for (int v = 0; v < 32; v++) {
        int64_t last = job->padded_rows - 1, first = row + 2 * v; /* rows past the end repeat the last one */
        const int8_t *upper = weight + (first < last ? first : last) * job->padded_cols;
        const int8_t *lower = weight + (first + 1 < last ? first + 1 : last) * job->padded_cols;
        vint *to = tile + v / 8 * columns + v % 8;
        ONCE for (int64_t k = 0; k < columns; k += 64) {
            __builtin_prefetch(upper + k + AHEAD_INT8, 0, 2);
            __builtin_prefetch(lower + k + AHEAD_INT8, 0, 2);
            UNROLL for (int i = 0; i < 64; i += 16, to += 16) {
                int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(upper + k + i));
                int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(lower + k + i));
                to[0] = vreinterpretq_s32_s64(vzip1q_s64(a, b));
                to[8] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
            }
        }
    }
}

ALWAYS void tile_of_columns(const int bits, const int block, const uint8_t *from, int64_t columns, vint *tile) {
    ONCE for (int64_t k = 0; k < columns / 8; k++) {
        vint codes[32];
        prefetch_codes(from, block * qmix_code_bits(bits));
        codes_of_columns(8, bits, block, from, codes);
        from += block * qmix_code_bits(bits);
        UNROLL for (int strip = 0; strip < block / 16; strip++)
            UNROLL for (int v = 0; v < 8; v++)
                tile[(strip * (columns / 8) + k) * 8 + v] = codes[8 * strip + v];
    }
}

/* `groups` groups of a tile's columns times a panel of `count` tokens, for 16 rows. */
ALWAYS void inner_matrices(const int count, const int bits, int64_t groups, int64_t group, const vint *tile,
                           panel_view x, const float *scale, const float *zero, float *y, int64_t y_stride) {
    const int pairs = (count + 1) / 2;
    for (int64_t g = 0; g < groups; g++) {
        vint held[8][2], sums[WIDTH][SUB];
        UNROLL for (int v = 0; v < 8; v++)
            UNROLL for (int p = 0; p < pairs; p++)
                held[v][p] = set_i(0);
        ONCE for (int64_t k = 0; k < group / 8; k++) {
            vint tokens[2];
            token_pairs(count, x.words, tokens);
            UNROLL for (int v = 0; v < 8; v++)
                UNROLL for (int p = 0; p < pairs; p++)
                    held[v][p] = dot_matrices(held[v][p], tile[v], tokens[p]);
            tile += 8, x.words += 2 * count;
        }
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < SUB; v++)
                sums[c][v] = rows_of_token(held[2 * v][c / 2], held[2 * v + 1][c / 2], c,
                                           bits == 8 ? 0 : start_of(bits, x.start[c]));
        finish_group(count, SUB, QMIX_ACT_INT8, bits > 4 ? bits : 4, sums, NULL, scale, zero, x.step, x.sum, y, y_stride);
        x.start += count, x.step += count, x.sum += count, scale += 64, zero += 64;
    }
}

/* A function for each number of tokens and each format. */
#define INNER(count, bits) \
    APART void inner_##count##_##bits(int64_t groups, int64_t group, const vint *tile, panel_view x, \
                                      const float *scale, const float *zero, float *y, int64_t y_stride) { \
        inner_matrices(count, bits, groups, group, tile, x, scale, zero, y, y_stride); \
    }
#define INNERS(bits) INNER(1, bits) INNER(2, bits) INNER(3, bits) INNER(4, bits)
INNERS(2)
INNERS(3)
INNERS(4)
INNERS(5) /* QMIX_E2M1 */
INNERS(8)
#undef INNERS
#undef INNER
#define OF_BITS(bits) {inner_1_##bits, inner_2_##bits, inner_3_##bits, inner_4_##bits}
static void (*const inner_of[5][WIDTH])(int64_t, int64_t, const vint *, panel_view, const float *, const float *,
                                        float *, int64_t) = {OF_BITS(2), OF_BITS(3), OF_BITS(4), OF_BITS(5), OF_BITS(8)};
#undef OF_BITS

/* acc fp32 [tokens][B] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void rows_by_matrices(const int bits, const int block, const qmix_job *job, int64_t row, const char *panels,
                             int64_t panel, int64_t last, char *scratch, float *acc) {
    int64_t bytes = token_bytes(QMIX_ACT_INT8, job), group = job->group, first = qmix_panel(job->tokens, WIDTH, panel);
    float *scale = (float *)(scratch + 32768), *zero = scale + 8 * 64;
    vint *tile = (vint *)scratch;
    for (int64_t column = 0; column < job->padded_cols; column += 256) {
        int64_t columns = job->padded_cols - column < 256 ? job->padded_cols - column : 256;
        const uint8_t *from = job->weight + (row / block * job->padded_cols + column) * (block * qmix_code_bits(bits) / 8);
        if (bits == 8)
            tile_of_rows(job, row, column, columns, tile);
        else
            tile_of_columns(bits, block, from, columns, tile);
        read_params(job, row, column / group, columns / group, scale, zero);
        for (int64_t p = panel; p < last; p++) {
            int64_t begin = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - begin;
            panel_view x = view_panel(QMIX_ACT_INT8, job, panels + begin * bytes, n, column);
            for (int at = 0; at < block; at += 16)
                inner_of[bits == 8 ? 4 : bits - 2][n - 1](columns / group, group, tile + at / 16 * columns, x,
                                                          scale + at, zero + at, acc + (begin - first) * block + at,
                                                          block);
        }
    }
}
