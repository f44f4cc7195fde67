/* int4, int3, int2 and mxfp4 with int8 activations for a few tokens: codes go straight from memory to registers, so that
 * loading and computing overlap. For the levels of 256 bits; a group of columns is computed by pairs.h or fours.h, in
 * a function of its own for each case: within larger ones gcc runs out of registers.
 */

typedef void grouping(int64_t group, const uint8_t *from, const uint16_t *params, panel_view x, float sums[][64]);

#define ALL_BITS(make, count, block) make(count, 2, block) make(count, 3, block) make(count, 4, block)
#ifdef HAS_VNNI
#define DIRECT_TOKENS(bits) ((bits) == 3 ? WIDTH : 2 * WIDTH) /* eight of int3 are faster by tiles */
#else
#define DIRECT_TOKENS(bits) (2 * WIDTH)
#endif
enum { DIRECT_PANELS = 2 };
ALL_BITS(GROUP_WHOLE, 1, 64)
ALL_BITS(GROUP_WHOLE, 1, 32)
ALL_BITS(GROUP_WHOLE, 2, 32)
GROUP_WHOLE(1, 5, 64) /* QMIX_E2M1 */
#ifdef HAS_VNNI
ALL_BITS(GROUP_HALVES, 2, 64)
ALL_BITS(GROUP_QUARTERS, 3, 64)
ALL_BITS(GROUP_QUARTERS, 4, 64)
ALL_BITS(GROUP_HALVES, 3, 32)
ALL_BITS(GROUP_HALVES, 4, 32)
GROUP_HALVES(2, 5, 64)
GROUP_QUARTERS(3, 5, 64)
GROUP_QUARTERS(4, 5, 64)
#else
ALL_BITS(GROUP_WHOLE, 2, 64)
ALL_BITS(GROUP_HALVES, 3, 64)
ALL_BITS(GROUP_HALVES, 4, 64)
ALL_BITS(GROUP_WHOLE, 3, 32)
ALL_BITS(GROUP_WHOLE, 4, 32)
GROUP_WHOLE(2, 5, 64)
GROUP_HALVES(3, 5, 64)
GROUP_HALVES(4, 5, 64)
#endif
#define OF_E2M1 {{NULL}, {group_1_5_64, group_2_5_64, group_3_5_64, group_4_5_64}}
#define OF_BITS(bits) {{group_1_##bits##_32, group_2_##bits##_32, group_3_##bits##_32, group_4_##bits##_32}, \
                       {group_1_##bits##_64, group_2_##bits##_64, group_3_##bits##_64, group_4_##bits##_64}}
static grouping *const groups_of[4][2][4] = {OF_BITS(2), OF_BITS(3), OF_BITS(4), OF_E2M1};
#undef OF_BITS
#undef OF_E2M1
#undef ALL_BITS

/* y fp32 [tokens][B] = one block of rows times all tokens, whose panels meet a group of columns one after the other:
 * the codes stay in the first cache meanwhile. */
static void rows_directly(const qmix_job *job, int64_t row, const char *panels, float *y) {
    int64_t groups = job->padded_cols / job->group, group = job->group, bytes = job->block * qmix_code_bits(job->bits) / 8;
    int64_t pitch = qmix_params(job->bits, job->padded_rows), params_bytes = qmix_params(job->bits, job->block) * 2;
    int64_t count = (job->tokens + WIDTH - 1) / WIDTH, size = token_bytes(QMIX_ACT_INT8, job);
    const uint8_t *from = job->weight + row / job->block * job->padded_cols * bytes;
    const uint16_t *params = job->params + qmix_params(job->bits, row);
    float sums[DIRECT_PANELS * WIDTH][64] = {{0}};
    panel_view views[DIRECT_PANELS];
    for (int64_t p = 0; p < count; p++) {
        int64_t first = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - first;
        views[p] = view_panel(QMIX_ACT_INT8, job, panels + first * size, n, 0);
    }
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t i = 0; i < params_bytes; i += 64) /* those of the group after the next */
            __builtin_prefetch((const char *)(params + 2 * pitch) + i);
        for (int64_t p = 0; p < count; p++) {
            int64_t first = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - first;
            panel_view *x = views + p;
            groups_of[job->bits - 2][job->block / 64][n - 1](group, from, params, *x, sums + first);
            x->words += group / COLUMNS_OF_WORD * n, x->start += starts_of_group(job) * n;
            x->step += n, x->sum += n;
        }
        from += group * bytes, params += pitch;
    }
    for (int64_t c = 0; c < job->tokens; c++)
        in_order_of_rows(row_distance(job->bits, job->block), job->block, sums[c], y + c * job->block);
}
