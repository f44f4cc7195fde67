/* The grouped formats straight from memory where a processor has a dot product of four bytes: four columns to a 32-bit
 * lane. pairs_direct.h calls this; x86_pairs.h has the order of the rows in the vectors.
 */

/* A group of columns, exact: wide[c][2 * v], wide[c][2 * v + 1] have the rows of vector v; x.words has four codes in each. */
ALWAYS void sums_in_fours(const int count, const int vectors, const int bits, const int block, int64_t group,
                          const uint8_t *from, panel_view x, vint wide[][8]) {
    vint held[WIDTH][8];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int w = 0; w < 2 * vectors; w++)
            /* -8 times the sum of x, but the middle is 8, 4 or 2; E2M1's start is its own */
            held[c][w] = set_i(bits == QMIX_E2M1 ? x.start[c] : x.start[c] >> (4 - bits));
    const int width = qmix_code_bits(bits);
    ONCE for (int64_t k = 0; k < group / 4; k += 2) {
        prefetch_codes(from, block * width);
        UNROLL for (int i = 0; i < 2; i++) {
            vint a[2], b[2], both[2], codes[8];
            nibbles_of_pair(bits, block, from, a);
            nibbles_of_pair(bits, block, from + block * width / 4, b);
            from += block * width / 2;
            UNROLL for (int n = 0; n < vectors / 2; n++) {
                both[0] = _mm256_unpacklo_epi16(a[n], b[n]);
                both[1] = _mm256_unpackhi_epi16(a[n], b[n]);
                UNROLL for (int h = 0; h < 2; h++) { /* vector n of the lower nibbles, then of the upper ones */
                    codes[2 * n + h] = masked(both[h], bits == 2 ? 3 : 15);
                    codes[vectors + 2 * n + h] = masked(_mm256_srli_epi16(both[h], 4), bits == 2 ? 3 : 15);
                }
            }
            if (bits == QMIX_E2M1)
                UNROLL for (int w = 0; w < 2 * vectors; w++)
                    codes[w] = of_e2m1(codes[w]);
            UNROLL for (int c = 0; c < count; c++) {
                vint word = set_i((int32_t)x.words[c]);
                UNROLL for (int w = 0; w < 2 * vectors; w++)
                    held[c][w] = dot4(held[c][w], codes[w], word);
            }
            x.words += count;
        }
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int w = 0; w < 2 * vectors; w++)
            wide[c][w] = held[c][w];
}
/* sums[c] += a group of columns times the activations of token c. */
ALWAYS void direct_group(const int count, const int bits, const int block, int64_t group, const uint8_t *from,
                         const uint16_t *params, panel_view x, float sums[][64]) {
    vint wide[WIDTH][8];
    sums_in_fours(count, block / 16, bits, block, group, from, x, wide);
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

#define GROUP_FUNCTIONS(count, bits, block) \
    APART void group_##count##_##bits##_##block(int64_t group, const uint8_t *from, const uint16_t *params, \
                                                panel_view x, float sums[][64]) { \
        direct_group(count, bits, block, group, from, params, x, sums); \
    }
enum { COLUMNS_OF_WORD = 4 };
static int64_t starts_of_group(const qmix_job *job) { return (void)job, 1; }
