/* 128 bits: columns of a block of the grouped formats, whose bytes become lanes.
 *
 * B rows per block, C columns at a time: 4 for dot products, 8 for products of matrices. A vector of codes has all C
 * columns of 16 / C rows, one row after the other. Codes are as stored: 0..15 of int4, 0..7 of int3, 0..3 of int2; of E2M1 0..24, looked up.
 */
#include <arm_neon.h>
#include <string.h>

#include "level.h"

ALWAYS uint8x16_t load_bytes(const int n, const uint8_t *from) { /* 16, 8 or 4, in the lower lanes */
    if (n == 16)
        return vld1q_u8(from);
    if (n == 8)
        return vcombine_u8(vld1_u8(from), vdup_n_u8(0));
    uint32_t four;
    memcpy(&four, from, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

/* Four columns of n bytes, `stride` bytes apart: byte i of each, then byte i + 1: vectors [n/4]. */
ALWAYS void four_columns(const int n, const uint8_t *from, const int stride, uint8x16_t *out) {
    uint8x16_t k0 = load_bytes(n, from), k1 = load_bytes(n, from + stride);
    uint8x16_t k2 = load_bytes(n, from + 2 * stride), k3 = load_bytes(n, from + 3 * stride);
    uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(k0, k1)), b = vreinterpretq_u16_u8(vzip1q_u8(k2, k3));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(a, b));
    if (n > 4)
        out[1] = vreinterpretq_u8_u16(vzip2q_u16(a, b));
    if (n > 8) {
        a = vreinterpretq_u16_u8(vzip2q_u8(k0, k1)), b = vreinterpretq_u16_u8(vzip2q_u8(k2, k3));
        out[2] = vreinterpretq_u8_u16(vzip1q_u16(a, b));
        out[3] = vreinterpretq_u8_u16(vzip2q_u16(a, b));
    }
}

/* The same of C columns: vectors [n C / 16]. */
ALWAYS void columns_of_bytes(const int columns, const int n, const uint8_t *from, const int stride, uint8x16_t *out) {
    if (columns == 4) {
        four_columns(n, from, stride, out);
        return;
    }
    uint8x16_t first[4], second[4];
    four_columns(n, from, stride, first);
    four_columns(n, from + 4 * stride, stride, second);
    UNROLL for (int i = 0; i < n / 4; i++) {
        uint32x4_t a = vreinterpretq_u32_u8(first[i]), b = vreinterpretq_u32_u8(second[i]);
        out[2 * i] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
        out[2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
    }
}

ALWAYS void put_codes(uint8x16_t codes, int32x4_t *to) { *to = vreinterpretq_s32_u8(codes); }

/* Of E2M1 what E2M1_CODES has for each code. */
ALWAYS void codes_of_int4(const int columns, const int bits, const int block, const uint8_t *from, int32x4_t *codes) {
    static const uint8_t e2m1[16] = {E2M1_CODES};
    const uint8x16_t table = vld1q_u8(e2m1);
    const int half = block / 2, count = half * columns / 16;
    uint8x16_t packed[16];
    UNROLL for (int i = 0; i < half / 16; i++)
        columns_of_bytes(columns, 16, from + 16 * i, half, packed + columns * i);
    UNROLL for (int i = 0; i < count; i++) {
        uint8x16_t low = packed[i] & vdupq_n_u8(15), high = packed[i] >> 4;
        put_codes(bits == QMIX_E2M1 ? vqtbl1q_u8(table, low) : low, codes + i);
        put_codes(bits == QMIX_E2M1 ? vqtbl1q_u8(table, high) : high, codes + count + i);
    }
}

ALWAYS void codes_of_int2(const int columns, const int block, const uint8_t *from, int32x4_t *codes) {
    const int quarter = block / 4, count = quarter * columns / 16;
    uint8x16_t packed[8];
    columns_of_bytes(columns, quarter, from, quarter, packed);
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int place = 0; place < 4; place++)
            put_codes(packed[i] >> 2 * place & vdupq_n_u8(3), codes + place * count + i);
}

/* The third bit of row i + b B/8 is bit b of a byte: that of the rows of a lower nibble is put above their two bits,
 * and that of the rows B/2 below is then in its place in the upper one. */
ALWAYS void codes_of_int3(const int columns, const int block, const uint8_t *from, int32x4_t *codes) {
    const int quarter = block / 4, eighth = block / 8, count = quarter * columns / 16;
    uint8x16_t packed[8], thirds[4];
    columns_of_bytes(columns, quarter, from, 3 * eighth, packed);
    columns_of_bytes(columns, eighth, from + quarter, 3 * eighth, thirds);
    UNROLL for (int i = 0; i < count; i++)
        UNROLL for (int place = 0; place < 2; place++) {
            const int bit = 2 * i / count + 2 * place;
            uint8x16_t third = thirds[i % (count / 2)];
            third = bit < 2 ? third << (2 - bit) : third >> (bit - 2);
            uint8x16_t nibbles = vbslq_u8(vdupq_n_u8(0x44), third, packed[i] >> 2 * place);
            put_codes(nibbles & vdupq_n_u8(7), codes + place * count + i);
            put_codes(nibbles >> 4 & vdupq_n_u8(7), codes + (place + 2) * count + i);
        }
}

ALWAYS void codes_of_columns(const int columns, const int bits, const int block, const uint8_t *from,
                             int32x4_t *codes) {
    if (bits == 4 || bits == QMIX_E2M1)
        codes_of_int4(columns, bits, block, from, codes);
    else if (bits == 3)
        codes_of_int3(columns, block, from, codes);
    else
        codes_of_int2(columns, block, from, codes);
}

/* -8 times the sum of x to that of the format's middle, 8, 4 or 2; E2M1's start is that of its own. */
ALWAYS int32_t start_of(const int bits, int32_t start) { return bits == QMIX_E2M1 ? start : start >> (4 - bits); }
