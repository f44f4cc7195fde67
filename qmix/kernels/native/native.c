/* The entry points: which levels there are, products cut into units for the pool, attention into
 * pieces of positions, the rest token by token. */
#define _GNU_SOURCE
#include "native.h"

#include <math.h>
#include <stdlib.h>

#include "level.h"
#include "pool.h"

static const qmix_level *const levels[] = {
#if defined(__x86_64__)
    &qmix_avx512bf16, &qmix_avx512vnni, &qmix_avx512, &qmix_avx2vnni, &qmix_avx2,
#elif defined(QMIX_NEON)
    &qmix_neoni8mm, &qmix_neondot,
#endif
    &qmix_portable,
};

enum { LEVELS = sizeof levels / sizeof *levels };
enum { SMALL = 1 << 18 }; /* weights x tokens below which another thread is not worth waking */
/* Attention's pieces of positions: small enough that a slow core does not hold up the others, at most so many that their
 * sums stay small beside what is read. */
enum { PIECES = 32, PIECE_UNIT = 64, LEAST_PIECE = 256 };
enum { ROUTER_UNIT = 8 }; /* experts whose logits a thread takes at a time */
enum { KEPT = 1 << 18 };  /* bytes of panels that stay allocated: those of a prompt's hundreds of tokens do not */

int32_t qmix_abi(void) { return QMIX_ABI; }

const char *qmix_level_name(int32_t level) { return level >= 0 && level < LEVELS ? levels[level]->name : NULL; }

int32_t qmix_level_supported(int32_t level) {
    return level >= 0 && level < LEVELS && levels[level]->supported();
}

typedef struct {
    const qmix_level *level;
    int32_t act;
    const qmix_job *jobs;
    char *panels; /* of all jobs, one after another */
    _Atomic int failed;
} work;

static int64_t panel_count(const work *w, const qmix_job *job) {
    return (job->tokens + w->level->width - 1) / w->level->width;
}

static int64_t panel_bytes(const work *w, const qmix_job *job) {
    return job->tokens * w->level->token_bytes(w->act, job);
}

/* Item i of all jobs' items: its job, the bytes of panels before it, and its number in the job. */
static const qmix_job *find(const work *w, int64_t *item, int64_t (*items)(const work *, const qmix_job *),
                            char **panels) {
    const qmix_job *job = w->jobs;
    *panels = w->panels;
    for (int64_t n; *item >= (n = items(w, job)); job++) {
        *item -= n;
        *panels += panel_bytes(w, job);
    }
    return job;
}

static int64_t unit_count(const work *w, const qmix_job *job) {
    (void)w;
    return job->tokens ? qmix_units(job) : 0;
}

static void pack_item(void *argument, int64_t item) {
    const work *w = argument;
    char *panels;
    const qmix_job *job = find(w, &item, panel_count, &panels);
    int64_t first = qmix_panel(job->tokens, w->level->width, item);
    int64_t count = qmix_panel(job->tokens, w->level->width, item + 1) - first;
    w->level->pack(w->act, job, first, count, panels + first * w->level->token_bytes(w->act, job));
}

static void unit_item(void *argument, int64_t item) {
    work *w = argument;
    char *panels, *scratch = pool_scratch(0, SCRATCH);
    const qmix_job *job = find(w, &item, unit_count, &panels);
    if (scratch)
        w->level->unit(w->act, job, item, panels, scratch);
    else
        w->failed = 1;
}

static int32_t run_products(int32_t level, int32_t act, const qmix_job *jobs, int64_t count, int32_t threads) {
    work w = {.level = levels[level], .act = act, .jobs = jobs};
    int64_t bytes = 0, panels = 0, units = 0, size = 0, packing = 0;
    for (int64_t i = 0; i < count; i++) {
        bytes += panel_bytes(&w, jobs + i);
        panels += panel_count(&w, jobs + i);
        units += unit_count(&w, jobs + i);
        packing += jobs[i].tokens * jobs[i].padded_cols;
        size += jobs[i].tokens * jobs[i].padded_cols * jobs[i].padded_rows;
    }
    if (!units)
        return 0;
    void *own = NULL;
    if (bytes > KEPT && posix_memalign(&own, 64, (size_t)bytes))
        return -1;
    w.panels = own ? own : pool_scratch(1, KEPT);
    if (!w.panels)
        return -1;
    pool_run(packing < SMALL / 4 ? 1 : threads, panels, pack_item, &w);
    pool_run(size < SMALL ? 1 : threads, units, unit_item, &w);
    free(own);
    return w.failed ? -1 : 0;
}

