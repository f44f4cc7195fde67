/* 512 bits: 16 rows side by side. HAS_VNNI (with VBMI) and HAS_BF16 say what the level may use. */
#include <immintrin.h>

#include "level.h"

typedef __m512i vint;
typedef __m512 vflt;

#define L 16
#define SUB 4
#define WIDTH 6
#define DIRECT

ALWAYS vint set_i(int32_t x) { return _mm512_set1_epi32(x); }
ALWAYS vint add_i(vint a, vint b) { return _mm512_add_epi32(a, b); }
ALWAYS vflt set_f(float x) { return _mm512_set1_ps(x); }
ALWAYS vflt load_f(const float *p) { return _mm512_loadu_ps(p); }
ALWAYS void store_f(float *p, vflt x) { _mm512_storeu_ps(p, x); }
ALWAYS vflt mul_f(vflt a, vflt b) { return _mm512_mul_ps(a, b); }
ALWAYS vflt fma_f(vflt a, vflt b, vflt c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS vflt to_f(vint x) { return _mm512_cvtepi32_ps(x); }

ALWAYS vflt load_i8(const int8_t *p) {
    return to_f(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
ALWAYS vflt load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

ALWAYS vflt load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

#define EVEN_ODD
/* 32 numbers: those at even places, those at odd ones. */
ALWAYS void load_even_odd(const uint16_t *p, vflt *two) {
    vint both = _mm512_loadu_si512(p);
    two[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    two[1] = _mm512_castsi512_ps(_mm512_and_si512(both, set_i((int32_t)0xffff0000)));
}

/* Lane i has the sum of the lanes of rows[i]. */
ALWAYS vflt row_sums(const vflt *rows) {
    vflt a[8], b[4];
    UNROLL for (int i = 0; i < 8; i++) /* of two lanes, rows 2i and 2i + 1 in turn */
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                             _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++) { /* of four lanes: 128 bits have rows 4i..4i + 3 */
        __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}

ALWAYS void split_params(const uint16_t *params, float *scale, float *zero) {
    vint both = _mm512_loadu_si512(params);
    store_f(scale, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
    store_f(zero, _mm512_castsi512_ps(_mm512_and_si512(both, set_i((int32_t)0xffff0000))));
}

/* 16 scales of mxfp4; 2^-127, the largest of those whose exponent is 0, is subnormal. */
ALWAYS vflt load_e8m0(const uint8_t *p) {
    vint exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)), 23);
    return _mm512_castsi512_ps(_mm512_max_epi32(exponents, set_i(1 << 22)));
}

#define OWN_RIGHT
ALWAYS vint right(vint x, const int bits) { return _mm512_srli_epi32(x, bits); }

/* 16 bytes, and what they have at each of the places 0..15. */
ALWAYS vint table_of_16(const int8_t *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
ALWAYS vint look_up(vint table, vint places) { return _mm512_shuffle_epi8(table, places); }

/* What E2M1_CODES has for each code, of `count` vectors. */
ALWAYS void of_e2m1(int count, vint *codes) {
    const vint table = _mm512_broadcast_i32x4(_mm_setr_epi8(E2M1_CODES));
    UNROLL for (int i = 0; i < count; i++)
        codes[i] = _mm512_shuffle_epi8(table, codes[i]);
}

/* The rows of bytes 0..15 and 16..31 of a block's columns, or with 32 rows only the first: each byte holds two. */
ALWAYS void split_nibbles(vint low, vint high, int block, vint *rows) {
    const vint mask = _mm512_set1_epi8(15);
    rows[0] = _mm512_and_si512(low, mask);
    if (block == 64) {
        rows[1] = _mm512_and_si512(high, mask);
        rows[2] = _mm512_and_si512(_mm512_srli_epi32(low, 4), mask);
        rows[3] = _mm512_and_si512(_mm512_srli_epi32(high, 4), mask);
    } else
        rows[1] = _mm512_and_si512(_mm512_srli_epi32(low, 4), mask);
}

#ifdef HAS_VNNI
ALWAYS void columns_64(const uint8_t *from, vint *low, vint *high) { /* bytes 0..15 and 16..31 of 4 columns */
    const vint first = _mm512_set_epi32(0x6f4f2f0f, 0x6e4e2e0e, 0x6d4d2d0d, 0x6c4c2c0c, 0x6b4b2b0b, 0x6a4a2a0a,
                                        0x69492909, 0x68482808, 0x67472707, 0x66462606, 0x65452505, 0x64442404,
                                        0x63432303, 0x62422202, 0x61412101, 0x60402000);
    const vint second = _mm512_or_si512(first, _mm512_set1_epi8(16));
    vint a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
    *low = _mm512_permutex2var_epi8(a, first, b);
    *high = _mm512_permutex2var_epi8(a, second, b);
}

ALWAYS vint columns_32(const uint8_t *from) {
    const vint order = _mm512_set_epi32(0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a,
                                        0x39291909, 0x38281808, 0x37271707, 0x36261606, 0x35251505, 0x34241404,
                                        0x33231303, 0x32221202, 0x31211101, 0x30201000);
    return _mm512_permutexvar_epi8(order, _mm512_loadu_si512(from));
}
ALWAYS vint bits_of(vint x, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi8((char)mask));
}

/* Rows 16v..16v + 15 of a block of 64 stand in bits 2v of the pairs' 16 bytes. */
ALWAYS void unpack2(const uint8_t *from, int block, vint *rows) {
    const vint middle = _mm512_set1_epi8(6);
    if (block == 64) {
        vint pairs = columns_32(from);
        UNROLL for (int v = 0; v < 4; v++)
            rows[v] = _mm512_add_epi8(bits_of(pairs, 2 * v, 3), middle);
    } else { /* 8 bytes: those of rows 8..15 are those of rows 0..7 two bits further */
        const vint order = _mm512_set_epi32(0x1f170f07, 0x1e160e06, 0x1d150d05, 0x1c140c04, 0x1b130b03, 0x1a120a02,
                                            0x19110901, 0x18100800, 0x1f170f07, 0x1e160e06, 0x1d150d05, 0x1c140c04,
                                            0x1b130b03, 0x1a120a02, 0x19110901, 0x18100800);
        vint pairs = _mm512_permutexvar_epi8(order, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from)));
        pairs = _mm512_mask_srli_epi32(pairs, 0xff00, pairs, 2);
        UNROLL for (int v = 0; v < 2; v++)
            rows[v] = _mm512_add_epi8(bits_of(pairs, 4 * v, 3), middle);
    }
}

