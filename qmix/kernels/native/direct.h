/* Weights straight from memory to registers, where one panel holds all tokens; products.h includes this. */

#ifdef DIRECT
/* Blocks of int4, int3, int2 (kind 4, of `width` bits) or E2M1, of SUB vectors, straight from memory, for one panel: the
 * codes never see the cache twice. With a width that the compiler knows, int3 and int2 take half the time: what their
 * unpacking keeps in registers stays there. */
ALWAYS void direct(const int count, const int act, const int kind, const int width, const int block, const qmix_job *job,
                   int64_t row, panel_view x, float *y) {
    const int sub = block / L;
    int64_t columns = job->padded_cols, groups = columns / job->group;
    const int bits = kind == QMIX_E2M1 ? kind : width;
    const uint8_t *from = job->weight + row / block * columns * (block * qmix_code_bits(bits) / 8);
    for (int64_t g = 0; g < groups; g++) {
        vint sums[WIDTH][SUB];
        vflt fsums[WIDTH][SUB];
        float scale[64], zero[64];
        UNROLL for (int c = 0; c < count; c++)
            UNROLL for (int v = 0; v < sub; v++) {
                if (act == QMIX_ACT_INT8)
                    sums[c][v] = set_i(x.start[c]);
                else
                    fsums[c][v] = set_f(0);
            }
        const uint16_t *params = job->params + qmix_params(bits, g * job->padded_rows + row);
        for (int i = 0; i < (bits == QMIX_E2M1 ? 64 : block * 4); i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + qmix_params(bits, 2 * job->padded_rows)) + i);
        for (int64_t k = 0; k < job->group / 4; k++) {
            vint codes[VECTORS];
            __builtin_prefetch(from + FAR_AHEAD, 0, 2); /* into the first cache it would cost a third of one core's rate */
            if (block == 64)
                __builtin_prefetch(from + FAR_AHEAD + 64, 0, 2);
            unpack_codes(bits, from, block, codes);
            from += block * qmix_code_bits(bits) / 2;
            if (act == QMIX_ACT_INT8) {
                UNROLL for (int c = 0; c < count; c++) {
                    vint word = set_i((int32_t)x.words[c]);
                    UNROLL for (int v = 0; v < sub; v++)
                        sums[c][v] = dot4(sums[c][v], codes[v], word);
                }
                x.words += count;
            } else
                UNROLL for (int w = 0; w < WORDS; w++) {
                    UNROLL for (int c = 0; c < count; c++) {
                        vint word = set_i((int32_t)x.words[c]);
                        UNROLL for (int v = 0; v < sub; v++)
                            fsums[c][v] = fdot(fsums[c][v], part_of(codes[v], w, qmix_middle(kind)), word);
                    }
                    x.words += count;
                }
        }
        UNROLL for (int v = 0; v < sub; v++)
            if (kind == QMIX_E2M1)
                store_f(scale + v * L, load_e8m0((const uint8_t *)params + v * L));
            else
                split_params(params + v * 2 * L, scale + v * L, zero + v * L);
        finish_group(count, sub, act, kind, sums, fsums, scale, zero, x.step, x.sum, y, block);
        x.start += count, x.step += count, x.sum += count;
    }
}
#endif

#if defined(DIRECT_INT8) && !defined(OWN_INT8_ROWS)
/* int8 rows for up to DIRECT_INT8 tokens with int8 activations: L rows at a time, each read from end to end; the tokens
 * meet 64 columns of them one after the other. Their panels are of one token each. */
ALWAYS void rows_of_int8(const int64_t tokens, const qmix_job *job, int64_t row, const char *panels, float *y) {
    int64_t columns = job->padded_cols, bytes = token_bytes(QMIX_ACT_INT8, job);
    for (int v = 0; v < VECTORS && row + v * L < job->padded_rows; v++) {
        const int8_t *rows[L];
        float scale[L], zero[L];
        vint sums[WIDTH][SUB];
        panel_view at[DIRECT_INT8];
        for (int64_t c = 0; c < tokens; c++)
            at[c] = view_panel(QMIX_ACT_INT8, job, panels + c * bytes, 1, 0);
        for (int i = 0; i < L; i++) {
            int64_t mine = row + v * L + i < job->padded_rows ? row + v * L + i : job->padded_rows - 1;
            rows[i] = (const int8_t *)job->weight + mine * columns;
            scale[i] = from_bf16(job->params[mine]);
        }
        for (int64_t column = 0; column < columns; column += 64) {
            /* The next L rows, in the order of their bytes: a processor follows one long stream by itself, but not L short
             * ones that end after a row. */
            UNROLL for (int i = 0; i < L; i++)
                __builtin_prefetch(rows[0] + L * columns + L * column + 64 * i, 0, 3);
            for (int64_t c = 0; c < tokens; c++) {
                sums[0][0] = dot_rows(rows, column, at[c].words);
                sums[0][0] = add_i(sums[0][0], set_i(*at[c].start));
                finish_group(1, 1, QMIX_ACT_INT8, 8, sums, NULL, scale, zero, at[c].step, at[c].sum, y + c * 64 + v * L,
                             0);
                at[c].words += 16, at[c].start++, at[c].step++;
            }
        }
    }
}

APART void one_by_int8(const qmix_job *job, int64_t row, const char *panels, float *y) {
    rows_of_int8(1, job, row, panels, y);
}
APART void few_by_int8(const qmix_job *job, int64_t row, const char *panels, float *y) {
    rows_of_int8(job->tokens, job, row, panels, y);
}
#endif
