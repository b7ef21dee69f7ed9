// pybind11 module _cuda: each bind_<op>.cpp adds the functions of one op. Raw pointers, sizes, strides and a stream
// come in; herdkern/ops/<op>.py has checked them and made their device the current one. It is compiled without CUDA's
// headers, imports without a driver, and is built a second time on the emulator of tests/cuda/simt, as HK_MODULE.
#include <pybind11/pybind11.h>

#ifndef HK_MODULE
#define HK_MODULE _cuda
#endif
#ifndef HK_CUDA_TARGETS
#define HK_CUDA_TARGETS ""
#endif

namespace py = pybind11;

namespace herdkern::cuda {
void bind_adamw(py::module_& m);            // bind_adamw.cpp
void bind_attention(py::module_& m);        // bind_attention.cpp
void bind_paged_attention(py::module_& m);  // bind_paged_attention.cpp
void bind_rms_norm(py::module_& m);         // bind_rms_norm.cpp
void bind_rope(py::module_& m);             // bind_rope.cpp
void bind_swiglu(py::module_& m);           // bind_swiglu.cpp
void bind_tile_list(py::module_& m);        // bind_tile_list.cpp
}  // namespace herdkern::cuda

PYBIND11_MODULE(HK_MODULE, m) {
  using namespace herdkern::cuda;
  m.doc() = "CUDA kernels of herdkern. Use herdkern.ops.";
  m.def("targets", [] { return HK_CUDA_TARGETS; });  // as in HERDKERN_CUDA_ARCHS, with "+PTX" after the last
  bind_adamw(m);
  bind_attention(m);
  bind_paged_attention(m);
  bind_rms_norm(m);
  bind_rope(m);
  bind_swiglu(m);
  bind_tile_list(m);
}
