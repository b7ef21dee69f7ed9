// Cuts UTF-8 text into the words of MinHash, 8 kB at a time: a list of borders into a folded copy, without a branch per
// word. Compiled once per x86-64 level (HK_MINHASH_LEVEL is its namespace).
// 64 bytes are taken at a time as bit masks: parts of words, characters of scripts without spaces. What is not ASCII
// is looked up lead byte by lead byte; the shape of the UTF-8 is checked by masks before, so that the look-ups have no
// branches. A block ends where a code point ends, so that nothing of one is carried to the next.
#pragma once
#include "text/minhash_words.h"

namespace herdkern::text::HK_MINHASH_LEVEL {

constexpr int64_t kChunkBytes = 8192;
constexpr int64_t kTailBytes = 1024;  // of words begun in the chunk before: 256 bytes of one, or 6 characters
constexpr int64_t kFoldedBytes = kTailBytes + kChunkBytes + 128;
constexpr int64_t kMaxBorders = kFoldedBytes + 256;  // a word takes two bytes of text or more and has two borders

// The masks of UTF-8 lead and continuation bytes.
struct Utf8Masks {
  uint64_t two, three, four, tail, low_tail, e0, ed;  // low_tail: 0x80 to 0x9F
};

#if defined(__AVX512BW__)
inline Utf8Masks utf8_masks(const uint8_t* in) {
  const __m512i v = _mm512_loadu_si512(in);
  const auto within = [v](int first, int count) -> uint64_t {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(char(first))), _mm512_set1_epi8(char(count)));
  };
  return {within(0xC2, 30), within(0xE0, 16), within(0xF0, 5), within(0x80, 64),
          within(0x80, 32), within(0xE0, 1),  within(0xED, 1)};
}
#elif defined(__AVX2__)
inline Utf8Masks utf8_masks(const uint8_t* in) {
  const __m256i v[2] = {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32))};
  const auto within = [&v](int first, int count) -> uint64_t {
    uint64_t mask[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i index = _mm256_sub_epi8(v[half], _mm256_set1_epi8(char(first)));
      const __m256i least = _mm256_min_epu8(index, _mm256_set1_epi8(char(count - 1)));
      mask[half] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(least, index)));
    }
    return mask[0] | mask[1] << 32;
  };
  return {within(0xC2, 30), within(0xE0, 16), within(0xF0, 5), within(0x80, 64),
          within(0x80, 32), within(0xE0, 1),  within(0xED, 1)};
}
#else
inline Utf8Masks utf8_masks(const uint8_t* in) {
  Utf8Masks masks{};
  for (int i = 0; i < 64; ++i) {
    const uint64_t bit = uint64_t{1} << i;
    const uint8_t c = in[i];
    if (c < 0x80) continue;
    if (c < 0xC0) {
      masks.tail |= bit;
      if (c < 0xA0) masks.low_tail |= bit;
    } else if (c >= 0xC2 && c < 0xE0) {
      masks.two |= bit;
    } else if (c >= 0xE0 && c < 0xF0) {
      masks.three |= bit;
      if (c == 0xE0) masks.e0 |= bit;
      if (c == 0xED) masks.ed |= bit;
    } else if (c >= 0xF0 && c < 0xF5) {
      masks.four |= bit;
    }
  }
  return masks;
}
#endif

// Writes base + i for every bit i and returns the end; up to 16 numbers behind it are overwritten.
inline uint32_t* write_bits(uint64_t bits, uint32_t base, uint32_t* out) {
#if defined(__AVX512BW__)
  const __m512i first = _mm512_add_epi32(_mm512_set1_epi32(int(base)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int part = 0; part < 4; ++part) {  // into a register first: compressing to memory is slow on Zen 4
    const __mmask16 mask = static_cast<__mmask16>(bits >> (16 * part));
    const __m512i places = _mm512_add_epi32(first, _mm512_set1_epi32(16 * part));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, places));
    out += __builtin_popcount(mask);
  }
  return out;
#else
  uint32_t* const end = out + __builtin_popcountll(bits);
#if defined(__BMI__)
  for (; out < end; out += 8) {  // eight at a time, needed or not: few of these branches go wrong
    for (int i = 0; i < 8; ++i) {
      out[i] = base + static_cast<uint32_t>(_tzcnt_u64(bits));
      bits = _blsr_u64(bits);
    }
  }
#else
  for (; bits; bits &= bits - 1) *out++ = base + static_cast<uint32_t>(__builtin_ctzll(bits));
#endif
  return end;
