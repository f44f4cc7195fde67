/* Formats that GGUF files have and stores carry (qmix/formats/carried.py has the byte contract): w = scale * (q - middle)
 * + zero, where scale and zero of a group of columns are products of stored numbers. products.h includes this.
 *
 * Codes lie as `dot4` wants them, four columns of a row side by side, so that a load and a mask are all that it takes to
 * read them. Parameters are decoded for 256 columns at a time, into fp32 [groups][64].
 * Codes that are places in a table become signed bytes, which are multiplied as those of q8_0 are. Activations have a step for each
 * group, as everywhere.
 */

#ifdef COMPACT
#define OVER_VECTORS ONCE
#define CARRIED_DIRECT 1 /* tokens */
#else
#define OVER_VECTORS UNROLL
#define CARRIED_DIRECT 4
#endif
enum { CARRIED_SPAN = 256, CARRIED_GROUPS = 16 }; /* columns; groups of them */

static const int8_t iq4_codes[16] = {IQ4_CODES};

ALWAYS int has_zero(const int kind) {
    return kind == QMIX_Q4_1 || kind == QMIX_Q5_1 || kind == QMIX_Q4_K || kind == QMIX_Q5_K;
}

/* Whether a matrix has parameters for whole 256 columns, and not for 32. */
ALWAYS int has_spans(const int kind) {
    return kind == QMIX_Q4_K || kind == QMIX_Q5_K || kind == QMIX_Q6_K || kind == QMIX_IQ4_XS;
}

/* Bytes of parameters that 64 rows have in 256 columns. */
ALWAYS int64_t carried_params(const int kind) {
    if (kind == QMIX_Q6_K || kind == QMIX_IQ4_XS)
        return 64 * (kind == QMIX_Q6_K ? 18 : 8);
    return 64 * (has_zero(kind) && !has_spans(kind) ? 32 : 16);
}

ALWAYS vint load_codes(const uint8_t *from) {
    vint x;
    memcpy(&x, from, sizeof x);
    return x;
}
#ifndef OWN_RIGHT
ALWAYS vint right(vint x, const int bits) { return x >> bits; } /* what comes in from above is masked off by all */
#endif
ALWAYS vint moved(vint x, const int left) { return left > 0 ? x << left : left < 0 ? right(x, -left) : x; }
ALWAYS vint every_byte(int x) { return set_i((int32_t)(0x01010101u * (uint32_t)x)); }

/* Vector v of the codes of four columns: rows v * L.. of a block. from: the eight columns, of which these are the first
 * half or the `second`. */
ALWAYS vint carried_codes(const int kind, const uint8_t *from, const int second, const int v) {
    const int bits = qmix_code_bits(kind), at = 4 * v * L;
    if (bits == 8)
        return load_codes(from + 256 * second + at);
    const uint8_t *low = from + (bits == 6 ? 192 : 128) * second;
    vint codes = load_codes(low + at % 128);
    codes = (at < 128 ? codes : right(codes, 4)) & every_byte(15);
    if (bits == 4)
        return codes; /* of a table, the places */
    vint upper = load_codes((bits == 6 ? low + 128 : from + 256) + at % 64);
    const int quarter = at / 64;
    return codes | (bits == 6 ? moved(upper, 4 - 2 * quarter) & every_byte(48)
                              : moved(upper, 4 - quarter - 4 * second) & every_byte(16));
}

/* d times the bytes of `groups` groups: fp32 [groups][64] of int8 [groups][64]. */
ALWAYS void scale_of_bytes(const int groups, const int8_t *bytes, const uint16_t *d, const float sign, float *out) {
    OVER_VECTORS for (int v = 0; v < VECTORS; v++) {
        const vflt whole = mul_f(set_f(sign), load_f16(d + v * L));
        UNROLL for (int g = 0; g < groups; g++)
            store_f(out + 64 * g + v * L, mul_f(whole, load_i8(bytes + 64 * g + v * L)));
    }
}

