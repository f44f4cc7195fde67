/* Threads that share the items of one job after another; they spin a little between jobs and then sleep. */
#ifndef QMIX_POOL_H
#define QMIX_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef void (*pool_work)(void *job, int64_t item);

/* work(job, i) for every i < items, by at most `threads` threads, the caller's included. Which thread takes which
 * item is left to chance, so work must not depend on it. Called while another job runs, it works alone. */
void pool_run(int32_t threads, int64_t items, pool_work work, void *job);

/* Memory of the calling thread, three pieces (0, 1, 2), each at least `bytes` long, aligned to 64, and kept until the thread
 * ends; NULL if there is none. */
void *pool_scratch(int32_t piece, size_t bytes);

#endif
