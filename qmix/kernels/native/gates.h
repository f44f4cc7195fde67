/* What joins gate and up, on rows of fp32, once for all callers; products.h includes this. spec.Activation
 * (qmix/spec/layers.py) has the formulas. A number's bits depend on it, its partner and the activation alone: not on its
 * place in a row, nor on the level. NaN stays. */

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

/* gate = silu(gate) * up */
static void swiglu(float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        gate[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

/* gate = gelu(gate) * up, by tanh: (1 + tanh(u)) / 2 is the logistic function of 2 u. */
static void geglu(float *gate, const float *up, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float x = gate[i], twice = 1.59576912f * (x + 0.044715f * x * x * x); /* 2 sqrt(2 / pi) */
        gate[i] = x / (1.0f + exp_of(-twice)) * up[i];
    }
}

/* gate = g * sigmoid(alpha * g) * (u + 1): g is gate clamped from above, u is up clamped to both sides. */
static void swiglu_clamped(float *gate, const float *up, float alpha, float limit, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        float x = gate[i] > limit ? limit : gate[i], u = up[i] > limit ? limit : up[i];
        u = u < -limit ? -limit : u;
        gate[i] = x / (1.0f + exp_of(-alpha * x)) * (u + 1.0f);
    }
}

static void join_gate(const qmix_activation *by, float *gate, const float *up, int64_t count) {
    switch (by->kind) {
    case QMIX_SWIGLU:
        swiglu(gate, up, count);
        break;
    case QMIX_GEGLU:
        geglu(gate, up, count);
        break;
    default:
        swiglu_clamped(gate, up, by->alpha, by->limit, count);
    }
}
