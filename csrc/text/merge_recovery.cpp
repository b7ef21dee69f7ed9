// Merge recovery: see merge_recovery.h for the rule.
#include "text/merge_recovery.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "text/bpe_tables.h"

namespace herdkern::text {

namespace {

constexpr uint64_t kBase =
    0x9E3779B97F4A7C15ull;     // of the polynomial hash, modulo 2**64; hits are compared byte by byte
constexpr size_t kShort = 48;  // units; up to here a linear search for the lowest rank beats a heap

class Recovery {
 public:
  Recovery(const std::vector<std::string_view>& tokens, MergeUnit unit) : tokens_(tokens), unit_(unit) {
    size_t longest = 0, slots = 16;
    for (const auto token : tokens) longest = std::max(longest, token.size());
    while (slots < 2 * tokens.size()) slots *= 2;
    mask_ = slots - 1;
    slots_.resize(slots);
    powers_.assign(longest + 1, 1);
    for (size_t i = 1; i <= longest; ++i) powers_[i] = powers_[i - 1] * kBase;
    prefixes_.resize(longest + 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
      hash_prefixes(tokens[i]);
      const uint64_t hash = mix(prefixes_[tokens[i].size()]);
      size_t at = hash & mask_;
      while (slots_[at].index != kNoToken) at = (at + 1) & mask_;
      slots_[at] = {uint32_t(hash >> 32), uint32_t(i)};
      if (tokens[i].size() == 2) byte_pairs_[pair_of(tokens[i].data())] = uint32_t(i);
    }
  }

  // Writes the two parts of token i; returns how many parts are left of it.
  uint32_t recover(uint32_t i, uint32_t* pair) {
    token_ = tokens_[i];
    limit_ = i;
    pair[0] = pair[1] = kNoToken;
    starts_.clear();
    for (size_t at = 0; at < token_.size(); ++at) {
      const bool continues = unit_ == MergeUnit::kCharacter && at != 0 && (uint8_t(token_[at]) & 0xC0) == 0x80;
      if (!continues) starts_.push_back(uint32_t(at));
    }
    if (starts_.size() == 1) return 1;
    starts_.push_back(uint32_t(token_.size()));
    hash_prefixes(token_);
    if (starts_.size() > kShort) {
      merge_long();
    } else if (starts_.size() > 3) {
      merge_short();
    }
    if (starts_.size() == 3) {
      pair[0] = find(starts_[0], starts_[1]);
      pair[1] = find(starts_[1], starts_[2]);
    }
    return uint32_t(starts_.size() - 1);
  }

 private:
  struct Slot {
    uint32_t tag = 0;  // the hash bits that do not choose the slot
    uint32_t index = kNoToken;
  };

  void hash_prefixes(std::string_view token) {
    for (size_t i = 0; i < token.size(); ++i) prefixes_[i + 1] = prefixes_[i] * kBase + uint8_t(token[i]) + 1;
  }
  static uint64_t mix(uint64_t hash) {
    hash = (hash ^ hash >> 32) * kBase;
    return hash ^ hash >> 29;
  }
  static size_t pair_of(const char* bytes) { return size_t(uint8_t(bytes[0])) << 8 | uint8_t(bytes[1]); }

  // The place of token_[begin, end), kNoToken if it is none.
  uint32_t find(uint32_t begin, uint32_t end) const {
    const uint32_t len = end - begin;
    if (len == 2) return byte_pairs_[pair_of(token_.data() + begin)];
    const uint64_t hash = mix(prefixes_[end] - prefixes_[begin] * powers_[len]);
    for (size_t at = hash & mask_;; at = (at + 1) & mask_) {
      const Slot slot = slots_[at];
      if (slot.index == kNoToken) return kNoToken;
      if (slot.tag != uint32_t(hash >> 32)) continue;
      const std::string_view other = tokens_[slot.index];
      if (other.size() == len && std::memcmp(other.data(), token_.data() + begin, len) == 0) return slot.index;
    }
  }
  uint32_t rank(uint32_t begin, uint32_t end) const {
    const uint32_t index = find(begin, end);
    return index < limit_ ? index : kNoToken;
  }

