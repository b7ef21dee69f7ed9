#include "cpu/attention.h"

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"

namespace herdkern::cpu::HK_ISA {

void attention_forward(const AttentionForward& args) {
#ifdef HK_VEC_AVX512
  if (args.shape.bf16 && has_avx512_bf16()) return attention_forward_bf16(args);
#endif
  args.shape.bf16 ? run_forward<FloatEngine, bf16>(args) : run_forward<FloatEngine, float>(args);
}

void attention_backward(const AttentionBackward& args) {
#ifdef HK_VEC_AVX512
  if (args.shape.bf16 && has_avx512_bf16()) return attention_backward_bf16(args);
#endif
  args.shape.bf16 ? run_backward<FloatEngine, bf16>(args) : run_backward<FloatEngine, float>(args);
}

}  // namespace herdkern::cpu::HK_ISA
