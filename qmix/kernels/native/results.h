/* What becomes of the sums of a unit's rows; products.h includes this. */

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

/* What joins a token's gate and up [rows], which have their biases, into its place; gate is overwritten. */
static void write_joined(const qmix_job *job, int64_t token, float *gate, const float *up) {
    qmix_activation activation = {job->activation, job->alpha, job->limit};
    join_gate(&activation, gate, up, job->rows);
    write_row(job, token, 0, job->rows, gate);
}

/* Where the rows of a unit go: y has the parts side by side without their padding. Parts with padding are whole blocks;
 * those without, as int8 has them, are one to a product that is not gated: a block may have rows of two. */
static void write_unit(const qmix_job *job, int64_t unit, int64_t first, int64_t tokens, float *acc, float *up) {
    int64_t block = job->block, part_rows = job->padded_rows / job->parts, row = unit * block;
    int64_t rows = job->gated || part_rows > job->rows ? job->rows : job->padded_rows;
    int64_t part = job->gated || rows == job->padded_rows ? 0 : row / part_rows, inside = row - part * part_rows;
    int64_t count = rows - inside < block ? rows - inside : block;
    if (count <= 0)
        return;
    qmix_activation activation = {job->activation, job->alpha, job->limit};
    for (int64_t t = 0; t < tokens; t++) {
        float *from = acc + t * block;
        if (job->bias) {
            add_bias(job->bias + part * rows + inside, count, from);
            if (job->gated)
                add_bias(job->bias + job->rows + inside, count, up + t * block);
        }
        if (job->gated)
            join_gate(&activation, from, up + t * block, block);
        write_row(job, first + t, part * rows + inside, count, from);
    }
}