/* Scales and minima of 6 bits, of two groups: lower four bits in a byte for each, upper two together. */
ALWAYS void six_bits(const uint8_t *low, const uint8_t *high, const int shift, int8_t *s, int8_t *m) {
    UNROLL for (int i = 0; i < 64; i += 4 * L) {
        vint a = load_codes(low + i), b = right(load_codes(high + i), shift);
        vint scale = (a & every_byte(15)) | (b & every_byte(3)) << 4;
        vint minimum = (right(a, 4) & every_byte(15)) | (b & every_byte(12)) << 2;
        memcpy(s + i, &scale, sizeof scale);
        memcpy(m + i, &minimum, sizeof minimum);
    }
}

/* Scales of iq4_xs, of a pair of groups: lower four bits in a nibble for each, upper two of four groups in a byte. */
ALWAYS void scales_of_xs(const uint8_t *low, const uint8_t *high, const int pair, int8_t *s) {
    UNROLL for (int i = 0; i < 64; i += 4 * L) {
        vint a = load_codes(low + i), b = load_codes(high + i);
        UNROLL for (int g = 0; g < 2; g++) {
            const int left = 4 - 2 * (2 * pair + g); /* from bits 2 (2 pair + g) to 4 and 5 */
            vint scale = (moved(a, -4 * g) & every_byte(15)) | (moved(b, left) & every_byte(48));
            /* less 32: the upper bit keeps each byte from borrowing of the next */
            scale = ((scale | every_byte(128)) - every_byte(32)) ^ every_byte(128);
            memcpy(s + 64 * g + i, &scale, sizeof scale);
        }
    }
}

/* Scale and zero of 64 rows in `columns` columns, 256 but for the last ones: fp32 [groups][64]. */
ALWAYS void read_carried(const int kind, const uint8_t *from, int64_t columns, float *scale, float *zero) {
    const uint16_t *d = (const uint16_t *)from;
    if (kind == QMIX_Q6_K)
        scale_of_bytes(16, (const int8_t *)from + 128, d, 1, scale);
    else if (kind == QMIX_IQ4_XS) {
        int8_t s[8 * 64];
        UNROLL for (int p = 0; p < 4; p++)
            scales_of_xs(from + 128 + 64 * p, from + 384 + 64 * (p / 2), p % 2, s + 128 * p);
        scale_of_bytes(8, s, d, 1, scale);
    } else if (kind == QMIX_Q4_K || kind == QMIX_Q5_K) {
        int8_t s[8 * 64], m[8 * 64];
        ONCE for (int g = 0; g < 8; g += 2)
            UNROLL for (int i = 0; i < 2; i++)
                six_bits(from + 256 + 64 * (g + i), from + 768 + 32 * g, 4 * i, s + 64 * (g + i), m + 64 * (g + i));
        scale_of_bytes(8, s, d, 1, scale);
        scale_of_bytes(8, m, d + 64, -1, zero);
    } else {
        const int step = has_zero(kind) ? 128 : 64;
        ONCE for (int64_t g = 0; g < columns / 32; g++)
            UNROLL for (int i = 0; i < 64; i += L) {
                store_f(scale + 64 * g + i, load_f16(d + step * g + i));
                if (has_zero(kind))
                    store_f(zero + 64 * g + i, load_f16(d + step * g + 64 + i));
            }
    }
}

#ifndef OWN_DOT4_TABLE
ALWAYS vint dot4_table(vint sum, vint w, vint x) { return dot4_signed(sum, w, x); }
#endif

/* What a table has at the places `codes`, as dot4_signed takes it. */
ALWAYS vint from_table(vint codes) { return look_up(signed_codes(table_of_16(iq4_codes)), codes); }

ALWAYS vint dot_carried(const int kind, vint sum, vint codes, vint word) {
    if (qmix_table(kind))
        return dot4_table(sum, codes, word);
    return kind == QMIX_Q8_0 ? dot4_signed(sum, signed_codes(codes), word) : dot4(sum, codes, word);
}

