/* The grouped formats with int8 activations where a processor has `maddubs` and no better dot product: two products
 * are added in a 16-bit lane, and 32 columns of them fit it, because |q - middle| <= 8 and |x| <= 127 (the sum starts
 * at -middle times the sum of x; what overflows on the way comes back). Two of these sums are then widened together.
 *
 * The activations are pairs: a word has the codes of two columns, twice. B rows per block; x86_pairs.h has the order
 * of the rows in the vectors.
 */

enum { FEW_COLUMNS = 64 }; /* of a tile for few tokens: reading it from memory and computing with it should overlap */

/* As assembly: gcc 12 gives the sums new registers, and then has to move them through memory. */
ALWAYS vint add_pairs(vint sum, vint codes, vint word) {
    vint products = _mm256_maddubs_epi16(codes, word);
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
    return sum;
}

/* Sums [c][v] of 32 columns in 16-bit lanes, `vectors` vectors of rows x `count` tokens. The codes come from a tile,
 * or, where bits is not 0, from memory: those of the vectors of nibbles from `part` on. */
ALWAYS void sums_of_32(const int count, const int vectors, const int bits, const int block, const int part,
                       const uint8_t *from, const vint *tile, const uint32_t *words, const int32_t *start,
                       vint sums[][4]) {
    vint held[WIDTH][4];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            held[c][v] = set_i(start[c]);
    ONCE for (int k = 0; k < 4; k++) { /* 4 pairs of columns */
        if (bits && !part)
            prefetch_codes(from, block * bits);
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            if (bits) {
                nibbles_of_pair(bits, block, from, nibbles);
                split_codes(bits, vectors / 2, nibbles + part, codes);
                from += block * bits / 4;
            } else {
                UNROLL for (int v = 0; v < vectors; v++)
                    codes[v] = tile[v];
                tile += vectors;
            }
            UNROLL for (int c = 0; c < count; c++) {
                vint word = set_i((int32_t)words[c]);
                UNROLL for (int v = 0; v < vectors; v++)
                    held[c][v] = add_pairs(held[c][v], codes[v], word);
            }
            words += count;
        }
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[c][v] = held[c][v];
}

/* A group of columns, exact: wide[c][2 * v], wide[c][2 * v + 1] have the rows of vector v in 32-bit lanes. bits is 0
 * where the codes come from a tile. */
ALWAYS void sums_in_pairs(const int count, const int vectors, const int bits, const int block, const int part,
                          int64_t group, const uint8_t *from, const vint *tile, panel_view x, vint wide[][8]) {
    const vint ones = _mm256_set1_epi16(1);
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int w = 0; w < 2 * vectors; w++)
            wide[c][w] = set_i(0);
    for (int64_t column = 0; column < group; column += 64) {
        vint first[WIDTH][4], second[WIDTH][4];
        sums_of_32(count, vectors, bits, block, part, from, tile, x.words, x.start, first);
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < vectors; v++)
                second[c][v] = set_i(0);
        if (group > 32)
            sums_of_32(count, vectors, bits, block, part, from + 4 * block * bits, tile + 16 * vectors, x.words + 16 * count,
                       x.start + count, second);
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < vectors; v++) {
                vint low = _mm256_unpacklo_epi16(first[c][v], second[c][v]);
                vint high = _mm256_unpackhi_epi16(first[c][v], second[c][v]);
                wide[c][2 * v] = _mm256_add_epi32(wide[c][2 * v], _mm256_madd_epi16(low, ones));
                wide[c][2 * v + 1] = _mm256_add_epi32(wide[c][2 * v + 1], _mm256_madd_epi16(high, ones));
            }
        from += 8 * block * bits, tile += 32 * vectors, x.words += 32 * count, x.start += 2 * count;
    }
}

/* Columns of a block into a tile [B/16 / SUB][columns / 2][SUB]. */
ALWAYS void tile_of_pairs(const int bits, const int block, const uint8_t *from, int64_t columns, vint *tile) {
    const int vectors = block / 16;
    ONCE for (int64_t k = 0; k < columns / 2; k += 4) {
        prefetch_codes(from, block * bits);
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            nibbles_of_pair(bits, block, from, nibbles);
            split_codes(bits, block / 32, nibbles, codes);
            from += block * bits / 4;
            UNROLL for (int v = 0; v < vectors; v++)
                tile[(v / SUB * (columns / 2) + k + i) * SUB + v % SUB] = codes[v];
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

/* `groups` groups of a tile's columns times a panel of `count` tokens; SUB vectors of 16 rows. */
ALWAYS void inner_of(const int count, int64_t groups, int64_t group, const vint *tile, panel_view x,
                     const float *scale, const float *zero, float *y, int64_t y_stride) {
    for (int64_t g = 0; g < groups; g++) {
        vint wide[WIDTH][8];
        sums_in_pairs(count, SUB, 0, 0, 0, group, NULL, tile, x, wide);
        UNROLL for (int w = 0; w < 2 * SUB; w++) {
            vflt s = load_f(scale + w * L), z = load_f(zero + w * L);
            UNROLL for (int c = 0; c < count; c++) {
                float *to = y + c * y_stride + w * L;
                store_f(to, add_zero(z, x.sum[c], add_codes(wide[c][w], s, x.step[c], load_f(to))));
            }
        }
        tile += group / 2 * SUB, scale += 64, zero += 64;
        x.words += group / 2 * count, x.start += group / 32 * count, x.step += count, x.sum += count;
    }
}

/* A function for each number of tokens: within larger ones gcc runs out of registers. */
#define INNER(count) \
    APART void inner_##count(int64_t groups, int64_t group, const vint *tile, panel_view x, const float *scale, \
                             const float *zero, float *y, int64_t y_stride) { \
        inner_of(count, groups, group, tile, x, scale, zero, y, y_stride); \
    }
INNER(1)
INNER(2)
INNER(3)
INNER(4)
#undef INNER
static void (*const inner_pairs[])(int64_t, int64_t, const vint *, panel_view, const float *, const float *, float *,
                                   int64_t) = {inner_1, inner_2, inner_3, inner_4};

/* acc fp32 [tokens][B] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void rows_by_tiles(const int bits, const int block, const qmix_job *job, int64_t row, const char *panels,
                          int64_t panel, int64_t last, char *scratch, float *acc) {
    const int vectors = block / 16, distance = row_distance(bits, block);
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
            for (int v = 0; v < vectors; v += SUB)
                inner_pairs[n - 1](columns / group, group, tile + v * (columns / 2), x, scale + 2 * v * L,
                                   zero + 2 * v * L, acc + (begin - first) * block + 2 * v * L, block);
        }
    }
    int64_t tokens = qmix_panel(job->tokens, WIDTH, last) - first;
    for (int64_t t = 0; t < tokens; t++) {
        float sums[64];
        memcpy(sums, acc + t * block, 4 * (size_t)block);
        in_order_of_rows(distance, block, sums, acc + t * block);
    }
}
