// Binds RoPE to Python: pointers as integers, sizes, strides in elements, a stream; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda/rope.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

// addresses of x and out, number of heads, strides of x (token, head), strides of out (token, head)
using Heads = std::array<int64_t, 7>;
// address of positions or 0, are they int64, address of cu_seqlens or 0, number of documents
using Places = std::tuple<uintptr_t, bool, uintptr_t, int64_t>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

RopeHeads heads_of(const Heads& h) { return {pointer<void>(h[0]), pointer<void>(h[1]), h[2], h[3], h[4], h[5], h[6]}; }

// operands: one or two.  sizes: number of tokens, head_dim, rows of the table, Element
void rope(const std::vector<Heads>& operands, uintptr_t cos, uintptr_t sin, const Places& places,
          const std::array<int64_t, 4>& sizes, bool interleaved, bool inverse, uintptr_t stream) {
  Rope args{};
  args.q = heads_of(operands.at(0));
  if (operands.size() > 1) args.k = heads_of(operands[1]);
  args.cos = reinterpret_cast<const float*>(cos);
  args.sin = reinterpret_cast<const float*>(sin);
  args.positions = reinterpret_cast<const void*>(std::get<0>(places));
  args.wide_positions = std::get<1>(places);
  args.cu_seqlens = reinterpret_cast<const int32_t*>(std::get<2>(places));
  args.num_docs = std::get<3>(places);
  args.num_tokens = sizes[0];
  args.head_dim = sizes[1];
  args.max_position = sizes[2];
  args.element = static_cast<Element>(sizes[3]);
  args.interleaved = interleaved;
  args.inverse = inverse;
  launch_rope(args, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_rope(py::module_& m) { m.def("rope", &rope, py::call_guard<py::gil_scoped_release>()); }

}  // namespace herdkern::cuda
