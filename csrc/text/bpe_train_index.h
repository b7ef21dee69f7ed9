// The pairs that training may merge next: their frequencies, where they occur, and which is first.
//
// A pair's frequency never grows after the merge that made its younger symbol, so only pairs of at least `threshold`
// are kept here; when they run out, the threshold falls and the index is built anew by scanning the words. Exact, and
// it keeps memory small: most pairs are rare. The scan first adds the weights up in a table of hashed buckets that fits
// the cache; only a pair whose bucket reaches the threshold gets an exact counter. Occurrences lie in one array, each
// list at its exact size; what merged pairs leave behind is freed by the next scan, which also comes when it is full.
#pragma once
#include <cstdint>
#include <vector>

#include "text/bpe_train_words.h"
#include "text/word_key.h"

namespace herdkern::text {

constexpr uint32_t kNone = 0xFFFFFFFF;

inline uint64_t pair_key(uint32_t left, uint32_t right) { return uint64_t(left) << 32 | right; }

// Open addressing from pair key to a small record that starts as Value{}.
template <typename Value>
class PairMap {
 public:
  explicit PairMap(size_t num_slots = 1 << 10) : slots_(num_slots, Slot{kFree, Value{}}) {}

  const Value* find(uint64_t key) const {
    for (size_t i = home(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].key == key) return &slots_[i].value;
      if (slots_[i].key == kFree) return nullptr;
    }
  }
  Value& at_or_new(uint64_t key) {
    if ((size_ + 1) * 2 > slots_.size()) grow();
    size_t i = home(key);
    while (slots_[i].key != kFree && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    if (slots_[i].key == kFree) {
      slots_[i].key = key;
      ++size_;
    }
    return slots_[i].value;
  }
  void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[home(key)], 1); }
  template <typename Visit>
  void for_each(Visit&& visit) {
    for (Slot& slot : slots_) {
      if (slot.key != kFree) visit(slot.key, slot.value);
    }
  }
  size_t size() const { return size_; }

 private:
  static constexpr uint64_t kFree = ~uint64_t(0);  // never a pair: ids stay below it
  struct Slot {
    uint64_t key;
    Value value;
  };
  size_t home(uint64_t key) const { return mix(key, 0x9E3779B97F4A7C15ull) & (slots_.size() - 1); }
  void grow() {
    std::vector<Slot> old(slots_.size() * 2, Slot{kFree, Value{}});
    old.swap(slots_);
    size_ = 0;
    for (Slot& slot : old) {
      if (slot.key != kFree) at_or_new(slot.key) = slot.value;
    }
  }
  std::vector<Slot> slots_;
  size_t size_ = 0;
};

struct Pair {
  int64_t frequency;
  size_t first;  // its slots of the left symbol are occurrences[first ...], rising; may be stale
  uint32_t num_occurrences;
};

struct Candidate {  // heap entry; stale when its frequency is not the pair's
  int64_t frequency;
  uint32_t left, right, pair;
  uint64_t key() const { return pair_key(left, right); }
  bool operator<(const Candidate& other) const {  // std heaps keep the greatest first
    return frequency != other.frequency ? frequency < other.frequency : key() > other.key();
  }
};

class PairIndex {
 public:
  // `lengths`: bytes of each token; a pair of more than max_length bytes is no candidate.
  PairIndex(TrainWords& words, const std::vector<uint32_t>& lengths, uint32_t max_length, int num_threads)
      : words_(words), lengths_(lengths), max_length_(max_length), num_threads_(num_threads) {}

  // Scans compacted words anew and forgets all pairs. Returns an upper bound of their frequencies.
  int64_t scan();
  // Indexes the pairs that the scan saw at least `threshold` times, or fewer by a higher threshold where their
  // occurrences would fill more than half of `room`. Can be called again with a lower threshold if it found none.
  void build(int64_t threshold, size_t room);
  // Gives back what the scan found, once nothing more is built of it.
  void forget_scan() {
    std::vector<int64_t>().swap(buckets_);
    std::vector<uint64_t>().swap(frequent_);
  }

  bool allows(uint32_t left, uint32_t right) const { return uint64_t(lengths_[left]) + lengths_[right] <= max_length_; }
  int64_t threshold() const { return threshold_; }
  bool empty() const { return heap_.empty(); }
  // The first pair, taken out of the heap with its occurrences up to date; pair kNone if none is left.
  Candidate pop();
  const Pair& pair(uint32_t index) const { return pairs_[index]; }
  const uint32_t* occurrences(const Pair& pair) const { return occurrences_.data() + pair.first; }

  void lose(uint64_t key, int64_t amount) {
    if (const uint32_t* index = by_key_.find(key)) pairs_[*index].frequency -= amount;
  }
  void forget(uint32_t index) { pairs_[index].frequency = INT64_MIN / 2; }  // later losses leave it below the threshold
  bool has_room(size_t num_occurrences) const { return occurrences_.size() + num_occurrences <= room_; }
  // A new pair with an empty list of that size; returns its index.
  uint32_t add(uint32_t left, uint32_t right, int64_t frequency, uint32_t num_occurrences);
  void add_occurrence(uint32_t index, uint32_t slot) {
    Pair& pair = pairs_[index];
    occurrences_[pair.first + pair.num_occurrences++] = slot;
  }

 private:
  struct Tally {
    int64_t frequency = 0;
    uint32_t num_occurrences = 0;
  };
  size_t bucket_of(uint32_t left, uint32_t right) const {
    if (by_bytes_) return left << 8 | right;
    return mix(pair_key(left, right), 0xD1B54A32D192ED03ull) & (buckets_.size() - 1);
  }
  // Pairs are shared out by bucket, so that no two threads touch the same counter: [first, end) is a thread's.
  std::pair<size_t, size_t> buckets_of(int thread) const {
    const size_t n = size_t(num_threads_);
    return {buckets_.size() * size_t(thread) / n, buckets_.size() * size_t(thread + 1) / n};
  }
  template <typename Map, typename Visit>
  void for_each_frequent(int thread, const Map& map, Visit&& visit) const;
  void mark_frequent(int64_t threshold);
  std::vector<PairMap<Tally>> tally() const;
  void tally_bytes(PairMap<Tally>& tallies) const;
  int64_t affordable(std::vector<PairMap<Tally>>& tallies, int64_t threshold) const;

  TrainWords& words_;
  const std::vector<uint32_t>& lengths_;
  const uint32_t max_length_;
  const int num_threads_;
  bool by_bytes_ = false;  // all ids are below 256: a bucket for each pair
  std::vector<int64_t> buckets_;
  std::vector<uint64_t> frequent_;  // a bit for each bucket that reaches the threshold
  int64_t threshold_ = INT64_MAX;
  size_t room_ = 0;
  std::vector<Pair> pairs_;
  std::vector<uint32_t> occurrences_;
  PairMap<uint32_t> by_key_;
  std::vector<Candidate> heap_;
};

}  // namespace herdkern::text
