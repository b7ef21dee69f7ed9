// The MinHash kernel for x86-64-v4 (AVX-512).
#define HK_MINHASH_LEVEL avx512
#include "text/minhash_kernel.h"
