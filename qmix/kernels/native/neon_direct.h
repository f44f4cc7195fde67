/* int4, int3 and int2 with int8 activations for a few tokens: codes go straight from memory to registers. A function
 * of its own for each case: within larger ones gcc runs out of registers.
 *
 * A group of columns is gone through in one or several passes, each over a part of the rows, so that their sums stay in
 * registers. B rows per block, C columns at a time; neon_columns.h has the order of the rows in the vectors.
 */

enum { DIRECT_TOKENS = WIDTH };

/* Vector h of those that a pass computes. Packed bytes make vectors i, i + packed, ... of codes; a pass takes a part of
 * the packed ones. Example: int4, B = 64, C = 4, pass 1 of 2: packed vectors 4 to 7, so vectors 4 to 7 and 12 to 15. */
ALWAYS int vector_of(const int columns, const int bits, const int block, const int passes, const int pass,
                     const int h) {
    const int packed = block / (qmix_code_bits(bits) == 4 ? 2 : 4) * columns / 16, part = packed / passes;
    return h / part * packed + pass * part + h % part;
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

/* sums[c][h] = a group of columns of the rows of the pass's vector h. `fours` times 4 columns a turn: their words of
 * activations are whole vectors. */
ALWAYS void sums_by_dots(const int count, const int bits, const int block, const int passes, const int pass,
                         int64_t group, const uint8_t *from, panel_view x, vint sums[][16]) {
    const int vectors = block / L / passes, fours = count == 4 ? 1 : count == 2 ? 2 : 4;
    vint held[WIDTH][16];
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int h = 0; h < vectors; h++)
            held[c][h] = set_i(start_of(bits, x.start[c]));
    ONCE for (int64_t k = 0; k < group / 4; k += fours) {
        vint words[WIDTH];
        UNROLL for (int i = 0; i < fours * count / 4; i++)
            words[i] = vld1q_s32((const int32_t *)x.words + 4 * i);
        UNROLL for (int i = 0; i < fours; i++) {
            vint codes[16];
            __asm__ volatile("" ::: "memory"); /* gcc would load for all turns at once, and run out of registers */
            if (!pass && i % 2 == 0)
                prefetch_codes(from, (fours > 1 ? 2 : 1) * block * qmix_code_bits(bits) / 2);
            codes_of_columns(4, bits, block, from, codes);
            from += block * qmix_code_bits(bits) / 2;
            UNROLL for (int h = 0; h < vectors; h++)
                UNROLL for (int c = 0; c < count; c++)
                    held[c][h] = dot4_lane(held[c][h], codes[vector_of(4, bits, block, passes, pass, h)],
                                           words[(i * count + c) / 4], (i * count + c) % 4);
        }
        x.words += fours * count;
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int h = 0; h < vectors; h++)
            sums[c][h] = held[c][h];
}

#ifdef MATRICES
/* The same by products of matrices, 8 columns a turn. */
ALWAYS void sums_by_matrices(const int count, const int bits, const int block, const int passes, const int pass,
                             int64_t group, const uint8_t *from, panel_view x, vint sums[][16]) {
    const int vectors = block / 2 / passes, pairs = (count + 1) / 2;
    vint held[16][2];
    UNROLL for (int h = 0; h < vectors; h++)
        UNROLL for (int p = 0; p < pairs; p++)
            held[h][p] = set_i(0);
    ONCE for (int64_t k = 0; k < group / 8; k++) {
        vint codes[32], tokens[2];
        if (!pass)
            prefetch_codes(from, block * qmix_code_bits(bits));
        token_pairs(count, x.words, tokens);
        codes_of_columns(8, bits, block, from, codes);
        UNROLL for (int h = 0; h < vectors; h++)
            UNROLL for (int p = 0; p < pairs; p++)
                held[h][p] = dot_matrices(held[h][p], codes[vector_of(8, bits, block, passes, pass, h)], tokens[p]);
        from += block * qmix_code_bits(bits), x.words += 2 * count;
    }
    UNROLL for (int c = 0; c < count; c++)
        UNROLL for (int h = 0; h < vectors / 2; h++)
            sums[c][h] = rows_of_token(held[2 * h][c / 2], held[2 * h + 1][c / 2], c, start_of(bits, x.start[c]));
}
#define BY_MATRICES(count) ((count) > 1)
#else
#define BY_MATRICES(count) 0
#define sums_by_matrices sums_by_dots /* never called */
#endif

