/* Products: every format, block and group size, both kinds of activations, few and many tokens.
 *
 * T tokens, N padded rows, K padded columns, B rows per block, g columns per group, G groups.
 */
#include "driver.h"

enum { TOKENS = 40, MOST_COLS = 384, MOST_GROUPS = MOST_COLS / 32, THREADS = 2 };

typedef struct {
    int bits, block, group, parts;
    int64_t rows, cols, padded_rows, padded_cols; /* rows: of each part */
    uint8_t *weight;
    uint16_t *params;
} matrix;

static int code_bits(int bits) { return bits == QMIX_E2M1 ? 4 : bits; }

static matrix random_matrix(int bits, int block, int group, int parts, int64_t rows, int64_t cols) {
    matrix m = {bits, block, group, parts, rows, cols, 0, 0, NULL, NULL};
    int64_t unit = bits == 8 ? 1 : block;
    m.padded_rows = parts * ((rows + unit - 1) / unit * unit);
    m.padded_cols = (cols + group - 1) / group * group;
    size_t bytes = (size_t)(m.padded_rows * m.padded_cols * code_bits(bits) / 8), groups = (size_t)(m.padded_cols / group);
    m.weight = make(bytes, 1);
    for (size_t i = 0; i < bytes; i++) {
        m.weight[i] = (uint8_t)draw();
        if (bits == 8 && m.weight[i] == 128)
            m.weight[i] = 0; /* codes are -127..127 */
    }
    size_t pairs = (size_t)m.padded_rows * (bits == 8 ? 1 : groups);
    m.params = make(2 * pairs, sizeof *m.params);
    for (size_t i = 0; bits == QMIX_E2M1 && i < pairs; i++)
        ((uint8_t *)m.params)[i] = (uint8_t)(120 + draw() % 12);
    for (size_t i = 0; bits != QMIX_E2M1 && i < pairs; i++) {
        m.params[bits == 8 ? i : 2 * i] = to_bf16((float)uniform(0.5, 1.5));
        if (bits != 8)
            m.params[2 * i + 1] = to_bf16((float)uniform(-2, 2));
    }
    return m;
}

static void free_matrix(matrix *m) {
    free(m->weight);
    free(m->params);
}

/* The code of a weight, less the middle of its format, or twice the number that an E2M1 code stands for:
 * qmix/formats/grouped.py, int8.py and mxfp4.py have the layout. */
static int code_of(const matrix *m, int64_t row, int64_t col) {
    if (m->bits == 8)
        return (int8_t)m->weight[row * m->padded_cols + col];
    int64_t block = m->block, r = row % block, quarter = block / 4, eighth = block / 8;
    const uint8_t *column = m->weight + (row / block * m->padded_cols + col) * (block * code_bits(m->bits) / 8);
    if (m->bits == QMIX_E2M1) {
        int code = column[r % 32] >> 4 * (r / 32) & 15, exponent = code >> 1 & 3, mantissa = code & 1;
        int twice = exponent ? (2 + mantissa) << (exponent - 1) : mantissa;
        return code >> 3 ? -twice : twice;
    }
    if (m->bits == 4)
        return (column[r % (block / 2)] >> 4 * (r / (block / 2)) & 15) - 8;
    int pair = column[r % quarter] >> 2 * (r / quarter) & 3;
    return m->bits == 2 ? pair - 2 : pair + 4 * (column[quarter + r % eighth] >> r / eighth & 1) - 4;
}

typedef struct {
    int codes[MOST_COLS];   /* of int8 activations; 0 past the last column */
    float step[MOST_GROUPS];
    double x[MOST_COLS];    /* bf16 activations */
} seen;

