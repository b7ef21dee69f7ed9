// The block scanners for x86-64-v4 (AVX-512).
#define HK_BLOCK_LEVEL avx512
#include "text/splitter_blocks_kernel.h"
