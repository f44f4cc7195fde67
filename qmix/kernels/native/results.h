/* What becomes of the sums of a unit's rows; products.h includes this. */

/* By a polynomial that is right to fp32's last bits; from -87 to 88, beyond which it stays what it is there. */
ALWAYS float exp_of(float a) {
    a = a > 88.0f ? 88.0f : a;
    a = a < -87.0f ? -87.0f : a;
    float shifted = a * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (a - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = (uint32_t)((int32_t)float_bits(shifted) - 0x4b400000 + 127) << 23;
    float two;
    memcpy(&two, &power, 4);
    return p * two;
}

/* silu(gate) * up over 64 numbers. */
static void silu_times(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++)
        gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

/* gelu(gate) * up, by tanh: x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)). */
static void gelu_times(float *gate, const float *up, int count) {
    for (int i = 0; i < count; i++) {
        float g = gate[i], u = 0.79788456f * (g + 0.044715f * g * g * g);
        gate[i] = g / (1.0f + exp_of(-2.0f * u)) * up[i];
    }
}

/* gpt-oss's; comparisons are written so that a NaN stays one. */
static void clamped_silu_times(float *gate, const float *up, int count, float alpha, float limit) {
    for (int i = 0; i < count; i++) {
        float g = gate[i] > limit ? limit : gate[i], u = up[i] > limit ? limit : up[i];
        u = u < -limit ? -limit : u;
        gate[i] = g / (1.0f + exp_of(-alpha * g)) * (u + 1.0f);
    }
}

static void activate(const qmix_job *job, float *gate, const float *up, int count) {
    if (job->activation == QMIX_SWIGLU)
        silu_times(gate, up, count);
    else if (job->activation == QMIX_GEGLU)
        gelu_times(gate, up, count);
    else
        clamped_silu_times(gate, up, count, job->alpha, job->limit);
}

static void add_bias(const float *bias, int64_t count, float *y) {
    for (int64_t i = 0; i < count; i++)
        y[i] += bias[i];
}

static void write_row(const qmix_job *job, int64_t token, int64_t column, int64_t count, const float *from) {
    int64_t row = job->y_rows ? job->y_rows[token] : token, start = row * job->y_stride + column;
    if (job->add)
        for (int64_t i = 0; i < count; i++)
            ((float *)job->y)[start + i] += from[i];
    else if (job->y_type == QMIX_FP32)
        memcpy((float *)job->y + start, from, 4 * (size_t)count);
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)job->y)[start + i] = to_bf16(from[i]);
}

/* Where the rows of a unit go: y has the parts side by side without their padding. Parts are whole blocks, or one. */
static void write_unit(const qmix_job *job, int64_t unit, int64_t first, int64_t tokens, float *acc, float *up) {
    int64_t block = job->block, part_rows = job->padded_rows / job->parts, row = unit * block;
    int64_t part = job->gated ? 0 : row / part_rows, inside = row - part * part_rows;
    int64_t count = job->rows - inside < block ? job->rows - inside : block;
    if (count <= 0)
        return;
    for (int64_t t = 0; t < tokens; t++) {
        float *from = acc + t * block;
        if (job->bias) {
            add_bias(job->bias + part * job->rows + inside, count, from);
            if (job->gated)
                add_bias(job->bias + job->rows + inside, count, up + t * block);
        }
        if (job->gated)
            activate(job, from, up + t * block, (int)block);
        write_row(job, first + t, part * job->rows + inside, count, from);
    }
}
