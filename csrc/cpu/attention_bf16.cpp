// Attention on bf16 products. Level avx512 does not imply AVX512_BF16, so this file asks the compiler for it and
// attention.cpp comes here only if the processor has it; level amx multiplies in tiles. Other levels have no such
// products.
#if defined(HK_ISA_AVX512)
#pragma GCC target("avx512bf16")
#endif
#if defined(HK_ISA_AVX512) || defined(HK_ISA_AMX)
#include "cpu/attention.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#ifdef HK_ISA_AMX
#include "cpu/attention_amx.h"
#else
#include "cpu/attention_dot.h"
#endif

namespace herdkern::cpu::HK_ISA {

#ifdef HK_ISA_AMX
using Bf16Engine = AmxEngine;
#else
using Bf16Engine = DotEngine;
#endif

void attention_forward_bf16(const AttentionForward& args) { run_forward<Bf16Engine, bf16>(args); }
void attention_backward_bf16(const AttentionBackward& args) { run_backward<Bf16Engine, bf16>(args); }

}  // namespace herdkern::cpu::HK_ISA
#endif
