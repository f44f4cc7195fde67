/* int4, int3 and int2 with int8 activations for a few tokens: codes go straight from memory to registers. A function
 * of its own for each case: within larger ones gcc runs out of registers.
 *
 * A group of columns is gone through in one or several passes, each over a part of the rows, so that their sums stay in
 * registers. B rows per block, C columns at a time; neon_columns.h has the order of the rows in the vectors.
 */

enum { DIRECT_TOKENS = WIDTH };

/* Vectors of packed bytes that C columns of a block make: their codes are vectors i, i + this, ... */
ALWAYS int packed_vectors(const int columns, const int bits, const int block) {
    return block / (bits == 4 ? 2 : 4) * columns / 16;
}

ALWAYS vint dot4_lane(vint sum, vint w, vint x, const int lane) { /* x: one word of it */
    int8x16_t codes = vreinterpretq_s8_s32(w), words = vreinterpretq_s8_s32(x);
    switch (lane) {
    case 0:
        return vdotq_laneq_s32(sum, codes, words, 0);
    case 1:
        return vdotq_laneq_s32(sum, codes, words, 1);
    case 2:
        return vdotq_laneq_s32(sum, codes, words, 2);
    default:
        return vdotq_laneq_s32(sum, codes, words, 3);
    }
}

/* sums[c][v] = a group of columns of the rows of vector v, if it is one of this pass. `fours` times 4 columns a turn:
 * their words of activations are whole vectors. */
ALWAYS void sums_by_dots(const int count, const int bits, const int block, const int passes, const int pass,
                         int64_t group, const uint8_t *from, panel_view x, vint sums[][64 / L]) {
    const int vectors = block / L, packed = packed_vectors(4, bits, block), part = packed / passes;
    const int fours = count == 4 ? 1 : count == 2 ? 2 : 4;
    vint held[WIDTH][64 / L];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            held[c][v] = set_i(x.start[c] >> (4 - bits)); /* -8 times the sum of x: the middle is 8, 4 or 2 */
    ONCE for (int64_t k = 0; k < group / 4; k += fours) {
        vint words[WIDTH];
        if (!pass)
            prefetch_codes(from, fours * block * bits / 2);
        UNROLL for (int i = 0; i < fours * count / 4; i++)
            words[i] = vld1q_s32((const int32_t *)x.words + 4 * i);
        UNROLL for (int i = 0; i < fours; i++) {
            vint codes[64 / L];
            codes_of_columns(4, bits, block, from, codes);
            from += block * bits / 2;
            UNROLL for (int v = 0; v < vectors; v++)
                UNROLL for (int c = 0; c < count; c++)
                    if (v % packed / part == pass)
                        held[c][v] = dot4_lane(held[c][v], codes[v], words[(i * count + c) / 4], (i * count + c) % 4);
        }
        x.words += fours * count;
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[c][v] = held[c][v];
}

/* y [count][B] += a group of columns times the activations of the tokens. */
ALWAYS void direct_group(const int count, const int bits, const int block, const int passes, int64_t group,
                         const uint8_t *from, const uint16_t *params, panel_view x, float *y) {
    const int packed = packed_vectors(4, bits, block), part = packed / passes;
    UNROLL for (int pass = 0; pass < passes; pass++) {
        vint sums[WIDTH][64 / L];
        sums_by_dots(count, bits, block, passes, pass, group, from, x, sums);
        UNROLL for (int v = 0; v < block / L; v++)
            if (v % packed / part == pass) {
                vflt scale, zero;
                params_of(params + 2 * v * L, &scale, &zero);
                UNROLL for (int c = 0; c < count; c++) {
                    float *to = y + c * block + v * L;
                    store_f(to, add_zero(zero, x.sum[c], add_codes(sums[c][v], scale, x.step[c], load_f(to))));
                }
            }
    }
}

typedef void grouping(int64_t group, const uint8_t *from, const uint16_t *params, panel_view x, float *y);

#define GROUP(count, bits, block, passes) \
    APART void group_##count##_##bits##_##block(int64_t group, const uint8_t *from, const uint16_t *params, \
                                                panel_view x, float *y) { \
        direct_group(count, bits, block, passes, group, from, params, x, y); \
    }
/* At most 24 vectors of sums in a pass. */
#define GROUPS(bits) \
    GROUP(1, bits, 64, 1) GROUP(2, bits, 64, 2) GROUP(3, bits, 64, 2) GROUP(4, bits, 64, 4) \
    GROUP(1, bits, 32, 1) GROUP(2, bits, 32, 1) GROUP(3, bits, 32, 1) GROUP(4, bits, 32, 2)
GROUPS(4)
GROUPS(3)
GROUPS(2)
#undef GROUPS
#undef GROUP

#define OF_BITS(bits) {{group_1_##bits##_32, group_2_##bits##_32, group_3_##bits##_32, group_4_##bits##_32}, \
                       {group_1_##bits##_64, group_2_##bits##_64, group_3_##bits##_64, group_4_##bits##_64}}
static grouping *const groups_of[3][2][WIDTH] = {OF_BITS(2), OF_BITS(3), OF_BITS(4)};
#undef OF_BITS

/* y fp32 [tokens][B] += one block of rows times all tokens, at most DIRECT_TOKENS. */
static void rows_of_columns(const qmix_job *job, int64_t row, const char *panels, float *y) {
    int64_t groups = job->padded_cols / job->group, bytes = job->block * job->bits / 8;
    const uint8_t *from = job->weight + row / job->block * job->padded_cols * bytes;
    const uint16_t *params = job->params + row * 2;
    panel_view x = view_panel(QMIX_ACT_INT8, job, panels, job->tokens, 0);
    grouping *add = groups_of[job->bits - 2][job->block / 64][job->tokens - 1];
    for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < job->block * 4; i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + 4 * job->padded_rows) + i);
        add(job->group, from, params, x, y);
        from += job->group * bytes, params += 2 * job->padded_rows;
        x.words += job->group / 4 * job->tokens;
        x.start += job->tokens, x.step += job->tokens, x.sum += job->tokens;
    }
}
