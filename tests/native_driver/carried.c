/* Products with ggml's formats, from random bytes: qmix/formats/carried.py has the layout.
 *
 * T tokens, N rows, a multiple of 64, K columns.
 */
#include "driver.h"

enum { TOKENS = 20, COLS = 512, ROWS = 128 };

typedef struct {
    const char *name;
    int kind, bits, group, columns, each, middle; /* columns: of a block of parameters; each: its bytes for a row */
} format;

static const format FORMATS[] = {
    {"q8_0", QMIX_Q8_0, 8, 32, 32, 2, 0},  {"q4_0", QMIX_Q4_0, 4, 32, 32, 2, 8},    {"q4_1", QMIX_Q4_1, 4, 32, 32, 4, 0},
    {"q5_0", QMIX_Q5_0, 5, 32, 32, 2, 16}, {"q5_1", QMIX_Q5_1, 5, 32, 32, 4, 0},    {"q4_k", QMIX_Q4_K, 4, 32, 256, 16, 0},
    {"q5_k", QMIX_Q5_K, 5, 32, 256, 16, 0}, {"q6_k", QMIX_Q6_K, 6, 16, 256, 18, 32},
    {"iq4_nl", QMIX_IQ4_NL, 4, 32, 32, 2, 0}, {"iq4_xs", QMIX_IQ4_XS, 4, 32, 256, 8, 0}};
static const int TABLE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static double from_fp16(const uint8_t *p) { /* normal */
    int bits = p[0] | p[1] << 8;
    return ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25) * (bits >> 15 ? -1 : 1);
}

static int code_of(const format *f, const uint8_t *weight, int row, int col) {
    const uint8_t *eight = weight + (row / 64 * (COLS / 8) + col / 8) * 64 * f->bits;
    int r = row % 64, half = col % 8 / 4, j = col % 4;
    if (f->bits == 8)
        return (int8_t)eight[256 * half + 4 * r + j];
    const uint8_t *low = eight + (f->bits == 6 ? 192 : 128) * half;
    int code = low[4 * (r % 32) + j] >> 4 * (r / 32) & 15, upper = 4 * (r % 16) + j;
    if (f->bits == 6)
        code += 16 * (low[128 + upper] >> 2 * (r / 16) & 3);
    if (f->bits == 5)
        code += 16 * (eight[256 + upper] >> (r / 16 + 4 * half) & 1);
    return f->kind >= QMIX_IQ4_NL ? TABLE[code] : code - f->middle;
}

static void params_of(const format *f, const uint8_t *params, int row, int g, double *scale, double *zero) {
    int blocks = COLS / f->columns, of = g * f->group / f->columns, inside = g % (f->columns / f->group), r = row % 64;
    const uint8_t *p = params + (row / 64 * blocks + of) * 64 * f->each;
    *scale = from_fp16(p + 2 * r), *zero = 0;
    if (f->each == 4)
        *zero = from_fp16(p + 128 + 2 * r);
    if (f->kind == QMIX_Q6_K)
        *scale *= (int8_t)p[128 + 64 * inside + r];
    if (f->kind == QMIX_IQ4_XS) {
        int low = p[128 + 64 * (inside / 2) + r] >> 4 * (inside % 2), upper = p[384 + 64 * (inside / 4) + r];
        *scale *= low % 16 + 16 * (upper >> 2 * (inside % 4) & 3) - 32;
    }
    if (f->each == 16) {
        int low = p[256 + 64 * inside + r], upper = p[768 + 64 * (inside / 2) + r] >> 4 * (inside % 2);
        *scale *= low % 16 + 16 * (upper & 3);
        *zero = -from_fp16(p + 128 + 2 * r) * (low / 16 + 16 * (upper >> 2 & 3));
    }
}

/* Element (row, token), and its bound: a scale and a zero are rounded once, a group's term three times with int8
 * activations, g times more with bf16 ones, and added by two operations. */
