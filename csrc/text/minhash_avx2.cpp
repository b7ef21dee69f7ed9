// The MinHash kernel for x86-64-v3 (AVX2).
#define HK_MINHASH_LEVEL avx2
#include "text/minhash_kernel.h"
