// Words seen lately with their ids, in bounded memory. It changes how fast words are encoded and never their ids.
//
// A bucket is one cache line of two entries. A short word (up to 15 bytes) is its own key; a longer one is found by its
// hash and compared with the bytes in a ring, where its ids follow them, as do those of a word with more than three.
// The table starts with 2 MiB, which the first text pays for (fresh memory costs more than the words put into it), and
// grows with the number of words into memory that was reserved for it. At its full size a new word takes the place of
// one that was not asked for since the last time a place was needed there.
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
  // Flags beside the number of ids.
  static constexpr uint32_t kInRing = 1u << 31;  // ids[0], ids[1] are a place in the ring
  static constexpr uint32_t kSeen = 1u << 30;    // asked for since it came
  static constexpr uint32_t kSpills = 1u << 29;  // of a first entry: words of this bucket lie in the next one
  static constexpr uint32_t kNumIds = (1u << 16) - 1;

  struct Entry {
    ShortKey key;  // of a longer word: its hash and kLongWord | its length
    uint32_t ids[kInlineIds];
    uint32_t num_and_flags;
    uint32_t num_ids() const { return num_and_flags & kNumIds; }
    bool is_inline() const { return !(num_and_flags & kInRing); }
    void mark_seen() {
      if (!(num_and_flags & kSeen)) num_and_flags |= kSeen;
    }
  };
  struct Ids {
    const void* ids;  // uint32_t each; null: not here
    size_t num_ids;
  };

  // max_bytes: of table and ring together; where the smallest do not fit, nothing is ever kept.
  explicit WordCache(size_t max_bytes)
      : num_buckets_(ring_size(max_bytes / 4) != 0 ? first_buckets(max_bytes / 4 * 3) : 2),
        max_buckets_(num_buckets_),
        ring_bytes_(ring_size(max_bytes / 4)) {
    while (2 * max_buckets_ * sizeof(Bucket) <= max_bytes / 4 * 3) max_buckets_ *= 2;
    table_ = UnwrittenArray<Bucket>(max_buckets_);
  }

  static ShortKey long_key(uint64_t hash, size_t len) { return {hash, kLongWord | len}; }

  // A view of the table for a loop: good until the next insert.
  struct View {
    Entry* entries;
    size_t mask;
    void prefetch(uint64_t hash) const { __builtin_prefetch(entries + 2 * (hash & mask)); }
    // The entry with this key, or null. It need not be marked as seen.
    Entry* find(ShortKey key, uint64_t hash) const {
      size_t place = hash & mask;
      for (int step = 0; step < kMaxSteps; ++step) {
        Entry* bucket = entries + 2 * place;
        const bool is_second = bucket[1].key == key;
        if (is_second || bucket[0].key == key) return bucket + is_second;
        if (!(bucket[0].num_and_flags & kSpills)) return nullptr;
        place = (place + 1) & mask;
      }
      return nullptr;
    }
  };
  View view() { return {table_[0].entries, num_buckets_ - 1}; }

  // What the entry of the word holds; nothing where the ring has moved on or another word has the same hash.
  Ids ids_of(const Entry& entry, const uint8_t* word, size_t len) const {
    if (entry.is_inline()) return {entry.ids, entry.num_ids()};
    const uint64_t place = place_of(entry);
    if (head_ > place + ring_bytes_) return {nullptr, 0};
    const uint8_t* record = &ring_[place & (ring_bytes_ - 1)];
    const size_t num_ids = entry.num_ids();
    if (len > kShortKey && std::memcmp(record + num_ids * sizeof(uint32_t), word, len) != 0) return {nullptr, 0};
    return {record, num_ids};
  }

  void insert(ShortKey key, uint64_t hash, const uint8_t* word, size_t len, const uint32_t* ids, size_t num_ids) {
    if (ring_bytes_ == 0) return;
    Entry entry{key, {}, uint32_t(num_ids)};
    if (len > kShortKey || num_ids > kInlineIds) {
      const uint64_t place = write(word, len > kShortKey ? len : 0, ids, num_ids);
      entry.ids[0] = uint32_t(place), entry.ids[1] = uint32_t(place >> 32);
      entry.num_and_flags |= kInRing;
    } else {
      std::copy(ids, ids + num_ids, entry.ids);
    }
    if (num_words_ > num_buckets_ + num_buckets_ / 8 * 3) grow();
    put(entry, hash);
  }

 private:
  struct alignas(64) Bucket {
    Entry entries[2];
  };
  static_assert(sizeof(Bucket) == 64);
  static constexpr uint64_t kLongWord = 1ull << 63;
  static constexpr size_t kFirstBuckets = 1 << 15, kLeastRing = 1 << 16;
  // Buckets that a word may lie in. With 4, one word in 25 found no place in a table that was not yet to grow.
  static constexpr int kMaxSteps = 12;

  // The largest power of two, or none: a record of the longest word must be a small part of the ring.
  static size_t ring_size(size_t max_bytes) {
    size_t size = kLeastRing;
    while (2 * size <= max_bytes) size *= 2;
    return size <= max_bytes ? size : 0;
  }

  static size_t first_buckets(size_t max_table_bytes) {
    size_t buckets = kFirstBuckets;
    while (buckets > 1 << 11 && buckets * sizeof(Bucket) > max_table_bytes) buckets /= 2;
    return buckets;
  }

  static uint64_t place_of(const Entry& entry) { return uint64_t(entry.ids[1]) << 32 | entry.ids[0]; }

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

  void put(const Entry& entry, uint64_t hash) {
    const size_t home = hash & (num_buckets_ - 1);
    size_t place = home;
    for (int step = 0; step < kMaxSteps; ++step) {
      for (Entry& old : table_[place].entries) {
        if (old.key.high != 0) continue;
        old.key = entry.key;
        std::copy(entry.ids, entry.ids + kInlineIds, old.ids);
        old.num_and_flags |= entry.num_and_flags;
        ++num_words_;
        return;
      }
      table_[place].entries[0].num_and_flags |= kSpills;
      place = (place + 1) & (num_buckets_ - 1);
    }
    Bucket& bucket = table_[home];
    turn_ ^= 1;
    if (bucket.entries[turn_].num_and_flags & kSeen) {
      bucket.entries[turn_].num_and_flags &= ~kSeen;
      turn_ ^= 1;
    }
    const uint32_t spills = bucket.entries[turn_].num_and_flags & kSpills;
    bucket.entries[turn_] = entry;
    bucket.entries[turn_].num_and_flags |= spills;
  }

  // In its place: new memory costs more than moving words. A few that lie behind the end of the smaller table, or that
  // are put there before their bucket's turn comes, are not found again and come anew.
  void grow() {
    if (num_buckets_ == max_buckets_) return;
    const size_t before = num_buckets_;
    num_buckets_ *= 2;
    num_words_ = 0;
    for (size_t i = 0; i < before; ++i) {
      const Bucket old = table_[i];
      table_[i] = Bucket();
      for (Entry entry : old.entries) {
        entry.num_and_flags &= ~kSpills;
        if (entry.key.high != 0) put(entry, entry.key.high & kLongWord ? entry.key.low : hash_short(entry.key));
      }
    }
  }

  UnwrittenArray<Bucket> table_;  // the first num_buckets_ are in use
  std::unique_ptr<uint8_t[]> ring_;
  size_t num_buckets_, max_buckets_, ring_bytes_;
  size_t num_words_ = 0, turn_ = 0;
  uint64_t head_ = 0;  // bytes ever written to the ring
};

}  // namespace herdkern::text
