// Binds AdamW to Python: the table of tensors is written on the host, copied by the caller, and read by the launches;
// the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cuda/adamw.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

// param, grad, exp_avg, exp_avg_sq, master or 0, step (on the host), count, param type, grad type, stream, number of
// its settings
using Row = std::array<int64_t, 11>;
// lr, beta1, beta2, eps, weight_decay, 1 to maximise
using Settings = std::array<double, 6>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// Writes the table of the update that follows `step` updates to `out`, which holds adamw_row_bytes for each row;
// returns the number of blocks.
int64_t table(const std::vector<Row>& rows, const std::vector<Settings>& settings, uintptr_t out) {
  AdamwRow* next = reinterpret_cast<AdamwRow*>(out);
  int64_t first_block = 0;
  for (const Row& row : rows) {
    const Settings& s = settings.at(static_cast<size_t>(row[10]));
    AdamwRow made{};
    made.param = pointer<void>(row[0]);
    made.grad = pointer<const void>(row[1]);
    made.exp_avg = pointer<float>(row[2]);
    made.exp_avg_sq = pointer<float>(row[3]);
    made.master = pointer<float>(row[4]);
    made.step = static_cast<uint32_t>(*pointer<const float>(row[5]) + 1.0f);
    made.count = row[6];
    made.param_type = static_cast<Element>(row[7]);
    made.grad_type = static_cast<Element>(row[8]);
    made.stream = static_cast<uint32_t>(row[9]);
    made.first_block = first_block;
    made.is_aligned = is_aligned({made.param, made.grad, made.exp_avg, made.exp_avg_sq, made.master}, {});
    set_factors({s[0], s[1], s[2], s[3], s[4], s[5] != 0}, made);
    *next++ = made;
    first_block += ceil_div(made.count, kAdamwBlock);
  }
  return first_block;
}

// The same for the norm alone. rows: (gradient, count, its type)
int64_t norm_table(const std::vector<std::array<int64_t, 3>>& rows, uintptr_t out) {
  AdamwRow* next = reinterpret_cast<AdamwRow*>(out);
  int64_t first_block = 0;
  for (const auto& [grad, count, type] : rows) {
    AdamwRow made{};
    made.grad = pointer<const void>(grad);
    made.count = count;
    made.grad_type = static_cast<Element>(type);
    made.first_block = first_block;
    made.is_aligned = is_aligned({made.grad}, {});
    *next++ = made;
    first_block += ceil_div(count, kAdamwBlock);
  }
  return first_block;
}

// norm_and_scale: address of two float64, or 0 for no clip
void step(uintptr_t table, int64_t num_tensors, int64_t num_blocks, uintptr_t norm_and_scale, bool stochastic,
          uint64_t seed, uintptr_t stream) {
  launch_adamw({reinterpret_cast<const AdamwRow*>(table), num_tensors, num_blocks,
                reinterpret_cast<const double*>(norm_and_scale), stochastic, seed},
               reinterpret_cast<cudaStream_t>(stream));
}

// sums: num_blocks float64 of scratch memory
void norm(uintptr_t table, int64_t num_tensors, int64_t num_blocks, uintptr_t sums, uintptr_t norm_and_scale,
          double max_grad_norm, uintptr_t stream) {
  launch_grad_norm({reinterpret_cast<const AdamwRow*>(table), num_tensors, num_blocks, reinterpret_cast<double*>(sums),
                    reinterpret_cast<double*>(norm_and_scale), max_grad_norm},
                   reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.attr("adamw_row_bytes") = sizeof(AdamwRow);
  m.def("adamw_table", &table, py::call_guard<py::gil_scoped_release>());
  m.def("grad_norm_table", &norm_table, py::call_guard<py::gil_scoped_release>());
  m.def("adamw_step", &step, py::call_guard<py::gil_scoped_release>());
  m.def("grad_norm", &norm, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cuda
