// BLAKE2b with a digest of 8 bytes, no key: what herdkern.data.document.document_id hashes with. Source: RFC 7693.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace herdkern::text {

class Blake2b64 {
 public:
  Blake2b64() { state_[0] ^= 0x01010000u ^ 8; }

  void add(std::string_view data) {
    while (!data.empty()) {
      if (filled_ == kBlock) compress(false);
      const size_t size = data.size() < kBlock - filled_ ? data.size() : kBlock - filled_;
      std::memcpy(block_ + filled_, data.data(), size);
      filled_ += size;
      data.remove_prefix(size);
    }
  }

  // The digest, its first byte lowest.
  uint64_t finish() {
    std::memset(block_ + filled_, 0, kBlock - filled_);
    compress(true);
    return state_[0];
  }

 private:
  static constexpr size_t kBlock = 128;
  static constexpr std::array<uint64_t, 8> kStart = {0x6A09E667F3BCC908u, 0xBB67AE8584CAA73Bu, 0x3C6EF372FE94F82Bu,
                                                     0xA54FF53A5F1D36F1u, 0x510E527FADE682D1u, 0x9B05688C2B3E6C1Fu,
                                                     0x1F83D9ABFB41BD6Bu, 0x5BE0CD19137E2179u};
  static constexpr uint8_t kOrder[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

  void compress(bool is_last) {
    total_ += filled_;
    uint64_t m[16], v[16];
    std::memcpy(m, block_, kBlock);
    for (int i = 0; i < 8; ++i) {
      v[i] = state_[i];
      v[i + 8] = kStart[i];
    }
    v[12] ^= total_;
    if (is_last) v[14] = ~v[14];
    const auto turn = [](uint64_t x, int bits) { return x >> bits | x << (64 - bits); };
    const auto mix_in = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
      v[a] += v[b] + x;
      v[d] = turn(v[d] ^ v[a], 32);
      v[c] += v[d];
      v[b] = turn(v[b] ^ v[c], 24);
      v[a] += v[b] + y;
      v[d] = turn(v[d] ^ v[a], 16);
      v[c] += v[d];
      v[b] = turn(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
      const uint8_t* order = kOrder[round % 10];
      for (int i = 0; i < 4; ++i) mix_in(i, 4 + i, 8 + i, 12 + i, m[order[2 * i]], m[order[2 * i + 1]]);
      for (int i = 0; i < 4; ++i)
        mix_in(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[order[8 + 2 * i]], m[order[9 + 2 * i]]);
    }
    for (int i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
    filled_ = 0;
  }

  std::array<uint64_t, 8> state_ = kStart;
  uint64_t total_ = 0;
  size_t filled_ = 0;
  char block_[kBlock];
};

}  // namespace herdkern::text
