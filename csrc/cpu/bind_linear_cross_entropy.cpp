// Binds the linear cross entropy to Python: pointers as integers (0: not wanted), sizes, strides in elements; the GIL
// is released.
#include <pybind11/pybind11.h>

#include "cpu/linear_cross_entropy.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

// The index of the first target that is neither ignore_index nor in [0, vocab_size), else -1.
int64_t find_bad_target(uintptr_t targets, int64_t count, int64_t vocab_size, int64_t ignore_index) {
  const auto* values = reinterpret_cast<const int64_t*>(targets);
  for (int64_t i = 0; i < count; ++i)
    if (values[i] != ignore_index && (values[i] < 0 || values[i] >= vocab_size)) return i;
  return -1;
}

void apply(uintptr_t x, uintptr_t weight, uintptr_t targets, uintptr_t dlosses, uintptr_t losses, uintptr_t loss,
           uintptr_t dx, uintptr_t dweight, int64_t num_tokens, int64_t dim, int64_t vocab_size, int64_t x_stride,
           int64_t weight_stride, int64_t ignore_index, int reduction, bool is_bf16, int num_threads) {
  LinearCrossEntropy args;
  args.num_tokens = num_tokens;
  args.dim = dim;
  args.vocab_size = vocab_size;
  args.x_stride = x_stride;
  args.weight_stride = weight_stride;
  args.is_bf16 = is_bf16;
  args.num_threads = num_threads;
  args.x = reinterpret_cast<const void*>(x);
  args.weight = reinterpret_cast<const void*>(weight);
  args.targets = reinterpret_cast<const int64_t*>(targets);
  args.ignore_index = ignore_index;
  args.reduction = static_cast<Reduction>(reduction);
  args.dlosses = reinterpret_cast<const float*>(dlosses);
  args.loss = reinterpret_cast<float*>(loss);
  args.losses = reinterpret_cast<float*>(losses);
  args.dx = reinterpret_cast<float*>(dx);
  args.dweight = reinterpret_cast<float*>(dweight);
  HK_DISPATCH(linear_cross_entropy, args);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("find_bad_target", &find_bad_target, py::call_guard<py::gil_scoped_release>());
  m.def("linear_cross_entropy", &apply, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
