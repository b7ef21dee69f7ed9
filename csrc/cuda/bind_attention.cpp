// Binds packed attention to Python: pointers as integers (0: none), sizes, strides in elements, a stream; the GIL is
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda/attention.h"

namespace py = pybind11;

namespace herdkern::cuda {
namespace {

using Operand = std::tuple<uintptr_t, int64_t, int64_t>;  // address, stride of a token, of a head
// num_docs, total_q, total_k, num_heads, num_kv_heads, head_dim, window left, window right (-1: no limit), Storage
using Numbers = std::array<int64_t, 9>;
// cu_seqlens of q, of k, sinks
using Addresses = std::array<uintptr_t, 3>;

AttentionShape shape_of(const Numbers& n, const Addresses& addresses, float scale, float softcap) {
  const auto side = [](int64_t limit) { return limit < 0 || limit > kUnbounded ? kUnbounded : limit; };
  return {reinterpret_cast<const int32_t*>(addresses[0]),
          reinterpret_cast<const int32_t*>(addresses[1]),
          n[0],
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          scale,
          softcap,
          {side(n[6]), side(n[7])},
          reinterpret_cast<const float*>(addresses[2]),
          static_cast<Storage>(n[8])};
}

AttentionInput input(const Operand& x) {
  return {reinterpret_cast<const void*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

int64_t workspace_bytes(const Numbers& numbers, bool backward) {
  return attention_workspace_bytes(shape_of(numbers, {}, 1.0f, 0.0f), backward);
}

// qkv: q, k, v.  outputs: out, lse, workspace.
void forward(const std::array<Operand, 3>& qkv, const Numbers& numbers, const Addresses& addresses, float scale,
             float softcap, const std::array<uintptr_t, 3>& outputs, uintptr_t stream) {
  AttentionForward args{};
  args.shape = shape_of(numbers, addresses, scale, softcap);
  args.q = input(qkv[0]);
  args.k = input(qkv[1]);
  args.v = input(qkv[2]);
  args.out = output(outputs[0]);
  args.lse = static_cast<float*>(output(outputs[1]));
  launch_attention_forward(args, output(outputs[2]), reinterpret_cast<cudaStream_t>(stream));
}

// operands: q, k, v, out, dout.  outputs: dq, dk, dv, dsinks, workspace.
void backward(const std::array<Operand, 5>& operands, uintptr_t lse, const Numbers& numbers, const Addresses& addresses,
              float scale, float softcap, const std::array<uintptr_t, 5>& outputs, uintptr_t stream) {
  AttentionBackward args{};
  args.shape = shape_of(numbers, addresses, scale, softcap);
  args.q = input(operands[0]);
  args.k = input(operands[1]);
  args.v = input(operands[2]);
  args.out = input(operands[3]);
  args.dout = input(operands[4]);
  args.lse = static_cast<const float*>(output(lse));
  args.dq = output(outputs[0]);
  args.dk = output(outputs[1]);
  args.dv = output(outputs[2]);
  args.dsinks = static_cast<float*>(output(outputs[3]));
  launch_attention_backward(args, output(outputs[4]), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_workspace_bytes", &workspace_bytes);
  m.def("attention_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("attention_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace herdkern::cuda
