#include "cpu/swiglu.h"

#include "common/pair.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"

namespace herdkern::cpu::HK_ISA {
namespace {

// Below this e^-x leaves fp32, and silu is 0 to 36 digits: all that lies below is taken for it. A NaN stays.
constexpr float kLowest = -87.0f;

// 1 / (1 + e^-x) for x >= kLowest. By a power of two, whose error of |x| 2^-24 no 16-bit result can hold, where Vec's
// exp2 has no end at 127.
template <typename T>
HK_INLINE Vec sigmoid_above_lowest(const Vec& x) {
#if defined(HK_VEC_AVX512)
  if constexpr (sizeof(T) == 2) return reciprocal(Vec(1.0f) + exp2(x * Vec(-1.44269504088896341f)));
#endif
  return reciprocal(Vec(1.0f) + exp(Vec(0.0f) - x));
}

template <typename T>
HK_INLINE Pair<T> raised(const Pair<T>& gate) {
  return {max(Vec(kLowest), gate.a), max(Vec(kLowest), gate.b)};
}

template <typename T>
HK_INLINE Pair<T> sigmoid(const Pair<T>& raised_gate) {
  return {sigmoid_above_lowest<T>(raised_gate.a), sigmoid_above_lowest<T>(raised_gate.b)};
}

template <typename T>
HK_INLINE Pair<T> forward_step(const Pair<T>& gate, const Pair<T>& up) {
  const Pair<T> g = raised(gate);
  return g * sigmoid(g) * up;
}

template <typename T, bool kStream>
void forward_run(const T* gate, const T* up, T* out, int64_t count) {
  for_each_pair(
      count,
      [&](int64_t i) {
        const Pair<T> y = forward_step(Pair<T>::load(gate + i), Pair<T>::load(up + i));
        kStream ? y.stream(out + i) : y.store(out + i);
      },
      [&](int64_t i, int n) {
        forward_step(Pair<T>::load_partial(gate + i, n), Pair<T>::load_partial(up + i, n)).store_partial(out + i, n);
      });
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <typename T>
struct Gradients {
  Pair<T> dgate, dup;
  HK_INLINE Gradients(const Pair<T>& dout, const Pair<T>& gate, const Pair<T>& up) {
    const Pair<T> one(1.0f), g = raised(gate), s = sigmoid(g), d = dout * s;
    dgate = d * up * fma(g, one - s, one);
    dup = d * g;
  }
};

template <typename T, bool kStream>
void backward_run(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
  for_each_pair(
      count,
      [&](int64_t i) {
        const Gradients<T> d(Pair<T>::load(dout + i), Pair<T>::load(gate + i), Pair<T>::load(up + i));
        if (dgate != nullptr) kStream ? d.dgate.stream(dgate + i) : d.dgate.store(dgate + i);
        if (dup != nullptr) kStream ? d.dup.stream(dup + i) : d.dup.store(dup + i);
      },
      [&](int64_t i, int n) {
        const Gradients<T> d(Pair<T>::load_partial(dout + i, n), Pair<T>::load_partial(gate + i, n),
                             Pair<T>::load_partial(up + i, n));
        if (dgate != nullptr) d.dgate.store_partial(dgate + i, n);
        if (dup != nullptr) d.dup.store_partial(dup + i, n);
      });
}

// Calls run(row, column, count) for stretches that cover a (num_rows, dim) array, of which no two threads get the same;
// a contiguous array is cut without regard to its rows. Tried fetching 1 to 4 KiB ahead: a quarter slower.
template <typename Run>
void for_each_stretch(int64_t num_rows, int64_t dim, bool contiguous, int num_threads, const Run& run) {
  constexpr int64_t kBlock = 1024;
  const int64_t total = num_rows * dim;
  num_threads = threads_for(total, num_threads);
  if (!contiguous) {
    parallel_ranges(num_rows, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run(row, int64_t{0}, dim);
      end_of_streams();
    });
    return;
  }
  parallel_ranges((total + kBlock - 1) / kBlock, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = end * kBlock < total ? end * kBlock : total;
    run(int64_t{0}, first, last - first);
    end_of_streams();
  });
}

template <typename T>
void forward(const SwigluForward& args) {
  const bool contiguous = args.gate_stride == args.dim && args.up_stride == args.dim;
  const int64_t bytes = args.num_rows * args.dim * static_cast<int64_t>(sizeof(T));
  prefer_huge_pages(args.out, bytes);
  for_each_stretch(args.num_rows, args.dim, contiguous, args.num_threads, [&](int64_t row, int64_t c, int64_t count) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + c;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + c;
    T* out = static_cast<T*>(args.out) + row * args.dim + c;
    if (bytes >= kStreamBytes && is_line_aligned(out)) {
      forward_run<T, true>(gate, up, out, count);
    } else {
      forward_run<T, false>(gate, up, out, count);
    }
  });
}

template <typename T>
T* at(void* data, int64_t offset) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + offset;
}

template <typename T>
void backward(const SwigluBackward& args) {
  bool contiguous = args.dout_stride == args.dim && args.gate_stride == args.dim && args.up_stride == args.dim;
  contiguous = contiguous && args.dgate_stride == args.dim && args.dup_stride == args.dim;
  const int64_t bytes = args.num_rows * args.dim * static_cast<int64_t>(sizeof(T));
  const bool packed = args.dgate_stride != args.dim;  // one tensor, which begins at dgate
  if (args.dgate != nullptr) prefer_huge_pages(args.dgate, packed ? 2 * bytes : bytes);
  if (args.dup != nullptr && !packed) prefer_huge_pages(args.dup, bytes);
  for_each_stretch(args.num_rows, args.dim, contiguous, args.num_threads, [&](int64_t row, int64_t c, int64_t count) {
    const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride + c;
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + c;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + c;
    T* dgate = at<T>(args.dgate, row * args.dgate_stride + c);
    T* dup = at<T>(args.dup, row * args.dup_stride + c);
    if (bytes >= kStreamBytes && is_line_aligned(dgate) && is_line_aligned(dup)) {
      backward_run<T, true>(dout, gate, up, dgate, dup, count);
    } else {
      backward_run<T, false>(dout, gate, up, dgate, dup, count);
    }
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& args) {
  if (args.element == Element::kFloat32) return forward<float>(args);
  args.element == Element::kBfloat16 ? forward<bf16>(args) : forward<fp16>(args);
}

void swiglu_backward(const SwigluBackward& args) {
  if (args.element == Element::kFloat32) return backward<float>(args);
  args.element == Element::kBfloat16 ? backward<bf16>(args) : backward<fp16>(args);
}

}  // namespace herdkern::cpu::HK_ISA
