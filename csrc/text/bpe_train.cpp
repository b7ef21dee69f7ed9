// Training with an index of pairs that is updated, never recomputed: see bpe_train.h for what it computes.
//
// Symbols. One array holds every distinct word, one slot a byte, words apart by kBorder. A token of n bytes that starts
// at slot p has its id in slot p and in slot p + n - 1, the slots between are kInside; so both neighbours of a token
// are found in O(1) and a merge touches four slots, however long the word. Index. A pair's frequency never grows after
// the merge that made its younger symbol, so only pairs of at least `threshold_` get an occurrence list and a place in
// the heap; when the heap runs dry the threshold falls and the index is rebuilt by one scan. Exact, and it keeps memory
// small: most pairs are rare. Lists hold slots in rising order and may be stale: an occurrence counts only if both
// symbols are still there.
#include "text/bpe_train.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace herdkern::text {

namespace {

constexpr uint32_t kBorder = 0xFFFFFFFF;  // between words
constexpr uint32_t kInside = 0xFFFFFFFE;  // a slot inside a token
constexpr uint32_t kNone = 0xFFFFFFFF;
constexpr int64_t kThresholdStep = 8;
constexpr int kPrefetch = 8;

uint64_t pair_key(uint32_t left, uint32_t right) { return uint64_t(left) << 32 | right; }

// Open addressing from pair key to a small record that starts as Value{}.
template <typename Value>
class PairMap {
 public:
  PairMap() : slots_(1 << 12, Slot{kFree, Value{}}) {}

  Value* find(uint64_t key) {
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
  template <typename Visit>
  void for_each(Visit&& visit) {
    for (Slot& slot : slots_) {
      if (slot.key != kFree) visit(slot.key, slot.value);
    }
  }

 private:
  static constexpr uint64_t kFree = ~uint64_t(0);  // never a pair: ids stay below kInside
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
  uint32_t left, right;
  int64_t frequency;
  std::unique_ptr<uint32_t[]> occurrences;  // slots of the left symbol
  uint32_t num_occurrences;
};

struct Candidate {  // heap entry; stale when its frequency is not the pair's
  int64_t frequency;
  uint64_t key;
  uint32_t pair;
  bool operator<(const Candidate& other) const {  // std heaps keep the greatest first
    return frequency != other.frequency ? frequency < other.frequency : key > other.key;
  }
};

// What one merge does to the pairs with one neighbour.
struct Change {
  int64_t removed = 0;  // (neighbour, left) or (right, neighbour) lost
  int64_t added = 0;    // (neighbour, new) or (new, neighbour) gained
  uint32_t num_occurrences = 0;
  uint32_t pair = kNone;  // where the gained pair went, kNone if it is too rare
  bool touched = false;
};

struct Neighbours {
  std::vector<Change> changes;                             // by symbol
  std::vector<uint32_t> symbols;                           // the touched ones
  std::vector<std::pair<uint32_t, uint32_t>> occurrences;  // (neighbour, slot of the new pair)

  explicit Neighbours(size_t num_symbols) : changes(num_symbols) {}

  void note(uint32_t neighbour, int64_t weight, bool allowed, uint32_t slot) {
    Change& change = changes[neighbour];
    if (!change.touched) {
      change.touched = true;
      symbols.push_back(neighbour);
    }
    change.removed += weight;
    if (!allowed) return;
    change.added += weight;
    ++change.num_occurrences;
    occurrences.emplace_back(neighbour, slot);
  }
  void reset() {
    for (uint32_t symbol : symbols) changes[symbol] = Change{};
    symbols.clear();
    occurrences.clear();
  }
};

class Trainer {
 public:
  Trainer(const WordCounts& words, const TrainOptions& options)
      : options_(options),
        min_frequency_(std::max<int64_t>(1, options.min_frequency)),
        max_length_(options.max_token_length ? options.max_token_length : std::numeric_limits<uint32_t>::max()),
        token_length_(256, 1),
        before_(size_t(256 + options.max_merges)),
        after_(size_t(256 + options.max_merges)) {
    const int64_t total = lay_out(words);
    threshold_ = std::max(min_frequency_, total / (int64_t(token_length_.size()) + options.max_merges) / 200);
  }

  std::vector<std::pair<uint32_t, uint32_t>> run(const std::function<void(int64_t)>& progress);

 private:
  int64_t lay_out(const WordCounts& words);
  void build_index();
  void add_pair(uint64_t key, int64_t frequency, uint32_t num_occurrences);
  template <typename Visit>
  void for_each_pair(Visit&& visit) const;
  void merge(uint32_t pair_index, uint32_t token);
  void replace_occurrences(const Pair& pair, uint32_t token);
  void update_index(uint32_t left, uint32_t right, uint32_t token);
  template <typename KeyOf>
  void settle(Neighbours& side, KeyOf&& key_of, uint32_t old_symbol, uint32_t token);
  void lose(uint64_t key, int64_t amount);

