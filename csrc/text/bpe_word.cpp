// Encoding of one word: see bpe_word.h for the rules.
#include "text/bpe_word.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace herdkern::text {

namespace {

constexpr size_t kShortWord = 64;
constexpr size_t kKeptScratch = 1 << 16;  // bytes of a word whose scratch is kept
constexpr size_t kPadding = 16;
static_assert(kPadding >= kReadBehind);
constexpr int32_t kNoMerge = 0x7FFFFFFF;

template <typename T>
void give_back(std::vector<T>& array) {
  std::vector<T>().swap(array);
}

int32_t lowest_of(const int32_t* values, size_t n) {
  int32_t lowest[4] = {kNoMerge, kNoMerge, kNoMerge, kNoMerge};
  for (size_t i = 0; i < n; i += 4) {
    for (size_t lane = 0; lane < 4; ++lane) lowest[lane] = std::min(lowest[lane], values[i + lane]);
  }
  return std::min(std::min(lowest[0], lowest[1]), std::min(lowest[2], lowest[3]));
}

// The search for one token in two steps. len 0: there is none.
struct PairLookup {
  PairLookup(const TokenTable& table, const uint8_t* at, size_t length) : bytes(at), len(length) {
    if (len - 1 >= kShortKey) return;
    key = short_key(bytes, len);
    hash = hash_short(key);
    if (table.may_hold(hash)) {
      table.prefetch(hash);
    } else {
      len = 0;
    }
  }
  uint32_t id(const TokenTable& table) const {
    if (len == 0) return kNoToken;
    return len <= kShortKey ? table.find_short(key, hash) : table.find_long(bytes, len);
  }
  const uint8_t* bytes;
  size_t len;
  ShortKey key{0, 0};
  uint64_t hash = 0;
};

// Place of the next set bit behind `at`, or `none`.
size_t next_bit(uint64_t bits, size_t at, size_t none) {
  const uint64_t rest = bits >> at >> 1;
  return rest == 0 ? none : at + 1 + size_t(__builtin_ctzll(rest));
}

}  // namespace

void WordEncoder::Scratch::shrink() {
  if (rows.dead.capacity() > kKeptScratch / 64) give_back(rows.dead);
  if (bytes.capacity() <= kKeptScratch) return;
  give_back(bytes);
  for (auto* array : {&ids, &next, &previous, &ranks}) give_back(*array);
  give_back(heap);
}

WordEncoder::WordEncoder(const TokenList& tokens)
    : table_(tokens), bytes_(tokens), rows_(tokens, table_, bytes_), merge_word_(find_merge_word()) {
  if (!rows_.is_regular()) return;
  merges_ = MergeTable(rows_.parts(), bytes_);
  starts_ = WordStarts(tokens, rows_.parts(), table_, merges_);
}

void WordEncoder::encode(const uint8_t* word, size_t len, ShortKey key, uint64_t hash, const uint8_t* readable_end,
                         Scratch& scratch, IdBuffer& out) const {
  uint32_t whole = kNoToken;
  if (len > kShortKey) {
    whole = table_.find_long(word, len);
  } else if (table_.may_hold(hash)) {
    whole = table_.find_short(key, hash);
  }
  if (whole != kNoToken) return out.push(whole);
  if (len >= kNoToken) throw std::length_error("encode: a word must be shorter than 2**32 bytes");
  if (!rows_.is_regular()) return merge(word, len, kNoToken, scratch, out);
  const uint8_t* padded = word;
  const size_t readable = std::max(len + kPadding, kReadAtOnce);
  if (size_t(readable_end - word) < readable) {
    scratch.bytes.resize(readable);
    padded = static_cast<const uint8_t*>(std::memcpy(scratch.bytes.data(), word, len));
  }
  if (len <= kLongestMerged) {
    const size_t num_ids = merge_word_(merges_, starts_, padded, len, out.room_for(kMergedAtOnce));
    if (num_ids != 0) return out.grow_by(num_ids);
  }
  if (rows_.encode(padded, len, scratch.rows, out)) return;
  merge(word, len, kNoToken, scratch, out);
}

void WordEncoder::merge(const uint8_t* word, size_t len, uint32_t limit, Scratch& scratch, IdBuffer& out) const {
  if (len <= kShortWord) return merge_short(word, len, limit, out);
  merge_with_heap(word, len, limit, scratch, out);
}

