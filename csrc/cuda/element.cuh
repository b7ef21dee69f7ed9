// From the type that a binding passes to a type that a kernel is compiled for.
#pragma once
#include "cuda/device.cuh"
#include "cuda/elementwise.h"

namespace herdkern::cuda {

// Calls function(T{}) with the T of `element`.
template <typename Function>
void with_element(Element element, const Function& function) {
  switch (element) {
    case Element::kFloat32:
      return function(float{});
    case Element::kBfloat16:
      return function(bf16{});
    case Element::kFloat16:
      return function(fp16{});
  }
}

}  // namespace herdkern::cuda
