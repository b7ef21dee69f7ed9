// Binds RoPE to Python: pointers as integers, sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>

#include "cpu/rope.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

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

void apply(uintptr_t x, uintptr_t cos_table, uintptr_t sin_table, uintptr_t positions, uintptr_t out,
           int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t token_stride, int64_t head_stride,
           bool is_bf16, bool interleaved, bool inverse, bool wide_positions, int num_threads) {
  HK_DISPATCH(rope, Rope{num_tokens, num_heads, head_dim, token_stride, head_stride, is_bf16, interleaved, inverse,
                         wide_positions, num_threads, reinterpret_cast<const void*>(x),
                         reinterpret_cast<const float*>(cos_table), reinterpret_cast<const float*>(sin_table),
                         reinterpret_cast<const void*>(positions), reinterpret_cast<void*>(out)});
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("find_bad_position", &find_bad_position, py::call_guard<py::gil_scoped_release>());
  m.def("rope", &apply, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
