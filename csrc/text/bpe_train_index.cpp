// The index of pairs: see bpe_train_index.h.
#include "text/bpe_train_index.h"

#include <algorithm>

#include "text/parallel.h"

namespace herdkern::text {

namespace {

constexpr uint32_t kBlock = 1024;  // slots
constexpr size_t kAhead = 8;
constexpr size_t kMinBuckets = 1 << 16, kMaxBuckets = 1 << 20;  // of eight bytes: the last fit a level-3 cache

}  // namespace

// visit(key, slot, weight) for the pairs of one thread whose buckets are marked as frequent. They are found a block at
// a time and without branches, so that their places in `map` can be fetched ahead.
template <typename Map, typename Visit>
void PairIndex::for_each_frequent(int thread, const Map& map, Visit&& visit) const {
  const auto range = buckets_of(thread);
  const auto first = range.first, end = range.second;
  const bool limited = max_length_ != UINT32_MAX;
  words_.with_symbols([&](const auto* symbols) {
    using Symbol = std::remove_const_t<std::remove_pointer_t<decltype(symbols)>>;
    words_.for_each_group([&](uint32_t group_begin, uint32_t group_end, int64_t weight) {
      for (uint32_t begin = group_begin; begin < group_end; begin += kBlock) {
        uint32_t slots[kBlock];
        size_t num_found = 0;
        for (uint32_t slot = begin, block_end = std::min(begin + kBlock, group_end); slot < block_end; ++slot) {
          const Symbol left = symbols[slot], right = symbols[slot + 1];
          const bool is_pair = (left != kBorder<Symbol>)&(right != kBorder<Symbol>);
          const size_t bucket = is_pair ? bucket_of(left, right) : first;
          slots[num_found] = slot;
          num_found += is_pair & (frequent_[bucket / 64] >> bucket % 64 & 1) & (bucket >= first) & (bucket < end);
        }
        const auto key_at = [&](size_t i) { return pair_key(symbols[slots[i]], symbols[slots[i] + 1]); };
        for (size_t i = 0; i < num_found; ++i) {
          if (i + kAhead < num_found) map.prefetch(key_at(i + kAhead));
          const uint64_t key = key_at(i);
          if (!limited || allows(uint32_t(key >> 32), uint32_t(key))) visit(key, slots[i], weight);
        }
      }
    });
  });
}

int64_t PairIndex::scan() {
  std::vector<Pair>().swap(pairs_);
  std::vector<Candidate>().swap(heap_);
  std::vector<uint32_t>().swap(occurrences_);
  by_key_ = PairMap<uint32_t>();
  by_bytes_ = lengths_.size() <= 256;
  size_t num_buckets = kMinBuckets;
  while (!by_bytes_ && num_buckets < kMaxBuckets && num_buckets < words_.num_slots() / 2) num_buckets *= 2;
  buckets_.assign(num_buckets, 0);
  parallel_for(num_threads_, num_threads_, [&](int64_t thread) {
    const auto range = buckets_of(int(thread));
    const auto first = range.first, end = range.second;
    words_.with_symbols([&](const auto* symbols) {
      using Symbol = std::remove_const_t<std::remove_pointer_t<decltype(symbols)>>;
      words_.for_each_group([&](uint32_t slot, uint32_t group_end, int64_t weight) {
        for (; slot < group_end; ++slot) {
          const Symbol left = symbols[slot], right = symbols[slot + 1];
          const size_t bucket = bucket_of(left, right);
          const bool counts = (left != kBorder<Symbol>)&(right != kBorder<Symbol>)&(bucket >= first) & (bucket < end);
          buckets_[counts ? bucket : first] += counts ? weight : 0;
        }
      });
    });
  });
  return *std::max_element(buckets_.begin(), buckets_.end());
}

void PairIndex::mark_frequent(int64_t threshold) {
  frequent_.assign(buckets_.size() / 64, 0);
  for (size_t i = 0; i < buckets_.size(); ++i) frequent_[i / 64] |= uint64_t(buckets_[i] >= threshold) << i % 64;
}

// The frequencies of byte pairs are in the buckets already.
void PairIndex::tally_bytes(PairMap<Tally>& tallies) const {
  std::vector<uint32_t> num_occurrences(buckets_.size());
  words_.with_symbols([&](const auto* symbols) {
    using Symbol = std::remove_const_t<std::remove_pointer_t<decltype(symbols)>>;
    words_.for_each_group([&](uint32_t slot, uint32_t group_end, int64_t) {
      for (; slot < group_end; ++slot) {
        const Symbol left = symbols[slot], right = symbols[slot + 1];
        const bool is_pair = (left != kBorder<Symbol>)&(right != kBorder<Symbol>);
        num_occurrences[is_pair ? bucket_of(left, right) : 0] += is_pair;
      }
    });
  });
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const uint32_t left = uint32_t(i >> 8), right = uint32_t(i & 255);
    if ((frequent_[i / 64] >> i % 64 & 1) == 0 || num_occurrences[i] == 0 || !allows(left, right)) continue;
    tallies.at_or_new(pair_key(left, right)) = {buckets_[i], num_occurrences[i]};
  }
}

