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

void apply(uintptr_t hidden, uintptr_t weight, uintptr_t targets, uintptr_t stats, bool has_stats, uintptr_t losses,
           uintptr_t logps, uintptr_t loss, uintptr_t dlosses, uintptr_t dlogps, uintptr_t dhidden, uintptr_t dweight,
           int64_t num_tokens, int64_t dim, int64_t vocab_size, int64_t total_vocab_size, int64_t hidden_stride,
           int64_t weight_stride, bool hidden_is_bf16, bool weight_is_bf16, bool dhidden_is_bf16, int64_t ignore_index,
           int reduction, float label_smoothing, float z_loss, float softcap, int num_threads) {
  LinearCrossEntropy args;
  args.num_tokens = num_tokens;
  args.dim = dim;
  args.vocab_size = vocab_size;
  args.total_vocab_size = total_vocab_size;
  args.hidden_stride = hidden_stride;
  args.weight_stride = weight_stride;
  args.hidden_is_bf16 = hidden_is_bf16;
  args.weight_is_bf16 = weight_is_bf16;
  args.dhidden_is_bf16 = dhidden_is_bf16;
  args.num_threads = num_threads;
  args.hidden = reinterpret_cast<const void*>(hidden);
  args.weight = reinterpret_cast<const void*>(weight);
  args.targets = reinterpret_cast<const int64_t*>(targets);
  args.ignore_index = ignore_index;
  args.label_smoothing = label_smoothing;
  args.z_loss = z_loss;
  args.softcap = softcap;
  args.reduction = static_cast<Reduction>(reduction);
  args.stats = reinterpret_cast<float*>(stats);
  args.has_stats = has_stats;
  args.losses = reinterpret_cast<float*>(losses);
  args.logps = reinterpret_cast<float*>(logps);
  args.loss = reinterpret_cast<float*>(loss);
  args.dlosses = reinterpret_cast<const float*>(dlosses);
  args.dlogps = reinterpret_cast<const float*>(dlogps);
  args.dhidden = reinterpret_cast<void*>(dhidden);
  args.dweight = reinterpret_cast<void*>(dweight);
  HK_DISPATCH(linear_cross_entropy, args);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("find_bad_target", &find_bad_target, py::call_guard<py::gil_scoped_release>());
  m.def("linear_cross_entropy", &apply, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
