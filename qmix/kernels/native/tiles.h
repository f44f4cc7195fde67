/* Weights: a piece of a block of rows into a tile, and the tile times a panel of tokens; products.h includes this.
 *
 * A tile is [rows / (SUB * L)][columns / 4][words][SUB] vectors.
 */

/* `bytes` of codes that will be wanted after a while, into the second cache: into the first one it would cost a third
 * of one core's rate. */
ALWAYS void prefetch_codes(const uint8_t *from, int bytes) {
    for (int i = 0; i < bytes; i += 64)
        __builtin_prefetch(from + FAR_AHEAD + i, 0, 2);
}

ALWAYS void unpack_int4(const int middle, int bits, const uint8_t *from, int block, int words, int64_t columns, vint *tile) {
    int vectors = block / L, sub = vectors < SUB ? vectors : SUB;
    for (int64_t k = 0; k < columns / 4; k++) {
        vint codes[VECTORS];
        __builtin_prefetch(from + AHEAD);
        if (block == 64)
            __builtin_prefetch(from + AHEAD + 64);
        unpack_codes(bits, from, block, codes);
        from += block * qmix_code_bits(bits) / 2;
        UNROLL for (int v = 0; v < vectors; v++) {
            vint *to = tile + ((v / sub * (columns / 4) + k) * words) * sub + v % sub;
            UNROLL for (int w = 0; w < words; w++)
                to[w * sub] = words == 1 ? codes[v] : part_of(codes[v], w, middle);
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
                    to[w * SUB] = words == 1 ? signed_codes(codes[i]) : part_of(codes[i], w, 0);
            }
        }
    }
}

/* Scale and zero of rows [row, row + block) in `groups` groups from `first` on: fp32 [groups][64]. */
static void read_params(const qmix_job *job, int64_t row, int64_t first, int64_t groups, float *scale, float *zero) {
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < job->block; i += L) {
            float *s = scale + g * 64 + i, *z = zero + g * 64 + i;
            if (job->bits == QMIX_E2M1)
                store_f(s, load_e8m0((const uint8_t *)job->params + (first + g) * job->padded_rows + row + i));
            else if (job->bits != 8)
                split_params(job->params + ((first + g) * job->padded_rows + row + i) * 2, s, z);
            else
                for (int j = 0; j < L; j++) {
                    int64_t at = row + i + j < job->padded_rows ? row + i + j : job->padded_rows - 1;
                    s[j] = from_bf16(job->params[at]);
                }
        }
}


/* What a group adds to y: sum of codes * scale * step, and zero * sum of x. */
ALWAYS vflt add_codes(vint sum, vflt scale, float step, vflt y) {
    return fma_f(mul_f(to_f(sum), scale), set_f(step), y);
}
ALWAYS vflt add_zero(vflt zero, float sum, vflt y) { return fma_f(zero, set_f(sum), y); }

ALWAYS void finish_group(const int count, const int sub, const int act, const int bits, vint sums[][SUB],
                         vflt fsums[][SUB], const float *scale, const float *zero, const float *step, const float *sum,
                         float *y, int64_t y_stride) {
    UNROLL for (int v = 0; v < sub; v++) {
        vflt s = load_f(scale + v * L);
        UNROLL for (int c = 0; c < count; c++) {
            float *to = y + c * y_stride + v * L;
            vflt value = load_f(to);
            if (act == QMIX_ACT_INT8)
                value = add_codes(sums[c][v], s, step[c], value);
            else
                value = fma_f(fsums[c][v], s, value);
            if (bits == 4)
                value = add_zero(load_f(zero + v * L), sum[c], value);
            store_f(to, value);
        }
    }
}

ALWAYS void inner(const int count, const int sub, const int act, const int bits, int64_t groups, int64_t fours,
                  const vint *tile, panel_view x, const float *scale, const float *zero, float *y, int64_t y_stride) {
    for (int64_t g = 0; g < groups; g++) {
        __asm__("" : "+r"(y)); /* or gcc keeps the address of each vector of y in memory */
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
                        else if (bits != 8)
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

/* Columns [column, column + columns) of a block of rows, all tokens [first, last). */
ALWAYS void block_piece(const int act, const int bits, const int block, const qmix_job *job, int64_t row,
                        int64_t column, int64_t columns, const char *panels, int64_t panel, int64_t last, vint *tile,
                        float *scale, float *zero, float *acc) {
    const int words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    const int vectors = block / L, sub = vectors < SUB ? vectors : SUB;
    int64_t bytes = token_bytes(act, job), group = job->group, first = qmix_panel(job->tokens, WIDTH, panel);
    if (bits != 8) {
        const int kind = bits == QMIX_E2M1 ? bits : job->bits;
        int64_t bytes_of_column = block * qmix_code_bits(kind) / 8;
        const uint8_t *from = job->weight + (row / block * job->padded_cols + column) * bytes_of_column;
        if (bits == QMIX_E2M1)
            unpack_int4(qmix_middle(bits), bits, from, block, words, columns, tile);
        else
            WITH_BITS(kind, unpack_int4(qmix_middle(bits), width, from, block, words, columns, tile))
    } else
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

