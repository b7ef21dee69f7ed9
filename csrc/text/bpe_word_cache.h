// Words seen lately with their ids, in bounded memory. It changes how fast words are encoded and never their ids.
//
// A bucket is one cache line of two entries. A short word (up to 15 bytes) is its own key; a longer one is found by its
// hash and compared with the bytes in a ring, where its ids follow them, as do those of a word with more than three.
// A new word enters a bucket's second place and moves to the first when it is seen again, so words that occur once
// drive out none that occur often. The table starts small and grows with the number of words: a short text never
// touches much memory.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "text/bpe_tables.h"

namespace herdkern::text {

class WordCache {
 public:
  static constexpr size_t kMaxWord = 1024;  // bytes; longer words are encoded anew each time
  static constexpr size_t kInlineIds = 3;
  static constexpr uint32_t kInRing = 1u << 31;  // flag of Entry::num_ids: ids[0], ids[1] are a place in the ring

  struct Entry {
    ShortKey key;  // of a longer word: its hash and kLongWord | its length
    uint32_t ids[kInlineIds];
    uint32_t num_ids;
  };
  struct Ids {
    const void* ids;  // uint32_t each; null: not here
    size_t num_ids;
  };

  // max_bytes: of table and ring together; where the smallest do not fit, nothing is ever kept.
  explicit WordCache(size_t max_bytes)
      : table_(ring_size(max_bytes / 4) != 0 ? kFirstBuckets : 1),
        max_table_bytes_(max_bytes / 4 * 3),
        ring_bytes_(ring_size(max_bytes / 4)) {}

  static ShortKey long_key(uint64_t hash, size_t len) { return {hash, kLongWord | len}; }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&table_[hash & (table_.size() - 1)]); }

  // The entry with this key, or null.
  const Entry* find(ShortKey key, uint64_t hash) {
    Bucket& bucket = table_[hash & (table_.size() - 1)];
    if (bucket.entries[0].key == key) return &bucket.entries[0];
    if (!(bucket.entries[1].key == key)) return nullptr;
    std::swap(bucket.entries[0], bucket.entries[1]);
    return &bucket.entries[0];
  }

  // What the entry of the word holds; nothing where the ring has moved on or another word has the same hash.
  Ids ids_of(const Entry& entry, const uint8_t* word, size_t len) const {
    if (!(entry.num_ids & kInRing)) return {entry.ids, entry.num_ids};
    const uint64_t place = uint64_t(entry.ids[1]) << 32 | entry.ids[0];
    if (head_ > place + ring_bytes_) return {nullptr, 0};
    const uint8_t* record = &ring_[place & (ring_bytes_ - 1)];
    const size_t num_ids = entry.num_ids & ~kInRing;
    if (len > kShortKey && std::memcmp(record + num_ids * sizeof(uint32_t), word, len) != 0) return {nullptr, 0};
    return {record, num_ids};
  }

  void insert(ShortKey key, uint64_t hash, const uint8_t* word, size_t len, const uint32_t* ids, size_t num_ids) {
    if (ring_bytes_ == 0) return;
    Entry entry{key, {}, uint32_t(num_ids)};
    if (len > kShortKey || num_ids > kInlineIds) {
      const uint64_t place = write(word, len > kShortKey ? len : 0, ids, num_ids);
      entry.ids[0] = uint32_t(place), entry.ids[1] = uint32_t(place >> 32);
      entry.num_ids |= kInRing;
    } else {
      std::copy(ids, ids + num_ids, entry.ids);
    }
    if (++num_inserted_ > table_.size()) grow();
    table_[hash & (table_.size() - 1)].entries[1] = entry;
  }

 private:
  struct alignas(64) Bucket {
    Entry entries[2];
  };
  static_assert(sizeof(Bucket) == 64);
  static constexpr uint64_t kLongWord = 1ull << 63;
  static constexpr size_t kFirstBuckets = 1 << 11, kLeastRing = 1 << 16;

  // The largest power of two, or none: a record of the longest word must be a small part of the ring.
  static size_t ring_size(size_t max_bytes) {
    size_t size = kLeastRing;
    while (2 * size <= max_bytes) size *= 2;
    return size <= max_bytes ? size : 0;
  }

  uint64_t write(const uint8_t* word, size_t len, const uint32_t* ids, size_t num_ids) {
    if (!ring_) ring_.reset(new uint8_t[ring_bytes_]);  // unwritten pages cost nothing
    const size_t size = (num_ids * sizeof(uint32_t) + len + 7) & ~size_t(7);
    const size_t left = ring_bytes_ - (head_ & (ring_bytes_ - 1));
    if (size > left) head_ += left;  // a record does not wrap around
    const uint64_t place = head_;
    uint8_t* record = &ring_[place & (ring_bytes_ - 1)];
    std::memcpy(record, ids, num_ids * sizeof(uint32_t));
    if (len != 0) std::memcpy(record + num_ids * sizeof(uint32_t), word, len);
    head_ += size;
    return place;
  }

  void grow() {
    num_inserted_ = 0;
    const size_t bytes = table_.size() * sizeof(Bucket);
    if (2 * bytes > max_table_bytes_) return;
    HugeArray<Bucket> old((4 * bytes > max_table_bytes_ ? 2 : 4) * table_.size());
    std::swap(old, table_);
    for (size_t i = 0; i < old.size(); ++i) {
      for (size_t place : {1, 0}) {  // the first place last: it stays in front
        const Entry& entry = old[i].entries[place];
        if (entry.key.high == 0) continue;
        const uint64_t hash = entry.key.high & kLongWord ? entry.key.low : hash_short(entry.key);
        Bucket& bucket = table_[hash & (table_.size() - 1)];
        bucket.entries[1] = bucket.entries[0];
        bucket.entries[0] = entry;
      }
    }
  }

  HugeArray<Bucket> table_;
  std::unique_ptr<uint8_t[]> ring_;
  size_t max_table_bytes_, ring_bytes_;
  size_t num_inserted_ = 0;  // since the table grew
  uint64_t head_ = 0;        // bytes ever written to the ring
};

}  // namespace herdkern::text
