/* int8 rows times int8 activations of a few tokens with 512 bits, straight from memory; products.h includes this.
 *
 * Eight rows are read side by side, 128 columns of each at a time: a processor follows only so many streams by itself.
 * Lane i < 8 of the sums has row i's first 64 columns, lane 8 + i the 64 after them. */
#define EIGHT 8

/* Lane i has the sum of 64 products of rows[i] with the activations of its half, SIGNED_OFFSET too much in each. */
ALWAYS vint dot_eight(const int8_t *const *rows, int64_t column, int64_t after, const char *x) {
    vint first = _mm512_loadu_si512(x + column), second = _mm512_loadu_si512(x + column + after), a[16], b[8];
    UNROLL for (int i = 0; i < EIGHT; i++) {
        vint w = signed_codes(_mm512_loadu_si512(rows[i] + column));
        vint next = signed_codes(_mm512_loadu_si512(rows[i] + column + after));
        a[i] = dot4_signed(_mm512_setzero_si512(), w, first);
        a[EIGHT + i] = dot4_signed(_mm512_setzero_si512(), next, second);
    }
    UNROLL for (int i = 0; i < 8; i++) /* sums of two lanes, rows 2i and 2i + 1 in turn */
        b[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) /* of four lanes: 128 bits have rows 4i..4i + 3 */
        a[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]),
                                _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++)
        b[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a[2 * i], a[2 * i + 1], 0x44),
                                _mm512_shuffle_i32x4(a[2 * i], a[2 * i + 1], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(b[0], b[1], 0x88), _mm512_shuffle_i32x4(b[0], b[1], 0xdd));
}

ALWAYS void rows_of_int8(const int tokens, const qmix_job *job, int64_t row, const char *panels, float *y) {
    int64_t columns = job->padded_cols, groups = columns / 64, bytes = token_bytes(QMIX_ACT_INT8, job);
    panel_view x[DIRECT_INT8];
    UNROLL for (int c = 0; c < tokens; c++)
        x[c] = view_panel(QMIX_ACT_INT8, job, panels + c * bytes, 1, 0);
    for (int v = 0; v < 64 && row + v < job->padded_rows; v += EIGHT) {
        const int8_t *rows[EIGHT];
        float scales[2 * EIGHT];
        __m256 totals[DIRECT_INT8];
        UNROLL for (int c = 0; c < tokens; c++)
            totals[c] = _mm256_setzero_ps();
        for (int i = 0; i < EIGHT; i++) {
            int64_t mine = row + v + i < job->padded_rows ? row + v + i : job->padded_rows - 1;
            rows[i] = (const int8_t *)job->weight + mine * columns;
            scales[i] = scales[EIGHT + i] = from_bf16(job->params[mine]);
        }
        vflt scale = load_f(scales);
        for (int64_t g = 0; g < groups; g += 2) {
            int more = g + 1 < groups;
            UNROLL for (int i = 0; i < 2 * EIGHT; i++) /* the next rows, in the order of their bytes */
                __builtin_prefetch(rows[0] + EIGHT * columns + EIGHT * 64 * g + 64 * i, 0, 3);
            UNROLL for (int c = 0; c < tokens; c++) {
                vint sum = dot_eight(rows, 64 * g, more ? 64 : 0, (const char *)x[c].words);
                sum = add_i(sum, _mm512_inserti64x4(set_i(x[c].start[g]), _mm256_set1_epi32(x[c].start[g + more]), 1));
                vflt scaled = mul_f(to_f(sum), scale);
                totals[c] = _mm256_fmadd_ps(_mm512_castps512_ps256(scaled), _mm256_set1_ps(x[c].step[g]), totals[c]);
                if (more)
                    totals[c] = _mm256_fmadd_ps(_mm512_extractf32x8_ps(scaled, 1), _mm256_set1_ps(x[c].step[g + 1]),
                                                totals[c]);
            }
        }
        UNROLL for (int c = 0; c < tokens; c++)
            _mm256_storeu_ps(y + c * 64 + v, totals[c]);
    }
}

APART void one_by_int8(const qmix_job *job, int64_t row, const char *panels, float *y) {
    rows_of_int8(1, job, row, panels, y);
}
APART void few_by_int8(const qmix_job *job, int64_t row, const char *panels, float *y) {
    switch (job->tokens) {
    case 2: rows_of_int8(2, job, row, panels, y); break;
    case 3: rows_of_int8(3, job, row, panels, y); break;
    case 4: rows_of_int8(4, job, row, panels, y); break;
    default: rows_of_int8((int)job->tokens, job, row, panels, y); /* 5 to 8 */
    }
}
