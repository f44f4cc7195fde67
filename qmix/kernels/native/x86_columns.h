/* Bytes of 4 columns, 32 or 16 rows' each, to lanes: lane i has byte i of each column. */
ALWAYS void columns_of_32_bytes(const uint8_t *from, __m256i *rows) {
    __m256i k0 = _mm256_loadu_si256((const __m256i *)from), k1 = _mm256_loadu_si256((const __m256i *)(from + 32));
    __m256i k2 = _mm256_loadu_si256((const __m256i *)(from + 64)), k3 = _mm256_loadu_si256((const __m256i *)(from + 96));
    __m256i a = _mm256_unpacklo_epi8(k0, k1), b = _mm256_unpackhi_epi8(k0, k1);
    __m256i c = _mm256_unpacklo_epi8(k2, k3), d = _mm256_unpackhi_epi8(k2, k3);
    __m256i e = _mm256_unpacklo_epi16(a, c), f = _mm256_unpackhi_epi16(a, c); /* 0-3 | 16-19, 4-7 | 20-23 */
    __m256i g = _mm256_unpacklo_epi16(b, d), h = _mm256_unpackhi_epi16(b, d);
    rows[0] = _mm256_permute2x128_si256(e, f, 0x20);
    rows[1] = _mm256_permute2x128_si256(g, h, 0x20);
    rows[2] = _mm256_permute2x128_si256(e, f, 0x31);
    rows[3] = _mm256_permute2x128_si256(g, h, 0x31);
}

ALWAYS void columns_of_16_bytes(const uint8_t *from, __m256i *rows) {
    __m128i k0 = _mm_loadu_si128((const __m128i *)from), k1 = _mm_loadu_si128((const __m128i *)(from + 16));
    __m128i k2 = _mm_loadu_si128((const __m128i *)(from + 32)), k3 = _mm_loadu_si128((const __m128i *)(from + 48));
    __m128i a = _mm_unpacklo_epi8(k0, k1), b = _mm_unpackhi_epi8(k0, k1);
    __m128i c = _mm_unpacklo_epi8(k2, k3), d = _mm_unpackhi_epi8(k2, k3);
    rows[0] = _mm256_set_m128i(_mm_unpackhi_epi16(a, c), _mm_unpacklo_epi16(a, c));
    rows[1] = _mm256_set_m128i(_mm_unpackhi_epi16(b, d), _mm_unpacklo_epi16(b, d));
}
