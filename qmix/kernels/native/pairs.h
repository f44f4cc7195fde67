/* The grouped formats with int8 activations where a processor has `maddubs` and no better dot product: two products
 * are added in a 16-bit lane, and 32 columns of them fit it, because |q - middle| <= 8 and |x| <= 127 (the sum starts
 * at -middle times the sum of x; what overflows on the way comes back). Two of these sums are then widened together.
 *
 * The activations are pairs: a word has the codes of two columns, twice. B rows per block; x86_pairs.h has the order
 * of the rows in the vectors.
 */

enum { FEW_COLUMNS = 64 }; /* of a tile for few tokens: reading it from memory and computing with it should overlap */

/* 32 columns: sums[c][v] in 16-bit lanes; the codes of 2 columns come from `tile`, sub vectors at a time, or, where it
 * is NULL, from memory. */
ALWAYS void sums_of_32(const int count, const int sub, const int bits, const int block, const uint8_t *from,
                       const vint *tile, const uint32_t *words, const int32_t *start, vint sums[][4]) {
    vint held[WIDTH][4];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < sub; v++)
            held[c][v] = set_i(start[c]);
    for (int k = 0; k < 4; k++) { /* 4 pairs of columns */
        if (!tile)
            prefetch_codes(from, block * bits);
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            if (tile) {
                UNROLL for (int v = 0; v < sub; v++)
                    codes[v] = tile[v];
                tile += sub;
            } else {
                nibbles_of_pair(bits, block, from, nibbles);
                split_codes(bits, block / 32, nibbles, codes);
                from += block * bits / 4;
            }
            UNROLL for (int c = 0; c < count; c++) {
                vint word = set_i((int32_t)words[c]);
                UNROLL for (int v = 0; v < sub; v++)
                    held[c][v] = _mm256_add_epi16(held[c][v], _mm256_maddubs_epi16(codes[v], word));
            }
            words += count;
        }
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < sub; v++)
            sums[c][v] = held[c][v];
}

/* A group of columns, exact: wide[c][2 * v], wide[c][2 * v + 1] have the rows of vector v in 32-bit lanes. */
ALWAYS void sums_in_pairs(const int count, const int sub, const int bits, const int block, int64_t group,
                          const uint8_t *from, const vint *tile, panel_view x, vint wide[][8]) {
    const vint ones = _mm256_set1_epi16(1);
    for (int64_t column = 0; column < group; column += 64) {
        vint first[WIDTH][4], second[WIDTH][4];
        sums_of_32(count, sub, bits, block, from, tile, x.words, x.start, first);
        if (group > 32) {
            sums_of_32(count, sub, bits, block, from + 4 * block * bits, tile ? tile + 16 * sub : NULL,
                       x.words + 16 * count, x.start + count, second);
            from += 8 * block * bits, tile += tile ? 32 * sub : 0, x.words += 32 * count, x.start += 2 * count;
        }
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < sub; v++) {
                vint other = group > 32 ? second[c][v] : set_i(0);
                vint low = _mm256_madd_epi16(_mm256_unpacklo_epi16(first[c][v], other), ones);
                vint high = _mm256_madd_epi16(_mm256_unpackhi_epi16(first[c][v], other), ones);
                wide[c][2 * v] = column ? _mm256_add_epi32(wide[c][2 * v], low) : low;
                wide[c][2 * v + 1] = column ? _mm256_add_epi32(wide[c][2 * v + 1], high) : high;
            }
    }
}

/* Columns of a block into a tile [B/16 / sub][columns / 2][sub]. */
ALWAYS void tile_of_pairs(const int bits, const int block, const uint8_t *from, int64_t columns, vint *tile) {
    const int vectors = block / 16, sub = vectors < SUB ? vectors : SUB;
    for (int64_t k = 0; k < columns / 2; k += 4) {
        prefetch_codes(from, block * bits);
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            nibbles_of_pair(bits, block, from, nibbles);
            split_codes(bits, block / 32, nibbles, codes);
            from += block * bits / 4;
            UNROLL for (int v = 0; v < vectors; v++)
                tile[(v / sub * (columns / 2) + k + i) * sub + v % sub] = codes[v];
        }
    }
}

