// The block scanners for x86-64-v4 with VBMI2 (Zen 4, Ice Lake and later).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own intrinsics
#define HK_BLOCK_LEVEL vbmi2
#include "text/splitter_blocks_kernel.h"