/* The same, and row r's third bit in bit r / (B/8) of byte r % (B/8) behind the pairs. */
ALWAYS void unpack3(const uint8_t *from, int block, vint *rows) {
    const vint middle = _mm512_set1_epi8(4);
    if (block == 64) { /* bytes 24k..24k + 15 and 24k + 16..24k + 23; from byte 64 on in the second vector */
        const vint pairs_at = _mm512_set_epi32(0x773f270f, 0x763e260e, 0x753d250d, 0x743c240c, 0x733b230b, 0x723a220a,
                                               0x71392109, 0x70382008, 0x6f371f07, 0x6e361e06, 0x6d351d05, 0x6c341c04,
                                               0x6b331b03, 0x6a321a02, 0x69311901, 0x68301800);
        const vint thirds_at = _mm512_set_epi32(0x7f672f17, 0x7e662e16, 0x7d652d15, 0x7c642c14, 0x7b632b13, 0x7a622a12,
                                                0x79612911, 0x78602810, 0x7f672f17, 0x7e662e16, 0x7d652d15, 0x7c642c14,
                                                0x7b632b13, 0x7a622a12, 0x79612911, 0x78602810);
        vint a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
        vint pairs = _mm512_permutex2var_epi8(a, pairs_at, b), thirds = _mm512_permutex2var_epi8(a, thirds_at, b);
        thirds = _mm512_mask_srli_epi32(thirds, 0xff00, thirds, 1);
        vint third[4] = {bits_of(_mm512_slli_epi32(thirds, 2), 0, 4), bits_of(thirds, 0, 4), bits_of(thirds, 2, 4),
                         bits_of(thirds, 4, 4)};
        UNROLL for (int v = 0; v < 4; v++)
            rows[v] = _mm512_add_epi8(_mm512_or_si512(bits_of(pairs, 2 * v, 3), third[v]), middle);
    } else { /* bytes 12k..12k + 7 and 12k + 8..12k + 11; lane i's thirds stand in bits i / 4 and 4 + i / 4 */
        const vint pairs_at = _mm512_set_epi32(0x2b1f1307, 0x2a1e1206, 0x291d1105, 0x281c1004, 0x271b0f03, 0x261a0e02,
                                               0x25190d01, 0x24180c00, 0x2b1f1307, 0x2a1e1206, 0x291d1105, 0x281c1004,
                                               0x271b0f03, 0x261a0e02, 0x25190d01, 0x24180c00);
        const vint thirds_at = _mm512_set_epi32(0x2f23170b, 0x2e22160a, 0x2d211509, 0x2c201408, 0x2f23170b, 0x2e22160a,
                                                0x2d211509, 0x2c201408, 0x2f23170b, 0x2e22160a, 0x2d211509, 0x2c201408,
                                                0x2f23170b, 0x2e22160a, 0x2d211509, 0x2c201408);
        const vint places = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        vint all = _mm512_maskz_loadu_epi8(0xffffffffffffull, from);
        vint pairs = _mm512_permutexvar_epi8(pairs_at, all);
        vint thirds = _mm512_srlv_epi32(_mm512_permutexvar_epi8(thirds_at, all), places);
        pairs = _mm512_mask_srli_epi32(pairs, 0xff00, pairs, 2);
        vint third[2] = {bits_of(_mm512_slli_epi32(thirds, 2), 0, 4), bits_of(thirds, 2, 4)};
        UNROLL for (int v = 0; v < 2; v++)
            rows[v] = _mm512_add_epi8(_mm512_or_si512(bits_of(pairs, 4 * v, 3), third[v]), middle);
    }
}

