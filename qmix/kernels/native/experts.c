/* The chosen experts of a few tokens, whose records are looked up here: per expert the interpreter would take longer than
 * the products of a small one.
 *
 * T tokens, H hidden, F expert inner, K chosen.
 */
#include "native.h"

#include "pool.h"

/* Of a matrix in a record that lies at `record`; the operands are left to fill in. */
static qmix_job product_of(const qmix_matrix *matrix, int64_t record) {
    return (qmix_job){
        .weight = (const uint8_t *)(intptr_t)(record + matrix->weight),
        .params = (const uint16_t *)(intptr_t)(record + matrix->params),
        .bias = matrix->bias ? (const float *)(intptr_t)(record + matrix->bias) : NULL,
        .padded_rows = matrix->padded_rows, .padded_cols = matrix->padded_cols, .rows = matrix->rows,
        .cols = matrix->cols, .bits = matrix->bits, .block = matrix->block, .group = matrix->group,
        .parts = matrix->parts, .activation = matrix->activation, .alpha = matrix->alpha, .limit = matrix->limit,
        .up_weight = matrix->up_weight ? (const uint8_t *)(intptr_t)(record + matrix->up_weight) : NULL,
        .up_params = (const uint16_t *)(intptr_t)(record + matrix->up_params),
        .up_padded_cols = matrix->up_padded_cols, .up_bits = matrix->up_bits, .up_group = matrix->up_group,
    };
}

static int seen_before(const int64_t *ids, int64_t at) {
    for (int64_t i = 0; i < at; i++)
        if (ids[i] == ids[at])
            return 1;
    return 0;
}

/* Each expert once for all of its tokens, in the order in which they are first named: the products of gate and up into
 * first, those of down into second. x_rows, y_rows [T * K]: memory for the rows that they read and write. */
static int64_t list_products(const qmix_experts *job, int64_t pairs, qmix_job *first, qmix_job *second, int64_t *x_rows,
                             int64_t *y_rows) {
    int64_t count = 0, placed = 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
        if (seen_before(job->ids, pair))
            continue;
        int64_t expert = job->ids[pair], start = placed;
        for (int64_t other = pair; other < pairs; other++)
            if (job->ids[other] == expert) {
                x_rows[placed] = other / job->chosen;
                y_rows[placed++] = other;
            }
        const qmix_record *layout = job->layouts + (job->kinds ? job->kinds[expert] : 0);
        qmix_job both = product_of(&layout->gate_up, job->records[expert]);
        both.x = job->x, both.x_type = job->x_type, both.x_stride = job->hidden, both.x_rows = x_rows + start;
        both.y = job->between + start * job->inner, both.y_stride = job->inner;
        both.tokens = placed - start, both.gated = 1;
        qmix_job down = product_of(&layout->down, job->records[expert]);
        down.x = both.y, down.x_stride = job->inner, down.tokens = both.tokens;
        down.y = job->rows, down.y_stride = job->hidden, down.y_rows = y_rows + start;
        first[count] = both;
        second[count++] = down;
    }
    return count;
}

int32_t qmix_chosen(int32_t level, int32_t act, const qmix_experts *job, int32_t tokens, int32_t threads) {
    int64_t pairs = tokens * job->chosen;
    for (int64_t pair = 0; pair < pairs; pair++)
        if (!job->records[job->ids[pair]])
            return QMIX_MISSING;
    qmix_job *first = pool_scratch(2, (size_t)pairs * 2 * (sizeof *first + sizeof(int64_t)));
    if (!first)
        return -1;
    qmix_job *second = first + pairs;
    int64_t *x_rows = (int64_t *)(second + pairs), *y_rows = x_rows + pairs;
    int64_t count = list_products(job, pairs, first, second, x_rows, y_rows);
    qmix_combine sum = {job->rows, job->weights, job->out, job->chosen, job->hidden};
    if (qmix_products(level, act, first, count, threads) || qmix_products(level, act, second, count, threads))
        return -1;
    return qmix_combines(level, &sum, tokens);
}
