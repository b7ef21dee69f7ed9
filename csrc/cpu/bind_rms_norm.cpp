// Binds RMSNorm to Python: pointers as integers (0: not wanted), sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/rms_norm.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

// num_rows, dim, Element of x, Element of weight, Casting, number of threads
using Shape = std::array<int64_t, 6>;

RmsNormShape shape_of(const Shape& s, float weight_offset) {
  const auto element = static_cast<Element>(s[2]), weight_element = static_cast<Element>(s[3]);
  return {s[0], s[1], element, weight_element, static_cast<Casting>(s[4]), weight_offset, static_cast<int>(s[5])};
}

const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

// strides: of x, residual
void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, const std::array<uintptr_t, 3>& out_new_residual_rstd,
             const Shape& shape, const std::array<int64_t, 2>& strides, float eps, float weight_offset) {
  const auto [out, new_residual, rstd] = out_new_residual_rstd;
  HK_DISPATCH(rms_norm_forward,
              RmsNormForward{shape_of(shape, weight_offset), input(x), input(residual), input(weight), strides[0],
                             strides[1], eps, output(out), output(new_residual), reinterpret_cast<float*>(rstd)});
}

// strides: of dout, dresidual, x
void backward(uintptr_t dout, uintptr_t dresidual, uintptr_t x, uintptr_t weight, uintptr_t rstd,
              const std::array<uintptr_t, 2>& dx_dweight, const Shape& shape, const std::array<int64_t, 3>& strides,
              float weight_offset) {
  HK_DISPATCH(rms_norm_backward,
              RmsNormBackward{shape_of(shape, weight_offset), input(dout), input(dresidual), input(x), input(weight),
                              strides[0], strides[1], strides[2], reinterpret_cast<const float*>(rstd),
                              output(dx_dweight[0]), output(dx_dweight[1])});
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