#endif
}

// With kRuns a word is a maximal run of any characters but separators, for n-grams of characters.
template <bool kRuns>
class Splitter {
 public:
  Splitter(const uint8_t* text, int64_t size, Scratch& scratch, const WordTable& table)
      : next_(text), left_(size), table_(table) {
    if (scratch.folded.empty()) {
      scratch.folded.resize(kFoldedBytes + 64);
      scratch.borders.resize(kMaxBorders);
    }
    folded_ = scratch.folded.data();
    borders_ = scratch.borders.data();
    end_ = borders_;
  }

  // Takes the next piece of text; false if there was none left. Word i is folded()[borders()[2 i], borders()[2 i + 1]).
  bool next() {
    if (left_ == 0) return false;
    keep_tail();
    while (left_ > 0 && fill_ < kTailBytes + kChunkBytes - 64) {
      if (left_ < kSafeBytes && !is_last_) {  // look-ups read behind a block
        std::memcpy(last_, next_, left_);
        std::memset(last_ + left_, 0, sizeof last_ - left_);
        next_ = last_;
        is_last_ = true;
      }
      block();
    }
    if (left_ == 0 || kRuns) close();
    if (left_ > 0 && open_) cut_open_word();
    return true;
  }

  const uint8_t* folded() const { return folded_; }
  const uint32_t* borders() const { return borders_; }
  int64_t num_words() const { return (end_ - borders_) / 2; }
  bool continues() const { return continues_; }  // kRuns: the first run goes on with the last one of the piece before

 private:
  static constexpr int64_t kSafeBytes = 72;

  // Moves what belongs to words that have not ended to the front.
  void keep_tail() {
    const uint32_t begin = open_ ? end_[-1] : num_pending_ ? pending_[0] : fill_;
    std::memmove(folded_, folded_ + begin, fill_ - begin);
    fill_ -= begin;
    for (int i = 0; i < num_pending_; ++i) pending_[i] -= begin;
    end_ = borders_;
    continues_ = kRuns && cut_;
    if (open_ || continues_) *end_++ = 0;
    open_ = open_ || continues_;
    cut_ = false;
  }

  void close() {
    if (open_) {
      *end_++ = fill_;
      cut_ = left_ > 0;
      open_ = false;
    }
    if (left_ == 0) end_run(fill_);
  }

  void cut_open_word() {
    uint32_t begin = end_[-1];
    for (; fill_ - begin > kMaxWordBytes; begin += kMaxWordBytes) {
      *end_++ = begin + kMaxWordBytes;
      *end_++ = begin + kMaxWordBytes;
    }
  }

  void block() {
    BlockMasks masks = classify_block(next_, folded_ + fill_);
    if (masks.high == 0 && left_ >= 64 && num_pending_ == 0) {
      const uint64_t edges = masks.word ^ (masks.word << 1 | uint64_t{open_});
      open_ = masks.word >> 63;
      end_ = write_bits(edges, fill_, end_);
      advance(64);
      return;
    }
    int size = static_cast<int>(std::min<int64_t>(left_, 64));
    uint64_t unspaced = 0, starts = 0;
    if (masks.high) look_up(size, masks, unspaced, starts);
    const uint64_t valid = low_bits(size);
    if (kRuns) masks.word |= unspaced;
    masks.word &= valid;
    const uint64_t edges = (masks.word ^ (masks.word << 1 | uint64_t{open_})) & valid;
    open_ = masks.word >> (size - 1) & 1;
    if (!kRuns && (unspaced || num_pending_)) {
      mixed(edges, unspaced, starts, size);
    } else {
      end_ = write_bits(edges, fill_, end_);
    }
    advance(size);
  }

  void advance(int size) {
    next_ += size;
    left_ -= size;
    fill_ += static_cast<uint32_t>(size);
  }

