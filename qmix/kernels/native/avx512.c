/* AVX-512 without dot products: Intel Skylake-X; Cascade Lake, which lacks VBMI. */
#if defined(__x86_64__)
#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#define LEVEL avx512
#define NAME "avx512"
#include "x86_512.h"

#include "products.h"
END_TARGET
#endif
