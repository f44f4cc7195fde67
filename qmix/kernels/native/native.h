/* The C ABI of qmix's CPU kernels: matrix products with packed weights, called through ctypes.
 *
 * Formats (qmix/formats/int4.py and int8.py have the byte contract):
 *   int4   w = (q - 8) * scale + zero, blocks of 32 or 64 rows, groups of 32, 64 or 128 columns
 *   int8   w = q * scale, one scale a row
 *
 * T tokens, N padded rows (outputs), K padded columns (inputs), B rows per block, g columns per group.
 */
#ifndef QMIX_NATIVE_H
#define QMIX_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define QMIX_ABI 1

enum { QMIX_FP32 = 0, QMIX_BF16 = 1 };          /* types of x and y */
enum { QMIX_ACT_INT8 = 0, QMIX_ACT_BF16 = 1 };  /* what the products see of the activations */

/* One product y[y_rows] = x[x_rows] W^T; with `gated`, W = [Wgate; Wup], y = silu(x Wgate^T) * (x Wup^T).
 * Strides are in elements. */
typedef struct {
    const uint8_t *weight;  /* int4: [N/B, K, B/2]; int8: [N, K] */
    const uint16_t *params; /* int4: bf16 [K/g, N, 2], scale and zero; int8: bf16 [N] */
    const void *x;          /* [*, x_stride], of which `cols` columns count */
    const int64_t *x_rows;  /* [T] rows of x, or NULL for 0..T-1 */
    void *y;                /* [*, y_stride] */
    const int64_t *y_rows;  /* [T] rows of y, or NULL for 0..T-1 */
    int64_t x_stride, y_stride;
    int64_t tokens;         /* T */
    int64_t padded_rows;    /* N */
    int64_t padded_cols;    /* K */
    int64_t rows;           /* rows wanted of each part; its padding is dropped */
    int64_t cols;           /* columns of x; the padded ones count as 0 */
    int32_t bits;           /* 4 or 8 */
    int32_t block;          /* B of int4; 64 for int8 */
    int32_t group;          /* g of int4; 64 for int8 */
    int32_t parts;          /* W's parts, each padded to N / parts rows */
    int32_t gated;
    int32_t x_type, y_type;
} qmix_job;

int32_t qmix_abi(void);
const char *qmix_level_name(int32_t level);     /* the best first; NULL past the last */
int32_t qmix_level_supported(int32_t level);    /* whether this processor has it */

/* Compute all jobs with at most `threads` threads, the caller's included. 0, or -1 where memory is lacking. The bits
 * of a row of y depend on its row of x, on W, `act` and the level: not on T, the other jobs or the threads. */
int32_t qmix_products(int32_t level, int32_t act, const qmix_job *jobs, int64_t count, int32_t threads);

#endif