/* Gated jobs whose gate and up are of different formats, and so read x differently: two products each, then joined. */
typedef struct {
    const qmix_level *level;
    const qmix_job *jobs;
    float *numbers; /* of each such job in turn: gate [T, rows], up [T, rows] */
} apart_work;

static void join_item(void *argument, int64_t token) {
    const apart_work *w = argument;
    const qmix_job *job = w->jobs;
    float *numbers = w->numbers;
    for (;; job++) {
        if (!job->up_weight)
            continue;
        if (token < job->tokens)
            break;
        token -= job->tokens;
        numbers += 2 * job->tokens * job->rows;
    }
    w->level->join_apart(job, token, numbers + token * job->rows, numbers + (job->tokens + token) * job->rows);
}

static void split_job(const qmix_job *job, float *numbers, qmix_job *gate, qmix_job *up) {
    *gate = *job;
    gate->y = numbers, gate->y_rows = NULL, gate->y_stride = job->rows, gate->y_type = QMIX_FP32, gate->add = 0;
    gate->padded_rows = job->padded_rows / 2, gate->parts = 1, gate->gated = 0, gate->up_weight = NULL;
    *up = *gate;
    up->y = numbers + job->tokens * job->rows;
    up->weight = job->up_weight, up->params = job->up_params, up->padded_cols = job->up_padded_cols;
    up->bits = job->up_bits, up->group = job->up_group, up->bias = job->bias ? job->bias + job->rows : NULL;
}

int32_t qmix_products(int32_t level, int32_t act, const qmix_job *jobs, int64_t count, int32_t threads) {
    int64_t apart = 0, tokens = 0, numbers = 0, all = 0;
    for (int64_t i = 0; i < count; i++)
        if (jobs[i].up_weight)
            apart++, tokens += jobs[i].tokens, numbers += 2 * jobs[i].tokens * jobs[i].rows;
    if (!apart)
        return run_products(level, act, jobs, count, threads);
    void *memory = NULL;
    size_t before = (size_t)(count + apart) * sizeof(qmix_job);
    if (posix_memalign(&memory, 64, before + (size_t)numbers * sizeof(float)))
        return -1;
    qmix_job *split = memory;
    apart_work w = {levels[level], jobs, (float *)((char *)memory + before)};
    float *next = w.numbers;
    for (int64_t i = 0; i < count; i++) {
        if (!jobs[i].up_weight) {
            split[all++] = jobs[i];
            continue;
        }
        split_job(jobs + i, next, split + all, split + all + 1);
        next += 2 * jobs[i].tokens * jobs[i].rows, all += 2;
    }
    int32_t failed = run_products(level, act, split, all, threads);
    if (!failed)
        pool_run(numbers < SMALL / 4 ? 1 : threads, tokens, join_item, &w);
    free(memory);
    return failed;
}

typedef struct {
    const qmix_level *level;
    qmix_pieces pieces;
    _Atomic int failed;
} attention_work;

static void piece_item(void *argument, int64_t item) {
    attention_work *w = argument;
    void *scratch = pool_scratch(0, w->level->attend_bytes(w->pieces.job));
    if (scratch)
        w->level->attend_head(&w->pieces, item / w->pieces.count, item % w->pieces.count, scratch);
    else
        w->failed = 1;
}

int32_t qmix_attend(int32_t level, const qmix_attention *job, int32_t threads) {
    int64_t positions = job->end - job->begin, heads = job->kv_heads;
    int64_t length = (positions + PIECES * PIECE_UNIT - 1) / (PIECES * PIECE_UNIT) * PIECE_UNIT;
    length = length < LEAST_PIECE ? LEAST_PIECE : length;
    int64_t count = (positions + length - 1) / length;
    size_t counters = ((size_t)heads * sizeof(int32_t) + 63) / 64 * 64;
    char *memory = pool_scratch(1, counters + 4 * (size_t)(count * job->query_heads * (job->head_dim + 2)));
    if (!memory)
        return -1;
    attention_work w = {.level = levels[level], .pieces = {job, length, count, (float *)(memory + counters),
                                                           (_Atomic int32_t *)memory}};
    for (int64_t head = 0; head < heads; head++)
        w.pieces.missing[head] = (int32_t)count;
    pool_run(positions * job->query_heads * job->head_dim < SMALL ? 1 : threads, heads * count, piece_item, &w);
    return w.failed ? -1 : 0;
}

