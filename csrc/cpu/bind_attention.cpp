// Binds attention to Python: pointers as integers, sizes, strides in elements; the GIL is released.
// Document borders are data, so they are checked here and not in Python: also where torch.compile runs the op.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/attention.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

// x: (data_ptr, token_stride, head_stride).
AttentionInput input(const py::tuple& x) {
  return {reinterpret_cast<const void*>(x[0].cast<uintptr_t>()), x[1].cast<int64_t>(), x[2].cast<int64_t>()};
}

void check_borders(const int32_t* borders, int64_t num_docs, int64_t total, const std::string& name) {
  const auto fail = [&](const std::string& rule, int64_t got) {
    throw std::invalid_argument("attention: " + name + " must " + rule + ", got " + std::to_string(got));
  };
  if (borders[0] != 0) fail("start with 0", borders[0]);
  for (int64_t d = 0; d < num_docs; ++d)
    if (borders[d + 1] < borders[d])
      fail("not decrease (entry " + std::to_string(d + 1) + " follows " + std::to_string(borders[d]) + ")",
           borders[d + 1]);
  if (borders[num_docs] != total) fail("end with the number of tokens " + std::to_string(total), borders[num_docs]);
}

// sizes: (num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim).
AttentionShape shape(uintptr_t cu_q, uintptr_t cu_k, const py::tuple& sizes, float scale, bool causal, bool bf16,
                     int num_threads) {
  const AttentionShape s{reinterpret_cast<const int32_t*>(cu_q),
                         reinterpret_cast<const int32_t*>(cu_k),
                         sizes[0].cast<int64_t>(),
                         sizes[1].cast<int64_t>(),
                         sizes[2].cast<int64_t>(),
                         sizes[3].cast<int64_t>(),
                         sizes[4].cast<int64_t>(),
                         sizes[5].cast<int64_t>(),
                         scale,
                         causal,
                         bf16,
                         num_threads};
  check_borders(s.cu_q, s.num_docs, s.total_q, "cu_seqlens");
  if (cu_q != cu_k) check_borders(s.cu_k, s.num_docs, s.total_k, "cu_seqlens_k");
  return s;
}

void forward(const py::tuple& q, const py::tuple& k, const py::tuple& v, uintptr_t cu_q, uintptr_t cu_k,
             const py::tuple& sizes, float scale, bool causal, bool bf16, int num_threads, uintptr_t out,
             uintptr_t lse) {
  const AttentionForward args{shape(cu_q, cu_k, sizes, scale, causal, bf16, num_threads),
                              input(q),
                              input(k),
                              input(v),
                              reinterpret_cast<void*>(out),
                              reinterpret_cast<float*>(lse)};
  const py::gil_scoped_release released;
  HK_DISPATCH(attention_forward, args);
}

void backward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out, const py::tuple& dout,
              uintptr_t lse, uintptr_t cu_q, uintptr_t cu_k, const py::tuple& sizes, float scale, bool causal,
              bool bf16, int num_threads, uintptr_t dq, uintptr_t dk, uintptr_t dv) {
  const AttentionBackward args{shape(cu_q, cu_k, sizes, scale, causal, bf16, num_threads),
                               input(q),
                               input(k),
                               input(v),
                               input(out),
                               input(dout),
                               reinterpret_cast<const float*>(lse),
                               reinterpret_cast<void*>(dq),
                               reinterpret_cast<void*>(dk),
                               reinterpret_cast<void*>(dv)};
  const py::gil_scoped_release released;
  HK_DISPATCH(attention_backward, args);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
}

}  // namespace herdkern::cpu
