// The line kernel for x86-64-v4 (AVX-512).
#define HK_LINE_LEVEL avx512
#include "text/line_keys_kernel.h"
