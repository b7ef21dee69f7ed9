// Binds SwiGLU to Python: pointers as integers (0: not wanted), sizes, strides in elements, a stream; the GIL is
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/swiglu.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

// strides: of gate, up
void forward(uintptr_t gate, uintptr_t up, uintptr_t out, int64_t num_rows, int64_t dim,
             const std::array<int64_t, 2>& strides, int element, uintptr_t stream) {
  launch_swiglu_forward(
      {num_rows, dim, static_cast<Element>(element), input(gate), input(up), strides[0], strides[1], output(out)},
      reinterpret_cast<cudaStream_t>(stream));
}

// strides: of dout, gate, up, and of dgate and dup
void backward(uintptr_t dout, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t num_rows,
              int64_t dim, const std::array<int64_t, 4>& strides, int element, uintptr_t stream) {
  launch_swiglu_backward({num_rows, dim, static_cast<Element>(element), input(dout), input(gate), input(up), strides[0],
                          strides[1], strides[2], strides[3], output(dgate), output(dup)},
                         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cuda
