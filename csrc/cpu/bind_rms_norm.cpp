// Binds RMSNorm to Python: pointers as integers (0: not wanted), sizes, strides in elements; the GIL is released.
#include <pybind11/pybind11.h>

#include "cpu/rms_norm.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

void forward(uintptr_t x, uintptr_t weight, uintptr_t out, uintptr_t rstd, int64_t num_rows, int64_t dim,
             int64_t x_stride, float eps, bool bf16_x, bool bf16_weight, int num_threads) {
  HK_DISPATCH(rms_norm_forward, RmsNormForward{{num_rows, dim, x_stride, bf16_x, bf16_weight, num_threads},
                                               reinterpret_cast<const void*>(x),
                                               reinterpret_cast<const void*>(weight),
                                               eps,
                                               reinterpret_cast<void*>(out),
                                               reinterpret_cast<float*>(rstd)});
}

void backward(uintptr_t dout, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
              int64_t num_rows, int64_t dim, int64_t dout_stride, int64_t x_stride, bool bf16_x, bool bf16_weight,
              int num_threads) {
  HK_DISPATCH(rms_norm_backward, RmsNormBackward{{num_rows, dim, x_stride, bf16_x, bf16_weight, num_threads},
                                                 reinterpret_cast<const void*>(dout),
                                                 reinterpret_cast<const void*>(x),
                                                 reinterpret_cast<const void*>(weight),
                                                 dout_stride,
                                                 reinterpret_cast<const float*>(rstd),
                                                 reinterpret_cast<void*>(dx),
                                                 reinterpret_cast<void*>(dweight)});
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cpu
