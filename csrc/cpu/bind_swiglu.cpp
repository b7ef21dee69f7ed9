// Binds SwiGLU to Python: pointers as integers (0: not wanted), sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/swiglu.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

// strides: of gate, up
void forward(uintptr_t gate, uintptr_t up, uintptr_t out, int64_t num_rows, int64_t dim,
             const std::array<int64_t, 2>& strides, int element, int num_threads) {
  HK_DISPATCH(swiglu_forward, SwigluForward{num_rows, dim, strides[0], strides[1], static_cast<Element>(element),
                                            num_threads, input(gate), input(up), output(out)});
}

// strides: of dout, gate, up, dgate, dup
void backward(uintptr_t dout, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t num_rows,
              int64_t dim, const std::array<int64_t, 5>& strides, int element, int num_threads) {
  HK_DISPATCH(swiglu_backward, SwigluBackward{num_rows, dim, strides[0], strides[1], strides[2], strides[3], strides[4],
                                              static_cast<Element>(element), num_threads, input(dout), input(gate),
                                              input(up), output(dgate), output(dup)});
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