int32_t qmix_norms(int32_t level, const qmix_norm *job, int32_t tokens) {
    float *scratch = pool_scratch(0, (size_t)job->size * sizeof *scratch);
    for (int32_t token = 0; scratch && token < tokens; token++)
        levels[level]->norm(job, token, scratch);
    return scratch ? 0 : -1;
}

typedef struct {
    const qmix_level *level;
    const qmix_route *job;
    const double *x;
    float *logits;
    int64_t tokens;
} router_work;

static void router_item(void *argument, int64_t item) {
    const router_work *w = argument;
    int64_t first = item * ROUTER_UNIT, last = first + ROUTER_UNIT;
    last = last < w->job->experts ? last : w->job->experts;
    w->level->logits(w->job, w->tokens, w->x, first, last, w->logits);
}

int32_t qmix_routes(int32_t level, const qmix_route *job, int32_t tokens, int32_t threads) {
    int64_t hidden = job->norm.size, experts = job->experts, numbers = tokens * hidden;
    int64_t scratch_size = 2 * experts + job->groups + job->chosen;
    scratch_size = scratch_size < hidden ? hidden : scratch_size;
    double *x = pool_scratch(0, (size_t)numbers * sizeof *x + (size_t)(tokens * experts + scratch_size) * sizeof(float));
    if (!x)
        return -1;
    float *logits = (float *)(x + numbers), *scratch = logits + tokens * experts;
    for (int64_t token = 0; token < tokens; token++) {
        levels[level]->norm(&job->norm, token, scratch);
        for (int64_t i = 0; i < hidden; i++)
            x[token * hidden + i] = scratch[i];
    }
    router_work w = {levels[level], job, x, logits, tokens};
    pool_run(numbers * experts < SMALL ? 1 : threads, (experts + ROUTER_UNIT - 1) / ROUTER_UNIT, router_item, &w);
    for (int64_t token = 0; token < tokens; token++)
        levels[level]->choose(job, token, logits + token * experts, scratch);
    return 0;
}

/* As a router's logits; the norm that norms nothing makes fp32 of x. */
int32_t qmix_exacts(int32_t level, const qmix_exact *job, int32_t tokens, int32_t threads) {
    int64_t size = job->size, numbers = tokens * size;
    qmix_route as = {.norm = {.x = job->x, .rows = 1, .size = size, .clip = INFINITY, .x_type = job->x_type, .bare = 1},
                     .router = job->weight, .experts = job->rows, .router_type = job->weight_type};
    double *x = pool_scratch(0, (size_t)numbers * sizeof *x + (size_t)size * sizeof(float));
    if (!x)
        return -1;
    float *scratch = (float *)(x + numbers);
    for (int64_t token = 0; token < tokens; token++) {
        levels[level]->norm(&as.norm, token, scratch);
        for (int64_t i = 0; i < size; i++)
            x[token * size + i] = scratch[i];
    }
    router_work w = {levels[level], &as, x, job->out, tokens};
    pool_run(numbers * job->rows < SMALL ? 1 : threads, (job->rows + ROUTER_UNIT - 1) / ROUTER_UNIT, router_item, &w);
    return 0;
}

int32_t qmix_gates(int32_t level, const qmix_gate *job, int32_t tokens) {
    for (int32_t token = 0; token < tokens; token++)
        levels[level]->gate(job, token);
    return 0;
}

int32_t qmix_convolution(int32_t level, const qmix_conv *job) {
    levels[level]->convolve(job);
    return 0;
}

typedef struct {
    const qmix_level *level;
    const qmix_delta *job;
    _Atomic int failed;
} delta_work;

static void delta_item(void *argument, int64_t head) {
    delta_work *w = argument;
    float *scratch = pool_scratch(0, (size_t)(2 * w->job->key_dim + w->job->value_dim) * sizeof *scratch);
    if (scratch)
        w->level->delta(w->job, head, scratch);
    else
        w->failed = 1;
}

int32_t qmix_delta_rule(int32_t level, const qmix_delta *job, int32_t threads) {
    delta_work w = {.level = levels[level], .job = job};
    int64_t size = job->value_heads * job->key_dim * job->value_dim;
    pool_run(size < SMALL / 4 ? 1 : threads, job->value_heads, delta_item, &w);
    return w.failed ? -1 : 0;
}

