// pybind11 module _ops: each bind_<op>.cpp adds the functions of one op. Raw pointers, sizes, strides and a thread
// count come in; herdkern/ops/<op>.py has checked them. The kernel level is the one that isa.h reports.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace herdkern::cpu {
void bind_adamw(py::module_& m);                 // bind_adamw.cpp
void bind_attention(py::module_& m);             // bind_attention.cpp
void bind_context_plan(py::module_& m);          // bind_context_plan.cpp
void bind_linear_cross_entropy(py::module_& m);  // bind_linear_cross_entropy.cpp
void bind_peak(py::module_& m);                  // bind_peak.cpp
void bind_rms_norm(py::module_& m);              // bind_rms_norm.cpp
void bind_rope(py::module_& m);                  // bind_rope.cpp
void bind_swiglu(py::module_& m);                // bind_swiglu.cpp
}  // namespace herdkern::cpu

PYBIND11_MODULE(_ops, m) {
  using namespace herdkern::cpu;
  m.doc() = "CPU kernels of herdkern. Use herdkern.ops.";
  m.def("detected_isa", [] { return isa_name(detected_isa()); });
  m.def("active_isa", [] { return isa_name(active_isa()); });
  m.def("set_isa", [](const std::string& name) { set_active_isa(name.c_str()); });
  m.def("has_avx512_bf16", &has_avx512_bf16);
  bind_adamw(m);
  bind_attention(m);
  bind_context_plan(m);
  bind_linear_cross_entropy(m);
  bind_peak(m);
  bind_rms_norm(m);
  bind_rope(m);
  bind_swiglu(m);
}
