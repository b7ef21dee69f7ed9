// The first 32 bits of SHA-1 of many short messages, one in each lane of a vector. Compiled once per x86-64 level.
// Source: FIPS 180-4, 6.1. A message at a time costs several times as much (the instructions of SHA-NI excepted, which
// not every processor with AVX-512 has).
#pragma once
#include "text/minhash_slots.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

inline Lanes rotate_left(Lanes x, int count) { return x << count | x >> (32 - count); }

inline void sha1_rounds(Lanes (&w)[16], Lanes (&state)[5]) {
  Lanes a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
  const auto round = [&](int t, Lanes f, uint32_t constant) {
    if (t >= 16) w[t & 15] = rotate_left(w[(t + 13) & 15] ^ w[(t + 8) & 15] ^ w[(t + 2) & 15] ^ w[t & 15], 1);
    const Lanes next = rotate_left(a, 5) + f + e + w[t & 15] + constant;
    e = d;
    d = c;
    c = rotate_left(b, 30);
    b = a;
    a = next;
  };
#pragma GCC unroll 20
  for (int t = 0; t < 20; ++t) round(t, d ^ (b & (c ^ d)), 0x5A827999u);
#pragma GCC unroll 20
  for (int t = 20; t < 40; ++t) round(t, b ^ c ^ d, 0x6ED9EBA1u);
#pragma GCC unroll 20
  for (int t = 40; t < 60; ++t) round(t, (b & c) | (d & (b | c)), 0x8F1BBCDCu);
#pragma GCC unroll 20
  for (int t = 60; t < 80; ++t) round(t, b ^ c ^ d, 0xCA62C1D6u);
  state[0] += a;
  state[1] += b;
  state[2] += c;
  state[3] += d;
  state[4] += e;
}

// Block `block` of the padded message, as it is read: 64 bytes.
inline void padded_block(const uint8_t* message, int64_t size, int64_t block, uint8_t* out) {
  const int64_t left = size - 64 * block;
  const int64_t copied = std::max<int64_t>(0, std::min<int64_t>(left, 64));
  if (copied) std::memcpy(out, message + 64 * block, copied);
  std::memset(out + copied, 0, 64 - copied);
  if (left >= 0 && left < 64) out[left] = 0x80;
  if (left >= 56) return;
  for (int i = 0; i < 8; ++i) out[63 - i] = static_cast<uint8_t>(static_cast<uint64_t>(size) * 8 >> (8 * i));
}

// out: (count,), the first four bytes of the digests as little-endian numbers. place(i): begin and end of message i.
template <typename Place>
inline void sha1_first_words(const uint8_t* text, Place&& place, int64_t count, uint64_t* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - first));
    const uint8_t* message[kLanes];
    int64_t size[kLanes] = {}, num_blocks[kLanes] = {}, most = 0;
    for (int i = 0; i < lanes; ++i) {
      const auto [begin, end] = place(first + i);
      message[i] = text + begin;
      size[i] = end - begin;
      num_blocks[i] = (size[i] + 9 + 63) / 64;
      most = std::max(most, num_blocks[i]);
    }
    Lanes state[5];
    const uint32_t start[5] = {0x67452301u, 0xEFCDAB89u, 0x98BADCFEu, 0x10325476u, 0xC3D2E1F0u};
    for (int i = 0; i < 5; ++i) state[i] = Lanes{} + start[i];
    alignas(64) uint32_t words[16][kLanes] = {};
    uint32_t digest[kLanes];
    for (int64_t block = 0; block < most; ++block) {
      for (int i = 0; i < lanes; ++i) {
        alignas(64) uint8_t bytes[64];
        padded_block(message[i], size[i], std::min(block, num_blocks[i] - 1), bytes);
        for (int t = 0; t < 16; ++t) {
          uint32_t word;
          std::memcpy(&word, bytes + 4 * t, 4);
          words[t][i] = __builtin_bswap32(word);
        }
      }
      Lanes w[16];
      for (int t = 0; t < 16; ++t) w[t] = load_lanes<Lanes>(words[t]);
      sha1_rounds(w, state);
      for (int i = 0; i < lanes; ++i)
        if (block == num_blocks[i] - 1) digest[i] = state[0][i];
    }
    for (int i = 0; i < lanes; ++i) out[first + i] = __builtin_bswap32(digest[i]);
  }
}

}  // namespace herdkern::text::HK_MINHASH_LEVEL
