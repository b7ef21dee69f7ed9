// N-grams of the code points of the normalised text: maximal runs of anything but separators, folded and joined by one
// space each. Hashed as polynomials mod 2^61 - 1 (Karp and Rabin), so that two n-grams collide with a probability below
// ngram_size / 2^61 whatever they hold. Compiled once per x86-64 level.
#pragma once
#include "text/minhash_split.h"
#include "text/utf8.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

// The polynomial of `count` code points and, in front of them, `leading`.
inline uint64_t hash_chars(const uint32_t* chars, int64_t count, uint64_t leading) {
  uint64_t sum = leading;
  for (int64_t i = 0; i < count; ++i) {
    sum = reduce61(fold61(static_cast<unsigned __int128>(sum) * kCharBase + chars[i] + 1));
  }
  return sum;
}

// out: (count - size + 1,), the hashes of all windows of `size` code points. power: kCharBase^size.
inline void hash_char_windows(const uint32_t* chars, int64_t count, int64_t size, uint64_t power, uint64_t* out) {
  constexpr int kChains = 4;  // one sum waits for its product for 9 cycles: four take turns
  const int64_t windows = count - size + 1, step = windows / kChains;
  const uint64_t minus = kMersenne61 - power;
  const auto roll = [&](uint64_t sum, int64_t i) {  // from window i to i + 1
    return fold61(static_cast<unsigned __int128>(sum) * kCharBase + chars[i + size] + 1 +
                  static_cast<unsigned __int128>(minus) * (chars[i] + 1));
  };
  uint64_t sum[kChains];
  if (step >= 2 * size) {
    for (int k = 0; k < kChains; ++k) sum[k] = hash_chars(chars + k * step, size, 0);
    for (int64_t i = 0; i < step; ++i) {
      for (int k = 0; k < kChains; ++k) {
        out[k * step + i] = mix(reduce61(sum[k]));
        if (i + 1 < step) sum[k] = roll(sum[k], k * step + i);
      }
    }
    if (kChains * step == windows) return;
    sum[0] = roll(sum[kChains - 1], kChains * step - 1);
  } else {
    sum[0] = hash_chars(chars, size, 0);
  }
  for (int64_t i = step >= 2 * size ? kChains * step : 0; i < windows; ++i) {
    out[i] = mix(reduce61(sum[0]));
    if (i + 1 < windows) sum[0] = roll(sum[0], i);
  }
}

// Appends the code points of a text and where each begins. A byte b that is not UTF-8 counts as 0x110000 + b,
// which is behind all code points.
inline void append_code_points(const uint8_t* text, int64_t begin, int64_t end, std::vector<uint32_t>& chars,
                               std::vector<uint32_t>& places) {
  const size_t old = chars.size();
  chars.resize(old + (end - begin));
  places.resize(chars.size());
  uint32_t *next = chars.data() + old, *place = places.data() + old;
  for (int64_t i = begin; i < end;) {
    *place++ = static_cast<uint32_t>(i);
    if (text[i] < 0x80) {
      *next++ = text[i++];
      continue;
    }
    const DecodedCodePoint c = decode_utf8(text + i, text + end);
    *next++ = c.num_bytes == 1 ? 0x110000u + text[i] : c.code_point;
    i += c.num_bytes;
  }
  chars.resize(next - chars.data());
  places.resize(chars.size());
}

}  // namespace herdkern::text::HK_MINHASH_LEVEL