/* Scale and zero of a block in `groups` groups from `first` on, in the order of the vectors: fp32 [groups][64]. */
ALWAYS void params_in_pairs(const qmix_job *job, const int distance, const int block, int64_t row, int64_t first,
                            int64_t groups, float *scale, float *zero) {
    for (int64_t g = 0; g < groups; g++)
        UNROLL for (int w = 0; w < block / 8; w++) {
            vflt s, z;
            params_of(job->params + ((first + g) * job->padded_rows + row) * 2, distance, w, &s, &z);
            store_f(scale + 64 * g + 8 * w, s);
            store_f(zero + 64 * g + 8 * w, z);
        }
}

/* `groups` groups of a tile's columns times a panel of `count` tokens. */
ALWAYS void inner_pairs(const int count, const int sub, int64_t groups, int64_t group, const vint *tile, panel_view x,
                        const float *scale, const float *zero, float *y, int64_t y_stride) {
    for (int64_t g = 0; g < groups; g++) {
        vint wide[WIDTH][8];
        sums_in_pairs(count, sub, 0, 0, group, NULL, tile, x, wide);
        UNROLL for (int w = 0; w < 2 * sub; w++) {
            vflt s = load_f(scale + w * L), z = load_f(zero + w * L);
            UNROLL for (int c = 0; c < count; c++) {
                float *to = y + c * y_stride + w * L;
                store_f(to, add_zero(z, x.sum[c], add_codes(wide[c][w], s, x.step[c], load_f(to))));
            }
        }
        tile += group / 2 * sub, scale += 64, zero += 64;
        x.words += group / 2 * count, x.start += group / 32 * count, x.step += count, x.sum += count;
    }
}

/* acc fp32 [tokens][B] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void rows_by_tiles(const int bits, const int block, const qmix_job *job, int64_t row, const char *panels,
                          int64_t panel, int64_t last, char *scratch, float *acc) {
    const int vectors = block / 16, sub = vectors < SUB ? vectors : SUB, distance = row_distance(bits, block);
    int64_t bytes = token_bytes(QMIX_ACT_INT8, job), group = job->group;
    int64_t few = group < FEW_COLUMNS ? FEW_COLUMNS : group, most = job->tokens <= 2 * WIDTH ? few : 256, first = qmix_panel(job->tokens, WIDTH, panel);
    vint *tile = (vint *)scratch;
    float *scale = (float *)(scratch + 32768), *zero = scale + 8 * 64;
    const uint8_t *from = job->weight + row / block * job->padded_cols * (block * bits / 8);
    for (int64_t column = 0; column < job->padded_cols; column += most) {
        int64_t columns = job->padded_cols - column < most ? job->padded_cols - column : most;
        tile_of_pairs(bits, block, from + column * (block * bits / 8), columns, tile);
        params_in_pairs(job, distance, block, row, column / group, columns / group, scale, zero);
        for (int64_t p = panel; p < last; p++) {
            int64_t begin = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - begin;
            panel_view x = view_panel(QMIX_ACT_INT8, job, panels + begin * bytes, n, column);
            for (int v = 0; v < vectors; v += sub)
                WITH_COUNT(n, inner_pairs(count, sub, columns / group, group, tile + v * (columns / 2), x,
                                          scale + 2 * v * L, zero + 2 * v * L,
                                          acc + (begin - first) * block + 2 * v * L, block))
        }
    }
    int64_t tokens = qmix_panel(job->tokens, WIDTH, last) - first;
    for (int64_t t = 0; t < tokens; t++) {
        float sums[64];
        memcpy(sums, acc + t * block, 4 * (size_t)block);
        in_order_of_rows(distance, block, sums, acc + t * block);
    }
}
