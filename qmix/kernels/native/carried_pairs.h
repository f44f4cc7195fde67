/* One token with int8 activations through ggml's formats on AVX2, straight from memory: all rows of a block side by side,
 * so that each byte is read once, and as many dots as fit are summed in 16 bits. Sums are exact and what is done with
 * them is that of carried_direct: a token has the same bits in both. carried.h includes this.
 */

enum { VECTORS_OF_HALF = VECTORS / 2 }; /* those of rows 0..31 have the low nibbles, the others the high ones */

/* Sums of 16 and of 32 bits. As assembly, or gcc 12 moves each sum to another register first. */
ALWAYS vint added_pairs(vint sum, vint pairs) {
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
    return sum;
}
ALWAYS vint added_words(vint sum, vint words) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(words));
    return sum;
}

/* Codes of four columns, those of rows 8v.. in codes[v]. p: the upper bits of 5-bit codes of all eight columns. */
ALWAYS void codes_of_block(const int kind, const uint8_t *low, const vint *p, const int second, const int v, vint *two) {
    vint raw = load_codes(low + 32 * v);
    two[0] = raw & every_byte(15), two[1] = right(raw, 4) & every_byte(15);
    if (qmix_code_bits(kind) == 5) {
        const int at = v / 2 + 4 * second;
        two[0] |= moved(p[v % 2], 4 - at) & every_byte(16);
        two[1] |= moved(p[v % 2], 4 - at - 2) & every_byte(16);
    }
    if (qmix_table(kind))
        two[0] = from_table(two[0]), two[1] = from_table(two[1]);
}

/* A group of 32 columns of 4- or 5-bit codes, exact but for `start`. */
ALWAYS void sums_of_block(const int kind, const uint8_t *from, const uint32_t *words, vint *sums) {
    const int bits = qmix_code_bits(kind), step = 64 * bits, many = short_dots(kind), run = many ? many : 8;
    UNROLL for (int dot = 0; dot < 8; dot += run) {
        vint parts[VECTORS];
        UNROLL for (int i = 0; i < run; i++) {
            const int second = (dot + i) % 2;
            const uint8_t *eight = from + (dot + i) / 2 * step;
            vint word = set_i((int32_t)words[dot + i]), p[2];
            if (!second)
                UNROLL for (int at = 0; at < step; at += 64)
                    __builtin_prefetch(eight + FAR_AHEAD + at, 0, 2);
            if (bits == 5)
                p[0] = load_codes(eight + 256), p[1] = load_codes(eight + 288);
            UNROLL for (int v = 0; v < VECTORS_OF_HALF; v++) {
                vint two[2];
                codes_of_block(kind, eight + 128 * second, p, second, v, two);
                UNROLL for (int half = 0; half < 2; half++) {
                    vint *part = parts + v + VECTORS_OF_HALF * half;
                    vint products = many ? pairs_of(two[half], word) /* |x| serves all rows, as in dot4_table */
                                         : pairs_of(_mm256_abs_epi8(word), _mm256_sign_epi8(two[half], word));
                    if (!many)
                        *part = i ? added_words(*part, sum_pairs(products)) : sum_pairs(products);
                    else
                        *part = i ? added_pairs(*part, products) : products;
                }
            }
        }
        UNROLL for (int v = 0; v < VECTORS; v++) {
            vint part = many ? sum_pairs(parts[v]) : parts[v];
            sums[v] = dot ? add_i(sums[v], part) : part;
        }
    }
}

/* Scales and minima of a span of 256 columns as bytes [8][64], and what they are multiplied by. */
typedef struct {
    int8_t s[8 * 64], m[8 * 64];
    float d[64], dmin[64];
} span_of_bytes;

ALWAYS void read_bytes(const int kind, const uint8_t *from, span_of_bytes *out) {
    const uint16_t *d = (const uint16_t *)from;
    if (kind == QMIX_IQ4_XS)
        UNROLL for (int p = 0; p < 4; p++)
            scales_of_xs(from + 128 + 64 * p, from + 384 + 64 * (p / 2), p % 2, out->s + 128 * p);
    else
        ONCE for (int g = 0; g < 8; g += 2)
            UNROLL for (int i = 0; i < 2; i++)
                six_bits(from + 256 + 64 * (g + i), from + 768 + 32 * g, 4 * i, out->s + 64 * (g + i),
                         out->m + 64 * (g + i));
    UNROLL for (int i = 0; i < 64; i += L) {
        store_f(out->d + i, load_f16(d + i));
        if (has_zero(kind))
            store_f(out->dmin + i, mul_f(set_f(-1), load_f16(d + 64 + i)));
    }
}

/* `groups` groups, as carried_direct has them. params: of these columns. */
ALWAYS void carried_one(const int kind, int64_t groups, const uint8_t *from, panel_view *x, const uint8_t *params, float *y) {
    const int each = has_zero(kind) ? 128 : 64; /* fp16 numbers of a group */
    span_of_bytes span;
    if (has_spans(kind))
        read_bytes(kind, params, &span);
    ONCE for (int64_t g = 0; g < groups; g++) {
        vint sums[VECTORS];
        sums_of_block(kind, from, x->words, sums);
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int at = v * L;
            vint sum = qmix_middle(kind) ? add_i(sums[v], set_i(x->start[0])) : sums[v];
            const uint16_t *halves = (const uint16_t *)params + each * g + at;
            vflt scale, zero = set_f(0);
            if (has_spans(kind)) {
                scale = mul_f(load_f(span.d + at), load_i8(span.s + 64 * g + at));
                if (has_zero(kind))
                    zero = mul_f(load_f(span.dmin + at), load_i8(span.m + 64 * g + at));
            } else {
                scale = load_f16(halves);
                if (has_zero(kind))
                    zero = load_f16(halves + 64);
            }
            vflt value = add_codes(sum, scale, x->step[0], load_f(y + at));
            store_f(y + at, has_zero(kind) ? add_zero(zero, x->sum[0], value) : value);
        }
        from += 4 * 64 * qmix_code_bits(kind);
        x->words += 8, x->start++, x->step++, x->sum++;
    }
}
