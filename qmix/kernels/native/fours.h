/* The grouped formats straight from memory where a processor has a dot product of four bytes: four columns to a 32-bit
 * lane. pairs_direct.h calls this; x86_pairs.h has the order of the rows in the vectors.
 */

/* A group of columns, exact: wide[c][w] has the rows of vector w (of B/8); x.words has four codes in each. Only vectors of
 * which `n` (of B/32) and `h` (of 2) say so, or all where these are -1: what is left out would not fit the registers, and
 * its codes are unpacked once more, from the first cache. */
ALWAYS void sums_in_fours(const int count, const int bits, const int block, const int n_only, const int h_only,
                          int64_t group, const uint8_t *from, panel_view x, vint wide[][8]) {
    const int width = qmix_code_bits(bits), vectors = block / 16;
    const int n0 = n_only < 0 ? 0 : n_only, n1 = n_only < 0 ? vectors / 2 : n_only + 1;
    const int h0 = h_only < 0 ? 0 : h_only, h1 = h_only < 0 ? 2 : h_only + 1;
    vint held[WIDTH][2][4]; /* of codes in the lower nibbles, in the upper ones */
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int i = 2 * n0; i < 2 * n1; i++)
            /* -8 times the sum of x, but the middle is 8, 4 or 2; E2M1's start is its own */
            held[c][0][i] = held[c][1][i] = set_i(bits == QMIX_E2M1 ? x.start[c] : x.start[c] >> (4 - bits));
    ONCE for (int64_t k = 0; k < group / 4; k += 2) {
        if (n0 == 0 && h0 == 0)
            prefetch_codes(from, block * width);
        UNROLL for (int i = 0; i < 2; i++) {
            vint a[2], b[2], codes[2][4];
            nibbles_of_pair(bits, block, from, a);
            nibbles_of_pair(bits, block, from + block * width / 4, b);
            from += block * width / 2;
            UNROLL for (int n = n0; n < n1; n++)
                UNROLL for (int h = h0; h < h1; h++) {
                    vint both = h ? _mm256_unpackhi_epi16(a[n], b[n]) : _mm256_unpacklo_epi16(a[n], b[n]);
                    vint lower = masked(both, bits == 2 ? 3 : 15);
                    vint upper = masked(_mm256_srli_epi16(both, 4), bits == 2 ? 3 : 15);
                    codes[0][2 * n + h] = bits == QMIX_E2M1 ? of_e2m1(lower) : lower;
                    codes[1][2 * n + h] = bits == QMIX_E2M1 ? of_e2m1(upper) : upper;
                }
            UNROLL for (int c = 0; c < count; c++) {
                vint word = set_i((int32_t)x.words[c]);
                UNROLL for (int n = n0; n < n1; n++)
                    UNROLL for (int h = h0; h < h1; h++)
                        UNROLL for (int u = 0; u < 2; u++)
                            held[c][u][2 * n + h] = dot4(held[c][u][2 * n + h], codes[u][2 * n + h], word);
            }
            x.words += count;
        }
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int n = n0; n < n1; n++)
            UNROLL for (int h = h0; h < h1; h++)
                UNROLL for (int u = 0; u < 2; u++)
                    wide[c][vectors * u + 2 * n + h] = held[c][u][2 * n + h];
}

/* A function for each part: within larger ones gcc runs out of registers. */
#define SUMS_IN_FOURS(name, count, bits, block, n, h) \
    APART void name(int64_t group, const uint8_t *from, panel_view x, vint wide[][8]) { \
        sums_in_fours(count, bits, block, n, h, group, from, x, wide); \
    }

/* sums[c] += what the exact sums of a group are worth. */
ALWAYS void add_fours(const int count, const int bits, const int block, const uint16_t *params, panel_view x,
                      vint wide[][8], float sums[][64]) {
    UNROLL for (int w = 0; w < block / 8; w++) {
        vflt scale, zero;
        params_of(bits, params, row_distance(bits, block), w, &scale, &zero);
        UNROLL for (int c = 0; c < count; c++) {
            float *to = sums[c] + w * L;
            vflt value = add_codes(wide[c][w], scale, x.step[c], load_f(to));
            store_f(to, bits == QMIX_E2M1 ? value : add_zero(zero, x.sum[c], value));
        }
    }
}

/* sums[c] += a group of columns times the activations of token c: all rows at once, or in two or four parts. */
#define GROUP_IN(count, bits, block, parts) \
    APART void group_##count##_##bits##_##block(int64_t group, const uint8_t *from, const uint16_t *params, \
                                                panel_view x, float sums[][64]) { \
        vint wide[WIDTH][8]; \
        parts \
        add_fours(count, bits, block, params, x, wide, sums); \
    }
#define GROUP_WHOLE(count, bits, block) \
    GROUP_IN(count, bits, block, sums_in_fours(count, bits, block, -1, -1, group, from, x, wide);)
#define GROUP_HALVES(count, bits, block) /* of 64 rows: by n; of 32, which have but one: by h */ \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_0, count, bits, block, block == 64 ? 0 : -1, block == 64 ? -1 : 0) \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_1, count, bits, block, block == 64 ? 1 : -1, block == 64 ? -1 : 1) \
    GROUP_IN(count, bits, block, fours_##count##_##bits##_##block##_0(group, from, x, wide); \
             fours_##count##_##bits##_##block##_1(group, from, x, wide);)
#define GROUP_QUARTERS(count, bits, block) \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_0, count, bits, block, 0, 0) \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_1, count, bits, block, 0, 1) \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_2, count, bits, block, 1, 0) \
    SUMS_IN_FOURS(fours_##count##_##bits##_##block##_3, count, bits, block, 1, 1) \
    GROUP_IN(count, bits, block, fours_##count##_##bits##_##block##_0(group, from, x, wide); \
             fours_##count##_##bits##_##block##_1(group, from, x, wide); \
             fours_##count##_##bits##_##block##_2(group, from, x, wide); \
             fours_##count##_##bits##_##block##_3(group, from, x, wide);)
enum { COLUMNS_OF_WORD = 4 };
static int64_t starts_of_group(const qmix_job *job) { return (void)job, 1; }
