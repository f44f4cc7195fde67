/* What a gated delta net does to a token beside its projections, and gates, once for all instruction sets; products.h
 * includes it. No sum runs across lanes of a vector and nothing is contracted, so that all levels give the same bits.
 *
 * J taps, C channels, K and V sizes of keys and values.
 */

/* y *= f(by). */
static void gate_token(const qmix_gate *job, int64_t token) {
    int64_t size = job->size, from = token * size;
    for (int64_t i = 0; i < size; i++) {
        float by = read_number(job->by_type, job->by, job->one ? token : from + i);
        float open = 1.0f / (1.0f + exp_of(-by));
        float y = read_number(job->type, job->y, from + i) * (job->silu ? by * open : open);
        if (job->type == QMIX_FP32)
            ((float *)job->y)[from + i] = y;
        else
            ((uint16_t *)job->y)[from + i] = to_bf16(y);
    }
}

/* Channels [first, first + size) of one source. */
static void convolve_source(const qmix_conv *job, int source, int64_t first) {
    int64_t size = job->sizes[source], channels = job->channels, last = job->taps - 1;
    float *out = job->out[source];
    for (int64_t c = 0; c < size; c++) {
        float x = read_number(job->types[source], job->sources[source], c), sum = 0;
        for (int64_t j = 0; j < last; j++) {
            float old = job->past[j * channels + first + c];
            sum += old * job->weight[j * channels + first + c];
            if (j)
                job->after[(j - 1) * channels + first + c] = old;
        }
        sum += x * job->weight[last * channels + first + c];
        if (last)
            job->after[(last - 1) * channels + first + c] = x;
        out[c] = sum / (1.0f + exp_of(-sum));
    }
}

static void convolve_token(const qmix_conv *job) {
    int64_t first = 0;
    for (int source = 0; source < QMIX_SOURCES; source++) {
        convolve_source(job, source, first);
        first += job->sizes[source];
    }
}

/* out = x / sqrt(sum(x^2) + 1e-6) * scale */
static void unit_row(const float *x, int64_t size, float scale, float *out) {
    float lanes[NORM_LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + NORM_LANES <= size; i += NORM_LANES)
        for (int j = 0; j < NORM_LANES; j++)
            lanes[j] += x[i + j] * x[i + j];
    for (; i < size; i++)
        lanes[0] += x[i] * x[i];
    for (int j = 0; j < NORM_LANES; j++)
        sum += lanes[j];
    float inverse = 1 / sqrtf(sum + 1e-6f);
    for (i = 0; i < size; i++)
        out[i] = x[i] * inverse * scale;
}

/* sum [V] += the rows of a state times k, four rows at a time, so that the sum is moved a quarter as often. */
static void read_state(const float *restrict state, const float *restrict k, int64_t keys, int64_t values,
                       float *restrict sum) {
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4) {
        const float *row = state + i * values;
        for (int64_t j = 0; j < values; j++)
            sum[j] = (((sum[j] + row[j] * k[i]) + row[values + j] * k[i + 1]) + row[2 * values + j] * k[i + 2]) +
                     row[3 * values + j] * k[i + 3];
    }
    for (; i < keys; i++)
        for (int64_t j = 0; j < values; j++)
            sum[j] += state[i * values + j] * k[i];
}

/* after = decay * state + k u^T, and out [V] += after^T q. */
static void write_state(const float *restrict state, float *restrict after, float decay, const float *restrict k,
                        const float *restrict q, const float *restrict u, int64_t keys, int64_t values,
                        float *restrict out) {
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4) {
        const float *row = state + i * values;
        float *to = after + i * values;
        for (int64_t j = 0; j < values; j++) {
            float a = row[j] * decay + k[i] * u[j], b = row[values + j] * decay + k[i + 1] * u[j];
            float c = row[2 * values + j] * decay + k[i + 2] * u[j], d = row[3 * values + j] * decay + k[i + 3] * u[j];
            to[j] = a, to[values + j] = b, to[2 * values + j] = c, to[3 * values + j] = d;
            out[j] = (((out[j] + a * q[i]) + b * q[i + 1]) + c * q[i + 2]) + d * q[i + 3];
        }
    }
    for (; i < keys; i++)
        for (int64_t j = 0; j < values; j++) {
            float a = state[i * values + j] * decay + k[i] * u[j];
            after[i * values + j] = a;
            out[j] += a * q[i];
        }
}

/* One value head: its state comes from memory once, the second time from a cache. scratch [2 K + V]. */
static void delta_head(const qmix_delta *job, int64_t head, float *scratch) {
    int64_t keys = job->key_dim, values = job->value_dim, at = head * keys * values;
    int64_t key_head = head / (job->value_heads / job->key_heads);
    float *k = scratch, *q = k + keys, *u = q + keys, *out = job->out + head * values;
    double x = (double)(job->a[head] + job->dt_bias[head]);
    float rate = -(float)exp((double)job->a_log[head]) * (float)(x > 20 ? x : log1p(exp(x)));
    float decay = (float)exp((double)rate), beta = (float)(1 / (1 + exp(-(double)job->b[head])));
    unit_row(job->k + key_head * keys, keys, decay, k);
    memset(u, 0, (size_t)values * sizeof *u);
    read_state(job->state + at, k, keys, values, u);
    for (int64_t j = 0; j < values; j++)
        u[j] = beta * (job->v[head * values + j] - u[j]);
    unit_row(job->k + key_head * keys, keys, 1, k);
    unit_row(job->q + key_head * keys, keys, 1 / sqrtf((float)keys), q);
    memset(out, 0, (size_t)values * sizeof *out);
    write_state(job->state + at, job->after + at, decay, k, q, u, keys, values, out);
}
