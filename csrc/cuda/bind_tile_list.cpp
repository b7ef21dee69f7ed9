// Binds the list of tiles to Python: device addresses as integers, sizes, a stream; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/tile_list.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

// borders: cu_q, cu_k; window: keys to the left and to the right, -1 for no limit; cut: size, step, of_keys; out:
// tiles, count, first_tiles.
void tile_list(const std::array<uintptr_t, 2>& borders, int64_t num_docs, int64_t capacity,
               const std::array<int64_t, 2>& window, const std::array<int64_t, 3>& cut,
               const std::array<uintptr_t, 3>& out, uintptr_t stream) {
  const auto limit = [](int64_t keys) { return keys < 0 ? kUnbounded : keys; };
  launch_tile_list({reinterpret_cast<const int32_t*>(borders[0]),
                    reinterpret_cast<const int32_t*>(borders[1]),
                    static_cast<int32_t>(num_docs),
                    capacity,
                    {limit(window[0]), limit(window[1])},
                    {static_cast<int32_t>(cut[0]), static_cast<int32_t>(cut[1]), cut[2] != 0},
                    reinterpret_cast<Tile*>(out[0]),
                    reinterpret_cast<int32_t*>(out[1]),
                    reinterpret_cast<int32_t*>(out[2])},
                   reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_tile_list(py::module_& m) {
  m.def("tile_list", &tile_list, py::call_guard<py::gil_scoped_release>());
  m.def("tile_capacity", &tile_capacity);
}

}  // namespace herdkern::cuda
