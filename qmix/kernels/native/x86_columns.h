/* For 256 and 512 bits: columns of packed rows, whose bytes become lanes. */
#include <immintrin.h>
#include <string.h>

#include "level.h"

/* Column k of a block of 64 or 32 rows as nibbles, 32 or 16 bytes; those of int3 and int2 as formats/narrow.py has it. */
ALWAYS __m256i nibbles_of_64(int bits, const uint8_t *from, int k) {
    if (bits == 4)
        return _mm256_loadu_si256((const __m256i *)(from + 32 * k));
    from += 8 * bits * k;
    __m256i pairs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)from));
    pairs = _mm256_srlv_epi64(pairs, _mm256_set_epi64x(2, 2, 0, 0));
    pairs = _mm256_and_si256(pairs, _mm256_set1_epi8(0x33));
    if (bits == 2)
        return _mm256_add_epi8(pairs, _mm256_set1_epi8(0x66));
    int64_t eight;
    memcpy(&eight, from + 16, 8);
    __m256i thirds = _mm256_srlv_epi64(_mm256_set1_epi64x(eight), _mm256_set_epi64x(3, 2, 1, 0));
    thirds = _mm256_slli_epi64(_mm256_and_si256(thirds, _mm256_set1_epi8(0x11)), 2);
    return _mm256_add_epi8(_mm256_or_si256(pairs, thirds), _mm256_set1_epi8(0x44));
}

ALWAYS __m128i nibbles_of_32(int bits, const uint8_t *from, int k) {
    if (bits == 4)
        return _mm_loadu_si128((const __m128i *)(from + 16 * k));
    from += 4 * bits * k;
    int64_t eight;
    memcpy(&eight, from, 8);
    __m128i pairs = _mm_srlv_epi64(_mm_set1_epi64x(eight), _mm_set_epi64x(2, 0));
    pairs = _mm_and_si128(pairs, _mm_set1_epi8(0x33));
    if (bits == 2)
        return _mm_add_epi8(pairs, _mm_set1_epi8(0x66));
    int32_t four;
    memcpy(&four, from + 8, 4);
    __m128i thirds = _mm_srlv_epi32(_mm_set1_epi32(four), _mm_set_epi32(3, 2, 1, 0));
    thirds = _mm_slli_epi32(_mm_and_si128(thirds, _mm_set1_epi8(0x11)), 2);
    return _mm_add_epi8(_mm_or_si128(pairs, thirds), _mm_set1_epi8(0x44));
}

/* Bytes of 4 columns, 32 or 16 rows' each, to lanes: lane i has byte i of each column. */
ALWAYS void columns_of_32_bytes(int bits, const uint8_t *from, __m256i *rows) {
    __m256i k0 = nibbles_of_64(bits, from, 0), k1 = nibbles_of_64(bits, from, 1);
    __m256i k2 = nibbles_of_64(bits, from, 2), k3 = nibbles_of_64(bits, from, 3);
    __m256i a = _mm256_unpacklo_epi8(k0, k1), b = _mm256_unpackhi_epi8(k0, k1);
    __m256i c = _mm256_unpacklo_epi8(k2, k3), d = _mm256_unpackhi_epi8(k2, k3);
    __m256i e = _mm256_unpacklo_epi16(a, c), f = _mm256_unpackhi_epi16(a, c); /* 0-3 | 16-19, 4-7 | 20-23 */
    __m256i g = _mm256_unpacklo_epi16(b, d), h = _mm256_unpackhi_epi16(b, d);
    rows[0] = _mm256_permute2x128_si256(e, f, 0x20);
    rows[1] = _mm256_permute2x128_si256(g, h, 0x20);
    rows[2] = _mm256_permute2x128_si256(e, f, 0x31);
    rows[3] = _mm256_permute2x128_si256(g, h, 0x31);
}

ALWAYS void columns_of_16_bytes(int bits, const uint8_t *from, __m256i *rows) {
    __m128i k0 = nibbles_of_32(bits, from, 0), k1 = nibbles_of_32(bits, from, 1);
    __m128i k2 = nibbles_of_32(bits, from, 2), k3 = nibbles_of_32(bits, from, 3);
    __m128i a = _mm_unpacklo_epi8(k0, k1), b = _mm_unpackhi_epi8(k0, k1);
    __m128i c = _mm_unpacklo_epi8(k2, k3), d = _mm_unpackhi_epi8(k2, k3);
    rows[0] = _mm256_set_m128i(_mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(a, c));
    rows[1] = _mm256_set_m128i(_mm_unpackhi_epi16(b, d), _mm_unpacklo_epi16(b, d));
}