/* Activations as the products see them. */
static void see(const matrix *m, int act, const float *x, seen *out) {
    memset(out, 0, sizeof *out);
    for (int64_t at = 0; at < m->cols; at += m->group) {
        int64_t count = m->cols - at < m->group ? m->cols - at : m->group;
        int8_t codes[128];
        out->step[at / m->group] = act == QMIX_ACT_INT8 ? quantize(x + at, count, codes) : 1;
        for (int64_t i = 0; i < count; i++)
            if (act == QMIX_ACT_INT8)
                out->codes[at + i] = codes[i];
            else
                out->x[at + i] = from_bf16(to_bf16(x[at + i]));
    }
}

typedef struct {
    double sum, total, sum_size, total_size; /* of code * x and of x, and of what they are in absolute value */
} group_sums;

static group_sums sum_group(int act, const int *codes, const seen *x, int64_t first, int64_t last) {
    group_sums s = {0};
    if (act == QMIX_ACT_INT8) { /* exact */
        int sum = 0, total = 0;
        for (int64_t k = first; k < last; k++)
            sum += codes[k] * x->codes[k], total += x->codes[k];
        return (group_sums){sum, total, abs(sum), abs(total)};
    }
    for (int64_t k = first; k < last; k++) {
        s.sum += codes[k] * x->x[k], s.sum_size += fabs(codes[k] * x->x[k]);
        s.total += x->x[k], s.total_size += fabs(x->x[k]);
    }
    return s;
}

/* Element (row, token) of the product, and how far the kernels may be off: with int8 activations a group's sum is
 * exact, its term is rounded three times and added to y by two operations; bf16 activations round the sum itself g
 * times. */
static double reference(const matrix *m, int act, const int *codes, int64_t row, const seen *x, double *bound) {
    int64_t groups = m->padded_cols / m->group, roundings = 2 * groups + 3 + (act == QMIX_ACT_BF16 ? m->group : 0);
    double value = 0, size = 0;
    for (int64_t g = 0; g < groups; g++) {
        group_sums s = sum_group(act, codes, x, g * m->group, (g + 1) * m->group);
        const uint16_t *params = m->params + (m->bits == 8 ? row : (g * m->padded_rows + row) * 2);
        const uint8_t *exponents = (const uint8_t *)m->params;
        int mx = m->bits == QMIX_E2M1;
        double scale = (mx ? ldexp(0.5, exponents[g * m->padded_rows + row] - 127) : (double)from_bf16(params[0])) *
                       x->step[g];
        double zero = mx || m->bits == 8 ? 0 : (double)from_bf16(params[1]) * x->step[g];
        value += s.sum * scale + s.total * zero;
        size += s.sum_size * fabs(scale) + s.total_size * fabs(zero);
    }
    *bound = (double)roundings * U * size;
    return value;
}

/* References [tokens][padded_rows] of x [tokens][cols], and their bounds, of the rows that are no padding. */
static void references(const matrix *m, int act, const float *x, int64_t tokens, double *want, double *bound) {
    seen *all = make((size_t)tokens, sizeof *all);
    int codes[MOST_COLS];
    for (int64_t t = 0; t < tokens; t++)
        see(m, act, x + t * m->cols, all + t);
    for (int64_t row = 0; row < m->padded_rows; row++) {
        if (row % (m->padded_rows / m->parts) >= m->rows)
            continue;
        for (int64_t k = 0; k < m->padded_cols; k++)
            codes[k] = code_of(m, row, k);
        for (int64_t t = 0; t < tokens; t++)
            want[t * m->padded_rows + row] = reference(m, act, codes, row, all + t, bound + t * m->padded_rows + row);
    }
    free(all);
}

static qmix_job job_of(const matrix *m, const float *x, int64_t tokens, float *y, int64_t y_stride) {
    return (qmix_job){.weight = m->weight, .params = m->params, .x = x, .y = y, .x_stride = m->cols,
                      .y_stride = y_stride, .tokens = tokens, .padded_rows = m->padded_rows,
                      .padded_cols = m->padded_cols, .rows = m->rows, .cols = m->cols, .bits = m->bits,
                      .block = m->bits == 8 ? 64 : m->block, .group = m->group, .parts = m->parts,
                      .x_type = QMIX_FP32, .y_type = QMIX_FP32};
}

