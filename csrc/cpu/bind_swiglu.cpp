// Binds SwiGLU to Python: pointers as integers (0: not wanted), sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>

#include "cpu/swiglu.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

void forward(uintptr_t gate, uintptr_t up, uintptr_t out, int64_t num_rows, int64_t dim, int64_t gate_stride,
             int64_t up_stride, bool is_bf16, int num_threads) {
  HK_DISPATCH(swiglu_forward, SwigluForward{num_rows, dim, gate_stride, up_stride, is_bf16, num_threads,
                                            reinterpret_cast<const void*>(gate), reinterpret_cast<const void*>(up),
                                            reinterpret_cast<void*>(out)});
}

void backward(uintptr_t dout, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t num_rows,
              int64_t dim, int64_t dout_stride, int64_t gate_stride, int64_t up_stride, bool is_bf16, int num_threads) {
  HK_DISPATCH(swiglu_backward, SwigluBackward{num_rows, dim, dout_stride, gate_stride, up_stride, is_bf16, num_threads,
                                              reinterpret_cast<const void*>(dout), reinterpret_cast<const void*>(gate),
                                              reinterpret_cast<const void*>(up), reinterpret_cast<void*>(dgate),
                                              reinterpret_cast<void*>(dup)});
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
