// The storage types of the element-wise kernels, as bindings pass them.
#pragma once

namespace herdkern::cpu {

enum class Element : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

}  // namespace herdkern::cpu