/* Groups that differ in size a hundredfold. */
static void fill_operand(float *x, int64_t tokens, int64_t cols) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t at = 0; at < cols; at += 32)
            fill(x + t * cols + at, cols - at < 32 ? cols - at : 32, pow(10, uniform(-1, 1)));
}

static const char *act_name(int act) { return act == QMIX_ACT_INT8 ? "int8" : "bf16"; }

/* All tokens against the reference; then a few of them, which must get the same bits. */
static void check_matrix(int32_t level, const matrix *m, int act) {
    int64_t stride = m->parts * m->rows, part_rows = m->padded_rows / m->parts;
    float *x = make((size_t)(TOKENS * m->cols), sizeof *x), *y = make((size_t)(TOKENS * stride), sizeof *y);
    float *few = make((size_t)(9 * stride), sizeof *few);
    double *want = make((size_t)(TOKENS * m->padded_rows), sizeof *want), worst = 0, other = 0;
    double *bound = make((size_t)(TOKENS * m->padded_rows), sizeof *bound);
    char what[128];
    fill_operand(x, TOKENS, m->cols);
    references(m, act, x, TOKENS, want, bound);
    qmix_job job = job_of(m, x, TOKENS, y, stride);
    worst = qmix_products(level, act, &job, 1, THREADS) ? NAN : 0;
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t row = 0; row < stride; row++) {
            int64_t at = t * m->padded_rows + row / m->rows * part_rows + row % m->rows;
            compare(y[t * stride + row], want[at], bound[at], &worst);
        }
    snprintf(what, sizeof what, "%d bits in blocks of %d, groups of %d, %d parts, %s activations", m->bits, m->block,
             m->group, m->parts, act_name(act));
    report(level, what, worst);
    for (int64_t count = 1; count < 10; count++) {
        int64_t first = draw() % (TOKENS - 9);
        job = job_of(m, x + first * m->cols, count, few, stride);
        if (qmix_products(level, act, &job, 1, 1) || memcmp(few, y + first * stride, (size_t)(count * stride) * 4))
            other = NAN;
    }
    strcat(what, ", 1 to 9 tokens as among 40");
    report(level, what, other);
    free(x), free(y), free(few), free(want), free(bound);
}

static const double ALPHA = 1.702, LIMIT = 0.75;
static const char *const ACTIVATIONS[] = {"swiglu", "geglu", "swiglu_clamped"};

/* What becomes of gate and up, both clamped already; *exponent: of the exp in it. */
static double joined(int how, double gate, double up, double *exponent) {
    double of = how == QMIX_GEGLU ? 2 * sqrt(2 / 3.14159265358979324) * (gate + 0.044715 * gate * gate * gate) : gate;
    *exponent = how == QMIX_SWIGLU_CLAMPED ? ALPHA * of : of;
    return gate / (1 + exp(-*exponent)) * (how == QMIX_SWIGLU_CLAMPED ? up + 1 : up);
}

/* activation(gate, up) of chosen rows of bf16 activations, put elsewhere; rows that are not chosen stay. exp's
 * polynomial errs by at most 4 U, what it is given by 4 roundings of that; the slope of x / (1 + exp(-x)), and of
 * gelu, is below 1.2. A bias is one rounding more. */
