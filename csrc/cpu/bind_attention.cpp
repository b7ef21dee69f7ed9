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

// arguments: (cu_q, cu_k, num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim, scale, softcap, window_left,
// window_right, sinks, storage, num_threads); a window of -1 is unbounded, sinks may be 0.
AttentionShape shape(const py::tuple& arguments) {
  const auto pointer = [&](int i) { return arguments[i].cast<uintptr_t>(); };
  const auto size = [&](int i) { return arguments[i].cast<int64_t>(); };
  const auto window = [&](int i) { return size(i) < 0 || size(i) > kUnbounded ? kUnbounded : size(i); };
  const AttentionShape s{reinterpret_cast<const int32_t*>(pointer(0)),
                         reinterpret_cast<const int32_t*>(pointer(1)),
                         size(2),
                         size(3),
                         size(4),
                         size(5),
                         size(6),
                         size(7),
                         arguments[8].cast<float>(),
                         arguments[9].cast<float>(),
                         {window(10), window(11)},
                         reinterpret_cast<const float*>(pointer(12)),
                         static_cast<Storage>(arguments[13].cast<int>()),
                         arguments[14].cast<int>()};
  check_borders(s.cu_q, s.num_docs, s.total_q, "cu_seqlens");
  if (s.cu_q != s.cu_k) check_borders(s.cu_k, s.num_docs, s.total_k, "cu_seqlens_k");
  return s;
}

void forward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& arguments, uintptr_t out,
             uintptr_t lse) {
  const AttentionForward args{
      shape(arguments), input(q), input(k), input(v), {}, reinterpret_cast<void*>(out), reinterpret_cast<float*>(lse)};
  const py::gil_scoped_release released;
  HK_DISPATCH(attention_forward, args);
}

// pages: (block_table, its row stride, page size, strides between the pages of k and of v).
void paged_forward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& pages,
                   const py::tuple& arguments, int64_t num_pages, uintptr_t out, uintptr_t lse) {
  const AttentionShape s = shape(arguments);
  const PagedKeys keys{reinterpret_cast<const int32_t*>(pages[0].cast<uintptr_t>()), pages[1].cast<int64_t>(),
                       pages[2].cast<int64_t>(), pages[3].cast<int64_t>(), pages[4].cast<int64_t>()};
  for (int64_t d = 0; d < s.num_docs; ++d)
    for (int64_t page = 0; page < ceil_div(s.document(d).k_len, keys.size); ++page) {
      const int32_t id = keys.table[d * keys.table_stride + page];
      if (id < 0 || id >= num_pages)
        throw std::invalid_argument("paged_attention: block_table must name pages from 0 to " +
                                    std::to_string(num_pages - 1) + " (row " + std::to_string(d) + ", entry " +
                                    std::to_string(page) + "), got " + std::to_string(id));
    }
  const AttentionForward args{
      s, input(q), input(k), input(v), keys, reinterpret_cast<void*>(out), reinterpret_cast<float*>(lse)};
  const py::gil_scoped_release released;
  HK_DISPATCH(attention_forward, args);
}

void backward(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& out, const py::tuple& dout,
              uintptr_t lse, const py::tuple& arguments, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t dsinks) {
  const AttentionBackward args{shape(arguments),
                               input(q),
                               input(k),
                               input(v),
                               input(out),
                               input(dout),
                               reinterpret_cast<const float*>(lse),
                               reinterpret_cast<void*>(dq),
                               reinterpret_cast<void*>(dk),
                               reinterpret_cast<void*>(dv),
                               reinterpret_cast<float*>(dsinks)};
  const py::gil_scoped_release released;
  HK_DISPATCH(attention_backward, args);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("paged_attention_forward", &paged_forward);
  m.def("attention_backward", &backward);
}

}  // namespace herdkern::cpu