static double reference(const format *f, const uint8_t *weight, const uint8_t *params, int act, const float *x, int row,
                        double *bound) {
    double value = 0, size = 0;
    int groups = COLS / f->group;
    for (int g = 0; g < groups; g++) {
        int8_t codes[32];
        double step = act == QMIX_ACT_INT8 ? quantize(x + g * f->group, f->group, codes) : 1, scale, zero;
        double sum = 0, total = 0, sizes = 0, totals = 0;
        params_of(f, params, row, g, &scale, &zero);
        for (int i = 0; i < f->group; i++) {
            double at = act == QMIX_ACT_INT8 ? codes[i] : from_bf16(to_bf16(x[g * f->group + i]));
            double term = at * code_of(f, weight, row, g * f->group + i);
            sum += term, total += at, sizes += fabs(term), totals += fabs(at);
        }
        if (act == QMIX_ACT_INT8)
            sizes = fabs(sum), totals = fabs(total);
        value += (sum * scale + total * zero) * step;
        size += (sizes * fabs(scale) + totals * fabs(zero)) * step;
    }
    *bound = (2 * groups + 4 + (act == QMIX_ACT_BF16 ? f->group : 0)) * U * size;
    return value;
}

static void check_format(int32_t level, const format *f, int act) {
    size_t bytes = ROWS * COLS * (size_t)f->bits / 8, pieces = (size_t)(ROWS * (COLS / f->columns));
    uint8_t *weight = make(bytes, 1), *params = make(pieces, (size_t)f->each);
    float *x = make(TOKENS * COLS, sizeof *x), *y = make(TOKENS * ROWS, sizeof *y), few[9 * ROWS];
    double worst = 0, other = 0;
    char what[96];
    for (size_t i = 0; i < bytes; i++)
        weight[i] = (uint8_t)draw();
    for (size_t i = 0; i < pieces * (size_t)f->each; i++)
        params[i] = (uint8_t)draw();
    size_t halves = f->each == 4 || f->each == 16 ? 256 : 128, block = 64 * (size_t)f->each;
    for (size_t start = 0; start < pieces * (size_t)f->each; start += block)
        for (size_t i = 1; i < halves; i += 2) /* fp16 from 0.5 to 2, or less than 0 */
            params[start + i] = (uint8_t)((params[start + i] & 0x83) | 0x38);
    for (int t = 0; t < TOKENS; t++)
        for (int at = 0; at < COLS; at += 32)
            fill(x + t * COLS + at, 32, pow(10, uniform(-1, 1)));
    qmix_job job = {.weight = weight, .params = (const uint16_t *)(const void *)params, .x = x, .y = y, .x_stride = COLS,
                    .y_stride = ROWS, .tokens = TOKENS, .padded_rows = ROWS, .padded_cols = COLS, .rows = ROWS,
                    .cols = COLS, .bits = f->kind, .block = 64, .group = f->group, .parts = 1, .x_type = QMIX_FP32,
                    .y_type = QMIX_FP32};
    worst = qmix_products(level, act, &job, 1, 2) ? NAN : 0;
    for (int t = 0; t < TOKENS; t++)
        for (int row = 0; row < ROWS; row += 7) {
            double bound, want = reference(f, weight, params, act, x + t * COLS, row, &bound);
            compare(y[t * ROWS + row], want, bound, &worst);
        }
    snprintf(what, sizeof what, "%s, %s activations", f->name, act == QMIX_ACT_INT8 ? "int8" : "bf16");
    report(level, what, worst);
    for (int count = 1; count < 10; count++) {
        int first = (int)(draw() % (TOKENS - 9));
        job.x = x + first * COLS, job.y = few, job.tokens = count;
        if (qmix_products(level, act, &job, 1, 1) || memcmp(few, y + first * ROWS, (size_t)count * ROWS * 4))
            other = NAN;
    }
    strcat(what, ", 1 to 9 tokens as among 20");
    report(level, what, other);
    free(weight), free(params), free(x), free(y);
}

void check_carried(int32_t level) {
    for (size_t i = 0; i < sizeof FORMATS / sizeof *FORMATS; i++)
        for (int act = QMIX_ACT_INT8; act <= QMIX_ACT_BF16; act++)
            check_format(level, FORMATS + i, act);
}
