/* Activations: from rows of x into a panel of C tokens, as the products read them; products.h includes this.
 *
 * int8: int32 codes [K/4][C], 4 in each; int32 start [K/g][C]; fp32 step, sum [K/g][C]
 * bf16: words [K/4][WORDS][C]; fp32 sum [K/g][C]
 * int8 for the grouped formats of a level with PAIRS, see pairs.h: int32 words [K/2][C], the codes of two columns,
 * twice; int32 start [K/32][C], of mxfp4 [K/16][C], a 16-bit number, twice; fp32 step, sum [K/g][C]
 *
 * For mxfp4 step, or x in bf16, is half as large: its codes are twice what they should be.
 */

ALWAYS float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

ALWAYS uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS uint16_t to_bf16(float value) { /* to the nearest, ties to even; NaN stays NaN */
    uint32_t bits = float_bits(value);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef PAIRS
#define IN_PAIRS(act, job) ((act) == QMIX_ACT_INT8 && (job)->bits != 8 && !qmix_carried((job)->bits))
#define PART(bits) ((bits) == QMIX_E2M1 ? 16 : 32) /* columns whose sum fits 16 bits */
#else
#define PART(bits) 32
#define IN_PAIRS(act, job) 0
#endif

static int64_t token_bytes(int32_t act, const qmix_job *job) {
    int64_t columns = job->padded_cols, groups = columns / job->group;
    if (IN_PAIRS(act, job))
        return 2 * columns + columns / PART(job->bits) * 4 + 8 * groups;
    return act == QMIX_ACT_INT8 ? columns + 12 * groups : columns * WORDS + 4 * groups;
}

static void read_group(const qmix_job *job, int64_t token, int64_t column, float *out) {
    int64_t row = job->x_rows ? job->x_rows[token] : token, start = row * job->x_stride + column;
    int64_t count = job->cols - column < job->group ? job->cols - column : job->group;
    for (int i = 0; i < job->group; i++)
        out[i] = 0;
    if (job->x_type == QMIX_FP32)
        for (int i = 0; i < count; i++)
            out[i] = ((const float *)job->x)[start + i];
    else
        for (int i = 0; i < count; i++)
            out[i] = from_bf16(((const uint16_t *)job->x)[start + i]);
}

/* Codes of one group, x = code * step to half a step; and their sum. Not finite: every code 0, and 0 * step is NaN. */
ALWAYS float quantize_group(const float *x, int group, int8_t *codes, int32_t *sum) {
    uint32_t peak = 0;
    for (int i = 0; i < group; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7fffffff; /* ordered as |x| is */
        peak = bits > peak ? bits : peak;
    }
    float largest, step;
    memcpy(&largest, &peak, 4);
    step = largest / 127;
    float inverse = peak >= 0x7f800000 || step < 1e-35f ? 0 : 127 / largest;
    int32_t total = 0;
    for (int i = 0; i < group; i++) {
        /* 1.5 * 2^23 leaves the nearest integer in the low bits. */
        int32_t code = (int32_t)float_bits((peak >= 0x7f800000 ? 0 : x[i]) * inverse + 12582912.0f) - 0x4b400000;
        codes[i] = (int8_t)code;
        total += code;
    }
    *sum = total;
    return step;
}

static void pack_int8(const qmix_job *job, int64_t first, int64_t count, char *panel) {
    int64_t columns = job->padded_cols, group = job->group, groups = columns / group;
    int32_t *words = (int32_t *)panel, *start = words + columns / 4 * count;
    float *step = (float *)(start + groups * count), *sum = step + groups * count;
    float x[128];
    int8_t codes[128];
    for (int64_t c = 0; c < count; c++)
        for (int64_t g = 0; g < groups; g++) {
            int32_t total;
            read_group(job, first + c, g * group, x);
            float width = quantize_group(x, (int)group, codes, &total);
            const int bytes = job->bits == 8 || job->bits == QMIX_Q8_0 || qmix_table(job->bits);
            start[g * count + c] = -total * (bytes ? SIGNED_OFFSET : qmix_middle(job->bits));
            step[g * count + c] = job->bits == QMIX_E2M1 ? width / 2 : width;
            sum[g * count + c] = width * (float)total;
            for (int64_t k = 0; k < group / 4; k++)
                memcpy(&words[(g * group / 4 + k) * count + c], codes + 4 * k, 4);
        }
}

#ifdef PAIRS
static void pack_pairs(const qmix_job *job, int64_t first, int64_t count, char *panel) {
    int64_t columns = job->padded_cols, group = job->group, groups = columns / group;
    uint32_t *words = (uint32_t *)panel, *start = words + columns / 2 * count;
    const int size = PART(job->bits), middle = job->bits == QMIX_E2M1 ? 12 : 1 << (job->bits - 1); /* 12, 8, 4 or 2 */
    float *step = (float *)(start + columns / size * count), *sum = step + groups * count;
    float x[128];
    int8_t codes[128];
    for (int64_t c = 0; c < count; c++)
        for (int64_t g = 0; g < groups; g++) {
            int32_t total;
            read_group(job, first + c, g * group, x);
            float width = quantize_group(x, (int)group, codes, &total);
            step[g * count + c] = job->bits == QMIX_E2M1 ? width / 2 : width;
            sum[g * count + c] = width * (float)total;
            for (int64_t k = 0; k < group / 2; k++) {
                uint32_t pair = (uint8_t)codes[2 * k] | (uint32_t)(uint8_t)codes[2 * k + 1] << 8;
                words[(g * group / 2 + k) * count + c] = pair * 0x10001;
            }
            for (int64_t part = 0; part < group / size; part++) {
                int32_t of_part = 0;
                for (int i = 0; i < size; i++)
                    of_part += codes[size * part + i];
                uint16_t most = (uint16_t)(-of_part * middle);
                start[(g * group / size + part) * count + c] = most * 0x10001u;
            }
        }
}
#endif

static void pack_float(const qmix_job *job, int64_t first, int64_t count, char *panel) {
    int64_t columns = job->padded_cols, group = job->group, groups = columns / group;
    uint32_t *words = (uint32_t *)panel;
    float *sum = (float *)(words + columns / 4 * WORDS * count);
    float x[128];
    for (int64_t c = 0; c < count; c++)
        for (int64_t g = 0; g < groups; g++) {
            float total = 0;
            read_group(job, first + c, g * group, x);
            for (int64_t i = 0; i < group; i++) {
                x[i] = from_bf16(to_bf16(x[i]));
                total += x[i];
                x[i] = job->bits == QMIX_E2M1 ? x[i] / 2 : x[i];
            }
            sum[g * count + c] = total;
            for (int64_t k = 0; k < group / 4; k++)
                for (int w = 0; w < WORDS; w++) {
                    const float *from = x + 4 * k + w;
                    uint32_t word = WORDS == 4 ? float_bits(from[0])
                                               : float_bits(from[0]) >> 16 | (float_bits(from[2]) & 0xffff0000);
                    words[((g * group / 4 + k) * WORDS + w) * count + c] = word;
                }
        }
}

static void pack(int32_t act, const qmix_job *job, int64_t first, int64_t count, void *panel) {
#ifdef PAIRS
    if (IN_PAIRS(act, job)) {
        pack_pairs(job, first, count, panel);
        return;
    }
#endif
#ifdef DIRECT_INT8
    if (act == QMIX_ACT_INT8 && job->bits == 8 && job->tokens <= DIRECT_INT8) {
        for (int64_t c = 0; c < count; c++)
            pack_int8(job, first + c, 1, (char *)panel + c * token_bytes(act, job));
        return;
    }
#endif
    (act == QMIX_ACT_INT8 ? pack_int8 : pack_float)(job, first, count, panel);
}

typedef struct {
    const uint32_t *words; /* where the panel's activations of these columns begin */
    const int32_t *start;
    const float *step, *sum;
} panel_view;

static panel_view view_panel(int32_t act, const qmix_job *job, const char *panel, int64_t count, int64_t column) {
    int64_t columns = job->padded_cols, groups = columns / job->group, g = column / job->group * count;
    panel_view x = {0};
    if (IN_PAIRS(act, job)) {
        x.words = (const uint32_t *)panel + column / 2 * count;
        const char *after = panel + 2 * columns * count;
        x.start = (const int32_t *)after + column / PART(job->bits) * count;
        x.step = (const float *)(after + columns / PART(job->bits) * 4 * count) + g;
        x.sum = x.step + groups * count;
        return x;
    }
    int64_t words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    x.words = (const uint32_t *)panel + column / 4 * words * count;
    const char *after = panel + columns * words * count;
    if (act == QMIX_ACT_INT8) {
        x.start = (const int32_t *)after + g;
        x.step = (const float *)(after + 4 * groups * count) + g;
        x.sum = (const float *)(after + 8 * groups * count) + g;
    } else
        x.sum = (const float *)after + g;
    return x;
}

