/* What the files of the driver share: random numbers, bf16, and the record of checks.
 *
 * A bound is derived from the unit roundoff U of fp32: n roundings, one after the other, of partial sums whose terms
 * add up to A in absolute value, err by at most n * U * A (Higham 2002, section 3.1).
 */
#ifndef DRIVER_H
#define DRIVER_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

static const double U = 1.0 / (1 << 24), U_BF16 = 1.0 / (1 << 8);

/* One line a check: what, and how much of its bound the worst number takes (more than 1 is a failure, NaN too). */
void report(int32_t level, const char *what, double worst);

/* The largest of *worst and |got - want| / bound; NaN stays. */
static inline void compare(double got, double want, double bound, double *worst) {
    double off = fabs(got - want), ratio = off == 0 ? 0 : off / bound;
    if (!(ratio <= *worst) && *worst == *worst)
        *worst = ratio;
}

void *make(size_t count, size_t size); /* zeros */

uint32_t draw(void);
double uniform(double low, double high);
void fill(float *x, int64_t count, double size); /* between -size and size */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static inline uint16_t to_bf16(float x) { /* finite, to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* int8 codes of `count` numbers, x = code * step to half a step, where step is the largest |x| over 127: in fp32, as
 * native.h's formats have it. */
static inline float quantize(const float *x, int64_t count, int8_t *codes) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++)
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    for (int64_t i = 0; i < count; i++)
        codes[i] = largest > 0 ? (int8_t)rintf(x[i] * (127 / largest)) : 0;
    return largest / 127;
}

void check_products(int32_t level);
void check_carried(int32_t level);
void check_attention(int32_t level);
void check_layer(int32_t level);
void check_delta(int32_t level);

#endif