/* How many dots may be summed in 16 bits where these are faster, two products in each: codes are up to 15, 31 and 63, and
 * activations up to 127; 0 where there is no such way. */
#ifdef PAIRS
ALWAYS int short_dots(const int kind) {
    const int bits = qmix_code_bits(kind);
    return qmix_table(kind) ? 0 : bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 0;
}
#else
ALWAYS int short_dots(const int kind) { return (void)kind, 0; }
ALWAYS vint pairs_of(vint codes, vint word) { return (void)word, codes; }
ALWAYS vint add_pairs(vint sum, vint codes, vint word) { return (void)codes, (void)word, sum; }
ALWAYS vint sum_pairs(vint x) { return x; }
#endif

/* `groups` groups straight from memory, for `count` tokens with int8 activations; y [count][64]. */
ALWAYS void carried_direct(const int count, const int kind, int64_t groups, const uint8_t *from, panel_view *x,
                           const float *scale, const float *zero, float *y) {
    const int vectors = VECTORS < 4 || (L == 8 && count > 2) ? (VECTORS < 2 ? VECTORS : 2) : 4;
    const int step = 8 * qmix_code_bits(kind) * 8, eights = kind == QMIX_Q6_K ? 2 : 4; /* bytes of, and in a group */
    ONCE for (int64_t g = 0; g < groups; g++) {
        OVER_VECTORS for (int first = 0; first < VECTORS; first += vectors) {
            const int many = short_dots(kind);
            vint sums[CARRIED_DIRECT][4], parts[CARRIED_DIRECT][4];
            const uint32_t *words = x->words;
            UNROLL for (int c = 0; c < count; c++)
                UNROLL for (int v = 0; v < vectors; v++)
                    sums[c][v] = set_i(x->start[c]);
            UNROLL for (int k = 0; k < eights; k++) {
                if (!first)
                    UNROLL for (int i = 0; i < step; i += 64)
                        __builtin_prefetch(from + k * step + FAR_AHEAD + i, 0, 2);
                UNROLL for (int second = 0; second < 2; second++) {
                    vint codes[4];
                    UNROLL for (int v = 0; v < vectors; v++) {
                        codes[v] = carried_codes(kind, from + k * step, second, first + v);
                        codes[v] = qmix_table(kind) ? from_table(codes[v]) : codes[v];
                    }
                    UNROLL for (int c = 0; c < count; c++) {
                        vint word = set_i((int32_t)words[c]);
                        UNROLL for (int v = 0; v < vectors; v++) {
                            if (!many) {
                                sums[c][v] = dot_carried(kind, sums[c][v], codes[v], word);
                                continue;
                            }
                            const int at = many ? (2 * k + second) % many : 0;
                            parts[c][v] = at ? add_pairs(parts[c][v], codes[v], word) : pairs_of(codes[v], word);
                            if (at == many - 1)
                                sums[c][v] = add_i(sums[c][v], sum_pairs(parts[c][v]));
                        }
                    }
                    words += count;
                }
            }
            UNROLL for (int v = 0; v < vectors; v++)
                UNROLL for (int c = 0; c < count; c++) {
                    const int at = (first + v) * L;
                    vflt value = add_codes(sums[c][v], load_f(scale + at), x->step[c], load_f(y + 64 * c + at));
                    store_f(y + 64 * c + at, has_zero(kind) ? add_zero(load_f(zero + at), x->sum[c], value) : value);
                }
        }
        from += eights * step, scale += 64, zero += 64;
        x->words += 2 * eights * count, x->start += count, x->step += count, x->sum += count;
    }
}

#ifdef PAIRS
#include "carried_pairs.h"
#endif