  // Corrects the masks and the folded copy for what is not ASCII, and takes a code point off the block that does not
  // end in it.
  void look_up(int& size, BlockMasks& masks, uint64_t& unspaced, uint64_t& starts) {
    const Utf8Masks m = utf8_masks(next_);
    uint64_t valid = low_bits(size);
    const uint64_t last = uint64_t{1} << (size - 1);
    const uint64_t over = ((m.two | m.three | m.four) & last) | ((m.three | m.four) & last >> 1) | (m.four & last >> 2);
    bool is_good = true;
    if (over) {
      if (left_ > size) {
        size = __builtin_ctzll(over);
        valid = low_bits(size);
      } else {
        is_good = false;
      }
    }
    const uint64_t two = m.two & valid, three = m.three & valid;
    const uint64_t expected = two << 1 | three << 1 | three << 2;
    const uint64_t bad = (m.tail ^ expected) | (masks.high & ~(m.tail | two | three)) | (m.e0 << 1 & m.low_tail) |
                         (m.ed << 1 & ~m.low_tail);
    if (!is_good || (bad & valid)) return look_up_each(size, masks, unspaced, starts);
    uint8_t* folded = folded_ + fill_;
    for (uint64_t bits = two; bits; bits &= bits - 1) {
      const int i = __builtin_ctzll(bits);
      const uint32_t entry = table_.two_bytes[(next_[i] & 0x1Fu) << 6 | (next_[i + 1] & 0x3Fu)];
      const uint16_t pair = static_cast<uint16_t>(entry);
      std::memcpy(folded + i, &pair, 2);
      masks.word |= static_cast<uint64_t>(entry >> 16) << i;  // 3 for a part of a word
    }
    constexpr uint64_t kWordBits[] = {0, 7, 0}, kUnspacedBits[] = {0, 0, 7};
    for (uint64_t bits = three; bits; bits &= bits - 1) {
      const int i = __builtin_ctzll(bits);
      const uint32_t c = (next_[i] & 0xFu) << 12 | (next_[i + 1] & 0x3Fu) << 6 | (next_[i + 2] & 0x3Fu);
      const int word_class = table_.word_class[c];
      masks.word |= kWordBits[word_class] << i;
      unspaced |= kUnspacedBits[word_class] << i;
    }
    starts = unspaced & three;
  }

  // The same for any bytes, code point by code point.
  void look_up_each(int size, BlockMasks& masks, uint64_t& unspaced, uint64_t& starts) {
    uint8_t* folded = folded_ + fill_;
    for (uint64_t todo = masks.high & low_bits(size); todo;) {
      const int i = __builtin_ctzll(todo);
      const CodePoint c = decode(next_ + i, next_ + left_, table_);
      const uint64_t bits = low_bits(c.size) << i;
      todo &= ~bits;
      if (c.word_class == kWordPart) masks.word |= bits;
      if (c.word_class == kUnspaced) {
        unspaced |= bits;
        starts |= uint64_t{1} << i;
      }
      if (c.size == 2) {
        const uint16_t pair = static_cast<uint16_t>(table_.two_bytes[c.value]);
        std::memcpy(folded + i, &pair, 2);
      }
    }
  }

  // The borders of a block that has characters of both kinds, in order.
  void mixed(uint64_t edges, uint64_t unspaced, uint64_t starts, int size) {
    for (int at = 0; at < size;) {
      const uint64_t rest = unspaced >> at;
      int length = size - at;
      if (rest & 1) {
        if (~rest) length = std::min(length, __builtin_ctzll(~rest));
        if (edges >> at & 1) *end_++ = fill_ + at;  // of a word that ends here
        add_to_run(starts & low_bits(length) << at);
      } else {
        if (rest) length = std::min(length, __builtin_ctzll(rest));
        end_run(fill_ + at);
        end_ = write_bits(edges & low_bits(length) << at, fill_, end_);
      }
      at += length;
    }
  }

  void add_to_run(uint64_t starts) {
    uint32_t places[kUnspacedReach + 64 + 16];
    std::copy(pending_, pending_ + num_pending_, places);
    const int64_t count = write_bits(starts, fill_, places + num_pending_) - places;
    int64_t i = 0;
    for (; i + kUnspacedReach < count; ++i) {
      *end_++ = places[i];
      *end_++ = places[i + kUnspacedReach];
    }
    num_pending_ = static_cast<int>(count - i);
    std::copy(places + i, places + count, pending_);
  }

  void end_run(uint32_t end) {
    for (int i = 0; i < num_pending_; ++i) {
      *end_++ = pending_[i];
      *end_++ = end;
    }
    num_pending_ = 0;
  }

  const uint8_t* next_;
  int64_t left_;
  const WordTable& table_;
  uint8_t* folded_;
  uint32_t *borders_, *end_;
  uint32_t fill_ = 0;  // bytes of folded_
  bool open_ = false;  // a word goes on: end_[-1] is its begin
  bool cut_ = false, continues_ = false, is_last_ = false;
  int num_pending_ = 0;  // characters without spaces whose words have not ended
  uint32_t pending_[kUnspacedReach];
  uint8_t last_[kSafeBytes + 64];
};

}  // namespace herdkern::text::HK_MINHASH_LEVEL
