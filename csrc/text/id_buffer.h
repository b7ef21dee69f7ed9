// A growing array of token ids that leaves new memory unwritten.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace herdkern::text {

class IdBuffer {
 public:
  struct Free {
    void operator()(uint32_t* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<uint32_t[], Free>;

  // Room for n more ids behind the last one; call grow_by after writing them.
  uint32_t* room_for(size_t n) {
    if (size_ + n > capacity_) resize(size_ + n + capacity_ / 2 + 64);
    return ids_.get() + size_;
  }
  void reserve(size_t capacity) {
    if (capacity > capacity_) resize(capacity);
  }
  void grow_by(size_t n) { size_ += n; }
  void push(uint32_t id) {
    *room_for(1) = id;
    grow_by(1);
  }
  void pop() { --size_; }
  void clear() { size_ = 0; }
  size_t size() const { return size_; }
  const uint32_t* data() const { return ids_.get(); }
  uint32_t* data() { return ids_.get(); }
  // The memory, cut to what is used.
  Memory release() {
    if (size_ < capacity_ || !ids_) resize(size_ + 1);  // an array needs an address even when it is empty
    return std::move(ids_);
  }

 private:
  // realloc moves the pages of large arrays instead of their bytes.
  void resize(size_t capacity) {
    void* memory = std::realloc(ids_.get(), capacity * sizeof(uint32_t));
    if (memory == nullptr) throw std::bad_alloc();
    (void)ids_.release();
    ids_.reset(static_cast<uint32_t*>(memory));
    capacity_ = capacity;
  }
  Memory ids_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace herdkern::text
