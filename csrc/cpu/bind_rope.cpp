// Binds RoPE to Python: pointers as integers, sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cpu/rope.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

// x, out, num_heads, token_stride, head_stride, out_token_stride, out_head_stride
using Heads = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// positions, are they int64, cu_seqlens, num_docs; 0 for what is not given
using Places = std::tuple<uintptr_t, bool, uintptr_t, int64_t>;

// The index of the first position outside [0, max_position), else -1.
template <typename T>
int64_t first_outside(const T* positions, int64_t count, int64_t max_position) {
  for (int64_t i = 0; i < count; ++i)
    if (positions[i] < 0 || positions[i] >= max_position) return i;
  return -1;
}

int64_t find_bad_position(uintptr_t positions, int64_t count, int64_t max_position, bool wide) {
  return wide ? first_outside(reinterpret_cast<const int64_t*>(positions), count, max_position)
              : first_outside(reinterpret_cast<const int32_t*>(positions), count, max_position);
}

void apply(const std::vector<Heads>& heads, uintptr_t cos_table, uintptr_t sin_table, const Places& places,
           int64_t num_tokens, int64_t head_dim, bool is_bf16, bool interleaved, bool inverse, int num_threads) {
  const auto [positions, wide, cu_seqlens, num_docs] = places;
  Rope args{num_tokens,
            head_dim,
            is_bf16,
            interleaved,
            inverse,
            wide,
            num_threads,
            reinterpret_cast<const float*>(cos_table),
            reinterpret_cast<const float*>(sin_table),
            reinterpret_cast<const void*>(positions),
            reinterpret_cast<const int32_t*>(cu_seqlens),
            num_docs,
            {}};
  for (size_t i = 0; i < heads.size() && i < 2; ++i) {
    const auto& [x, out, num_heads, token_stride, head_stride, out_token_stride, out_head_stride] = heads[i];
    args.heads[i] = {reinterpret_cast<const void*>(x),
                     reinterpret_cast<void*>(out),
                     num_heads,
                     token_stride,
                     head_stride,
                     out_token_stride,
                     out_head_stride};
  }
  HK_DISPATCH(rope, args);
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("find_bad_position", &find_bad_position, py::call_guard<py::gil_scoped_release>());
  m.def("rope", &apply, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
