/* AVX2: nearly every x86 processor since 2013. */
#if defined(__x86_64__)
#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

TARGET("avx2,fma,f16c")
#define LEVEL avx2
#define NAME "avx2"
#include "x86_256.h"

#include "products.h"
END_TARGET
#endif
