// A filter that lets through only the edges that connect something new: of the edges between documents of a partition a
// spanning forest is left. It knows a bounded number of documents and forgets all when there are more; then it lets
// through more than a forest, never less.
#pragma once
#include <cstdint>
#include <vector>

#include "text/minhash.h"
#include "text/union_find.h"

namespace herdkern::text {

class ForestFilter {
 public:
  explicit ForestFilter(size_t max_bytes) {  // a document takes 12 bytes of the table, half full at most, and a parent
    while (max_slots_ * 2 * 16 <= max_bytes) max_slots_ *= 2;
    clear();
  }

  // True if the two were not connected by what it remembers; now they are.
  bool unite(uint64_t a, uint64_t b) {
    if (parents_.size() + 2 > slots_.size() / 2) {
      if (slots_.size() >= max_slots_) {
        clear();
      } else {
        grow();
      }
    }
    const uint32_t x = root(number_of(a)), y = root(number_of(b));
    if (x == y) return false;
    parents_[x < y ? y : x] = x < y ? x : y;
    return true;
  }

 private:
  struct Slot {
    uint32_t number_plus_1 = 0;
    uint32_t doc_low = 0, doc_high = 0;
  };
  void clear() {
    slots_.assign(1024, Slot{});
    slots_.shrink_to_fit();
    std::vector<uint32_t>().swap(parents_);
  }
  static uint64_t doc_of(const Slot& slot) { return uint64_t{slot.doc_high} << 32 | slot.doc_low; }
  size_t place_of(uint64_t doc) const {
    size_t place = multiply_fold(doc + 1, kGolden) & (slots_.size() - 1);
    while (slots_[place].number_plus_1 != 0 && doc_of(slots_[place]) != doc) place = (place + 1) & (slots_.size() - 1);
    return place;
  }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (const Slot& slot : old)
      if (slot.number_plus_1 != 0) slots_[place_of(doc_of(slot))] = slot;
  }
  uint32_t number_of(uint64_t doc) {
    Slot& slot = slots_[place_of(doc)];
    if (slot.number_plus_1 == 0) {
      slot = {static_cast<uint32_t>(parents_.size()) + 1, static_cast<uint32_t>(doc), static_cast<uint32_t>(doc >> 32)};
      parents_.push_back(static_cast<uint32_t>(parents_.size()));
    }
    return slot.number_plus_1 - 1;
  }
  uint32_t root(uint32_t x) {
    while (parents_[x] != x) x = parents_[x] = parents_[parents_[x]];
    return x;
  }
  size_t max_slots_ = 1024;
  std::vector<Slot> slots_;
  std::vector<uint32_t> parents_;
};

}  // namespace herdkern::text
