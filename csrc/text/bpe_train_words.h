// The distinct words of a corpus as training holds them: one array of symbols, words apart by a border, in order of
// falling count. A symbol has two bytes while every id fits, then four.
//
// A token made since the last `compact` covers as many slots as its parts: its id stands in the first and the last of
// them, so both neighbours of a token are found in O(1) and a merge touches four slots, however long the word.
// `compact` closes the gaps and drops words that have become one token.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace herdkern::text {

// Calls visit(word, count) for every distinct word, in any order; can be called again and visits the same words, but
// not after is_last: then it may drop them as it goes.
using WordVisitor = std::function<void(std::string_view word, int64_t count)>;
using WordStream = std::function<void(const WordVisitor& visit, bool is_last)>;

// The ids that a word starts as, written over `ids`: at most as many as bytes. Called from several threads.
using Segmenter = std::function<void(std::string_view word, std::vector<uint32_t>& ids)>;

template <typename Symbol>
constexpr Symbol kBorder = Symbol(-1);  // between words
template <typename Symbol>
constexpr Symbol kInside = Symbol(-2);  // a slot inside a token

// Zeroed memory, in pages of 2 MiB where the system has them: training reads it in random order.
class PageArray {
 public:
  PageArray() = default;
  explicit PageArray(size_t bytes);
  PageArray(PageArray&& other) noexcept { *this = std::move(other); }
  PageArray& operator=(PageArray&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~PageArray();
  void forget_behind(size_t bytes);  // what lies there need not be kept
  void* data() const { return data_; }

 private:
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

// Something for each count of a word: small counts are quick.
class PerCount {
 public:
  uint64_t& operator[](int64_t count) { return count < kDense ? dense_[size_t(count)] : sparse_[count]; }
  // (count, value) of those that are not 0, by falling count.
  std::vector<std::pair<int64_t, uint64_t>> falling() const;

 private:
  static constexpr int64_t kDense = 1 << 12;
  std::vector<uint64_t> dense_ = std::vector<uint64_t>(kDense);
  std::unordered_map<int64_t, uint64_t> sparse_;
};

class TrainWords {
 public:
  // Lays the words out as bytes; those of one byte hold no pair and are left out. Throws as train_merges does: with
  // room for less than all of `max_slots` it names the counts that would have to go.
  TrainWords(const WordStream& words, bool wide, size_t max_slots);

  // Turns every byte b into byte_ids[b].
  void name_bytes(const uint32_t* byte_ids);
  // Turns every word into the ids that `segment` gives.
  void segment(const Segmenter& segment, int num_threads);
  // One slot for each symbol; afterwards every width is 1. `widths`: slots of each id. `alias` becomes `original`.
  void compact(const std::vector<uint32_t>& widths, uint32_t alias, uint32_t original);
  // Four bytes for each symbol from now on.
  void widen();

  bool wide() const { return wide_; }
  bool fits(uint32_t id) const { return wide_ || id < kInside<uint16_t>; }
  size_t num_slots() const { return num_slots_; }
  size_t memory() const { return num_slots_ * (wide_ ? sizeof(uint32_t) : sizeof(uint16_t)); }

  // f(symbols) with the array in the type it has.
  template <typename F>
  decltype(auto) with_symbols(F&& f) {
    return wide_ ? f(static_cast<uint32_t*>(symbols_.data())) : f(static_cast<uint16_t*>(symbols_.data()));
  }

  // The count of the word that holds a slot. Words lie in order of falling count, so this is a step function; `group`
  // is the caller's place in it and only moves forward.
  int64_t weight_at(uint32_t slot, size_t& group) const {
    if (slot >= group_end_[group]) {
      group = size_t(std::upper_bound(group_end_.begin() + group, group_end_.end(), slot) - group_end_.begin());
    }
    return group_weight_[group];
  }
  // visit(first slot, last slot, count) for the words of each count: with the slots in between the last one is the left
  // symbol of a pair, or a border. Right after `compact`.
  template <typename Visit>
  void for_each_group(Visit&& visit) const {
    uint32_t begin = 1;
    for (size_t group = 0; group < group_end_.size(); ++group) {
      visit(begin, group_end_[group] - 1, group_weight_[group]);
      begin = group_end_[group];
    }
  }

 private:
  PerCount plan(const WordStream& words, size_t max_slots);
  template <typename Symbol>
  void segment_range(const Segmenter& segment, Symbol* symbols, size_t begin, size_t end);
  template <typename Symbol>
  size_t compact_symbols(Symbol* symbols, const std::vector<uint32_t>& widths, uint32_t alias, uint32_t original);

  bool wide_;
  size_t num_slots_ = 1;
  PageArray symbols_;
  std::vector<uint32_t> group_end_;    // first slot after the words of one count
  std::vector<int64_t> group_weight_;  // that count
};

}  // namespace herdkern::text
