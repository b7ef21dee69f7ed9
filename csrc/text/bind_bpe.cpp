#include <pybind11/pybind11.h>
namespace herdkern::text {
void bind_bpe(pybind11::module_&) {}
}  // namespace herdkern::text