/* `columns` columns into a tile as `inner` reads it. */
ALWAYS void tile_of_carried(const int act, const int kind, const uint8_t *from, int64_t columns, vint *tile) {
    const int step = 8 * qmix_code_bits(kind) * 8, words = act == QMIX_ACT_INT8 ? 1 : WORDS;
    ONCE for (int64_t k = 0; k < columns / 8; k++, from += step) {
        prefetch_codes(from, step);
        UNROLL for (int second = 0; second < 2; second++)
            OVER_VECTORS for (int v = 0; v < VECTORS; v++) {
                vint codes = carried_codes(kind, from, second, v);
                vint *to = tile + ((v / SUB * (columns / 4) + 2 * k + second) * words) * SUB + v % SUB;
                if (words == 1) {
                    *to = qmix_table(kind) ? from_table(codes) : kind == QMIX_Q8_0 ? signed_codes(codes) : codes;
                    continue;
                }
                if (qmix_table(kind))
                    codes = look_up(table_of_16(iq4_codes), codes);
                if (qmix_middle(kind)) /* bytes less the middle: the upper bit keeps each from borrowing of the next */
                    codes = ((codes | every_byte(128)) - every_byte(qmix_middle(kind))) ^ every_byte(128);
                UNROLL for (int w = 0; w < words; w++)
                    to[w * SUB] = part_of(codes, w, 0);
            }
    }
}

/* What `inner` does with the codes of a kind: as with int8's, with a zero as with int4's, or with neither. */
ALWAYS int inner_kind(const int kind) { return kind == QMIX_Q8_0 || qmix_table(kind) ? 8 : has_zero(kind) ? 4 : QMIX_E2M1; }

#define CARRIED_INNER(name, act, bits) \
    APART void name(int64_t n, int64_t groups, int64_t group, const vint *tile, panel_view x, const float *scale, \
                    const float *zero, float *y) { \
        WITH_COUNT(n, inner(count, SUB, act, bits, groups, group / 4, tile, x, scale, zero, y, 64)) \
    }
CARRIED_INNER(codes_int8, QMIX_ACT_INT8, QMIX_E2M1)
CARRIED_INNER(zeros_int8, QMIX_ACT_INT8, 4)
CARRIED_INNER(bytes_int8, QMIX_ACT_INT8, 8)
CARRIED_INNER(codes_bf16, QMIX_ACT_BF16, QMIX_E2M1)
CARRIED_INNER(zeros_bf16, QMIX_ACT_BF16, 4)
#undef CARRIED_INNER

/* 256 columns of a block, from a tile, times all tokens of panels [panel, last). */
ALWAYS void carried_tiles(const int act, const int kind, const qmix_job *job, const uint8_t *from, int64_t column,
                          int64_t columns, const char *panels, int64_t panel, int64_t last, vint *tile,
                          const float *scale, const float *zero, float *acc) {
    const int words = act == QMIX_ACT_INT8 ? 1 : WORDS, group = kind == QMIX_Q6_K ? 16 : 32;
    int64_t bytes = token_bytes(act, job), first = qmix_panel(job->tokens, WIDTH, panel), most = CARRIED_SPAN / words;
    for (int64_t done = 0; done < columns; done += most) {
        int64_t now = columns - done < most ? columns - done : most;
        tile_of_carried(act, kind, from + done * 8 * qmix_code_bits(kind), now, tile);
        for (int64_t p = panel; p < last; p++) {
            int64_t begin = qmix_panel(job->tokens, WIDTH, p), n = qmix_panel(job->tokens, WIDTH, p + 1) - begin;
            panel_view x = view_panel(act, job, panels + begin * bytes, n, column + done);
            for (int v = 0; v < VECTORS; v += SUB) {
                int64_t at = done / group * 64 + v * L;
                (act != QMIX_ACT_INT8 ? has_zero(kind) ? zeros_bf16 : codes_bf16
                 : inner_kind(kind) == 8 ? bytes_int8 : inner_kind(kind) == 4 ? zeros_int8 : codes_int8)(
                    n, now / group, group, tile + v * (now / 4) * words, x, scale + at, zero + at,
                    acc + (begin - first) * 64 + v * L);
            }
        }
    }
}

