// The line kernel for x86-64-v3 (AVX2).
#define HK_LINE_LEVEL avx2
#include "text/line_keys_kernel.h"
