// Binds RMSNorm to Python: pointers as integers (0: not wanted), sizes, strides in elements, a stream; the GIL is
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/rms_norm.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

// num_rows, dim, Element of x, Element of weight, Casting
using Shape = std::array<int64_t, 5>;

RmsNormShape shape_of(const Shape& s, float weight_offset) {
  const auto element = static_cast<Element>(s[2]), weight_element = static_cast<Element>(s[3]);
  return {s[0], s[1], element, weight_element, static_cast<Casting>(s[4]), weight_offset};
}

const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

// strides: of x, residual
void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, const std::array<uintptr_t, 3>& out_new_residual_rstd,
             const Shape& shape, const std::array<int64_t, 2>& strides, float eps, float weight_offset,
             uintptr_t stream) {
  const auto [out, new_residual, rstd] = out_new_residual_rstd;
  launch_rms_norm_forward({shape_of(shape, weight_offset), input(x), input(residual), input(weight), strides[0],
                           strides[1], eps, output(out), output(new_residual), reinterpret_cast<float*>(rstd)},
                          reinterpret_cast<cudaStream_t>(stream));
}

// strides: of dout, dresidual, x
void backward(uintptr_t dout, uintptr_t dresidual, uintptr_t x, uintptr_t weight, uintptr_t rstd,
              const std::array<uintptr_t, 3>& dx_dweight_sums, int64_t rows_per_sum, const Shape& shape,
              const std::array<int64_t, 3>& strides, float weight_offset, uintptr_t stream) {
  const auto [dx, dweight, sums] = dx_dweight_sums;
  launch_rms_norm_backward({shape_of(shape, weight_offset), input(dout), input(dresidual), input(x), input(weight),
                            strides[0], strides[1], strides[2], reinterpret_cast<const float*>(rstd), output(dx),
                            output(dweight), reinterpret_cast<float*>(sums), rows_per_sum},
                           reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cuda
