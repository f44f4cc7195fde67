/* 256 bits: two columns of a block of the grouped formats at a time. A 16-bit lane has the codes of one row in both
 * columns, as `maddubs` wants them.
 *
 * B rows per block. Vector v (of B/16) holds 16 rows; those of its upper half are `distance` rows below those of its
 * lower half: the interleaving instructions work within 128 bits, and moving rows across would cost more than to read
 * scale and zero in this order.
 *
 *   4 bits, B = 64  v: rows 8v..8v+7 | 8v+16.. for v < 2; the same 32 rows further for the others
 *   all others      v: rows 16v..16v+7 | 16v+8..16v+15
 *
 * Codes are as stored: 0..15 of int4, 0..7 of int3, 0..3 of int2; of E2M1 0..24, looked up.
 */
#include <immintrin.h>
#include <string.h>

#include "level.h"

ALWAYS __m256i two_columns(const uint8_t *k0, const uint8_t *k1) { /* 16 bytes each, interleaved */
    __m128i a = _mm_loadu_si128((const __m128i *)k0), b = _mm_loadu_si128((const __m128i *)k1);
    return _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
}
ALWAYS __m256i eight_bytes(const uint8_t *k0, const uint8_t *k1) { /* 8 bytes each, interleaved, in both halves */
    int64_t a, b;
    memcpy(&a, k0, 8);
    memcpy(&b, k1, 8);
    return _mm256_unpacklo_epi8(_mm256_set1_epi64x(a), _mm256_set1_epi64x(b));
}
ALWAYS __m256i four_bytes(const uint8_t *k0, const uint8_t *k1) { /* 4 bytes each, interleaved, in all quarters */
    int32_t a, b;
    memcpy(&a, k0, 4);
    memcpy(&b, k1, 4);
    return _mm256_unpacklo_epi8(_mm256_set1_epi32(a), _mm256_set1_epi32(b));
}
ALWAYS __m256i masked(__m256i x, int mask) { return _mm256_and_si256(x, _mm256_set1_epi8((char)mask)); }

/* What E2M1_CODES has for each code. */
ALWAYS __m256i of_e2m1(__m256i codes) {
    return _mm256_shuffle_epi8(_mm256_setr_epi8(E2M1_CODES, E2M1_CODES), codes);
}

/* Eight scales of mxfp4; 2^-127, the largest of those whose exponent is 0, is subnormal. */
ALWAYS __m256 of_e8m0(__m128i bytes) {
    __m256i exponents = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
    return _mm256_castsi256_ps(_mm256_max_epi32(exponents, _mm256_set1_epi32(1 << 22)));
}

/* Two columns of int3: two bits of each code, and the third one of each as formats/narrow.py has it, to nibbles. */
ALWAYS void nibbles_of_int3(const uint8_t *from, int block, __m256i *nibbles) {
    if (block == 64) {
        __m256i pairs = two_columns(from, from + 24), thirds = eight_bytes(from + 16, from + 40);
        thirds = _mm256_srlv_epi64(thirds, _mm256_set_epi64x(1, 1, 0, 0));
        nibbles[0] = _mm256_or_si256(masked(pairs, 0x33), _mm256_slli_epi16(masked(thirds, 0x11), 2));
        nibbles[1] = _mm256_or_si256(masked(_mm256_srli_epi16(pairs, 2), 0x33), masked(thirds, 0x44));
    } else {
        __m256i pairs = eight_bytes(from, from + 12), thirds = four_bytes(from + 8, from + 20);
        pairs = _mm256_srlv_epi64(pairs, _mm256_set_epi64x(2, 2, 0, 0));
        thirds = _mm256_srlv_epi64(thirds, _mm256_set_epi64x(3, 2, 1, 0));
        nibbles[0] = _mm256_or_si256(masked(pairs, 0x33), _mm256_slli_epi16(masked(thirds, 0x11), 2));
    }
}

/* Two columns as B/32 vectors whose bytes hold two codes, that of a later row in the upper nibble; what else is in a
 * nibble of int2 does not belong to it. */
ALWAYS void nibbles_of_pair(const int bits, const int block, const uint8_t *from, __m256i *nibbles) {
    if (qmix_code_bits(bits) == 4 && block == 64) {
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
        nibbles[0] = _mm256_unpacklo_epi8(a, b);
        nibbles[1] = _mm256_unpackhi_epi8(a, b);
    } else if (bits == 4)
        nibbles[0] = two_columns(from, from + 16);
    else if (bits == 3)
        nibbles_of_int3(from, block, nibbles);
    else if (block == 64) {
        nibbles[0] = two_columns(from, from + 16);
        nibbles[1] = _mm256_srli_epi16(nibbles[0], 2);
    } else
        nibbles[0] = _mm256_srlv_epi64(eight_bytes(from, from + 8), _mm256_set_epi64x(2, 2, 0, 0));
}

/* `count` vectors of nibbles to 2 * count vectors of codes. */
ALWAYS void split_codes(const int bits, const int count, const __m256i *nibbles, __m256i *codes) {
    UNROLL for (int i = 0; i < count; i++) {
        codes[i] = masked(nibbles[i], bits == 2 ? 3 : 15);
        codes[count + i] = masked(_mm256_srli_epi16(nibbles[i], 4), bits == 2 ? 3 : 15);
    }
    if (bits == QMIX_E2M1)
        UNROLL for (int i = 0; i < 2 * count; i++)
            codes[i] = of_e2m1(codes[i]);
}

ALWAYS int row_distance(const int bits, const int block) { return qmix_code_bits(bits) == 4 && block == 64 ? 16 : 8; }

/* After 16-bit lanes became 32-bit ones, vector w (of B/8) has 4 rows from this one on, and 4 `distance` rows below. */
ALWAYS int first_row(const int distance, int w) {
    return 2 * distance * (w / (distance / 4)) + 4 * (w % (distance / 4));
}

/* Scale and zero of the rows of vector w; params is that of the block's first row. mxfp4 has no zero. */
ALWAYS void params_of(const int bits, const uint16_t *params, const int distance, int w, __m256 *scale, __m256 *zero) {
    if (bits == QMIX_E2M1) {
        int32_t upper, lower;
        memcpy(&upper, (const uint8_t *)params + first_row(distance, w), 4);
        memcpy(&lower, (const uint8_t *)params + first_row(distance, w) + distance, 4);
        *scale = of_e8m0(_mm_insert_epi32(_mm_cvtsi32_si128(upper), lower, 1));
        *zero = _mm256_setzero_ps();
        return;
    }
    const uint16_t *from = params + 2 * first_row(distance, w);
    __m256i both = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(from + 2 * distance)),
                                    _mm_loadu_si128((const __m128i *)from));
    *scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *zero = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int32_t)0xffff0000)));
}

/* The sums of a block's rows, from the order of the vectors to that of the rows. */
ALWAYS void in_order_of_rows(const int distance, const int block, const float *sums, float *y) {
    UNROLL for (int w = 0; w < block / 8; w++) {
        float *to = y + first_row(distance, w);
        _mm_storeu_ps(to, _mm_loadu_ps(sums + 8 * w));
        _mm_storeu_ps(to + distance, _mm_loadu_ps(sums + 8 * w + 4));
    }
}
