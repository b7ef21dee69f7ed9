#include "cuda/adamw_kernel.cuh"

namespace herdkern::cuda {

void set_factors(const AdamwSettings& s, AdamwRow& row) {
  const double step = row.step, weight = 1 - s.beta1;
  const float narrow = static_cast<float>(weight);
  row.grad_sign = s.maximize ? -1.0f : 1.0f;
  row.keep = static_cast<float>(1 - s.lr * s.weight_decay);
  row.lerp_from_grad = narrow >= 0.5f;
  row.lerp_weight = row.lerp_from_grad ? narrow - 1.0f : narrow;
  row.beta2 = static_cast<float>(s.beta2);
  row.one_minus_beta2 = static_cast<float>(1 - s.beta2);
  row.root_correction = static_cast<float>(std::sqrt(1 - std::pow(s.beta2, step)));
  row.eps = static_cast<float>(s.eps);
  row.minus_step_size = -static_cast<float>(s.lr / (1 - std::pow(s.beta1, step)));
}

void launch_adamw(const Adamw& a, cudaStream_t stream) {
  if (a.num_blocks == 0) return;
  HK_LAUNCH(adamw_kernel, dim3(grid_size("adamw_step", a.num_blocks)), dim3(kAdamwThreads), 0, stream, a);
}

void launch_grad_norm(const GradNorm& a, cudaStream_t stream) {
  if (a.num_blocks > 0)
    HK_LAUNCH(sum_squares_kernel, dim3(grid_size("grad_norm", a.num_blocks)), dim3(kAdamwThreads), 0, stream, a);
  HK_LAUNCH(norm_kernel, dim3(1), dim3(kNormThreads), 0, stream, a);
}

}  // namespace herdkern::cuda
