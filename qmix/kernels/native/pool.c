/* A pool of threads for short jobs. A decoding layer asks for a handful of products, some tens of microseconds
 * apart, so a thread that has just worked spins for SPIN_NS before it sleeps: waking one takes about as long as
 * a small product. After the first ALONE_NS it offers its core to others between two looks: where there are more threads
 * than cores, or another program is busy, the thread that everybody waits for may be waiting for that core.
 *
 * A job is open while `closed` is 0. A thread enters by counting itself in `running` and then looks whether the job
 * is still open; the caller closes it when the items are gone and waits until `running` is 0. So a thread that
 * wakes too late is not waited for, and one that entered may touch the job. The caller waits as the others do: it spins,
 * then sleeps (`asleep`) until the last of them leaves. All orders are sequentially consistent.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define MOST 256          /* threads */
#define SPIN_NS 200000    /* how long an idle thread stays awake */
#define ALONE_NS 10000    /* how long it keeps its core meanwhile */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;      /* held by the thread whose job runs */
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static atomic_int generation, sleepers, closed = 1, running, asleep;
static atomic_llong next;
static int32_t workers;   /* threads that exist, under `busy` */
static int32_t wanted;    /* of them may join the job, written before it opens */
static int64_t item_count;
static pool_work task;
static void *argument;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* A thread takes a quarter of its share of what is left, then of the rest, at last single items. Neighbouring items are
 * neighbouring memory: where two cores take alternate blocks of one stream, the processor's prefetching for one runs into
 * what the other reads (on Zen 5 that costs 40 % of the rate). A core of a quarter of the others' speed still ends in time. */
static void take_items(void) {
    for (;;) {
        long long item = atomic_load(&next);
        int64_t count;
        do {
            if (item >= item_count)
                return;
            count = (item_count - item) / (4 * (wanted + 1));
            count = count < 1 ? 1 : count;
        } while (!atomic_compare_exchange_weak(&next, &item, item + count));
        for (int64_t i = 0; i < count; i++)
            task(argument, item + i);
    }
}

/* Until *what is no longer `old`, or SPIN_NS have passed: then 0. */
static int spin(atomic_int *what, int old) {
    int64_t start = 0;
    for (int turns = 1; atomic_load(what) == old; turns++) {
        relax();
        if (turns % 64)
            continue;
        int64_t now = nanoseconds();
        start = start ? start : now;
        if (now - start > SPIN_NS)
            return 0;
        if (now - start > ALONE_NS)
            sched_yield();
    }
    return 1;
}

static void leave(void) {
    if (atomic_fetch_sub(&running, 1) == 1 && atomic_load(&asleep)) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_signal(&left);
        pthread_mutex_unlock(&sleeping);
    }
}

static void *worker(void *number) {
    int32_t mine = (int32_t)(intptr_t)number;
    for (int seen = 0;;) {
        if (!spin(&generation, seen)) {
            pthread_mutex_lock(&sleeping);
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&generation) == seen)
                pthread_cond_wait(&wake, &sleeping);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&sleeping);
        }
        seen = atomic_load(&generation);
        atomic_fetch_add(&running, 1);
        if (!atomic_load(&closed) && mine < wanted)
            take_items();
        leave();
    }
    return NULL;
}

/* Until no thread is in the job. */
static void wait_for_all(void) {
    for (int others; (others = atomic_load(&running)) && spin(&running, others);)
        ;
    if (!atomic_load(&running))
        return;
    pthread_mutex_lock(&sleeping);
    atomic_store(&asleep, 1);
    while (atomic_load(&running))
        pthread_cond_wait(&left, &sleeping);
    atomic_store(&asleep, 0);
    pthread_mutex_unlock(&sleeping);
}

/* A child of fork has none of its parent's threads. */
static void forget_threads(void) {
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&left, NULL);
    atomic_store(&sleepers, 0);
    atomic_store(&running, 0);
    atomic_store(&asleep, 0);
    atomic_store(&closed, 1);
    workers = 0;
}

static void prepare_once(void) { pthread_atfork(NULL, NULL, forget_threads); }

static void start_workers(int32_t count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, prepare_once);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (pthread_t id; workers < count; workers++)
        if (pthread_create(&id, &attributes, worker, (void *)(intptr_t)workers))
            break;  /* fewer threads do the same work */
    pthread_attr_destroy(&attributes);
}

void pool_run(int32_t threads, int64_t items, pool_work work, void *job) {
    if (threads > MOST)
        threads = MOST;
    if (threads > items)
        threads = (int32_t)items;
    if (threads <= 1 || pthread_mutex_trylock(&busy)) {
        for (int64_t item = 0; item < items; item++)
            work(job, item);
        return;
    }
    start_workers(threads - 1);
    task = work, argument = job, item_count = items, wanted = threads - 1;
    atomic_store(&next, 0);
    atomic_store(&closed, 0);
    atomic_fetch_add(&generation, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
    take_items();
    atomic_store(&closed, 1);
    wait_for_all();
    pthread_mutex_unlock(&busy);
}

enum { PIECES_OF_SCRATCH = 3 };

typedef struct {
    size_t bytes[PIECES_OF_SCRATCH];
    void *memory[PIECES_OF_SCRATCH];
} scratch;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *held) {
    for (int piece = 0; piece < PIECES_OF_SCRATCH; piece++)
        free(((scratch *)held)->memory[piece]);
    free(held);
}

static void make_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *pool_scratch(int32_t piece, size_t bytes) {
    pthread_once(&scratch_once, make_key);
    scratch *held = pthread_getspecific(scratch_key);
    if (!held) {
        held = calloc(1, sizeof *held);
        if (!held || pthread_setspecific(scratch_key, held)) {
            free(held);
            return NULL;
        }
    }
    if (held->bytes[piece] < bytes) {
        free(held->memory[piece]);
        held->memory[piece] = NULL, held->bytes[piece] = 0;
        if (posix_memalign(&held->memory[piece], 64, bytes)) {
            held->memory[piece] = NULL;
            return NULL;
        }
        held->bytes[piece] = bytes;
    }
    return held->memory[piece];
}
