// Scratch memory of a kernel: 64-byte aligned, not initialised, freed at the end of the scope.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#ifndef HK_ISA
#error "workspace.h belongs in a kernel source, which setup.py compiles once per level"
#endif

namespace herdkern::cpu::HK_ISA {

template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t count) {
    if (count == 0) return;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();  // pybind11 raises MemoryError
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace herdkern::cpu::HK_ISA