std::vector<PairMap<PairIndex::Tally>> PairIndex::tally() const {
  std::vector<PairMap<Tally>> tallies(static_cast<size_t>(num_threads_));
  if (by_bytes_) {
    tally_bytes(tallies[0]);
    return tallies;
  }
  parallel_for(num_threads_, num_threads_, [&](int64_t thread) {
    PairMap<Tally>& own = tallies[size_t(thread)];
    for_each_frequent(int(thread), own, [&](uint64_t key, uint32_t, int64_t weight) {
      Tally& tally = own.at_or_new(key);
      tally.frequency += weight;
      ++tally.num_occurrences;
    });
  });
  return tallies;
}

// The lowest threshold, not below the given one, whose pairs fill at most half of the room: merges need the rest. The
// most frequent pairs are in whatever they take.
int64_t PairIndex::affordable(std::vector<PairMap<Tally>>& tallies, int64_t threshold) const {
  std::vector<std::pair<int64_t, uint32_t>> sizes;
  size_t total = 0;
  for (auto& own : tallies) {
    own.for_each([&](uint64_t, const Tally& tally) {
      if (tally.frequency < threshold) return;
      sizes.emplace_back(tally.frequency, tally.num_occurrences);
      total += tally.num_occurrences;
    });
  }
  if (total <= room_ / 2) return threshold;
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  total = 0;
  for (const auto& [frequency, num_occurrences] : sizes) {
    if ((total += num_occurrences) > room_ / 2 && frequency < sizes[0].first) return frequency + 1;
  }
  return threshold;
}

void PairIndex::build(int64_t threshold, size_t room) {
  room_ = room;
  {
    mark_frequent(threshold);
    auto tallies = tally();
    threshold_ = affordable(tallies, threshold);
    if (threshold_ > threshold) mark_frequent(threshold_);
    size_t num_occurrences = 0;
    for (auto& own : tallies) {
      own.for_each([&](uint64_t, const Tally& tally) {
        if (tally.frequency >= threshold_) num_occurrences += tally.num_occurrences;
      });
    }
    room_ = std::max(room_, 2 * num_occurrences);
    occurrences_.reserve(room_);
    for (auto& own : tallies) {
      own.for_each([&](uint64_t key, const Tally& tally) {
        if (tally.frequency < threshold_) return;
        add(uint32_t(key >> 32), uint32_t(key), tally.frequency, tally.num_occurrences);
      });
    }
  }
  parallel_for(num_threads_, num_threads_, [&](int64_t thread) {
    for_each_frequent(int(thread), by_key_, [&](uint64_t key, uint32_t slot, int64_t) {
      if (const uint32_t* index = by_key_.find(key)) add_occurrence(*index, slot);
    });
  });
}

uint32_t PairIndex::add(uint32_t left, uint32_t right, int64_t frequency, uint32_t num_occurrences) {
  const uint32_t index = uint32_t(pairs_.size());
  by_key_.at_or_new(pair_key(left, right)) = index;
  pairs_.push_back({frequency, occurrences_.size(), 0});
  occurrences_.resize(occurrences_.size() + num_occurrences);
  heap_.push_back({frequency, left, right, index});
  std::push_heap(heap_.begin(), heap_.end());
  return index;
}

Candidate PairIndex::pop() {
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end());
    Candidate top = heap_.back();
    heap_.pop_back();
    const int64_t frequency = pairs_[top.pair].frequency;
    if (frequency < threshold_) continue;  // a later index finds it again
    if (frequency == top.frequency) return top;
    top.frequency = frequency;
    heap_.push_back(top);
    std::push_heap(heap_.begin(), heap_.end());
  }
  return {0, 0, 0, kNone};
}

}  // namespace herdkern::text
