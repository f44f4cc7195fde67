/* A gated delta net's token: exact products, convolution, delta rule; and gates.
 *
 * H inputs, N outputs, C channels of a source, J taps, A key heads, B value heads, K and V their sizes.
 */
#include "driver.h"

enum { T = 3, H = 200, N = 11, C = 37, J = 4, A = 2, B = 4, K = 18, V = 23 };

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

/* Sums in double, rounded once. */
static void check_exact(int32_t level) {
    float x[T * H], weight[N * H], out[T * N];
    double worst = 0;
    fill(x, T * H, 2), fill(weight, N * H, 1);
    qmix_exact job = {x, weight, out, H, N, QMIX_FP32, QMIX_FP32};
    if (qmix_exacts(level, &job, T, 2))
        worst = NAN;
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double want = 0, terms = 0;
            for (int i = 0; i < H; i++) {
                want += (double)x[t * H + i] * weight[n * H + i];
                terms += fabs((double)x[t * H + i] * weight[n * H + i]);
            }
            compare(out[t * N + n], want, U * fabs(want) + H * 0x1p-52 * terms, &worst);
        }
    report(level, "exact products", worst);
}

/* An exponential has 8 roundings, its argument moves it by |a| * U; the rest is 5. */
static void check_gate(int32_t level, int32_t silu, int32_t one) {
    float y[T * H], before[T * H], by[T * H];
    uint16_t narrow[T * H];
    double worst = 0;
    fill(before, T * H, 3), fill(by, T * H, 6);
    memcpy(y, before, sizeof y);
    for (int i = 0; i < T * H; i++)
        narrow[i] = to_bf16(before[i]);
    qmix_gate job = {y, by, H, QMIX_FP32, QMIX_FP32, silu, one}, other = job;
    other.y = narrow, other.type = QMIX_BF16;
    if (qmix_gates(level, &job, T) || qmix_gates(level, &other, T))
        worst = NAN;
    for (int i = 0; i < T * H; i++) {
        double g = by[one ? i / H : i], open = sigmoid(g) * (silu ? g : 1), off = (13 + fabs(g)) * U;
        double want = before[i] * open, rounded = from_bf16(to_bf16(before[i])) * open;
        compare(y[i], want, off * fabs(want), &worst);
        compare(from_bf16(narrow[i]), rounded, (off + U_BF16) * fabs(rounded), &worst);
    }
    report(level, silu ? "gate by silu" : one ? "gate by one number" : "gate", worst);
}

/* J products and sums; silu's derivative is at most 1.1, and silu itself is one as `check_gate` has it. */
static void check_convolution(int32_t level) {
    enum { ALL = 3 * C };
    float past[(J - 1) * ALL], after[(J - 1) * ALL], weight[J * ALL], x[ALL], out[ALL];
    double worst = 0;
    fill(past, (J - 1) * ALL, 2), fill(weight, J * ALL, 1), fill(x, ALL, 2);
    qmix_conv job = {past, after, weight, {x, x + C, x + 2 * C}, {out, out + C, out + 2 * C}, {C, C, C}, ALL, J,
                     {QMIX_FP32, QMIX_FP32, QMIX_FP32}};
    if (qmix_convolution(level, &job))
        worst = NAN;
    for (int c = 0; c < ALL; c++) {
        double sum = 0, terms = 0;
        for (int j = 0; j < J; j++) {
            float from = j < J - 1 ? past[j * ALL + c] : x[c];
            sum += (double)from * weight[j * ALL + c], terms += fabs((double)from * weight[j * ALL + c]);
            if (j)
                compare(after[(j - 1) * ALL + c], from, 0, &worst);
        }
        double want = sum * sigmoid(sum);
        compare(out[c], want, 1.1 * (J + 1) * U * terms + (13 + fabs(sum)) * U * fabs(want), &worst);
    }
    report(level, "short convolution", worst);
}

/* With S and k exact, S^T k errs by K + 2 roundings of its terms; an entry of the new state has that of u times k and 3
 * of its own; out has K + 2 of the new state's terms and what these err by. A unit vector errs by (K / 2 + 4) U, the
 * decay by its exponent's 4 roundings and one. */
static void check_rule(int32_t level) {
    float state[B * K * V], after[B * K * V], q[A * K], k[A * K], v[B * V], a[B], b[B], a_log[B], dt[B], out[B * V];
    double worst = 0, outs = 0;
    fill(state, B * K * V, 1), fill(q, A * K, 2), fill(k, A * K, 2), fill(v, B * V, 2);
    fill(a, B, 2), fill(b, B, 2), fill(a_log, B, 1), fill(dt, B, 1);
    qmix_delta job = {state, after, q, k, v, a, b, a_log, dt, out, A, B, K, V};
    if (qmix_delta_rule(level, &job, 2))
        worst = NAN;
    for (int h = 0; h < B; h++) {
        const float *kh = k + h / (B / A) * K, *qh = q + h / (B / A) * K, *s = state + h * K * V;
        double kk = 1e-6, qq = 1e-6, rate = exp(a_log[h]) * log1p(exp((double)a[h] + dt[h])), decay = exp(-rate);
        double unit = (K / 2 + 4) * U, fading = (5 * rate + 1) * U, strength = sigmoid(b[h]);
        for (int i = 0; i < K; i++)
            kk += (double)kh[i] * kh[i], qq += (double)qh[i] * qh[i];
        for (int j = 0; j < V; j++) {
            double read = 0, terms = 0, found = 0, all = 0;
            for (int i = 0; i < K; i++) {
                double term = decay * s[i * V + j] * kh[i] / sqrt(kk);
                read += term, terms += fabs(term);
            }
            double u = strength * (v[h * V + j] - read);
            double off = (strength * terms) * (unit + fading + (K + 2) * U) + 4 * U * (fabs(u) + fabs(read));
            for (int i = 0; i < K; i++) {
                double add = kh[i] / sqrt(kk) * u, old = decay * s[i * V + j], to = qh[i] / sqrt(qq * K);
                double mine = fabs(old) * (fading + 2 * U) + fabs(add) * (unit + 2 * U) + fabs(kh[i] / sqrt(kk)) * off;
                compare(after[(h * K + i) * V + j], old + add, mine, &worst);
                found += (old + add) * to;
                all += fabs(to) * (mine + fabs(old + add) * (unit + (K + 4) * U));
            }
            compare(out[h * V + j], found, all, &outs);
        }
    }
    report(level, "delta rule, state", worst);
    report(level, "delta rule", outs);
}

void check_delta(int32_t level) {
    check_exact(level);
    check_gate(level, 0, 0);
    check_gate(level, 0, 1);
    check_gate(level, 1, 0);
    check_convolution(level);
    check_rule(level);
}
