// Merging within short words for x86-64-v3 (AVX2).
#define HK_MERGE_LEVEL avx2
#include "text/bpe_word_merge_kernel.h"