// A part is known by the place of its first byte. pairs[i]: rank of the part at i with the one behind it << 6 | i, so
// that the smallest value is the leftmost pair of the lowest rank.
void WordEncoder::merge_short(const uint8_t* word, size_t len, uint32_t limit, IdBuffer& out) const {
  uint8_t bytes[kShortWord + kPadding] = {};
  std::memcpy(bytes, word, len);
  int32_t pairs[kShortWord];
  uint32_t ids[kShortWord];
  const auto value_of = [limit](uint32_t rank, size_t at) { return rank < limit ? int32_t(rank << 6 | at) : kNoMerge; };
  const size_t rounded = (len + 3) & ~size_t(3);
  for (size_t i = 0; i < len; ++i) ids[i] = bytes_.one(bytes[i]);
  for (size_t i = 0; i + 1 < len; ++i) pairs[i] = value_of(bytes_.pair(bytes[i], bytes[i + 1]), i);
  for (size_t i = len - 1; i < rounded; ++i) pairs[i] = kNoMerge;
  uint64_t starts = ~uint64_t(0) >> (64 - len);
  for (;;) {
    const int32_t lowest = lowest_of(pairs, rounded);
    if (lowest == kNoMerge) break;
    const size_t at = size_t(lowest) & 63;
    const size_t gone = next_bit(starts, at, len);
    starts ^= uint64_t(1) << gone;
    pairs[gone] = kNoMerge;
    ids[at] = uint32_t(lowest) >> 6;
    // Ask for both new pairs before looking at either: their cache lines come together.
    const size_t end = next_bit(starts, at, len);
    const size_t end_of_next = end == len ? at : next_bit(starts, end, len);
    const size_t before = at == 0 ? 0 : 63 - size_t(__builtin_clzll(starts & ((uint64_t(1) << at) - 1)));
    const PairLookup right(table_, bytes + at, end_of_next - at),
        left(table_, bytes + before, at == 0 ? 0 : end - before);
    pairs[at] = value_of(right.id(table_), at);
    if (at > 0) pairs[before] = value_of(left.id(table_), before);
  }
  uint32_t* place = out.room_for(len);
  size_t n = 0;
  for (uint64_t rest = starts; rest != 0; rest &= rest - 1) place[n++] = ids[__builtin_ctzll(rest)];
  out.grow_by(n);
}

void WordEncoder::merge_with_heap(const uint8_t* word, size_t len, uint32_t limit, Scratch& scratch,
                                  IdBuffer& out) const {
  auto& bytes = scratch.bytes;
  auto &ids = scratch.ids, &next = scratch.next, &previous = scratch.previous, &ranks = scratch.ranks;
  auto& heap = scratch.heap;
  bytes.resize(len + kPadding);
  std::memcpy(bytes.data(), word, len);
  ids.resize(len), next.resize(len), previous.resize(len), ranks.resize(len);
  heap.clear();
  const auto later = std::greater<uint64_t>();
  for (size_t i = 0; i < len; ++i) {
    ids[i] = bytes_.one(bytes[i]);
    next[i] = uint32_t(i + 1);
    previous[i] = uint32_t(i - 1);
    const uint32_t rank = i + 1 < len ? bytes_.pair(bytes[i], bytes[i + 1]) : kNoToken;
    ranks[i] = rank < limit ? rank : kNoToken;
    if (ranks[i] != kNoToken) heap.push_back(uint64_t(ranks[i]) << 32 | i);
  }
  std::make_heap(heap.begin(), heap.end(), later);
  const auto update = [&](uint32_t at) {
    const uint32_t rank = next[at] < len ? table_.find(&bytes[at], next[next[at]] - at) : kNoToken;
    ranks[at] = rank < limit ? rank : kNoToken;
    if (ranks[at] == kNoToken) return;
    heap.push_back(uint64_t(ranks[at]) << 32 | at);
    std::push_heap(heap.begin(), heap.end(), later);
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const auto rank = uint32_t(heap.back() >> 32), at = uint32_t(heap.back());
    heap.pop_back();
    if (ranks[at] != rank) continue;
    const uint32_t gone = next[at];
    ids[at] = rank;
    ranks[gone] = kNoToken;
    next[at] = next[gone];
    if (next[at] < len) previous[next[at]] = at;
    update(at);
    if (at > 0) update(previous[at]);
  }
  for (uint32_t at = 0; at < len; at = next[at]) out.push(ids[at]);
}

std::vector<uint32_t> WordEncoder::parts_of(std::string_view bytes, uint32_t id) const {
  IdBuffer out;
  Scratch scratch;
  merge(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), id, scratch, out);
  return {out.data(), out.data() + out.size()};
}

}  // namespace herdkern::text