static void check_gated(int32_t level, int bits, int act, int how, int biased) {
    matrix m = random_matrix(bits, 64, bits == 8 ? 64 : 32, 2, 70, 100);
    int64_t x_rows[3] = {8, 0, 3}, y_rows[3] = {1, 11, 5}, stride = m.rows + 3, part_rows = m.padded_rows / 2;
    float wide[9 * 100], bias[2 * 70], *y = make((size_t)(12 * stride), sizeof *y), left = 7;
    uint16_t x[9 * 100];
    double *want = make((size_t)(9 * m.padded_rows), sizeof *want), worst = 0;
    double *bound = make((size_t)(9 * m.padded_rows), sizeof *bound);
    for (int i = 0; i < 9 * 100; i++)
        wide[i] = from_bf16(x[i] = to_bf16((float)uniform(-1, 1) / (bits == 8 ? 1000 : 100)));
    fill(bias, 2 * 70, biased ? 2 : 0);
    for (int64_t i = 0; i < 12 * stride; i++)
        y[i] = left;
    references(&m, act, wide, 9, want, bound);
    qmix_job job = job_of(&m, wide, 3, y, stride);
    job.x = x, job.x_type = QMIX_BF16, job.x_rows = x_rows, job.y_rows = y_rows, job.gated = 1;
    job.bias = biased ? bias : NULL, job.activation = how, job.alpha = (float)ALPHA, job.limit = (float)LIMIT;
    if (qmix_products(level, act, &job, 1, THREADS))
        worst = NAN;
    for (int t = 0; t < 3; t++)
        for (int64_t row = 0; row < m.rows; row++) {
            int64_t at = x_rows[t] * m.padded_rows + row;
            double gate = want[at] + bias[row], up = want[at + part_rows] + bias[m.rows + row], exponent;
            double gate_off = bound[at] + U * fabs(gate), up_off = bound[at + part_rows] + U * fabs(up);
            if (how == QMIX_SWIGLU_CLAMPED)
                gate = fmin(gate, LIMIT), up = fmax(-LIMIT, fmin(up, LIMIT));
            double value = joined(how, gate, up, &exponent), times = how == QMIX_SWIGLU_CLAMPED ? up + 1 : up;
            double off = 1.2 * gate_off * (fabs(times) + up_off) + fabs(gate) * up_off;
            float *got = y + y_rows[t] * stride + row;
            compare(*got, value, off + (8 + 4 * fabs(exponent)) * U * fabs(value) + 2 * U * fabs(gate), &worst);
            *got = left;
        }
    for (int64_t i = 0; i < 12 * stride; i++)
        if (y[i] != left)
            worst = NAN;
    char what[96];
    snprintf(what, sizeof what, "gate and up of %d bits, %s activations, %s%s", bits, act_name(act), ACTIVATIONS[how],
             biased ? " with biases" : "");
    report(level, what, worst);
    free(y), free(want), free(bound), free_matrix(&m);
}

/* The result added to y, or rounded to bf16: one rounding more. */
static void check_results(int32_t level) {
    matrix m = random_matrix(4, 64, 64, 1, 70, 200);
    float x[3 * 200], y[3 * 70], before[3 * 70], sum[3 * 70];
    uint16_t narrow[3 * 70];
    double worst = 0;
    fill(x, 3 * 200, 1);
    fill(before, 3 * 70, 100);
    memcpy(sum, before, sizeof sum);
    qmix_job jobs[3] = {job_of(&m, x, 3, y, 70), job_of(&m, x, 3, sum, 70), job_of(&m, x, 3, NULL, 70)};
    jobs[1].add = 1, jobs[2].y = narrow, jobs[2].y_type = QMIX_BF16;
    if (qmix_products(level, QMIX_ACT_INT8, jobs, 3, THREADS))
        worst = NAN;
    for (int i = 0; i < 3 * 70; i++) {
        compare(sum[i], (double)before[i] + y[i], U * fabs((double)before[i] + y[i]), &worst);
        compare(narrow[i], to_bf16(y[i]), 0.5, &worst);
    }
    report(level, "results added to y, and in bf16", worst);
    free_matrix(&m);
}

