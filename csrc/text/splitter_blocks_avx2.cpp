// The block scanners for x86-64-v3 (AVX2).
#define HK_BLOCK_LEVEL avx2
#include "text/splitter_blocks_kernel.h"
