// Binds the measurement of the processor's peak to Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/peak.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

double measure(const std::string& kind, int num_threads, int trials) {
  const char* const names[] = {"fma", "dot", "tile"};
  if (num_threads < 1)
    throw std::invalid_argument("measure_peak: num_threads must be at least 1, got " + std::to_string(num_threads));
  for (int i = 0; i < 3; ++i) {
    if (kind != names[i]) continue;
    const py::gil_scoped_release released;
    return HK_DISPATCH(peak_gflop_per_s, static_cast<PeakKind>(i), num_threads, trials);
  }
  throw std::invalid_argument("measure_peak: kind must be fma, dot or tile, got '" + kind + "'");
}

}  // namespace

void bind_peak(py::module_& m) {
  m.def("measure_peak", &measure, py::arg("kind"), py::arg("num_threads"), py::arg("trials") = 100);
}

}  // namespace herdkern::cpu
