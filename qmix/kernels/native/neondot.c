/* NEON with dot products of bytes: most 64-bit ARM processors since 2018. */
#include "level.h"

#ifdef QMIX_NEON
#include <arm_neon.h>
#include <sys/auxv.h>

#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1UL << 20)
#endif

static int supported(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

TARGET("arch=armv8.2-a+dotprod")
#define LEVEL neondot
#define NAME "neon-dot"
#include "neon.h"

#include "products.h"
END_TARGET
#endif
