// What an encoder looks up: tokens by their bytes. Keys of short byte strings are the strings themselves, so one
// comparison of 16 bytes decides; a lookup reads one cache line.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "text/huge_array.h"

namespace herdkern::text {

constexpr uint32_t kNoToken = 0xFFFFFFFF;
constexpr uint32_t kMaxTokens = 1 << 21;  // ids must be smaller: an id and a place in a short word share 32 bits

using TokenList = std::vector<std::pair<std::string_view, uint32_t>>;  // (bytes, id)

// 1 to 15 bytes padded with zeros, their number in the last byte; all zero: no string.
struct ShortKey {
  uint64_t low, high;
  bool operator==(const ShortKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
};

constexpr size_t kShortKey = 15;

struct KeyMask {
  uint64_t low, high;
};
constexpr KeyMask kKeyMasks[16] = {
    {0, 0},
    {~0ull >> 56, 0},
    {~0ull >> 48, 0},
    {~0ull >> 40, 0},
    {~0ull >> 32, 0},
    {~0ull >> 24, 0},
    {~0ull >> 16, 0},
    {~0ull >> 8, 0},
    {~0ull, 0},
    {~0ull, 0xFF},
    {~0ull, 0xFFFF},
    {~0ull, 0xFFFFFF},
    {~0ull, ~0ull >> 32},
    {~0ull, ~0ull >> 24},
    {~0ull, ~0ull >> 16},
    {~0ull, ~0ull >> 8},
};

inline uint64_t load_little_endian(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// 16 bytes at `bytes` must be readable; len <= 15.
inline ShortKey short_key(const uint8_t* bytes, size_t len) {
  return {load_little_endian(bytes) & kKeyMasks[len].low,
          (load_little_endian(bytes + 8) & kKeyMasks[len].high) | uint64_t(len) << 56};
}

// Reads nothing from `end` on.
inline ShortKey short_key_before(const uint8_t* bytes, size_t len, const uint8_t* end) {
  if (end - bytes >= 16) return short_key(bytes, len);
  uint8_t padded[16] = {};
  std::memcpy(padded, bytes, len);
  return short_key(padded, len);
}

// The bytes of a key, then zeros: 16 in all.
inline void store_short_key(ShortKey key, uint8_t* bytes) {
  key.high &= ~0ull >> 8;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  key = {__builtin_bswap64(key.low), __builtin_bswap64(key.high)};
#endif
  std::memcpy(bytes, &key, 16);
}

inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
  const __uint128_t product = __uint128_t(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

inline uint64_t hash_short(ShortKey key) {
  return multiply_fold(key.low ^ 0x9E3779B97F4A7C15ull, key.high ^ 0xD1B54A32D192ED03ull);
}

// len >= 16; equal bytes hash equal, the caller compares bytes.
inline uint64_t hash_long(const uint8_t* bytes, size_t len) {
  uint64_t hash = 0xA24BAED4963EE407ull ^ len;
  for (size_t at = 0; at + 16 < len; at += 16) {
    hash = multiply_fold(hash ^ load_little_endian(bytes + at),
                         load_little_endian(bytes + at + 8) ^ 0xE7037ED1A0B428DBull);
  }
  return multiply_fold(hash ^ load_little_endian(bytes + len - 16),
                       load_little_endian(bytes + len - 8) ^ 0x8EBC6AF09C88C6E3ull);
}

// Bytes of a token -> id.
class TokenTable {
 public:
  // Each byte string once; the caller checks.
  explicit TokenTable(const TokenList& tokens);

  // Most pairs that are asked for are no token: a filter that stays in the nearest caches says so of nine in ten.
  bool may_hold(uint64_t hash) const { return filter_[hash >> filter_shift_ >> 3] >> (hash >> filter_shift_ & 7) & 1; }
  uint32_t find_short(ShortKey key, uint64_t hash) const {
    for (size_t i = line_of(hash);; i = i + 1 == lines_.size() ? 0 : i + 1) {
      const Line& line = lines_[i];
      const unsigned hits =
          unsigned(line.keys[0] == key) | unsigned(line.keys[1] == key) << 1 | unsigned(line.keys[2] == key) << 2;
      if (hits != 0) return line.ids[hits >> 1];  // 1, 2, 4 -> 0, 1, 2
      if (!line.spills) return kNoToken;
    }
  }
  // 16 bytes at `bytes` must be readable.
  uint32_t find(const uint8_t* bytes, size_t len) const {
    if (len > kShortKey) return find_long(bytes, len);
    const ShortKey key = short_key(bytes, len);
    const uint64_t hash = hash_short(key);
    return may_hold(hash) ? find_short(key, hash) : kNoToken;
  }
  uint32_t find_long(const uint8_t* bytes, size_t len) const;
  // Calls take(length, id) for the tokens of 16 bytes or more that `text` starts with, the longest first, until take
  // returns true; says whether it did.
  template <typename Take>
  bool any_long_prefix(const uint8_t* text, size_t len, Take&& take) const {
    if (len <= kShortKey) return false;
    const auto [begin, end] = long_with_prefix(text);
    for (size_t i = begin; i < end; ++i) {
      const LongToken& token = long_[i];
      if (token.len <= len && std::memcmp(&long_bytes_[token.begin], text, token.len) == 0 && take(token.len, token.id))
        return true;
    }
    return false;
  }
  // Calls visit(bytes, length, id) for every token; 16 bytes behind each may be read.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    for (size_t i = 0; i < lines_.size(); ++i) {
      for (size_t place = 0; place < 3 && lines_[i].keys[place].high != 0; ++place) {
        uint8_t bytes[48] = {};
        store_short_key(lines_[i].keys[place], bytes);
        visit(static_cast<const uint8_t*>(bytes), size_t(lines_[i].keys[place].high >> 56), lines_[i].ids[place]);
      }
    }
    for (const LongToken& token : long_) visit(&long_bytes_[token.begin], size_t(token.len), token.id);
  }
  // Where a short token is looked for first.
  const void* line(uint64_t hash) const { return &lines_[line_of(hash)]; }
  void prefetch(uint64_t hash) const { __builtin_prefetch(line(hash)); }
  size_t max_length() const { return max_length_; }
  // Bytes of a token, 0 for an id without one.
  uint32_t length_of(uint32_t id) const { return lengths_[id]; }
  uint32_t num_ids() const { return uint32_t(lengths_.size()); }

 private:
  struct alignas(64) Line {
    ShortKey keys[3];
    uint32_t ids[3];
    uint32_t spills;  // a key that belongs here lies in a line behind
  };
  static_assert(sizeof(Line) == 64);
  struct LongToken {
    size_t begin;  // in long_bytes_
    uint32_t len, id;
  };

  size_t line_of(uint64_t hash) const { return size_t((__uint128_t(hash) * lines_.size()) >> 64); }
  std::pair<size_t, size_t> long_with_prefix(const uint8_t* text) const;

  HugeArray<Line> lines_;
  std::vector<uint8_t> filter_;  // bit set: some short token's hash has these highest bits
  int filter_shift_ = 0;
  std::vector<LongToken> long_;  // by their first 16 bytes, the longest first
  std::vector<uint8_t> long_bytes_;
  std::vector<std::pair<uint32_t, uint32_t>> long_slots_;  // hash of the first 16 bytes -> [begin, end) in long_
  std::vector<uint32_t> lengths_;                          // by id
  size_t max_length_ = 0;
};

// Tokens of one byte and of two.
class ByteTokens {
 public:
  // Throws std::invalid_argument if a single byte is missing.
  explicit ByteTokens(const TokenList& tokens);
  uint32_t one(uint8_t byte) const { return ones_[byte]; }
  uint32_t pair(uint8_t first, uint8_t second) const { return pairs_[first << 8 | second]; }

 private:
  std::vector<uint32_t> ones_, pairs_;  // (256,), (256 * 256,)
};

}  // namespace herdkern::text
