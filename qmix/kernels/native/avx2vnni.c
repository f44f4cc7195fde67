/* AVX2 with dot products of bytes: Intel Alder Lake and later. */
#if defined(__x86_64__)
#include <cpuid.h>

#include "level.h"

static int has_avx_vnni(void) { /* CPUID 7.1, EAX bit 4 */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && has_avx_vnni();
}

TARGET("avx2,fma,f16c,avxvnni")
#define HAS_VNNI
#define LEVEL avx2vnni
#define NAME "avx2-vnni"
#include "x86_256.h"

#include "products.h"
END_TARGET
#endif
