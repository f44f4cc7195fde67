/* What a layer does to a token beside products, attention and its router, once for all instruction sets; products.h
 * includes it.
 *
 * H hidden, K chosen. Every token is computed as it is alone.
 */

enum { NORM_LANES = 32 };

/* The same for every processor: partial sums in lanes, added up in order. */
static float inverse_rms(const float *x, int64_t size, float eps) {
    float lanes[NORM_LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + NORM_LANES <= size; i += NORM_LANES)
        for (int j = 0; j < NORM_LANES; j++)
            lanes[j] += x[i + j] * x[i + j];
    for (; i < size; i++)
        lanes[0] += x[i] * x[i];
    for (int j = 0; j < NORM_LANES; j++)
        sum += lanes[j];
    return 1 / sqrtf(sum / (float)size + eps);
}

static void store_row(int32_t type, const float *from, int64_t size, void *to) {
    if (type == QMIX_FP32)
        memcpy(to, from, (size_t)size * sizeof *from);
    else
        for (int64_t i = 0; i < size; i++)
            ((uint16_t *)to)[i] = to_bf16(from[i]);
}

/* x may be out. */
static void norm_row(const float *x, const float *weight, int64_t size, float eps, float *out) {
    float inverse = inverse_rms(x, size, eps);
    if (weight)
        for (int64_t i = 0; i < size; i++) {
            float unit = x[i] * inverse;
            out[i] = unit * weight[i];
        }
    else
        for (int64_t i = 0; i < size; i++)
            out[i] = x[i] * inverse;
}

/* NaN stays. */
static void clamp_row(float *x, int64_t size, float clip) {
    for (int64_t i = 0; i < size; i++) {
        float low = x[i] < -clip ? -clip : x[i];
        x[i] = low > clip ? clip : low;
    }
}

static int64_t type_bytes(int32_t type) { return type == QMIX_FP32 ? 4 : 2; }

static void norm_token(const qmix_norm *job, int64_t token, float *scratch) {
    for (int64_t row = token * job->rows; row < (token + 1) * job->rows; row++) {
        int64_t at = row * job->size;
        const float *x = (const float *)job->x + at;
        if (job->x_type != QMIX_FP32) {
            for (int64_t i = 0; i < job->size; i++)
                scratch[i] = from_bf16(((const uint16_t *)job->x)[at + i]);
            x = scratch;
        }
        if (!job->bare)
            norm_row(x, job->weight, job->size, job->eps, scratch);
        else if (x != scratch)
            memcpy(scratch, x, (size_t)job->size * sizeof *x);
        if (job->clip < INFINITY)
            clamp_row(scratch, job->size, job->clip);
        if (job->out)
            store_row(job->out_type, scratch, job->size, (char *)job->out + at * type_bytes(job->out_type));
        if (job->wide)
            memcpy(job->wide + at, scratch, (size_t)job->size * sizeof *scratch);
    }
}

/* Heads of one token, [heads, D], turned by their position's angles: Hugging Face's half-split order. */
static void rotate_heads(int32_t type, const void *from, int64_t heads, int64_t size, int64_t rotary, const float *c,
                         const float *s, float *out) {
    int64_t half = rotary / 2;
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t d = 0; d < half; d++) {
            float low = read_number(type, from, h * size + d), high = read_number(type, from, h * size + half + d);
            out[h * size + d] = low * c[d] + high * s[d];
            out[h * size + half + d] = high * c[half + d] + low * s[half + d];
        }
        for (int64_t d = rotary; d < size; d++)
            out[h * size + d] = read_number(type, from, h * size + d);
    }
}

static void rotate_token(const qmix_rotate *job, int64_t token) {
    int64_t size = job->head_dim, rotary = job->rotary_dim, heads = job->query_heads + job->kv_heads;
    const float *c = job->cos + token * rotary, *s = job->sin + token * rotary;
    float *out = job->out + token * heads * size;
    rotate_heads(job->query_type,
                 (const char *)job->queries + token * job->query_heads * size * type_bytes(job->query_type),
                 job->query_heads, size, rotary, c, s, out);
    rotate_heads(job->key_type, (const char *)job->keys + token * job->kv_heads * size * type_bytes(job->key_type),
                 job->kv_heads, size, rotary, c, s, out + job->query_heads * size);
}

/* The angle in fp32 and its cosine in fp64, as qmix/kernels/layer.py has them. */
static void angles_of_token(const qmix_angles *job, int64_t token) {
    int64_t half = job->rotary_dim / 2;
    float *c = job->cos + token * job->rotary_dim, *s = job->sin + token * job->rotary_dim;
    for (int64_t d = 0; d < half; d++) {
        float angle = (float)job->positions[token] * job->inverse[d];
        float turn = (float)cos((double)angle), across = (float)sin((double)angle);
        c[d] = c[half + d] = turn * job->factor;
        s[half + d] = across * job->factor;
        s[d] = -s[half + d];
    }
}

/* out [H] = sum_k weights[k] * rows[k], strictly in order. */
static void combine_token(const qmix_combine *job, int64_t token) {
    const float *rows = job->rows + token * job->chosen * job->size, *weights = job->weights + token * job->chosen;
    float *out = job->out + token * job->size;
    for (int64_t i = 0; i < job->size; i++)
        out[i] = rows[i] * weights[0];
    for (int64_t k = 1; k < job->chosen; k++)
        for (int64_t i = 0; i < job->size; i++)
            out[i] += rows[k * job->size + i] * weights[k];
}

/* out [F] = what joins gate and up. */
static void join_token(const qmix_join *job, int64_t token, float *scratch) {
    int64_t size = job->size, from = token * size;
    for (int64_t i = 0; i < size; i++) {
        job->out[from + i] = read_number(job->type, job->gate, from + i);
        scratch[i] = read_number(job->type, job->up, from + i);
    }
    join_gate(&job->by, job->out + from, scratch, size);
}

static void bias_token(const qmix_bias *job, int64_t token) {
    if (job->type == QMIX_FP32) {
        float *y = (float *)job->y + token * job->size;
        for (int64_t i = 0; i < job->size; i++)
            y[i] += job->bias[i];
        return;
    }
    uint16_t *y = (uint16_t *)job->y + token * job->size;
    for (int64_t i = 0; i < job->size; i++)
        y[i] = to_bf16(from_bf16(y[i]) + job->bias[i]);
}
