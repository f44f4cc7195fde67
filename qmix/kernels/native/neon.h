/* 128 bits of ARM's NEON with dot products of bytes: 4 rows side by side; MATRICES: also with products of matrices. */
#include <arm_neon.h>
#include <string.h>

#include "level.h"

typedef int32x4_t vint;
typedef float32x4_t vflt;

#define L 4
#define SUB 4
#define WIDTH 4

ALWAYS vint set_i(int32_t x) { return vdupq_n_s32(x); }
ALWAYS vint add_i(vint a, vint b) { return vaddq_s32(a, b); }
ALWAYS vflt set_f(float x) { return vdupq_n_f32(x); }
ALWAYS vflt load_f(const float *p) { return vld1q_f32(p); }
ALWAYS void store_f(float *p, vflt x) { vst1q_f32(p, x); }
ALWAYS vflt mul_f(vflt a, vflt b) { return vmulq_f32(a, b); }
ALWAYS vflt fma_f(vflt a, vflt b, vflt c) { return vfmaq_f32(c, a, b); }
ALWAYS vflt to_f(vint x) { return vcvtq_f32_s32(x); }

ALWAYS vflt load_i8(const int8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return to_f(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
ALWAYS vflt load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

ALWAYS vflt load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

/* Lane i has the sum of the lanes of rows[i]. */
ALWAYS vflt row_sums(const vflt *rows) {
    return vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3]));
}

ALWAYS vflt load_e8m0(const uint8_t *p) { /* 2^-127, the largest of those whose exponent is 0, is subnormal */
    uint32_t four;
    memcpy(&four, p, 4);
    uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
    return vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(wide, 23), vdupq_n_u32(1 << 22)));
}

/* 16 bytes, and what they have at each of the places 0..15. */
ALWAYS vint table_of_16(const int8_t *p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
ALWAYS vint look_up(vint table, vint places) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(places)));
}

/* Scale and zero of 4 rows. */
ALWAYS void params_of(const uint16_t *params, vflt *scale, vflt *zero) {
    uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(params));
    *scale = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    *zero = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
}
ALWAYS void split_params(const uint16_t *params, float *scale, float *zero) {
    vflt s, z;
    params_of(params, &s, &z);
    store_f(scale, s);
    store_f(zero, z);
}

#include "neon_columns.h"

ALWAYS void unpack_codes(int bits, const uint8_t *from, int block, vint *rows) {
    if (bits == 4)
        codes_of_columns(4, 4, block, from, rows);
    else if (bits == QMIX_E2M1)
        codes_of_columns(4, QMIX_E2M1, block, from, rows);
    else if (bits == 3)
        codes_of_columns(4, 3, block, from, rows);
    else
        codes_of_columns(4, 2, block, from, rows);
    if (bits == 3 || bits == 2)
        UNROLL for (int v = 0; v < block / L; v++)
            rows[v] = add_i(rows[v], set_i(bits == 3 ? 0x04040404 : 0x06060606));
}

/* A 4 x 4 matrix of words, transposed. */
ALWAYS void transpose_words(const vint *a, vint *out) {
    vint b0 = vtrn1q_s32(a[0], a[1]), b1 = vtrn2q_s32(a[0], a[1]);
    vint b2 = vtrn1q_s32(a[2], a[3]), b3 = vtrn2q_s32(a[2], a[3]);
    out[0] = vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(b0), vreinterpretq_s64_s32(b2)));
    out[1] = vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(b1), vreinterpretq_s64_s32(b3)));
    out[2] = vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(b0), vreinterpretq_s64_s32(b2)));
    out[3] = vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(b1), vreinterpretq_s64_s32(b3)));
}

/* 64 columns of 4 rows: lane i of out[k] has columns 4k..4k+3 of row i. */
ALWAYS void transpose(const int8_t *const *rows, int64_t column, vint *out) {
    UNROLL for (int k = 0; k < 4; k++) {
        vint a[4];
        UNROLL for (int i = 0; i < 4; i++)
            a[i] = vreinterpretq_s32_s8(vld1q_s8(rows[i] + column + 16 * k));
        transpose_words(a, out + 4 * k);
    }
}

#define SIGNED_OFFSET 0
ALWAYS vint signed_codes(vint w) { return w; }
ALWAYS vint dot4(vint sum, vint w, vint x) { /* codes 0..24 are signed bytes too */
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
ALWAYS vint dot4_signed(vint sum, vint w, vint x) { return dot4(sum, w, x); }

#define DIRECT_INT8 1 /* tokens */
/* 64 columns of 4 rows times 64 int8 activations: lane i has the sum of row i. */
ALWAYS vint dot_rows(const int8_t *const *rows, int64_t column, const void *x) {
    vint sums[4];
    UNROLL for (int i = 0; i < 4; i++) {
        sums[i] = set_i(0);
        UNROLL for (int k = 0; k < 4; k++)
            sums[i] = vdotq_s32(sums[i], vld1q_s8(rows[i] + column + 16 * k), vld1q_s8((const int8_t *)x + 16 * k));
    }
    return vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
}

#define WORDS 4
ALWAYS vint part_of(vint codes, int i, int middle) { /* weight i of each lane as fp32 */
    vint code = middle ? (codes >> 8 * i & 255) - middle : codes << (24 - 8 * i) >> 24;
    return vreinterpretq_s32_f32(to_f(code));
}
ALWAYS vflt fdot(vflt sum, vint w, vint x) {
    return fma_f(vreinterpretq_f32_s32(w), vreinterpretq_f32_s32(x), sum);
}

#define DIRECT_COLUMNS /* neon_direct.h */
