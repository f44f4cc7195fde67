/* 256 bits: 8 rows side by side, on AVX2; HAS_VNNI: with AVX-VNNI's dot products. */
#include <immintrin.h>

#include "level.h"

typedef __m256i vint;
typedef __m256 vflt;

#define L 8
#define SUB 2
#define WIDTH 4
#define DIRECT_PAIRS
#ifndef HAS_VNNI
#define PAIRS
#endif

ALWAYS vint set_i(int32_t x) { return _mm256_set1_epi32(x); }
ALWAYS vint add_i(vint a, vint b) { return _mm256_add_epi32(a, b); }
ALWAYS vflt set_f(float x) { return _mm256_set1_ps(x); }
ALWAYS vflt load_f(const float *p) { return _mm256_loadu_ps(p); }
ALWAYS void store_f(float *p, vflt x) { _mm256_storeu_ps(p, x); }
ALWAYS vflt mul_f(vflt a, vflt b) { return _mm256_mul_ps(a, b); }
ALWAYS vflt fma_f(vflt a, vflt b, vflt c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS vflt to_f(vint x) { return _mm256_cvtepi32_ps(x); }

ALWAYS vflt load_i8(const int8_t *p) {
    return to_f(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
ALWAYS vflt load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

ALWAYS vflt load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

#define EVEN_ODD
/* 16 numbers: those at even places, those at odd ones. */
ALWAYS void load_even_odd(const uint16_t *p, vflt *two) {
    vint both = _mm256_loadu_si256((const vint *)p);
    two[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    two[1] = _mm256_castsi256_ps(_mm256_and_si256(both, set_i((int32_t)0xffff0000)));
}

/* Lane i has the sum of the lanes of rows[i]. */
ALWAYS vflt row_sums(const vflt *rows) {
    vflt low = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    vflt high = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

ALWAYS void split_params(const uint16_t *params, float *scale, float *zero) {
    vint both = _mm256_loadu_si256((const vint *)params);
    store_f(scale, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
    store_f(zero, _mm256_castsi256_ps(_mm256_and_si256(both, set_i((int32_t)0xffff0000))));
}

#include "x86_columns.h"
#include "x86_pairs.h"

#define OWN_RIGHT /* there is no arithmetic shift of the 64 bits that a `vint` is to the compiler */
ALWAYS vint right(vint x, const int bits) { return _mm256_srli_epi32(x, bits); }

/* 16 bytes, and what they have at each of the places 0..15. */
ALWAYS vint table_of_16(const int8_t *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
ALWAYS vint look_up(vint table, vint places) { return _mm256_shuffle_epi8(table, places); }

ALWAYS vflt load_e8m0(const uint8_t *p) { return of_e8m0(_mm_loadl_epi64((const __m128i *)p)); }

ALWAYS void unpack_codes(int bits, const uint8_t *from, int block, vint *rows) {
    const vint mask = _mm256_set1_epi8(15);
    const int half = block / 16;
    if (block == 64)
        columns_of_32_bytes(qmix_code_bits(bits), from, rows);
    else
        columns_of_16_bytes(qmix_code_bits(bits), from, rows);
    UNROLL for (int i = 0; i < half; i++) {
        rows[half + i] = _mm256_and_si256(_mm256_srli_epi32(rows[i], 4), mask);
        rows[i] = _mm256_and_si256(rows[i], mask);
    }
    if (bits == QMIX_E2M1)
        UNROLL for (int i = 0; i < 2 * half; i++)
            rows[i] = of_e2m1(rows[i]);
}

/* 64 columns of 8 rows: lane i of out[k] has columns 4k..4k+3 of row i. */
ALWAYS void transpose(const int8_t *const *rows, int64_t column, vint *out) {
    UNROLL for (int half = 0; half < 2; half++) {
        vint a[8], b[8];
        UNROLL for (int i = 0; i < 8; i++)
            a[i] = _mm256_loadu_si256((const vint *)(rows[i] + column + 32 * half));
        UNROLL for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
        UNROLL for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        UNROLL for (int j = 0; j < 4; j++) {
            out[8 * half + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
            out[8 * half + 4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
        }
    }
}

/* A sum that stays in its register: without this gcc 12 gives sums new ones, runs out of them and moves them through
 * memory, at half the speed. */
ALWAYS vint in_place(vint sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

#ifdef HAS_VNNI
#define SIGNED_OFFSET 128
ALWAYS vint signed_codes(vint w) { return _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80)); }
ALWAYS vint dot4(vint sum, vint w, vint x) {
    return in_place(_mm256_dpbusd_avx_epi32(sum, w, x));
}
ALWAYS vint dot4_signed(vint sum, vint w, vint x) { return dot4(sum, w, x); }
#else
#define SIGNED_OFFSET 0
ALWAYS vint signed_codes(vint w) { return w; }
ALWAYS vint dot4(vint sum, vint w, vint x) {
    return in_place(_mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))));
}
ALWAYS vint dot4_signed(vint sum, vint w, vint x) { /* |w| * (x with w's sign): two of them fit 16 bits */
    return dot4(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
#define OWN_DOT4_TABLE /* w is -127 or more: |x| serves all rows of a word */
ALWAYS vint dot4_table(vint sum, vint w, vint x) { return dot4(sum, _mm256_abs_epi8(x), _mm256_sign_epi8(w, x)); }
#endif

#define DIRECT_INT8 8 /* tokens */
/* 64 columns of 8 rows times 64 int8 activations: lane i has the sum of row i, SIGNED_OFFSET too much in each term. */
ALWAYS vint dot_rows(const int8_t *const *rows, int64_t column, const void *x) {
    vint x0 = _mm256_loadu_si256(x), x1 = _mm256_loadu_si256((const vint *)x + 1), a[8], b[4];
    UNROLL for (int i = 0; i < 8; i++) {
        const vint *w = (const vint *)(rows[i] + column);
        a[i] = dot4_signed(set_i(0), signed_codes(_mm256_loadu_si256(w)), x0);
        a[i] = dot4_signed(a[i], signed_codes(_mm256_loadu_si256(w + 1)), x1);
    }
    UNROLL for (int i = 0; i < 4; i++) /* sums of two lanes, rows 2i and 2i + 1 in turn */
        b[i] = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++) /* of four lanes: both halves have rows 4i..4i + 3 */
        a[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(b[2 * i], b[2 * i + 1]),
                                _mm256_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a[0], a[1], 0x20),
                            _mm256_permute2x128_si256(a[0], a[1], 0x31));
}

#define WORDS 4
ALWAYS vint part_of(vint codes, int i, int middle) { /* weight i of each lane as fp32 */
    vint code = middle ? _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(codes, 8 * i), set_i(255)), set_i(middle))
                       : _mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * i), 24);
    return _mm256_castps_si256(to_f(code));
}
ALWAYS vflt fdot(vflt sum, vint w, vint x) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(w), _mm256_castsi256_ps(x), sum);
}
