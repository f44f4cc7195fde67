/* AVX-512 with dot products of bytes: Intel Ice Lake, Tiger Lake, Rocket Lake. */
#if defined(__x86_64__)
#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")
#define HAS_VNNI
#define LEVEL avx512vnni
#define NAME "avx512-vnni"
#include "x86_512.h"

#include "products.h"
END_TARGET
#endif