  // The count of the word that holds a slot. Words lie in order of falling count, so this is a step function; `group`
  // is the caller's place in it and only moves forward.
  int64_t weight_at(uint32_t slot, size_t& group) const {
    if (slot >= group_end_[group]) {
      group = std::upper_bound(group_end_.begin() + group, group_end_.end(), slot) - group_end_.begin();
    }
    return group_weight_[group];
  }

  const TrainOptions& options_;
  const int64_t min_frequency_;
  const uint32_t max_length_;
  std::vector<uint32_t> symbols_;
  std::vector<uint32_t> group_end_;    // first slot after the words of one count
  std::vector<int64_t> group_weight_;  // that count
  std::vector<uint32_t> token_length_;
  int64_t threshold_;
  std::vector<Pair> pairs_;
  PairMap<uint32_t> pair_index_;
  std::vector<Candidate> heap_;
  Neighbours before_, after_;  // scratch of one merge
};

// Returns the sum of all pair frequencies.
int64_t Trainer::lay_out(const WordCounts& words) {
  std::vector<std::pair<int64_t, std::string_view>> order;
  size_t num_slots = 1;
  words.for_each([&](std::string_view word, int64_t count) {
    if (word.size() < 2) return;
    order.emplace_back(count, word);
    num_slots += word.size() + 1;
  });
  if (num_slots >= kInside) {
    throw std::length_error("train_bpe: the distinct words must hold less than 2**32 bytes, got " +
                            std::to_string(num_slots) + "; WordCounts.prune drops the rarest");
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  symbols_.reserve(num_slots);
  symbols_.push_back(kBorder);
  int64_t total = 0;
  for (const auto& [count, word] : order) {
    for (char c : word) symbols_.push_back(options_.byte_id[uint8_t(c)]);
    symbols_.push_back(kBorder);
    if (group_weight_.empty() || group_weight_.back() != count) {
      group_weight_.push_back(count);
      group_end_.push_back(0);
    }
    group_end_.back() = uint32_t(symbols_.size());
    int64_t windows;
    if (__builtin_mul_overflow(count, int64_t(word.size() - 1), &windows) ||
        __builtin_add_overflow(total, windows, &total)) {
      throw std::overflow_error("train_bpe: the sum of word count times word length must stay below 2**63");
    }
  }
  return total;
}

// visit(left, right, slot of left, count of the word) for all pairs, by rising slot.
template <typename Visit>
void Trainer::for_each_pair(Visit&& visit) const {
  size_t group = 0;
  for (uint32_t slot = 1; slot + 1 < symbols_.size();) {
    const uint32_t left = symbols_[slot];
    if (left == kBorder) {
      ++slot;
      continue;
    }
    const uint32_t next = slot + token_length_[left];
    if (symbols_[next] != kBorder) visit(left, symbols_[next], slot, weight_at(slot, group));
    slot = next;
  }
}

void Trainer::add_pair(uint64_t key, int64_t frequency, uint32_t num_occurrences) {
  pair_index_.at_or_new(key) = uint32_t(pairs_.size());
  pairs_.push_back(
      {uint32_t(key >> 32), uint32_t(key), frequency, std::unique_ptr<uint32_t[]>(new uint32_t[num_occurrences]), 0});
  heap_.push_back({frequency, key, uint32_t(pairs_.size() - 1)});
}

// Counts every pair and indexes those of at least threshold_.
void Trainer::build_index() {
  struct Tally {
    int64_t frequency = 0;
    uint32_t num_occurrences = 0;
  };
  pairs_.clear();
  heap_.clear();
  pair_index_ = {};
  {
    PairMap<Tally> tallies;
    for_each_pair([&](uint32_t left, uint32_t right, uint32_t, int64_t weight) {
      if (token_length_[left] + token_length_[right] > max_length_) return;
      Tally& tally = tallies.at_or_new(pair_key(left, right));
      tally.frequency += weight;
      ++tally.num_occurrences;
    });
    tallies.for_each([&](uint64_t key, const Tally& tally) {
      if (tally.frequency >= threshold_) add_pair(key, tally.frequency, tally.num_occurrences);
    });
  }
  for_each_pair([&](uint32_t left, uint32_t right, uint32_t slot, int64_t) {
    if (const uint32_t* index = pair_index_.find(pair_key(left, right))) {
      Pair& pair = pairs_[*index];
      pair.occurrences[pair.num_occurrences++] = slot;
    }
  });
  std::make_heap(heap_.begin(), heap_.end());
}

std::vector<std::pair<uint32_t, uint32_t>> Trainer::run(const std::function<void(int64_t)>& progress) {
  std::vector<std::pair<uint32_t, uint32_t>> merges;
  build_index();
  while (int64_t(merges.size()) < options_.max_merges) {
    if (heap_.empty()) {
      if (threshold_ == min_frequency_) break;
      threshold_ = std::max(min_frequency_, threshold_ / kThresholdStep);
      build_index();
      continue;
    }
    std::pop_heap(heap_.begin(), heap_.end());
    Candidate top = heap_.back();
    heap_.pop_back();
    const Pair& pair = pairs_[top.pair];
    if (pair.frequency < threshold_) continue;  // a later index finds it again
    if (pair.frequency != top.frequency) {
      top.frequency = pair.frequency;
      heap_.push_back(top);
      std::push_heap(heap_.begin(), heap_.end());
      continue;
    }
    const auto token = uint32_t(token_length_.size());
    merges.emplace_back(pair.left, pair.right);
    token_length_.push_back(token_length_[pair.left] + token_length_[pair.right]);
    merge(top.pair, token);
    if (merges.size() % 64 == 0) progress(int64_t(merges.size()));
  }
  return merges;
}

void Trainer::merge(uint32_t pair_index, uint32_t token) {
  const Pair pair = std::move(pairs_[pair_index]);
  replace_occurrences(pair, token);
  pairs_[pair_index].frequency =
      std::numeric_limits<int64_t>::min() / 2;  // gone; later losses leave it below threshold_
  update_index(pair.left, pair.right, token);
}

void Trainer::replace_occurrences(const Pair& pair, uint32_t token) {
  const uint32_t left_length = token_length_[pair.left];
  const uint32_t length = token_length_[token];
  size_t group = 0;
  for (uint32_t i = 0; i < pair.num_occurrences; ++i) {
    if (i + kPrefetch < pair.num_occurrences) __builtin_prefetch(&symbols_[pair.occurrences[i + kPrefetch]], 1);
    const uint32_t slot = pair.occurrences[i];
    const uint32_t middle = slot + left_length;
    if (symbols_[slot] != pair.left || symbols_[middle] != pair.right) continue;
    const int64_t weight = weight_at(slot, group);
    const uint32_t before = symbols_[slot - 1];
    const uint32_t after = symbols_[slot + length];
    if (before != kBorder) {
      before_.note(before, weight, token_length_[before] + length <= max_length_, slot - token_length_[before]);
    }
    if (after != kBorder) after_.note(after, weight, token_length_[after] + length <= max_length_, slot);
    symbols_[middle - 1] = kInside;
    symbols_[middle] = kInside;
    symbols_[slot] = token;
    symbols_[slot + length - 1] = token;
  }
}

// In a run of merges ("abab") the first notes (token, left) as gained and the second, whose left neighbour is the new
// token, notes it as lost: the two are netted here.
void Trainer::update_index(uint32_t left, uint32_t right, uint32_t token) {
  after_.changes[left].added -= before_.changes[token].removed;
  before_.changes[token].removed = 0;
  settle(before_, [&](uint32_t symbol, uint32_t with) { return pair_key(symbol, with); }, left, token);
  settle(after_, [&](uint32_t symbol, uint32_t with) { return pair_key(with, symbol); }, right, token);
}

// Of each neighbour: its pair with `old_symbol` becomes rarer, its pair with `token` is new. key_of(neighbour, other).
template <typename KeyOf>
void Trainer::settle(Neighbours& side, KeyOf&& key_of, uint32_t old_symbol, uint32_t token) {
  for (uint32_t symbol : side.symbols) {
    Change& change = side.changes[symbol];
    lose(key_of(symbol, old_symbol), change.removed);
    if (change.added < threshold_) continue;
    change.pair = uint32_t(pairs_.size());
    add_pair(key_of(symbol, token), change.added, change.num_occurrences);
    std::push_heap(heap_.begin(), heap_.end());
  }
  for (const auto& [symbol, slot] : side.occurrences) {
    const uint32_t index = side.changes[symbol].pair;
    if (index == kNone) continue;
    Pair& pair = pairs_[index];
    pair.occurrences[pair.num_occurrences++] = slot;
  }
  side.reset();
}

void Trainer::lose(uint64_t key, int64_t amount) {
  if (amount == 0) return;
  if (const uint32_t* index = pair_index_.find(key)) pairs_[*index].frequency -= amount;
}

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> train_merges(const WordCounts& words, const TrainOptions& options,
                                                        const std::function<void(int64_t)>& progress) {
  return Trainer(words, options).run(progress);
}

}  // namespace herdkern::text
