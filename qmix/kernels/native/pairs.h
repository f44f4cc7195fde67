/* The grouped formats with int8 activations where a processor has `maddubs` and no better dot product: two products
 * are added in a 16-bit lane, and 32 columns of them fit it, because |q - middle| <= 8 and |x| <= 127 (the sum starts
 * at -middle times the sum of x; what overflows on the way comes back). Two of these sums are then widened together. Of
 * mxfp4, whose codes are up to 12 from the middle, 16 columns fit: a part, PART(bits) columns, is 32 or 16.
 *
 * The activations are pairs: a word has the codes of two columns, twice. B rows per block; x86_pairs.h has the order
 * of the rows in the vectors.
 */

enum { FEW_COLUMNS = 64 }; /* of a tile for few tokens: reading it from memory and computing with it should overlap */

ALWAYS vint add_pairs(vint sum, vint codes, vint word) {
    return in_place(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, word)));
}

/* The first of such sums; and what is in the two halves of a lane together. */
ALWAYS vint pairs_of(vint codes, vint word) { return _mm256_maddubs_epi16(codes, word); }
ALWAYS vint sum_pairs(vint sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

/* The lower or upper rows of two vectors of sums, added in 32-bit lanes. */
ALWAYS vint widened(vint first, vint second, const int upper) {
    vint both = upper ? _mm256_unpackhi_epi16(first, second) : _mm256_unpacklo_epi16(first, second);
    return _mm256_madd_epi16(both, _mm256_set1_epi16(1));
}

typedef vint sums_of_pairs[WIDTH][4]; /* [c][v]: of token c and 16 rows, in 16-bit lanes */

/* Sums of `columns` columns, `vectors` vectors of rows x `count` tokens. The codes come from a tile, or, where bits is
 * not 0, from memory: those of the vectors of nibbles from `part` on. */
ALWAYS void sums_of_part(const int count, const int vectors, const int columns, const int bits, const int block,
                         const int part, const void *from, const uint32_t *words, const int32_t *start,
                         sums_of_pairs sums) {
    const uint8_t *packed = from;
    const vint *tile = from;
    vint held[WIDTH][4];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            held[c][v] = set_i(start[c]);
    ONCE for (int k = 0; k < columns / 8; k++) { /* 4 pairs of columns */
        if (bits && !part)
            prefetch_codes(packed, block * qmix_code_bits(bits));
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            if (bits) {
                nibbles_of_pair(bits, block, packed, nibbles);
                split_codes(bits, vectors / 2, nibbles + part, codes);
                packed += block * qmix_code_bits(bits) / 4;
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

/* A function for each case: within larger ones gcc runs out of registers. */
#define SUMS_OF_PART(name, count, vectors, columns, bits, block, part) \
    APART void name(const void *from, const uint32_t *words, const int32_t *start, sums_of_pairs sums) { \
        sums_of_part(count, vectors, columns, bits, block, part, from, words, start, sums); \
    }
typedef void summing(const void *from, const uint32_t *words, const int32_t *start, sums_of_pairs sums);

/* Sums of a group of columns, `step` bytes for a part of them: the last two parts (or one) in first and second, those
 * before them already widened: wide[c][2 * v], wide[c][2 * v + 1] have the rows of vector v in 32-bit lanes. */
ALWAYS void sums_of_group(const int count, const int vectors, const int part, summing *sum, int64_t group,
                          const char *from, int64_t step, panel_view x, sums_of_pairs first, sums_of_pairs second,
                          vint wide[][8]) {
    for (int64_t column = 0;; column += 2 * part) {
        sum(from, x.words, x.start, first);
        if (group > part)
            sum(from + step, x.words + part / 2 * count, x.start + count, second);
        if (column + 2 * part >= group)
            return;
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int w = 0; w < 2 * vectors; w++)
                wide[c][w] = widened(first[c][w / 2], second[c][w / 2], w % 2);
        from += 2 * step, x.words += part * count, x.start += 2 * count;
    }
}

/* Columns of a block into a tile [B/16 / SUB][columns / 2][SUB]. */
ALWAYS void tile_of_pairs(const int bits, const int block, const uint8_t *from, int64_t columns, vint *tile) {
    const int vectors = block / 16;
    ONCE for (int64_t k = 0; k < columns / 2; k += 4) {
        prefetch_codes(from, block * qmix_code_bits(bits));
        UNROLL for (int i = 0; i < 4; i++) {
            vint nibbles[2], codes[4];
            nibbles_of_pair(bits, block, from, nibbles);
            split_codes(bits, block / 32, nibbles, codes);
            from += block * qmix_code_bits(bits) / 4;
            UNROLL for (int v = 0; v < vectors; v++)
                tile[(v / SUB * (columns / 2) + k + i) * SUB + v % SUB] = codes[v];
        }
    }
}

/* Scale and zero of a block in `groups` groups from `first` on, in the order of the vectors: fp32 [groups][64]. */
ALWAYS void params_in_pairs(const qmix_job *job, const int bits, const int block, int64_t row, int64_t first,
                            int64_t groups, float *scale, float *zero) {
    const uint16_t *from = job->params + qmix_params(bits, first * job->padded_rows + row);
    for (int64_t g = 0; g < groups; g++)
        UNROLL for (int w = 0; w < block / 8; w++) {
            vflt s, z;
            params_of(bits, from + qmix_params(bits, g * job->padded_rows), row_distance(bits, block), w, &s, &z);
            store_f(scale + 64 * g + 8 * w, s);
            store_f(zero + 64 * g + 8 * w, z);
        }
}

/* y[c][w] += what a group's sums of vector w / 2 are worth; more: it has 128 columns, of which `wide` has 64. */
ALWAYS void add_group(const int count, const int bits, const int more, const int w, const int i, vflt scale, vflt zero, panel_view x,
                      sums_of_pairs first, sums_of_pairs second, vint wide[][8], float *y, int64_t y_stride) {
    UNROLL for (int c = 0; c < count; c++) {
        float *to = y + c * y_stride + w * L;
        vint sum = widened(first[c][i / 2], second[c][i / 2], i % 2);
        if (more)
            sum = _mm256_add_epi32(sum, wide[c][i]);
        vflt value = add_codes(sum, scale, x.step[c], load_f(to));
        store_f(to, bits == QMIX_E2M1 ? value : add_zero(zero, x.sum[c], value));
    }
}

/* Zeros where a group has no second part, and for the compiler, which cannot see that `wide` is written. */
ALWAYS void prepare(int64_t group, const int part, const int more, sums_of_pairs second, vint wide[][8]) {
    if (group <= part)
        memset(second, 0, sizeof(sums_of_pairs));
    if (more)
        memset(wide, 0, WIDTH * sizeof *wide);
}

/* `groups` groups of a tile's columns times a panel of `count` tokens; SUB vectors of 16 rows; more: as in add_group;
 * bits: QMIX_E2M1, or 4 for all others. */
ALWAYS void inner_of(const int count, const int bits, const int more, summing *sum, int64_t groups, int64_t group, const vint *tile,
                     panel_view x, const float *scale, const float *zero, float *y, int64_t y_stride) {
    sums_of_pairs first, second;
    vint wide[WIDTH][8];
    const int part = PART(bits);
    prepare(group, part, more, second, wide);
    for (int64_t g = 0; g < groups; g++) {
        sums_of_group(count, SUB, part, sum, group, (const char *)tile, part / 2 * SUB * sizeof *tile, x, first, second,
                      wide);
        UNROLL for (int w = 0; w < 2 * SUB; w++)
            add_group(count, bits, more, w, w, load_f(scale + w * L), load_f(zero + w * L), x, first, second, wide, y, y_stride);
        tile += group / 2 * SUB, scale += 64, zero += 64;
        x.words += group / 2 * count, x.start += group / part * count, x.step += count, x.sum += count;
    }
}

#define INNER(count) \
    SUMS_OF_PART(sums_##count, count, SUB, 32, 0, 0, 0) \
    APART void inner_##count(int64_t groups, int64_t group, const vint *tile, panel_view x, const float *scale, \
                             const float *zero, float *y, int64_t y_stride) { \
        if (group > 64) \
            inner_of(count, 4, 1, sums_##count, groups, group, tile, x, scale, zero, y, y_stride); \
        else \
            inner_of(count, 4, 0, sums_##count, groups, group, tile, x, scale, zero, y, y_stride); \
    } \
    SUMS_OF_PART(sums_##count##_e2m1, count, SUB, 16, 0, 0, 0) \
    APART void inner_##count##_e2m1(int64_t groups, int64_t group, const vint *tile, panel_view x, const float *scale, \
                                    const float *zero, float *y, int64_t y_stride) { \
        inner_of(count, QMIX_E2M1, 0, sums_##count##_e2m1, groups, group, tile, x, scale, zero, y, y_stride); \
    }
INNER(1)
INNER(2)
INNER(3)
INNER(4)
#undef INNER
static void (*const inner_pairs[2][4])(int64_t, int64_t, const vint *, panel_view, const float *, const float *, float *,
                                       int64_t) = {
    {inner_1, inner_2, inner_3, inner_4}, {inner_1_e2m1, inner_2_e2m1, inner_3_e2m1, inner_4_e2m1}};

/* acc fp32 [tokens][B] += one block of rows times all tokens of panels [panel, last). */
ALWAYS void rows_by_tiles(const int bits, const int block, const qmix_job *job, int64_t row, const char *panels,
                          int64_t panel, int64_t last, char *scratch, float *acc) {
    const int vectors = block / 16, distance = row_distance(bits, block);
    int64_t bytes = token_bytes(QMIX_ACT_INT8, job), group = job->group;
    int64_t few = group < FEW_COLUMNS ? FEW_COLUMNS : group, most = job->tokens <= 2 * WIDTH ? few : 256, first = qmix_panel(job->tokens, WIDTH, panel);
    vint *tile = (vint *)scratch;
    float *scale = (float *)(scratch + 32768), *zero = scale + 8 * 64;
    const int width = block * qmix_code_bits(bits) / 8;
    const uint8_t *from = job->weight + row / block * job->padded_cols * width;
    for (int64_t column = 0; column < job->padded_cols; column += most) {
        int64_t columns = job->padded_cols - column < most ? job->padded_cols - column : most;
        tile_of_pairs(bits, block, from + column * width, columns, tile);
        params_in_pairs(job, bits, block, row, column / group, columns / group, scale, zero);
        for (int64_t p = panel; p < last; p++) {
            int64_t begin = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - begin;
            panel_view x = view_panel(QMIX_ACT_INT8, job, panels + begin * bytes, n, column);
            for (int v = 0; v < vectors; v += SUB)
                inner_pairs[bits == QMIX_E2M1][n - 1](columns / group, group, tile + v * (columns / 2), x, scale + 2 * v * L,
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

/* sums[c] += a group of columns times the activations of token c, straight from memory; `sum` does a half of the
 * vectors of nibbles where all sums would not fit the registers, and `other` the other one. */
ALWAYS void direct_group(const int count, const int bits, const int block, const int more, summing *sum, summing *other,
                         int64_t group, const uint8_t *from, const uint16_t *params, panel_view x, float sums[][64]) {
    const int vectors = block / 16, step = other ? vectors / 2 : vectors, columns = PART(bits);
    sums_of_pairs first, second;
    vint wide[WIDTH][8];
    prepare(group, columns, more, second, wide);
    UNROLL for (int part = 0; part < vectors; part += step) {
        sums_of_group(count, step, columns, part ? other : sum, group, (const char *)from,
                      columns * block * qmix_code_bits(bits) / 8, x, first, second, wide);
        UNROLL for (int i = 0; i < 2 * step; i++) {
            /* vector of nibbles n has vectors n and vectors / 2 + n of codes */
            int w = i < step ? part + i : vectors + part + i - step;
            vflt scale, zero;
            params_of(bits, params, row_distance(bits, block), w, &scale, &zero);
            add_group(count, bits, more, w, i, scale, zero, x, first, second, wide, *sums, 64);
        }
    }
}

#define GROUP_OF(count, bits, block, other) \
    APART void group_##count##_##bits##_##block(int64_t group, const uint8_t *from, const uint16_t *params, \
                                                panel_view x, float sums[][64]) { \
        if (group > 64 && bits != QMIX_E2M1) \
            direct_group(count, bits, block, 1, sums_##count##_##bits##_##block, other, group, from, params, x, sums); \
        else \
            direct_group(count, bits, block, 0, sums_##count##_##bits##_##block, other, group, from, params, x, sums); \
    }
#define GROUP_WHOLE(count, bits, block) \
    SUMS_OF_PART(sums_##count##_##bits##_##block, count, block / 16, PART(bits), bits, block, 0) \
    GROUP_OF(count, bits, block, NULL)
#define GROUP_HALVES(count, bits, block) \
    SUMS_OF_PART(sums_##count##_##bits##_##block, count, block / 32, PART(bits), bits, block, 0) \
    SUMS_OF_PART(others_##count##_##bits##_##block, count, block / 32, PART(bits), bits, block, 1) \
    GROUP_OF(count, bits, block, others_##count##_##bits##_##block)
enum { COLUMNS_OF_WORD = 2 };
static int64_t starts_of_group(const qmix_job *job) { return job->group / PART(job->bits); }
