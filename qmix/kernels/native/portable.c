/* Any processor: what the compiler makes of plain loops over 4 lanes. */
#include <string.h>

#include "level.h"

typedef int32_t vint __attribute__((vector_size(16)));
typedef float vflt __attribute__((vector_size(16)));

#define LEVEL portable
#define NAME "portable"
#define L 4
#define SUB 2
#define WIDTH 4
#define COMPACT

static int supported(void) { return 1; }

ALWAYS vint set_i(int32_t x) { return (vint){x, x, x, x}; }
ALWAYS vint add_i(vint a, vint b) { return a + b; }
ALWAYS vflt set_f(float x) { return (vflt){x, x, x, x}; }
ALWAYS vflt load_f(const float *p) {
    vflt x;
    memcpy(&x, p, sizeof x);
    return x;
}
ALWAYS void store_f(float *p, vflt x) { memcpy(p, &x, sizeof x); }
ALWAYS vflt mul_f(vflt a, vflt b) { return a * b; }
ALWAYS vflt fma_f(vflt a, vflt b, vflt c) { return a * b + c; }
ALWAYS vflt to_f(vint x) { return __builtin_convertvector(x, vflt); }

ALWAYS vflt load_i8(const int8_t *p) { return (vflt){p[0], p[1], p[2], p[3]}; }
ALWAYS vflt load_bf16(const uint16_t *p) {
    uint32_t bits[L];
    vflt x;
    for (int i = 0; i < L; i++)
        bits[i] = (uint32_t)p[i] << 16;
    memcpy(&x, bits, sizeof x);
    return x;
}

/* Lane i has the sum of the lanes of rows[i]. */
ALWAYS vflt row_sums(const vflt *rows) {
    vflt sums;
    for (int i = 0; i < L; i++)
        sums[i] = rows[i][0] + rows[i][1] + rows[i][2] + rows[i][3];
    return sums;
}

ALWAYS void split_params(const uint16_t *params, float *scale, float *zero) {
    for (int i = 0; i < L; i++) {
        uint32_t s = (uint32_t)params[2 * i] << 16, z = (uint32_t)params[2 * i + 1] << 16;
        memcpy(scale + i, &s, 4);
        memcpy(zero + i, &z, 4);
    }
}

ALWAYS vflt load_f16(const uint16_t *p) {
    vflt x;
    for (int i = 0; i < L; i++) {
        uint32_t bits = (uint32_t)(p[i] & 0x7fff) << 13; /* fp32 has the same number times 2^-112, also of a subnormal one */
        memcpy((float *)&x + i, &bits, 4);
        x[i] *= p[i] & 0x8000 ? -0x1p112f : 0x1p112f;
    }
    return x;
}

ALWAYS vflt load_e8m0(const uint8_t *p) {
    vflt x;
    for (int i = 0; i < L; i++) {
        uint32_t bits = p[i] ? (uint32_t)p[i] << 23 : 1u << 22; /* 2^-127 is subnormal */
        memcpy((float *)&x + i, &bits, 4);
    }
    return x;
}

/* 16 bytes, and what they have at each of the places 0..15. */
ALWAYS vint table_of_16(const int8_t *p) {
    vint table;
    memcpy(&table, p, sizeof table);
    return table;
}
ALWAYS vint look_up(vint table, vint places) {
    int8_t from[16], at[16], found[16];
    memcpy(from, &table, 16);
    memcpy(at, &places, 16);
    for (int i = 0; i < 16; i++)
        found[i] = from[at[i]];
    return table_of_16(found);
}

/* Nibbles of 4 columns of int3 or int2: see formats/narrow.py. */
static void widen(int bits, const uint8_t *from, int block, uint8_t *to) {
    int quarter = block / 4, eighth = block / 8;
    for (int k = 0; k < 4; k++, from += block * bits / 8, to += 2 * quarter) {
        for (int i = 0; i < quarter; i++) {
            to[i] = from[i] & 0x33;
            to[quarter + i] = from[i] >> 2 & 0x33;
        }
        for (int place = 0; place < 4 && bits == 3; place++)
            for (int i = 0; i < eighth; i++)
                to[place * eighth + i] |= (from[quarter + i] >> place & 0x11) << 2;
        for (int i = 0; i < 2 * quarter; i++)
            to[i] += bits == 3 ? 0x44 : 0x66;
    }
}

ALWAYS void unpack_codes(int bits, const uint8_t *from, int block, vint *rows) {
    int half = block / 2;
    uint8_t nibbles[128];
    static const uint8_t of_e2m1[16] = {E2M1_CODES};
    if (bits == 3 || bits == 2) {
        widen(bits, from, block, nibbles);
        from = nibbles;
    }
    for (int i = 0; i < half; i++) {
        uint32_t low = 0, high = 0;
        for (int k = 0; k < 4; k++) {
            uint8_t first = from[k * half + i] & 15, second = from[k * half + i] >> 4;
            low |= (uint32_t)(bits == QMIX_E2M1 ? of_e2m1[first] : first) << 8 * k;
            high |= (uint32_t)(bits == QMIX_E2M1 ? of_e2m1[second] : second) << 8 * k;
        }
        rows[i / L][i % L] = (int32_t)low;
        rows[(half + i) / L][i % L] = (int32_t)high;
    }
}

/* 64 columns of 4 rows: lane i of out[k] has columns 4k..4k+3 of row i. */
ALWAYS void transpose(const int8_t *const *rows, int64_t column, vint *out) {
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < L; i++) {
            int32_t four;
            memcpy(&four, rows[i] + column + 4 * k, 4);
            out[k][i] = four;
        }
}

#define SIGNED_OFFSET 0
ALWAYS vint signed_codes(vint w) { return w; }
ALWAYS vint dot4_signed(vint sum, vint w, vint x) {
    for (int k = 0; k < 4; k++)
        sum += (w << (24 - 8 * k) >> 24) * (x << (24 - 8 * k) >> 24);
    return sum;
}
ALWAYS vint dot4(vint sum, vint w, vint x) { return dot4_signed(sum, w, x); } /* codes 0..24 are signed bytes too */

#define WORDS 4
ALWAYS vint part_of(vint codes, int i, int middle) { /* weight i of each lane as fp32 */
    vint code = middle ? (codes >> 8 * i & 255) - middle : codes << (24 - 8 * i) >> 24;
    vflt value = to_f(code);
    return (vint)value;
}
ALWAYS vflt fdot(vflt sum, vint w, vint x) { return fma_f((vflt)w, (vflt)x, sum); }

#include "products.h"