ALWAYS void unpack_codes(int bits, const uint8_t *from, int block, vint *rows) {
    vint low, high = _mm512_setzero_si512();
    if (bits == 3 || bits == 2) {
        (bits == 3 ? unpack3 : unpack2)(from, block, rows);
        return;
    }
    if (block == 64)
        columns_64(from, &low, &high);
    else
        low = columns_32(from);
    split_nibbles(low, high, block, rows);
    if (bits == QMIX_E2M1)
        of_e2m1(block / L, rows);
}
#else
#include "x86_columns.h"

ALWAYS void unpack_codes(int bits, const uint8_t *from, int block, vint *rows) {
    __m256i quarters[4] = {0};
    if (block == 64)
        columns_of_32_bytes(qmix_code_bits(bits), from, quarters);
    else
        columns_of_16_bytes(qmix_code_bits(bits), from, quarters);
    split_nibbles(_mm512_inserti64x4(_mm512_castsi256_si512(quarters[0]), quarters[1], 1),
                  _mm512_inserti64x4(_mm512_castsi256_si512(quarters[2]), quarters[3], 1), block, rows);
    if (bits == QMIX_E2M1)
        of_e2m1(block / L, rows);
}
#endif

/* 64 columns of 16 rows: lane i of out[k] has columns 4k..4k+3 of row i. */
ALWAYS void transpose(const int8_t *const *rows, int64_t column, vint *out) {
    vint a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(rows[i] + column);
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) { /* rows i..i+3; a[i + j]: dword j of each 128 bits */
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        vint low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        vint low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        vint high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        out[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        out[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        out[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        out[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

#ifdef HAS_VNNI
#define SIGNED_OFFSET 128
ALWAYS vint signed_codes(vint w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
/* As assembly: gcc 12 gives the intrinsic's sums new registers, and the inner loop then spills them to memory, at half
 * the speed. */
ALWAYS vint dot4(vint sum, vint w, vint x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
ALWAYS vint dot4_signed(vint sum, vint w, vint x) { return dot4(sum, w, x); }
#else
#define SIGNED_OFFSET 0
ALWAYS vint signed_codes(vint w) { return w; }
ALWAYS vint dot4(vint sum, vint w, vint x) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
ALWAYS vint dot4_signed(vint sum, vint w, vint x) { /* |w| * (x with w's sign): two of them fit 16 bits */
    vint turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    return dot4(sum, _mm512_abs_epi8(w), turned);
}
#define OWN_DOT4_TABLE /* w is -127 or more: |x| and its signs serve all rows of a word */
ALWAYS vint dot4_table(vint sum, vint w, vint x) {
    vint turned = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
    return dot4(sum, _mm512_abs_epi8(x), turned);
}
#endif

#define DIRECT_INT8 8 /* tokens */
#define OWN_INT8_ROWS

#ifdef HAS_BF16
#define WORDS 2
/* Weights i and i + 2 of each lane as bf16. Unsigned ones from a table, which the low 5 bits of a word look up. */
ALWAYS vint part_of(vint codes, int i, int middle) {
    if (middle == 12) {
        const vint table = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0,
                                            0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, (short)0xbf80, (short)0xc000,
                                            (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0,
                                            (short)0xc100, (short)0xc110, (short)0xc120, (short)0xc130, (short)0xc140);
        return _mm512_permutexvar_epi16(i ? _mm512_srli_epi32(codes, 8) : codes, table);
    }
    if (middle) {
        const vint table = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40e0, 0x40c0, 0x40a0, 0x4080,
                                            0x4040, 0x4000, 0x3f80, 0, (short)0xbf80, (short)0xc000, (short)0xc040,
                                            (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100);
        return _mm512_permutexvar_epi16(i ? _mm512_srli_epi32(codes, 8) : codes, table);
    }
    vint low = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * i), 24);
    vint high = _mm512_srai_epi32(_mm512_slli_epi32(codes, 8 - 8 * i), 24);
    vint a = _mm512_castps_si512(to_f(low)), b = _mm512_castps_si512(to_f(high));
    return _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, set_i((int32_t)0xffff0000)));
}
ALWAYS vflt fdot(vflt sum, vint w, vint x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
#else
#define WORDS 4
ALWAYS vint part_of(vint codes, int i, int middle) { /* weight i of each lane as fp32 */
    vint code = middle ? _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(codes, 8 * i), set_i(255)), set_i(middle))
                       : _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * i), 24);
    return _mm512_castps_si512(to_f(code));
}
ALWAYS vflt fdot(vflt sum, vint w, vint x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
}
#endif
