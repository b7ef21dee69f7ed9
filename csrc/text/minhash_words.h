// Cuts UTF-8 text into the words of MinHash, compiled once per x86-64 level (HK_MINHASH_LEVEL is its namespace).
// The text is taken 64 bytes at a time: a bit mask says which bytes are parts of words, a lower-cased copy is hashed.
#pragma once
#include <algorithm>
#include <array>
#include <type_traits>

#include "text/minhash.h"
#if defined(HK_X86)
#include <immintrin.h>
#endif

namespace herdkern::text::HK_MINHASH_LEVEL {

struct BlockMasks {
  uint64_t word, high;  // bit i: byte i is an ASCII letter, digit or '_'; byte i is not ASCII
};

#if defined(__AVX512BW__)
template <bool kZeroDigits>
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  const __m512i v = _mm512_loadu_si512(in);
  const __m512i bit5 = _mm512_set1_epi8(0x20);
  const __m512i letter_index = _mm512_sub_epi8(_mm512_or_si512(v, bit5), _mm512_set1_epi8('a'));
  const __mmask64 letter = _mm512_cmplt_epu8_mask(letter_index, _mm512_set1_epi8(26));
  const __mmask64 digit = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('0')), _mm512_set1_epi8(10));
  __m512i folded = _mm512_or_si512(v, _mm512_maskz_mov_epi8(letter, bit5));
  if (kZeroDigits) folded = _mm512_mask_mov_epi8(folded, digit, _mm512_set1_epi8('0'));
  _mm512_storeu_si512(out, folded);
  return {letter | digit | _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('_')), _mm512_movepi8_mask(v)};
}
#elif defined(__AVX2__)
template <bool kZeroDigits>
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  uint64_t word[2], high[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32 * half));
    const __m256i bit5 = _mm256_set1_epi8(0x20);
    const __m256i letter_index = _mm256_sub_epi8(_mm256_or_si256(v, bit5), _mm256_set1_epi8('a'));
    const __m256i digit_index = _mm256_sub_epi8(v, _mm256_set1_epi8('0'));
    const __m256i letter = _mm256_cmpeq_epi8(_mm256_min_epu8(letter_index, _mm256_set1_epi8(25)), letter_index);
    const __m256i digit = _mm256_cmpeq_epi8(_mm256_min_epu8(digit_index, _mm256_set1_epi8(9)), digit_index);
    const __m256i underscore = _mm256_cmpeq_epi8(v, _mm256_set1_epi8('_'));
    __m256i folded = _mm256_or_si256(v, _mm256_and_si256(letter, bit5));
    if (kZeroDigits) folded = _mm256_blendv_epi8(folded, _mm256_set1_epi8('0'), digit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), folded);
    const __m256i parts = _mm256_or_si256(_mm256_or_si256(letter, digit), underscore);
    word[half] = static_cast<uint32_t>(_mm256_movemask_epi8(parts));
    high[half] = static_cast<uint32_t>(_mm256_movemask_epi8(v));
  }
  return {word[0] | word[1] << 32, high[0] | high[1] << 32};
}
#elif defined(__SSE2__)
template <bool kZeroDigits>
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  BlockMasks masks{0, 0};
  for (int quarter = 0; quarter < 4; ++quarter) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16 * quarter));
    const __m128i bit5 = _mm_set1_epi8(0x20);
    const __m128i letter_index = _mm_sub_epi8(_mm_or_si128(v, bit5), _mm_set1_epi8('a'));
    const __m128i digit_index = _mm_sub_epi8(v, _mm_set1_epi8('0'));
    const __m128i letter = _mm_cmpeq_epi8(_mm_min_epu8(letter_index, _mm_set1_epi8(25)), letter_index);
    const __m128i digit = _mm_cmpeq_epi8(_mm_min_epu8(digit_index, _mm_set1_epi8(9)), digit_index);
    const __m128i underscore = _mm_cmpeq_epi8(v, _mm_set1_epi8('_'));
    __m128i folded = _mm_or_si128(v, _mm_and_si128(letter, bit5));
    if (kZeroDigits) folded = _mm_or_si128(_mm_andnot_si128(digit, folded), _mm_and_si128(digit, _mm_set1_epi8('0')));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * quarter), folded);
    const uint64_t parts = _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(letter, digit), underscore));
    masks.word |= parts << (16 * quarter);
    masks.high |= static_cast<uint64_t>(_mm_movemask_epi8(v)) << (16 * quarter);
  }
  return masks;
}
#else
template <bool kZeroDigits>
inline BlockMasks classify_block(const uint8_t* in, uint8_t* out) {
  BlockMasks masks{0, 0};
  for (int i = 0; i < 64; ++i) {
    const uint8_t c = in[i];
    const bool letter = static_cast<uint8_t>((c | 0x20) - 'a') < 26, digit = static_cast<uint8_t>(c - '0') < 10;
    out[i] = letter ? c | 0x20 : kZeroDigits && digit ? '0' : c;
    masks.word |= static_cast<uint64_t>(letter || digit || c == '_') << i;
    masks.high |= static_cast<uint64_t>(c >> 7) << i;
  }
  return masks;
}
#endif

