#include "cpu/rms_norm.h"

#include "common/simd.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {
namespace {

// Mean of squares in four independent chains, so that the additions overlap.
template <typename T>
HK_INLINE float sum_of_squares(const T* x, int64_t dim) {
  Vec total[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t c = 0;
  for (; c + 64 <= dim; c += 64)
    for (int k = 0; k < 4; ++k) {
      const Vec v = Vec::load(x + c + 16 * k);
      total[k] = fma(v, v, total[k]);
    }
  for_each_vec(
      dim - c, [&](int64_t i) { total[0] = fma(Vec::load(x + c + i), Vec::load(x + c + i), total[0]); },
      [&](int64_t i, int n) {
        const Vec v = Vec::load_partial(x + c + i, n);
        total[1] = fma(v, v, total[1]);
      });
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <typename T, typename W>
void forward_rows(const RmsNormForward& args, int64_t row_begin, int64_t row_end) {
  const int64_t dim = args.shape.dim;
  const W* weight = static_cast<const W*>(args.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.shape.x_stride;
    T* out = static_cast<T*>(args.out) + row * dim;
    const float rstd = 1.0f / std::sqrt(sum_of_squares(x, dim) / static_cast<float>(dim) + args.eps);
    args.rstd[row] = rstd;
    const Vec scale(rstd);
    for_each_vec(
        dim, [&](int64_t c) { (Vec::load(x + c) * scale * Vec::load(weight + c)).store(out + c); },
        [&](int64_t c, int n) {
          (Vec::load_partial(x + c, n) * scale * Vec::load_partial(weight + c, n)).store_partial(out + c, n);
        });
  }
}

// With xhat = x * rstd: dx = rstd * (dout * weight - xhat * mean(dout * weight * xhat)), dweight = sum_rows(dout *
// xhat). dweight_sum: (dim,) fp32, added to; null: not wanted.
template <typename T, typename W>
void backward_rows(const RmsNormBackward& args, int64_t row_begin, int64_t row_end, float* dweight_sum) {
  const int64_t dim = args.shape.dim;
  const W* weight = static_cast<const W*>(args.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.shape.x_stride;
    const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride;
    const Vec rstd(args.rstd[row]);
    Vec dot[2] = {Vec(0.0f), Vec(0.0f)};
    for_each_vec(
        dim,
        [&](int64_t c) {
          const Vec g = Vec::load(dout + c), xhat = Vec::load(x + c) * rstd;
          if (dweight_sum != nullptr) fma(g, xhat, Vec::load(dweight_sum + c)).store(dweight_sum + c);
          Vec& chain = dot[(c / Vec::kLanes) & 1];
          chain = fma(g * Vec::load(weight + c), xhat, chain);
        },
        [&](int64_t c, int n) {
          const Vec g = Vec::load_partial(dout + c, n), xhat = Vec::load_partial(x + c, n) * rstd;
          if (dweight_sum != nullptr)
            fma(g, xhat, Vec::load_partial(dweight_sum + c, n)).store_partial(dweight_sum + c, n);
          dot[0] = fma(g * Vec::load_partial(weight + c, n), xhat, dot[0]);
        });
    if (args.dx == nullptr) continue;
    T* dx = static_cast<T*>(args.dx) + row * dim;
    const Vec mean(sum(dot[0] + dot[1]) / static_cast<float>(dim));
    for_each_vec(
        dim,
        [&](int64_t c) {
          const Vec xhat = Vec::load(x + c) * rstd;
          (rstd * (Vec::load(dout + c) * Vec::load(weight + c) - xhat * mean)).store(dx + c);
        },
        [&](int64_t c, int n) {
          const Vec xhat = Vec::load_partial(x + c, n) * rstd;
          (rstd * (Vec::load_partial(dout + c, n) * Vec::load_partial(weight + c, n) - xhat * mean))
              .store_partial(dx + c, n);
        });
  }
}

template <typename T, typename W>
void forward(const RmsNormForward& args) {
  const RmsNormShape& shape = args.shape;
  parallel_ranges(shape.num_rows, threads_for(shape.num_rows * shape.dim, shape.num_threads),
                  [&](int64_t begin, int64_t end) { forward_rows<T, W>(args, begin, end); });
}

// dweight is summed per block of rows, then over the blocks in order; the blocks depend on num_rows alone.
template <typename T, typename W>
void backward(const RmsNormBackward& args) {
  constexpr int64_t kMaxBlocks = 64, kMinRowsPerBlock = 16;
  const int64_t num_rows = args.shape.num_rows, dim = args.shape.dim;
  const int64_t even_share = (num_rows + kMaxBlocks - 1) / kMaxBlocks;
  const int64_t block_rows = even_share > kMinRowsPerBlock ? even_share : kMinRowsPerBlock;
  const int64_t num_blocks = (num_rows + block_rows - 1) / block_rows;
  const bool wants_dweight = args.dweight != nullptr;
  Workspace<float> sums(wants_dweight ? num_blocks * dim : 0);
  const int num_threads = threads_for(num_rows * dim, args.shape.num_threads);
  parallel_ranges(num_blocks, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* block_sum = wants_dweight ? sums.data() + block * dim : nullptr;
      if (wants_dweight) std::memset(block_sum, 0, static_cast<size_t>(dim) * sizeof(float));
      const int64_t row_end = (block + 1) * block_rows;
      backward_rows<T, W>(args, block * block_rows, row_end < num_rows ? row_end : num_rows, block_sum);
    }
  });
  if (!wants_dweight) return;
  parallel_ranges(dim, threads_for(num_blocks * dim, num_threads), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float total = 0.0f;
      for (int64_t block = 0; block < num_blocks; ++block) total += sums.data()[block * dim + c];
      static_cast<W*>(args.dweight)[c] = from_float<W>(total);
    }
  });
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) {
  if (!args.shape.bf16_x) return forward<float, float>(args);
  args.shape.bf16_weight ? forward<bf16, bf16>(args) : forward<bf16, float>(args);
}

void rms_norm_backward(const RmsNormBackward& args) {
  if (!args.shape.bf16_x) return backward<float, float>(args);
  args.shape.bf16_weight ? backward<bf16, bf16>(args) : backward<bf16, float>(args);
}

}  // namespace herdkern::cpu::HK_ISA