int32_t qmix_rotations(int32_t level, const qmix_rotate *job, int32_t tokens) {
    for (int32_t token = 0; token < tokens; token++)
        levels[level]->rotate(job, token);
    return 0;
}

int32_t qmix_angles_of(int32_t level, const qmix_angles *job, int32_t tokens) {
    for (int32_t token = 0; token < tokens; token++)
        levels[level]->angles(job, token);
    return 0;
}

int32_t qmix_combines(int32_t level, const qmix_combine *job, int32_t tokens) {
    for (int32_t token = 0; token < tokens; token++)
        levels[level]->combine(job, token);
    return 0;
}

int32_t qmix_joins(int32_t level, const qmix_join *job, int32_t tokens) {
    float *scratch = pool_scratch(0, (size_t)job->size * sizeof *scratch);
    for (int32_t token = 0; scratch && token < tokens; token++)
        levels[level]->join(job, token, scratch);
    return scratch ? 0 : -1;
}

int32_t qmix_biases(int32_t level, const qmix_bias *job, int32_t tokens) {
    for (int32_t token = 0; token < tokens; token++)
        levels[level]->bias(job, token);
    return 0;
}

int32_t qmix_add(const qmix_addition *job, int32_t tokens) {
    for (int64_t i = 0; i < job->size * tokens; i++)
        job->y[i] += job->x[i];
    return 0;
}

int32_t qmix_scale(const qmix_scaling *job, int32_t tokens) {
    for (int64_t i = 0; i < job->size * tokens; i++) {
        float weighted = job->weight ? job->y[i] * job->weight[job->one ? 0 : i % job->size] : job->y[i];
        job->y[i] = weighted * job->factor;
    }
    return 0;
}

static int32_t run_call(int32_t level, int32_t act, const qmix_call *call, int32_t threads) {
    switch (call->kind) {
    case QMIX_PRODUCTS:
        return qmix_products(level, act, call->job, call->count, threads);
    case QMIX_ATTEND:
        return qmix_attend(level, call->job, threads);
    case QMIX_NORM:
        return qmix_norms(level, call->job, call->count);
    case QMIX_ROUTE:
        return qmix_routes(level, call->job, call->count, threads);
    case QMIX_ROTATE:
        return qmix_rotations(level, call->job, call->count);
    case QMIX_ANGLES:
        return qmix_angles_of(level, call->job, call->count);
    case QMIX_COMBINE:
        return qmix_combines(level, call->job, call->count);
    case QMIX_ADD:
        return qmix_add(call->job, call->count);
    case QMIX_EXPERTS:
        return qmix_chosen(level, act, call->job, call->count, threads);
    case QMIX_JOIN:
        return qmix_joins(level, call->job, call->count);
    case QMIX_BIASED:
        return qmix_biases(level, call->job, call->count);
    case QMIX_EXACT:
        return qmix_exacts(level, call->job, call->count, threads);
    case QMIX_GATED:
        return qmix_gates(level, call->job, call->count);
    case QMIX_CONV:
        return qmix_convolution(level, call->job);
    case QMIX_DELTA:
        return qmix_delta_rule(level, call->job, threads);
    case QMIX_SCALED:
        return qmix_scale(call->job, call->count);
    }
    return -1;
}

int32_t qmix_sequence(int32_t level, int32_t act, const qmix_call *calls, int32_t count, int32_t threads) {
    for (int32_t i = 0; i < count; i++) {
        int32_t failed = run_call(level, act, calls + i, threads);
        if (failed)
            return failed == QMIX_MISSING ? i + 1 : -1;
    }
    return 0;
}

typedef struct {
    const qmix_level *level;
    int32_t act;
    int64_t turns;
    _Atomic int64_t operations;
} peak_work;

static void peak_item(void *argument, int64_t item) {
    peak_work *w = argument;
    uint32_t words[8];
    float out[16];
    for (int i = 0; i < 8; i++)
        words[i] = 0x3f803f80u + (uint32_t)item; /* 1 and 1 as bf16, small numbers as bytes */
    w->operations += w->level->peak(w->act, w->turns, words, out);
}

int64_t qmix_peak(int32_t level, int32_t act, int64_t turns, int32_t threads) {
    peak_work w = {.level = levels[level], .act = act, .turns = turns};
    pool_run(threads, threads, peak_item, &w);
    return w.operations;
}
