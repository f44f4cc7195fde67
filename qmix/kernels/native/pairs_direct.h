/* int4, int3 and int2 with int8 activations for a token or two: codes go straight from memory to registers, so that
 * loading and computing overlap. For the levels of 256 bits; x86_pairs.h has the order of the rows in the vectors. */

#ifdef HAS_VNNI
/* A group of columns, as pairs.h has it, four columns to a 32-bit lane; x.words has four codes in each. */
ALWAYS void sums_in_fours(const int count, const int vectors, const int bits, const int block, int64_t group,
                          const uint8_t *from, panel_view x, vint wide[][8]) {
    vint held[WIDTH][8];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int w = 0; w < 2 * vectors; w++)
            held[c][w] = set_i(x.start[c] >> (4 - bits)); /* -8 times the sum of x: the middle is 8, 4 or 2 */
    ONCE for (int64_t k = 0; k < group / 4; k += 2) {
        prefetch_codes(from, block * bits);
        UNROLL for (int i = 0; i < 2; i++) {
            vint a[2], b[2], both[2], codes[8];
            nibbles_of_pair(bits, block, from, a);
            nibbles_of_pair(bits, block, from + block * bits / 4, b);
            from += block * bits / 2;
            UNROLL for (int n = 0; n < vectors / 2; n++) {
                both[0] = _mm256_unpacklo_epi16(a[n], b[n]);
                both[1] = _mm256_unpackhi_epi16(a[n], b[n]);
                UNROLL for (int h = 0; h < 2; h++) { /* vector n of the lower nibbles, then of the upper ones */
                    codes[2 * n + h] = masked(both[h], bits == 2 ? 3 : 15);
                    codes[vectors + 2 * n + h] = masked(_mm256_srli_epi16(both[h], 4), bits == 2 ? 3 : 15);
                }
            }
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
#define DIRECT_ROWS 64 /* times tokens: their sums stay in registers */
#define DIRECT_TOKENS(block) (DIRECT_ROWS / (block))
#else
#define DIRECT_ROWS 128
#define DIRECT_TOKENS(block) WIDTH
#endif

/* y fp32 [count][B] = one block of rows times the tokens of a panel. */
ALWAYS void direct_pairs(const int count, const int bits, const int block, const qmix_job *job, int64_t row,
                         panel_view x, float *y) {
    const int vectors = block / 16, distance = row_distance(bits, block);
    const int step = count * block <= DIRECT_ROWS ? vectors : vectors / 2; /* that many sums stay in registers */
    int64_t groups = job->padded_cols / job->group, group = job->group;
    const uint8_t *from = job->weight + row / block * job->padded_cols * (block * bits / 8);
    const uint16_t *params = job->params + row * 2;
    float sums[WIDTH][64] = {{0}};
    for (int64_t g = 0; g < groups; g++) {
        vint wide[WIDTH][8];
        for (int i = 0; i < block * 4; i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + 4 * job->padded_rows) + i);
        UNROLL for (int part = 0; part < vectors; part += step) {
#ifdef HAS_VNNI
            sums_in_fours(count, vectors, bits, block, group, from, x, wide);
#else
            sums_in_pairs(count, step, bits, block, part / 2, group, from, NULL, x, wide);
#endif
            UNROLL for (int i = 0; i < 2 * step; i++) {
                /* vector of nibbles n has vectors n and vectors / 2 + n of codes */
                int w = i < step ? part + i : vectors + part + i - step;
                vflt scale, zero;
                params_of(params, distance, w, &scale, &zero);
                UNROLL for (int c = 0; c < count; c++) {
                    float *to = sums[c] + w * L;
                    store_f(to, add_zero(zero, x.sum[c], add_codes(wide[c][i], scale, x.step[c], load_f(to))));
                }
            }
        }
#ifdef HAS_VNNI
        x.words += group / 4 * count, x.start += count;
#else
        x.words += group / 2 * count, x.start += group / 32 * count;
#endif
        from += group * (block * bits / 8), params += 2 * job->padded_rows, x.step += count, x.sum += count;
    }
    for (int c = 0; c < count; c++)
        in_order_of_rows(distance, block, sums[c], y + c * block);
}

/* A function for each number of tokens, format and block, at most DIRECT_ROWS rows times tokens: within larger ones
 * gcc runs out of registers. */
#define DIRECTLY(count, bits, block) \
    APART void direct_##count##_##bits##_##block(const qmix_job *job, int64_t row, panel_view x, float *y) { \
        direct_pairs(count, bits, block, job, row, x, y); \
    }
#define ALL_BITS(count, block) DIRECTLY(count, 2, block) DIRECTLY(count, 3, block) DIRECTLY(count, 4, block)
ALL_BITS(1, 64)
ALL_BITS(1, 32)
ALL_BITS(2, 32)
#ifdef HAS_VNNI
#define OF_BITS(bits) {{direct_1_##bits##_32, direct_2_##bits##_32}, {direct_1_##bits##_64}}
#else
ALL_BITS(2, 64)
ALL_BITS(3, 64)
ALL_BITS(4, 64)
ALL_BITS(3, 32)
ALL_BITS(4, 32)
#define OF_BITS(bits) {{direct_1_##bits##_32, direct_2_##bits##_32, direct_3_##bits##_32, direct_4_##bits##_32}, \
                       {direct_1_##bits##_64, direct_2_##bits##_64, direct_3_##bits##_64, direct_4_##bits##_64}}
#endif
static void (*const direct_rows[3][2][4])(const qmix_job *, int64_t, panel_view, float *) = {OF_BITS(2), OF_BITS(3),
                                                                                            OF_BITS(4)};
#undef OF_BITS
#undef ALL_BITS
#undef DIRECTLY
