#include "cpu/attention.h"

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"

namespace herdkern::cpu::HK_ISA {

// Small heads stay on fp32 products: their errors do not average out, and bf16 products would work on padding.
[[maybe_unused]] static bool use_bf16_products(const AttentionShape& shape) {
  return shape.storage == Storage::kBfloat16 && shape.head_dim > 16 && has_avx512_bf16();
}

void attention_forward(const AttentionForward& args) {
#ifdef HK_VEC_AVX512
  if (use_bf16_products(args.shape)) return attention_forward_bf16(args);
#endif
  switch (args.shape.storage) {
    case Storage::kFloat32:
      return run_forward<FloatEngine, float>(args);
    case Storage::kBfloat16:
      return run_forward<FloatEngine, bf16>(args);
    case Storage::kFloat16:
      return run_forward<FloatEngine, fp16>(args);
  }
}

void attention_backward(const AttentionBackward& args) {
#ifdef HK_VEC_AVX512
  if (use_bf16_products(args.shape)) return attention_backward_bf16(args);
#endif
  switch (args.shape.storage) {
    case Storage::kFloat32:
      return run_backward<FloatEngine, float>(args);
    case Storage::kBfloat16:
      return run_backward<FloatEngine, bf16>(args);
    case Storage::kFloat16:
      return run_backward<FloatEngine, fp16>(args);
  }
}

}  // namespace herdkern::cpu::HK_ISA