inline uint64_t load8(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

// Hash of size >= 1 bytes; 16 bytes from p on must be readable (what lies behind size does not count).
inline uint64_t hash_bytes(const uint8_t* p, int64_t size) {
  const uint64_t salt = kGolden * static_cast<uint64_t>(size);
  uint64_t x, y, h = salt;
  if (size <= 8) {
    x = load8(p) & (~uint64_t{0} >> (64 - 8 * size));
    y = 0;
  } else if (size <= 16) {
    x = load8(p);
    y = load8(p + 8) & (~uint64_t{0} >> (128 - 8 * size));
  } else {
    const uint8_t* last = p + size - 16;
    for (; p < last; p += 16) h = multiply_fold(load8(p) ^ h, load8(p + 8) ^ 0xE7037ED1A0B428DBu);
    x = load8(last);
    y = load8(last + 8);
  }
  return multiply_fold(x ^ h ^ 0xA0761D6478BD642Fu, y ^ salt ^ 0x8EBC6AF09C88C6E3u);
}

struct CodePoint {
  uint32_t value;
  int size;  // bytes
  WordClass word_class;
};

// The code point that starts at p (not ASCII). A byte that starts none counts as a letter of its own.
inline CodePoint decode(const uint8_t* p, const uint8_t* end, const WordTable& table) {
  const uint8_t lead = p[0];
  const auto trail = [&](int i) { return p + i < end && (p[i] & 0xC0) == 0x80; };
  uint32_t value = 0;
  int size = 1;
  if (lead >= 0xC2 && lead <= 0xDF && trail(1)) {
    value = (lead & 0x1Fu) << 6 | (p[1] & 0x3Fu);
    size = 2;
  } else if ((lead & 0xF0) == 0xE0 && trail(1) && trail(2)) {
    value = (lead & 0xFu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    size = value >= 0x800 && (value < 0xD800 || value > 0xDFFF) ? 3 : 1;
  } else if (lead >= 0xF0 && lead <= 0xF4 && trail(1) && trail(2) && trail(3)) {
    value = (lead & 7u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
    size = value >= 0x10000 && value < 0x110000 ? 4 : 1;
  }
  if (size == 1) return {0, 1, kWordPart};
  return {value, size, static_cast<WordClass>(table.word_class[value])};
}

inline uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Calls emit(pointer, size) for every word of the text in order. `lower` holds size + 128 bytes and gets the folded
// text.
template <bool kZeroDigits, typename Emit>
class WordScanner {
 public:
  WordScanner(const uint8_t* text, int64_t size, uint8_t* lower, const WordTable& table, Emit& emit)
      : text_(text), size_(size), lower_(lower), table_(table), emit_(emit) {}

  void scan() {
    int64_t base = 0;
    for (; base + 64 <= size_; base += 64) block(text_ + base, base);
    if (base < size_) {
      uint8_t last[64] = {};
      std::memcpy(last, text_ + base, size_ - base);
      block(last, base);
    }
    end_word(size_);
    end_run(size_);
  }

 private:
  void block(const uint8_t* in, int64_t base) {
    BlockMasks masks = classify_block<kZeroDigits>(in, lower_ + base);
    uint64_t unspaced = 0, unspaced_starts = 0;
    if (masks.high) other_scripts(base, masks, unspaced, unspaced_starts);
    uint64_t edges = masks.word ^ (masks.word << 1 | last_word_);
    last_word_ = masks.word >> 63;
    if (unspaced | last_unspaced_) {
      const uint64_t run_ends = ~unspaced & (unspaced << 1 | last_unspaced_);
      last_unspaced_ = unspaced >> 63;
      for (uint64_t events = edges | unspaced_starts | run_ends; events; events &= events - 1) {
        const int i = __builtin_ctzll(events);
        const uint64_t bit = uint64_t{1} << i;
        if ((edges & bit) && word_start_ >= 0) {
          end_word(base + i);
          edges &= ~bit;
        }
        if (run_ends & bit) end_run(base + i);
        if (edges & bit) word_start_ = base + i;
        if (unspaced_starts & bit) add_to_run(base + i);
      }
      return;
    }
    if (word_start_ >= 0 && edges) {
      end_word(base + __builtin_ctzll(edges));
      edges &= edges - 1;
    }
    while (edges) {
      word_start_ = base + __builtin_ctzll(edges);
      edges &= edges - 1;
      if (!edges) return;
      end_word(base + __builtin_ctzll(edges));
      edges &= edges - 1;
    }
  }

  // Corrects the masks and the folded copy for the code points of this block that are not ASCII.
  void other_scripts(int64_t base, BlockMasks& masks, uint64_t& unspaced, uint64_t& unspaced_starts) {
    uint64_t todo = masks.high;
    if (carried_bytes_) {  // the end of a code point that began in the block before
      const uint64_t bits = low_bits(carried_bytes_);
      todo &= ~bits;
      if (carried_class_ == kWordPart) masks.word |= bits;
      if (carried_class_ == kUnspaced) unspaced |= bits;
      if (carried_fold_) lower_[base] = carried_fold_;
      carried_bytes_ = 0;
      carried_fold_ = 0;
    }
    while (todo) {
      const int i = __builtin_ctzll(todo);
      const CodePoint c = decode(text_ + base + i, text_ + size_, table_);
      const uint64_t bits = low_bits(c.size) << i;
      todo &= ~bits;
      if (c.word_class == kWordPart) masks.word |= bits;
      if (c.word_class == kUnspaced) {
        unspaced |= bits;
        unspaced_starts |= uint64_t{1} << i;
      }
      if (i + c.size > 64) {
        carried_bytes_ = i + c.size - 64;
        carried_class_ = c.word_class;
      }
      if (c.size == 2 && table_.folded[c.value]) {
        const uint32_t folded = table_.folded[c.value];
        lower_[base + i] = static_cast<uint8_t>(0xC0 | folded >> 6);
        lower_[base + i + 1] = static_cast<uint8_t>(0x80 | (folded & 0x3F));
        if (i == 63) carried_fold_ = lower_[base + 64];
      }
    }
  }

  void end_word(int64_t end) {
    if (word_start_ < 0) return;
    for (; end - word_start_ > kMaxWordBytes; word_start_ += kMaxWordBytes) emit_(lower_ + word_start_, kMaxWordBytes);
    emit_(lower_ + word_start_, end - word_start_);
    word_start_ = -1;
  }

  void add_to_run(int64_t start) {
    if (run_size_ == kUnspacedReach) {
      emit_(lower_ + run_[0], start - run_[0]);
      std::copy(run_.begin() + 1, run_.end(), run_.begin());
      --run_size_;
    }
    run_[run_size_++] = start;
  }

  void end_run(int64_t end) {
    for (int i = 0; i < run_size_; ++i) emit_(lower_ + run_[i], end - run_[i]);
    run_size_ = 0;
  }

  const uint8_t* text_;
  int64_t size_;
  uint8_t* lower_;
  const WordTable& table_;
  Emit& emit_;
  int64_t word_start_ = -1;
  uint64_t last_word_ = 0, last_unspaced_ = 0;  // whether the last byte of the block before was part of one
  int carried_bytes_ = 0;
  WordClass carried_class_ = kSeparator;
  uint8_t carried_fold_ = 0;
  std::array<int64_t, kUnspacedReach> run_{};
  int run_size_ = 0;
};

template <bool kZeroDigits, typename Emit>
inline void scan_words(const uint8_t* text, int64_t size, Scratch& scratch, const WordTable& table, Emit&& emit) {
  if (static_cast<int64_t>(scratch.lower.size()) < size + 128) scratch.lower.resize(size + 128);
  WordScanner<kZeroDigits, std::remove_reference_t<Emit>>(text, size, scratch.lower.data(), table, emit).scan();
}

}  // namespace herdkern::text::HK_MINHASH_LEVEL