  void merge_short() {
    uint32_t ranks[kShort];  // of the parts i and i + 1 together
    size_t n = starts_.size() - 1;
    for (size_t i = 0; i + 1 < n; ++i) ranks[i] = rank(starts_[i], starts_[i + 2]);
    while (n > 2) {
      const size_t at = size_t(std::min_element(ranks, ranks + n - 1) - ranks);
      if (ranks[at] == kNoToken) break;
      starts_.erase(starts_.begin() + std::ptrdiff_t(at) + 1);
      std::copy(ranks + at + 1, ranks + n - 1, ranks + at);
      --n;
      if (at + 1 < n) ranks[at] = rank(starts_[at], starts_[at + 2]);
      if (at > 0) ranks[at - 1] = rank(starts_[at - 1], starts_[at + 1]);
    }
  }

  // The same with a heap over a linked list of parts.
  void merge_long() {
    const uint32_t n = uint32_t(starts_.size() - 1);
    next_.resize(n), previous_.resize(n), ranks_.assign(n, kNoToken);
    heap_.clear();
    const auto later = std::greater<uint64_t>();
    const auto update = [&](uint32_t at) {
      const uint32_t second = next_[at];
      ranks_[at] = second < n ? rank(starts_[at], starts_[next_[second]]) : kNoToken;
      if (ranks_[at] == kNoToken) return;
      heap_.push_back(uint64_t(ranks_[at]) << 32 | at);
      std::push_heap(heap_.begin(), heap_.end(), later);
    };
    for (uint32_t i = 0; i < n; ++i) next_[i] = i + 1, previous_[i] = i - 1;
    for (uint32_t i = 0; i < n; ++i) update(i);
    uint32_t left = n;
    while (!heap_.empty() && left > 2) {
      std::pop_heap(heap_.begin(), heap_.end(), later);
      const auto lowest = uint32_t(heap_.back() >> 32), at = uint32_t(heap_.back());
      heap_.pop_back();
      if (ranks_[at] != lowest) continue;
      const uint32_t gone = next_[at];
      ranks_[gone] = kNoToken;
      next_[at] = next_[gone];
      if (next_[at] < n) previous_[next_[at]] = at;
      --left;
      update(at);
      if (at > 0) update(previous_[at]);
    }
    size_t kept = 0;
    for (uint32_t at = 0; at < n; at = next_[at]) starts_[kept++] = starts_[at];
    starts_[kept++] = uint32_t(token_.size());
    starts_.resize(kept);
  }

  const std::vector<std::string_view>& tokens_;
  const MergeUnit unit_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> byte_pairs_ = std::vector<uint32_t>(1 << 16, kNoToken);  // places of the tokens of two bytes
  size_t mask_ = 0;
  std::vector<uint64_t> powers_, prefixes_;  // prefixes_[i]: hash of the first i bytes of the token at hand
  std::string_view token_;
  uint32_t limit_ = 0;
  std::vector<uint32_t> starts_;  // of the parts left, and the end of the last one
  std::vector<uint32_t> next_, previous_, ranks_;
  std::vector<uint64_t> heap_;  // rank << 32 | part; stale when ranks_ says otherwise
};

}  // namespace

RecoveredMerges recover_merges(const std::vector<std::string_view>& tokens, MergeUnit unit) {
  for (const auto token : tokens) {
    if (token.empty() || token.size() >= kNoToken) {
      throw std::invalid_argument("recover_merges: tokens must have 1 to 2**32 - 2 bytes");
    }
  }
  RecoveredMerges result;
  result.pairs.resize(2 * tokens.size());
  result.num_parts.resize(tokens.size());
  Recovery recovery(tokens, unit);
  for (size_t i = 0; i < tokens.size(); ++i) {
    result.num_parts[i] = recovery.recover(uint32_t(i), &result.pairs[2 * i]);
  }
  return result;
}

}  // namespace herdkern::text
