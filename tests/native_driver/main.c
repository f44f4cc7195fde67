/* Runs every kernel of the library at the levels of this processor and compares it with references in double
 * precision, computed here from the same bytes. It needs neither Python nor torch, so that it runs under an emulator of
 * another processor.
 *
 *     native_driver [LEVEL...]     all levels of this processor, unless some are named
 *
 * Exit code 1 where a check failed, 2 where a level is not here.
 */
#include "driver.h"

static int failures;
static uint64_t state = 0x9e3779b97f4a7c15u;

void report(int32_t level, const char *what, double worst) {
    int good = worst <= 1;
    failures += !good;
    printf("%s %s, %s: %.3g of the bound\n", good ? "ok  " : "FAIL", qmix_level_name(level), what, worst);
    fflush(stdout);
}

void *make(size_t count, size_t size) {
    void *found = calloc(count, size);
    if (!found) {
        fprintf(stderr, "no memory\n");
        exit(2);
    }
    return found;
}

uint32_t draw(void) { /* xorshift64*, Vigna 2016 */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 0x2545f4914f6cdd1du >> 32);
}

double uniform(double low, double high) { return low + (high - low) * draw() / 4294967296.0; }

void fill(float *x, int64_t count, double size) {
    for (int64_t i = 0; i < count; i++)
        x[i] = (float)uniform(-size, size);
}

static void check_level(int32_t level) {
    check_products(level);
    check_carried(level);
    check_attention(level);
    check_layer(level);
    check_delta(level);
}

static int32_t find_level(const char *name) {
    for (int32_t level = 0; qmix_level_name(level); level++)
        if (qmix_level_supported(level) && !strcmp(qmix_level_name(level), name))
            return level;
    fprintf(stderr, "%s: this processor has no such level\n", name);
    exit(2);
}

int main(int count, char **names) {
    if (qmix_abi() != QMIX_ABI)
        return 2;
    printf("levels:");
    for (int32_t level = 0; qmix_level_name(level); level++)
        if (qmix_level_supported(level))
            printf(" %s", qmix_level_name(level));
    printf("\n");
    for (int i = 1; i < count; i++)
        check_level(find_level(names[i]));
    for (int32_t level = 0; count == 1 && qmix_level_name(level); level++)
        if (qmix_level_supported(level))
            check_level(level);
    printf("%d failed\n", failures);
    return failures != 0;
}
