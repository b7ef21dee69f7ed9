// Binds paged attention to Python: device addresses as integers, sizes, strides in elements, a stream; the GIL is
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda/paged_attention.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

using Strided = std::array<int64_t, 4>;  // address, strides: q of (token, head), 0; k and v of (page, token, head)
// cu_q, cu_k, num_docs, total_q, num_heads, num_kv_heads, head_dim, is_bfloat16
using Shape = std::array<int64_t, 8>;
using Pages = std::array<int64_t, 5>;  // table, table_stride, page_size, num_pages, max_keys
using Softmax = std::tuple<float, float, int64_t, int64_t, uintptr_t>;  // scale, softcap, left, right, sinks

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// out: out, lse, workspace
void forward(const Strided& q, const Strided& k, const Strided& v, const Pages& pages, const Shape& shape,
             const Softmax& softmax, const std::array<int64_t, 3>& out, uintptr_t stream) {
  const auto limit = [](int64_t keys) { return keys < 0 ? kUnbounded : keys; };
  const auto number = [](int64_t x) { return static_cast<int32_t>(x); };
  const auto [scale, softcap, left, right, sinks] = softmax;
  const PagedAttention args{at<const void>(q[0]),
                            at<const void>(k[0]),
                            at<const void>(v[0]),
                            q[1],
                            q[2],
                            k[1],
                            k[2],
                            k[3],
                            v[1],
                            v[2],
                            v[3],
                            at<const int32_t>(pages[0]),
                            pages[1],
                            number(pages[2]),
                            number(pages[3]),
                            at<const int32_t>(shape[0]),
                            at<const int32_t>(shape[1]),
                            number(shape[2]),
                            number(shape[4]),
                            number(shape[5]),
                            number(shape[6]),
                            shape[3],
                            pages[4],
                            scale,
                            softcap,
                            {limit(left), limit(right)},
                            reinterpret_cast<const float*>(sinks),
                            shape[7] != 0,
                            at<void>(out[0]),
                            at<float>(out[1])};
  launch_paged_attention(args, at<void>(out[2]), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_paged_attention(py::module_& m) {
  m.def("paged_attention_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("paged_attention_workspace_bytes", &paged_attention_workspace_bytes);
}

}  // namespace herdkern::cuda