/* A number that is not finite reaches every element of its token, and no other token. */
static void check_not_finite(int32_t level, int bits, int act) {
    matrix m = random_matrix(bits, 64, bits == QMIX_E2M1 ? 32 : 64, 1, 64, 128);
    float x[3 * 128], clean[3 * 64], y[3 * 64];
    double worst = 0;
    fill(x, 3 * 128, 1);
    qmix_job job = job_of(&m, x, 3, clean, 64);
    int failed = qmix_products(level, act, &job, 1, 1);
    for (int kind = 0; kind < 2; kind++) {
        x[128 + 70] = kind ? INFINITY : NAN;
        job.y = y;
        failed |= qmix_products(level, act, &job, 1, 1);
        if (failed || memcmp(y, clean, 64 * 4) || memcmp(y + 128, clean + 128, 64 * 4))
            worst = NAN;
        for (int i = 64; i < 128; i++)
            if (isfinite(y[i]))
                worst = NAN;
    }
    char what[64];
    snprintf(what, sizeof what, "not finite, %d bits, %s activations", bits, act_name(act));
    report(level, what, worst);
    free_matrix(&m);
}

/* Every code and every activation at its end: no sum may overflow. */
static void check_ends(int32_t level, int bits, int block) {
    double worst = 0;
    for (int end = 0; end < 2; end++) {
        matrix m = random_matrix(bits, block, bits == 8 ? 64 : bits == QMIX_E2M1 ? 32 : 128, 1, 64, 256);
        int lowest = bits == 8 ? 0x81 : bits == QMIX_E2M1 ? 0xff : 0;
        int highest = bits == 8 ? 127 : bits == QMIX_E2M1 ? 0x77 : 0xff;
        float x[5 * 256], y[5 * 64];
        double want[5 * 64], bound[5 * 64];
        memset(m.weight, end ? highest : lowest, (size_t)(64 * 256 * code_bits(bits) / 8));
        for (int t = 0; t < 5; t++)
            for (int i = 0; i < 256; i++)
                x[256 * t + i] = t == 0 || (t == 2 && i % 2) || (t == 3 && i % 4 < 2) ? 1.0f : -1.0f;
        qmix_job job = job_of(&m, x, 5, y, 64);
        references(&m, QMIX_ACT_INT8, x, 5, want, bound);
        for (int64_t count = 1; count <= 5; count += 2) {
            job.tokens = count;
            if (qmix_products(level, QMIX_ACT_INT8, &job, 1, 1))
                worst = NAN;
            for (int64_t i = 0; i < count * 64; i++)
                compare(y[i], want[i], bound[i], &worst);
        }
        free_matrix(&m);
    }
    char what[64];
    snprintf(what, sizeof what, "largest codes of %d bits in blocks of %d", bits, block);
    report(level, what, worst);
}

void check_products(int32_t level) {
    static const int groups[] = {32, 64, 128};
    for (int act = QMIX_ACT_INT8; act <= QMIX_ACT_BF16; act++) {
        for (int bits = 4; bits >= 2; bits--)
            for (int block = 64; block >= 32; block /= 2)
                for (int g = 0; g < 3; g++) {
                    matrix m = random_matrix(bits, block, groups[g], 1 + g % 2, 70, 130 + groups[g]);
                    check_matrix(level, &m, act);
                    free_matrix(&m);
                }
        for (int parts = 1; parts <= 2; parts++) {
            matrix m = random_matrix(QMIX_E2M1, 64, 32, parts, 70, 130 + 32 * parts);
            check_matrix(level, &m, act);
            free_matrix(&m);
        }
        for (int64_t rows = 1; rows < 110; rows += 36) {
            matrix m = random_matrix(8, 64, 64, 1, rows, 200);
            check_matrix(level, &m, act);
            free_matrix(&m);
        }
        for (int bits = 2; bits <= 8; bits += bits == QMIX_E2M1 ? 3 : 1) {
            for (int how = QMIX_SWIGLU; how <= QMIX_SWIGLU_CLAMPED; how++)
                check_gated(level, bits, act, how, how != QMIX_SWIGLU);
            check_not_finite(level, bits, act);
        }
    }
    for (int bits = 2; bits <= 8; bits += bits == QMIX_E2M1 ? 3 : 1)
        for (int block = bits == QMIX_E2M1 ? 64 : 32; block <= (bits == 8 ? 32 : 64); block *= 2)
            check_ends(level, bits, block);
    check_results(level);
}
