// The split pattern of Llama 3 and cl100k as a scanner over UTF-8: it cuts a document into the words that BPE works on.
//
//   (?i:'s|'t|'re|'ve|'m|'ll|'d) | [^\r\n\p{L}\p{N}]?\p{L}+ | \p{N}{1,3} | ?[^\s\p{L}\p{N}]+[\r\n]* | \s*[\r\n]+
//   | \s+(?!\S) | \s+          (alternatives in this order; the fourth starts with an optional space)
//
// Every byte belongs to exactly one word. A byte that is no part of well-formed UTF-8 (overlong forms, surrogates and
// code points above U+10FFFF included) counts as one code point of class kOther, the next byte starts afresh; this is
// what the pattern does to text decoded with Python's "surrogateescape". Linear time: a word is scanned at most twice.
// Not plain from the pattern: the prefix of a letter run may be ANY code point that is no letter, number, CR or LF (a
// tab, a mark, U+200B); \p{M} is no letter; 's also matches ' and U+017F, which folds to s; \s is the property
// White_Space.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "text/unicode_classes.h"

namespace herdkern::text {

enum CharClass : uint8_t { kOther, kLetter, kUpper, kLower, kMark, kNumber, kSpace, kNewline };

inline bool is_letter(uint8_t cls) { return uint8_t(cls - kLetter) <= kLower - kLetter; }
inline bool is_space(uint8_t cls) { return cls >= kSpace; }
inline bool is_symbol(uint8_t cls) { return cls == kOther || cls == kMark; }  // [^\s\p{L}\p{N}]

// (0x110000,) class of each code point, unpacked from kClassRuns once.
inline const uint8_t* class_table() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> classes;
    classes.reserve(0x110000);
    for (uint16_t run : kClassRuns) classes.insert(classes.end(), run >> 3, run & 7);
    return classes;
  }();
  return table.data();
}

struct CodePoint {
  uint32_t num_bytes;
  uint8_t cls;
};

class WordScanner {
 public:
  WordScanner() : classes_(class_table()) {}

  // Returns the end of the word that starts at p; p < end, and p must be a border of words.
  const uint8_t* next(const uint8_t* p, const uint8_t* end) const {
    const CodePoint first = decode(p, end);
    const uint8_t* second = p + first.num_bytes;
    if (is_letter(first.cls)) return skip_letters(second, end);
    if (*p == '\'') {
      if (const uint8_t* stop = contraction(p, end)) return stop;
    }
    if (first.cls == kNumber) return skip_numbers(second, end);
    if (second < end) {
      const CodePoint next = decode(second, end);
      if (is_letter(next.cls) && first.cls != kNewline) return skip_letters(second + next.num_bytes, end);
      if (*p == ' ' && is_symbol(next.cls)) return skip_symbols(second + next.num_bytes, end);
    }
    if (is_symbol(first.cls)) return skip_symbols(second, end);
    return white_space(p, second, end);
  }

  CodePoint decode(const uint8_t* p, const uint8_t* end) const {
    const uint32_t lead = *p;
    if (lead < 0x80) return {1, classes_[lead]};
    const auto left = end - p;
    const auto tail = [p](int i) { return uint32_t(p[i]) ^ 0x80u; };  // below 0x40 for a continuation byte
    if (lead < 0xE0) {
      if (lead < 0xC2 || left < 2 || tail(1) >= 0x40) return {1, kOther};
      return {2, classes_[(lead & 0x1F) << 6 | tail(1)]};
    }
    if (lead < 0xF0) {
      if (left < 3 || (tail(1) | tail(2)) >= 0x40) return {1, kOther};
      const uint32_t c = (lead & 0x0F) << 12 | tail(1) << 6 | tail(2);
      if (c < 0x800 || (c - 0xD800u) < 0x800u) return {1, kOther};
      return {3, classes_[c]};
    }
    if (lead > 0xF4 || left < 4 || (tail(1) | tail(2) | tail(3)) >= 0x40) return {1, kOther};
    const uint32_t c = (lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3);
    if (c < 0x10000 || c > 0x10FFFF) return {1, kOther};
    return {4, classes_[c]};
  }

 private:
  // (?i:'s|'t|'re|'ve|'m|'ll|'d) at the apostrophe p: its end, or null.
  static const uint8_t* contraction(const uint8_t* p, const uint8_t* end) {
    if (end - p < 2) return nullptr;
    const uint8_t a = p[1] | 0x20;
    if (p[1] >= 0x80) return end - p >= 3 && p[1] == 0xC5 && p[2] == 0xBF ? p + 3 : nullptr;  // U+017F folds to s
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (end - p < 3 || p[2] >= 0x80) return nullptr;
    const uint8_t b = p[2] | 0x20;
    return (b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l') ? p + 3 : nullptr;
  }

  const uint8_t* skip_letters(const uint8_t* p, const uint8_t* end) const {
    while (p < end) {
      if (*p < 0x80) {
        const uint8_t* stop = skip_ascii_letters(p, end);
        if (stop == end || *stop < 0x80) return stop;
        p = stop;
      }
      const CodePoint c = decode(p, end);
      if (!is_letter(c.cls)) return p;
      p += c.num_bytes;
    }
    return p;
  }

  static const uint8_t* skip_ascii_letters(const uint8_t* p, const uint8_t* end) {
#if defined(__SSE2__)
    for (; end - p >= 16; p += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      const __m128i index = _mm_sub_epi8(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), _mm_set1_epi8('a'));
      const __m128i letter = _mm_cmpeq_epi8(_mm_min_epu8(index, _mm_set1_epi8(25)), index);
      const unsigned others = unsigned(_mm_movemask_epi8(letter)) ^ 0xFFFFu;
      if (others != 0) return p + __builtin_ctz(others);
    }
#endif
    while (p < end && uint8_t((*p | 0x20) - 'a') < 26) ++p;
    return p;
  }

  // \p{N}{1,3} after its first code point.
  const uint8_t* skip_numbers(const uint8_t* p, const uint8_t* end) const {
    for (int i = 0; i < 2 && p < end; ++i) {
      const CodePoint c = decode(p, end);
      if (c.cls != kNumber) break;
      p += c.num_bytes;
    }
    return p;
  }

  // [^\s\p{L}\p{N}]*[\r\n]*
  const uint8_t* skip_symbols(const uint8_t* p, const uint8_t* end) const {
    while (p < end) {
      const CodePoint c = decode(p, end);
      if (!is_symbol(c.cls)) break;
      p += c.num_bytes;
    }
    while (p < end && (*p == '\r' || *p == '\n')) ++p;
    return p;
  }

  // \s*[\r\n]+ | \s+(?!\S) | \s+ for a run of white space whose first code point is [p, second).
  const uint8_t* white_space(const uint8_t* p, const uint8_t* second, const uint8_t* end) const {
    const uint8_t* after_newline = (*p == '\r' || *p == '\n') ? second : nullptr;
    const uint8_t* last = p;
    const uint8_t* stop = second;
    while (stop < end) {
      const CodePoint c = decode(stop, end);
      if (!is_space(c.cls)) break;
      last = stop;
      stop += c.num_bytes;
      if (c.cls == kNewline) after_newline = stop;
    }
    if (after_newline != nullptr) return after_newline;
    return stop == end || last == p ? stop : last;  // the last space goes to the word that follows
  }

  const uint8_t* classes_;
};

}  // namespace herdkern::text
