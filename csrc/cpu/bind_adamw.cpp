// Binds AdamW to Python: a row of integers for each tensor, pointers among them; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/adamw.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

// param, grad, exp_avg, exp_avg_sq, master or 0, step, count, param type, grad type, stream, number of its settings
using Row = std::array<int64_t, 11>;
// lr, beta1, beta2, eps, weight_decay, 1 to maximise
using Settings = std::array<double, 6>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

std::vector<AdamwTensor> tensors_of(const std::vector<Row>& rows, const std::vector<Settings>& settings) {
  std::vector<AdamwTensor> tensors;
  for (const Row& row : rows) {
    const Settings& s = settings.at(static_cast<size_t>(row[10]));
    tensors.push_back({pointer<void>(row[0]), pointer<const void>(row[1]), pointer<float>(row[2]),
                       pointer<float>(row[3]), pointer<float>(row[4]), pointer<float>(row[5]), row[6],
                       static_cast<Float>(row[7]), static_cast<Float>(row[8]), static_cast<uint32_t>(row[9]),
                       AdamwSettings{s[0], s[1], s[2], s[3], s[4], s[5] != 0}});
  }
  return tensors;
}

double step(const std::vector<Row>& rows, const std::vector<Settings>& settings, double max_grad_norm, bool stochastic,
            uint64_t seed, int num_threads) {
  const std::vector<AdamwTensor> tensors = tensors_of(rows, settings);
  const Adamw args{tensors.data(), static_cast<int64_t>(tensors.size()), max_grad_norm, stochastic, seed, num_threads};
  return HK_DISPATCH(adamw, args);
}

// rows: (gradient, count, its type)
double norm(const std::vector<std::array<int64_t, 3>>& rows, int num_threads) {
  std::vector<AdamwTensor> tensors(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    tensors[i].grad = pointer<const void>(rows[i][0]);
    tensors[i].count = rows[i][1];
    tensors[i].grad_type = static_cast<Float>(rows[i][2]);
  }
  return HK_DISPATCH(grad_norm, tensors.data(), static_cast<int64_t>(tensors.size()), num_threads);
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("adamw_step", &step, py::call_guard<py::gil_scoped_release>());
  m.def("grad_norm", &norm, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
