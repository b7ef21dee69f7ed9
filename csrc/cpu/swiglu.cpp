#include "cpu/swiglu.h"

#include "common/simd.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {
namespace {

template <typename T>
void forward_run(const T* gate, const T* up, T* out, int64_t count) {
  for_each_vec(
      count,
      [&](int64_t i) {
        const Vec g = Vec::load(gate + i);
        (g * sigmoid(g) * Vec::load(up + i)).store(out + i);
      },
      [&](int64_t i, int n) {
        const Vec g = Vec::load_partial(gate + i, n);
        (g * sigmoid(g) * Vec::load_partial(up + i, n)).store_partial(out + i, n);
      });
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
struct Gradients {
  Vec dgate, dup;
  HK_INLINE Gradients(const Vec& dout, const Vec& gate, const Vec& up) {
    const Vec one(1.0f), s = sigmoid(gate);
    dgate = dout * up * s * fma(gate, one - s, one);
    dup = dout * gate * s;
  }
};

template <typename T>
void backward_run(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
  for_each_vec(
      count,
      [&](int64_t i) {
        const Gradients d(Vec::load(dout + i), Vec::load(gate + i), Vec::load(up + i));
        if (dgate != nullptr) d.dgate.store(dgate + i);
        if (dup != nullptr) d.dup.store(dup + i);
      },
      [&](int64_t i, int n) {
        const Gradients d(Vec::load_partial(dout + i, n), Vec::load_partial(gate + i, n), Vec::load_partial(up + i, n));
        if (dgate != nullptr) d.dgate.store_partial(dgate + i, n);
        if (dup != nullptr) d.dup.store_partial(dup + i, n);
      });
}

// Calls run(row, column, count) for stretches that cover a (num_rows, dim) array, of which no two threads get the same;
// a contiguous array is cut without regard to its rows.
template <typename Run>
void for_each_stretch(int64_t num_rows, int64_t dim, bool contiguous, int num_threads, const Run& run) {
  constexpr int64_t kBlock = 1024;
  const int64_t total = num_rows * dim;
  num_threads = threads_for(total, num_threads);
  if (!contiguous) {
    parallel_ranges(num_rows, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run(row, int64_t{0}, dim);
    });
    return;
  }
  parallel_ranges((total + kBlock - 1) / kBlock, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = end * kBlock < total ? end * kBlock : total;
    run(int64_t{0}, first, last - first);
  });
}

template <typename T>
void forward(const SwigluForward& args) {
  const bool contiguous = args.gate_stride == args.dim && args.up_stride == args.dim;
  for_each_stretch(args.num_rows, args.dim, contiguous, args.num_threads, [&](int64_t row, int64_t c, int64_t count) {
    forward_run(static_cast<const T*>(args.gate) + row * args.gate_stride + c,
                static_cast<const T*>(args.up) + row * args.up_stride + c,
                static_cast<T*>(args.out) + row * args.dim + c, count);
  });
}

template <typename T>
void backward(const SwigluBackward& args) {
  const bool contiguous = args.dout_stride == args.dim && args.gate_stride == args.dim && args.up_stride == args.dim;
  for_each_stretch(args.num_rows, args.dim, contiguous, args.num_threads, [&](int64_t row, int64_t c, int64_t count) {
    const int64_t at = row * args.dim + c;
    backward_run(static_cast<const T*>(args.dout) + row * args.dout_stride + c,
                 static_cast<const T*>(args.gate) + row * args.gate_stride + c,
                 static_cast<const T*>(args.up) + row * args.up_stride + c,
                 args.dgate == nullptr ? nullptr : static_cast<T*>(args.dgate) + at,
                 args.dup == nullptr ? nullptr : static_cast<T*>(args.dup) + at, count);
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& args) { args.is_bf16 ? forward<bf16>(args) : forward<float>(args); }

void swiglu_backward(const SwigluBackward& args) { args.is_bf16 ? backward<bf16>(args) : backward<float>(args); }

}  // namespace herdkern::cpu::HK_ISA
