/* AVX-512 with dot products of bytes and of bf16: AMD Zen 4 and later, Intel Sapphire Rapids and later. */
#if defined(__x86_64__)
#include "level.h"

static int supported(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16")
#define HAS_VNNI
#define HAS_BF16
#define LEVEL avx512bf16
#define NAME "avx512-bf16"
#include "x86_512.h"

#include "products.h"
END_TARGET
#endif