/* acc fp32 [tokens][64] += a block of rows times all tokens of panels [panel, last). */
ALWAYS void rows_carried(const int act, const int kind, const qmix_job *job, int64_t row, const char *panels,
                         int64_t panel, int64_t last, char *scratch, float *acc) {
    float scale[CARRIED_GROUPS * 64], zero[CARRIED_GROUPS * 64];
    const int group = kind == QMIX_Q6_K ? 16 : 32, width = 8 * qmix_code_bits(kind); /* bytes of a column */
    int64_t spans = (job->padded_cols + CARRIED_SPAN - 1) / CARRIED_SPAN, pitch = carried_params(kind);
    int64_t whole = has_spans(kind) ? spans * pitch : pitch * job->padded_cols / CARRIED_SPAN;
    const uint8_t *from = job->weight + row / 64 * job->padded_cols * width;
    const uint8_t *params = (const uint8_t *)job->params + row / 64 * whole;
    panel_view x = view_panel(act, job, panels, job->tokens, 0);
    for (int64_t column = 0; column < job->padded_cols; column += CARRIED_SPAN) {
        int64_t columns = job->padded_cols - column < CARRIED_SPAN ? job->padded_cols - column : CARRIED_SPAN;
        for (int64_t i = 0; i < pitch; i += 64) /* those that come next */
            __builtin_prefetch(params + pitch + i, 0, 2);
#ifdef PAIRS
        if (act == QMIX_ACT_INT8 && job->tokens == 1 && kind != QMIX_Q8_0 && kind != QMIX_Q6_K) {
            carried_one(kind, columns / group, from, &x, params, acc);
            from += columns * width, params += pitch;
            continue;
        }
#endif
        read_carried(kind, params, columns, scale, zero);
        if (act == QMIX_ACT_INT8 && job->tokens <= CARRIED_DIRECT && job->tokens <= WIDTH)
            switch (job->tokens) {
            case 1: carried_direct(1, kind, columns / group, from, &x, scale, zero, acc); break;
#if CARRIED_DIRECT > 1
            case 2: carried_direct(2, kind, columns / group, from, &x, scale, zero, acc); break;
            case 3: carried_direct(3, kind, columns / group, from, &x, scale, zero, acc); break;
            default: carried_direct(4, kind, columns / group, from, &x, scale, zero, acc);
#endif
            }
        else
            carried_tiles(act, kind, job, from, column, columns, panels, panel, last, (vint *)scratch, scale, zero, acc);
        from += columns * width, params += pitch;
    }
}

/* A function for each format. */
#define ROWS(name, kind) \
    APART void name(int32_t act, const qmix_job *job, int64_t row, const char *panels, int64_t panel, int64_t last, \
                    char *scratch, float *acc) { \
        if (act == QMIX_ACT_INT8) \
            rows_carried(QMIX_ACT_INT8, kind, job, row, panels, panel, last, scratch, acc); \
        else \
            rows_carried(QMIX_ACT_BF16, kind, job, row, panels, panel, last, scratch, acc); \
    }
ROWS(rows_q8_0, QMIX_Q8_0)
ROWS(rows_q4_0, QMIX_Q4_0)
ROWS(rows_q4_1, QMIX_Q4_1)
ROWS(rows_q5_0, QMIX_Q5_0)
ROWS(rows_q5_1, QMIX_Q5_1)
ROWS(rows_q4_k, QMIX_Q4_K)
ROWS(rows_q5_k, QMIX_Q5_K)
ROWS(rows_q6_k, QMIX_Q6_K)
ROWS(rows_iq4_nl, QMIX_IQ4_NL)
ROWS(rows_iq4_xs, QMIX_IQ4_XS)
#undef ROWS
static void (*const rows_of_carried[])(int32_t, const qmix_job *, int64_t, const char *, int64_t, int64_t, char *,
                                       float *) = {rows_q8_0, rows_q4_0, rows_q4_1, rows_q5_0,
                                                   rows_q5_1, rows_q4_k, rows_q5_k, rows_q6_k, rows_iq4_nl, rows_iq4_xs};
