/* NEON with dot products and products of matrices of bytes: 64-bit ARM processors since about 2021. */
#include "level.h"

#ifdef QMIX_NEON
#include <arm_neon.h>
#include <sys/auxv.h>

#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1UL << 20)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1UL << 13)
#endif

static int supported(void) {
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
}

TARGET("arch=armv8.2-a+dotprod+i8mm")
#define MATRICES
#define LEVEL neoni8mm
#define NAME "neon-i8mm"
#include "neon.h"

#include "products.h"
END_TARGET
#endif