/* y [count][B] += a group of columns times the activations of the tokens. */
ALWAYS void direct_group(const int count, const int bits, const int block, const int passes, int64_t group,
                         const uint8_t *from, const uint16_t *params, panel_view x, float *y) {
    UNROLL for (int pass = 0; pass < passes; pass++) {
        vint sums[WIDTH][16];
        if (BY_MATRICES(count))
            sums_by_matrices(count, bits, block, passes, pass, group, from, x, sums);
        else
            sums_by_dots(count, bits, block, passes, pass, group, from, x, sums);
        UNROLL for (int h = 0; h < block / L / passes; h++) {
            const int row = L * vector_of(4, bits, block, passes, pass, h);
            vflt scale, zero;
            if (bits == QMIX_E2M1)
                scale = load_e8m0((const uint8_t *)params + row);
            else
                params_of(params + 2 * row, &scale, &zero);
            UNROLL for (int c = 0; c < count; c++) {
                float *to = y + c * block + row;
                vflt value = add_codes(sums[c][h], scale, x.step[c], load_f(to));
                store_f(to, bits == QMIX_E2M1 ? value : add_zero(zero, x.sum[c], value));
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
/* At most 16 vectors of sums in a pass. */
#define GROUPS(bits) \
    GROUP(1, bits, 64, 1) GROUP(2, bits, 64, 2) GROUP(3, bits, 64, 4) GROUP(4, bits, 64, 4) \
    GROUP(1, bits, 32, 1) GROUP(2, bits, 32, 1) GROUP(3, bits, 32, 2) GROUP(4, bits, 32, 2)
GROUPS(4)
GROUPS(3)
GROUPS(2)
GROUP(1, 5, 64, 1) GROUP(2, 5, 64, 2) GROUP(3, 5, 64, 4) GROUP(4, 5, 64, 4) /* 5: QMIX_E2M1 */
#undef GROUPS
#undef GROUP

#define OF_BITS(bits) {{group_1_##bits##_32, group_2_##bits##_32, group_3_##bits##_32, group_4_##bits##_32}, \
                       {group_1_##bits##_64, group_2_##bits##_64, group_3_##bits##_64, group_4_##bits##_64}}
static grouping *const groups_of[4][2][WIDTH] = {OF_BITS(2), OF_BITS(3), OF_BITS(4),
                                                 {{NULL}, {group_1_5_64, group_2_5_64, group_3_5_64, group_4_5_64}}};
#undef OF_BITS

/* y fp32 [tokens][B] += one block of rows times all tokens, at most DIRECT_TOKENS. */
static void rows_of_columns(const qmix_job *job, int64_t row, const char *panels, float *y) {
    int64_t groups = job->padded_cols / job->group, bytes = job->block * qmix_code_bits(job->bits) / 8;
    const uint8_t *from = job->weight + row / job->block * job->padded_cols * bytes;
    const uint16_t *params = job->params + qmix_params(job->bits, row);
    int64_t pitch = qmix_params(job->bits, job->padded_rows), size = qmix_params(job->bits, job->block) * 2;
    panel_view x = view_panel(QMIX_ACT_INT8, job, panels, job->tokens, 0);
    grouping *add = groups_of[job->bits - 2][job->block / 64][job->tokens - 1];
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < size; i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + 2 * pitch) + i);
        add(job->group, from, params, x, y);
        from += job->group * bytes, params += pitch;
        x.words += job->group / 4 * job->tokens;
        x.start += job->tokens, x.step += job->tokens, x.sum += job->tokens;
    }
}
