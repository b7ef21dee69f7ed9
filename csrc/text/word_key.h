// Keys and hashes of short byte strings: what the word table, the token table and the word cache share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace herdkern::text {

inline uint64_t mix(uint64_t a, uint64_t b) {
  const __uint128_t product = __uint128_t(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

// The bytes of a word of at most 16 bytes, padded with zeros. Together with the length it is the word itself.
struct WordKey {
  uint64_t low, high;
  bool operator==(const WordKey& other) const { return low == other.low && high == other.high; }
};

// 0 < len <= 16. Reads 16 bytes at `word` when `readable_end` allows it, which is quicker than copying len bytes.
inline WordKey load_key(const uint8_t* word, size_t len, const uint8_t* readable_end) {
  WordKey key{0, 0};
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (readable_end - word >= 16) {
    std::memcpy(&key, word, 16);
    if (len <= 8) {
      key.low &= ~uint64_t(0) >> (64 - 8 * len);
      key.high = 0;
    } else {
      key.high &= ~uint64_t(0) >> (128 - 8 * len);
    }
    return key;
  }
#else
  (void)readable_end;
#endif
  std::memcpy(&key, word, len);
  return key;
}

inline uint64_t hash_key(const WordKey& key, size_t len) {
  const uint64_t h = mix(key.low ^ 0x9E3779B97F4A7C15ull, key.high ^ 0xD1B54A32D192ED03ull ^ len);
  return h ^ (h >> 29);
}

// Any length; equal bytes hash equal, the caller compares bytes.
inline uint64_t hash_bytes(const uint8_t* bytes, size_t len) {
  uint64_t h = 0xA24BAED4963EE407ull ^ len;
  for (; len >= 16; bytes += 16, len -= 16) {
    uint64_t x, y;
    std::memcpy(&x, bytes, 8);
    std::memcpy(&y, bytes + 8, 8);
    h = mix(h ^ x, y ^ 0xE7037ED1A0B428DBull);
  }
  uint64_t rest[2] = {0, 0};
  std::memcpy(rest, bytes, len);
  h = mix(h ^ rest[0], rest[1] ^ 0x8EBC6AF09C88C6E3ull);
  return h ^ (h >> 29);
}

}  // namespace herdkern::text
