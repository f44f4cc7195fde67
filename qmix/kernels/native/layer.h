/* What a layer does to a token beside products and attention, once for all instruction sets; products.h includes it.
 *
 * H hidden, E experts, K chosen. Every token is computed as it is alone.
 */

enum { NORM_LANES = 32, ROUTER_LANES = 16 };

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

static void norm_row(const float *x, const float *weight, int64_t size, float eps, float *out) {
    float inverse = inverse_rms(x, size, eps);
    for (int64_t i = 0; i < size; i++) {
        float unit = x[i] * inverse;
        out[i] = unit * weight[i];
    }
}

static void norm_token(const qmix_norm *job, int64_t token, float *scratch) {
    int64_t at = token * job->size;
    norm_row(job->x + at, job->weight, job->size, job->eps, scratch);
    store_row(job->out_type, scratch, job->size, (char *)job->out + at * (job->out_type == QMIX_FP32 ? 4 : 2));
}

static float router_logit(const float *x, const double *row, int64_t size) {
    double lanes[ROUTER_LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + ROUTER_LANES <= size; i += ROUTER_LANES)
        for (int j = 0; j < ROUTER_LANES; j++)
            lanes[j] += (double)x[i + j] * row[i + j];
    for (; i < size; i++)
        lanes[0] += (double)x[i] * row[i];
    for (int j = 0; j < ROUTER_LANES; j++)
        sum += lanes[j];
    return (float)sum;
}

/* As torch.topk orders: NaN above all; of equals, the first. */
static int above(float a, float b) { return a > b || (a != a && b == b); }

static void route_token(const qmix_route *job, int64_t token, float *scratch) {
    int64_t *ids = job->ids + token * job->ids_stride;
    float *normed = scratch, *logits = scratch + job->norm.size, *top = logits + job->experts;
    norm_row(job->norm.x + token * job->norm.size, job->norm.weight, job->norm.size, job->norm.eps, normed);
    if (job->norm.out)
        store_row(job->norm.out_type, normed, job->norm.size,
                  (char *)job->norm.out + token * job->norm.size * (job->norm.out_type == QMIX_FP32 ? 4 : 2));
    for (int64_t e = 0; e < job->experts; e++)
        logits[e] = router_logit(normed, job->router + e * job->norm.size, job->norm.size);
    int64_t held = 0; /* ids[0..held) are the largest of the logits seen so far, sorted */
    for (int64_t e = 0; e < job->experts; e++) {
        int64_t place = held;
        while (place > 0 && above(logits[e], top[place - 1]))
            place--;
        if (place == job->chosen)
            continue;
        held += held < job->chosen;
        for (int64_t k = held - 1; k > place; k--) {
            top[k] = top[k - 1];
            ids[k] = ids[k - 1];
        }
        top[place] = logits[e];
        ids[place] = e;
    }
    if (!job->weights)
        return;
    float *weights = job->weights + token * job->chosen, total = 0;
    for (int64_t k = 0; k < job->chosen; k++)
        total += weights[k] = expf(top[k] - top[0]);
    for (int64_t k = 0; k < job->chosen; k++)
        weights[k] /= total;
}

/* Heads of one token, [heads, D], turned by their position's angles: Hugging Face's half-split order. */
static void rotate_heads(int32_t type, const void *from, int64_t heads, int64_t size, const float *c,
                         const float *s, float *out) {
    int64_t half = size / 2;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < half; d++) {
            float low = read_number(type, from, h * size + d), high = read_number(type, from, h * size + half + d);
            out[h * size + d] = low * c[d] + high * s[d];
            out[h * size + half + d] = high * c[half + d] + low * s[half + d];
        }
}

static void rotate_token(const qmix_rotate *job, int64_t token) {
    int64_t size = job->head_dim, item = job->type == QMIX_FP32 ? 4 : 2, heads = job->query_heads + job->kv_heads;
    const float *c = job->cos + token * size, *s = job->sin + token * size;
    float *out = job->out + token * heads * size;
    rotate_heads(job->type, (const char *)job->queries + token * job->query_heads * size * item, job->query_heads, size,
                 c, s, out);
    rotate_heads(job->type, (const char *)job->keys + token * job->kv_heads * size * item, job->kv_heads, size, c,
                 s, out + job->query_heads * size);
}

/* The angle in fp32 and its cosine in fp64, as qmix/kernels/layer.py has them. */
static void angles_of_token(const qmix_angles *job, int64_t token) {
    int64_t half = job->head_dim / 2;
    float *c = job->cos + token * job->head_dim, *s = job->sin + token * job->head_dim;
    for (int64_t d = 0; d < half; d++) {
        float angle = (float)job->positions[token] * job->inverse[d];
        c[d] = c[half + d] = (float)cos((double)angle);
        s[half + d] = (float)sin((double)angle);
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
