// Merging within short words for x86-64-v4 (AVX-512).
#define HK_MERGE_LEVEL avx512
#include "text/bpe_word_merge_kernel.h"
