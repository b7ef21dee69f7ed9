// The line kernel's body, compiled once per x86-64 level (HK_LINE_LEVEL names it, and its namespace).
// 64 bytes at a time: bit masks say which bytes stay, the folded copy is compressed to the normal form by them, and the
// normal form of each line is hashed when its end is met, while it is in the cache. A block with characters of a script
// without spaces goes through the code-point loop, which alone is the baseline.
#pragma once
#include "text/line_keys.h"
#include "text/minhash.h"
#include "text/utf8.h"
#if defined(HK_X86) && defined(__AVX2__)
#include <immintrin.h>
#define HK_LINE_BLOCKS 1
#endif

namespace herdkern::text::HK_LINE_LEVEL {

// Hash of size >= 1 bytes; 16 bytes from p on must be readable (what lies behind size does not count).
inline uint64_t hash_line(const uint8_t* p, int64_t size) {
  const uint64_t salt = 0x9E3779B97F4A7C15u * static_cast<uint64_t>(size);
  const auto load = [](const uint8_t* at) {
    uint64_t x;
    std::memcpy(&x, at, 8);
    return x;
  };
  uint64_t x, y, h = salt;
  if (size <= 16) {
    x = load(p);
    y = load(p + 8);
    x = size >= 8 ? x : x & (~uint64_t{0} >> (64 - 8 * size));
    y = size <= 8 ? 0 : y & (~uint64_t{0} >> (128 - 8 * size));
  } else {
    const uint8_t* last = p + size - 16;
    for (; p < last; p += 16) h = mix(load(p) ^ h, load(p + 8) ^ 0xE7037ED1A0B428DBu);
    x = load(last);
    y = load(last + 8);
  }
  const uint64_t key = mix(x ^ h ^ 0xA0761D6478BD642Fu, y ^ salt ^ 0x8EBC6AF09C88C6E3u);
  return key ? key : 1;
}

#if defined(HK_LINE_BLOCKS)
struct LineMasks {
  uint64_t word, newline, high;  // bit i: byte i is an ASCII letter, digit or '_'; is '\n'; is not ASCII
};

// out: letters in lower case, digits as '0', other ASCII as ' ', the rest as it is.
#if defined(__AVX512BW__)
inline LineMasks classify_line_block(const uint8_t* in, uint8_t* out) {
  const __m512i v = _mm512_loadu_si512(in), bit5 = _mm512_set1_epi8(0x20);
  const __m512i letter_index = _mm512_sub_epi8(_mm512_or_si512(v, bit5), _mm512_set1_epi8('a'));
  const __mmask64 letter = _mm512_cmplt_epu8_mask(letter_index, _mm512_set1_epi8(26));
  const __mmask64 digit = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8('0')), _mm512_set1_epi8(10));
  const __mmask64 high = _mm512_movepi8_mask(v);
  const __mmask64 word = letter | digit | _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('_'));
  __m512i folded = _mm512_mask_blend_epi8(word | high, bit5, v);
  folded = _mm512_or_si512(folded, _mm512_maskz_mov_epi8(letter, bit5));
  folded = _mm512_mask_mov_epi8(folded, digit, _mm512_set1_epi8('0'));
  _mm512_storeu_si512(out, folded);
  return {word, _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8('\n')), high};
}
#else
inline LineMasks classify_line_block(const uint8_t* in, uint8_t* out) {
  uint64_t word[2], newline[2], high[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32 * half));
    const __m256i bit5 = _mm256_set1_epi8(0x20);
    const __m256i letter_index = _mm256_sub_epi8(_mm256_or_si256(v, bit5), _mm256_set1_epi8('a'));
    const __m256i digit_index = _mm256_sub_epi8(v, _mm256_set1_epi8('0'));
    const __m256i letter = _mm256_cmpeq_epi8(_mm256_min_epu8(letter_index, _mm256_set1_epi8(25)), letter_index);
    const __m256i digit = _mm256_cmpeq_epi8(_mm256_min_epu8(digit_index, _mm256_set1_epi8(9)), digit_index);
    const __m256i parts = _mm256_or_si256(_mm256_or_si256(letter, digit), _mm256_cmpeq_epi8(v, _mm256_set1_epi8('_')));
    __m256i folded = _mm256_blendv_epi8(bit5, v, _mm256_or_si256(parts, v));  // by the upper bit of each byte
    folded = _mm256_or_si256(folded, _mm256_and_si256(letter, bit5));
    folded = _mm256_blendv_epi8(folded, _mm256_set1_epi8('0'), digit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), folded);
    word[half] = static_cast<uint32_t>(_mm256_movemask_epi8(parts));
    newline[half] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8('\n'))));
    high[half] = static_cast<uint32_t>(_mm256_movemask_epi8(v));
  }
  return {word[0] | word[1] << 32, newline[0] | newline[1] << 32, high[0] | high[1] << 32};
}
#endif

// Appends the bytes of in[0..64) whose bit in `keep` is set; writes up to 8 bytes more.
inline uint8_t* compress_block(const uint8_t* in, uint64_t keep, uint8_t* out) {
  for (int part = 0; part < 8; ++part) {
    const uint64_t bits = keep >> (8 * part) & 0xFF;
    const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101u) * 0xFF;
    uint64_t x;
    std::memcpy(&x, in + 8 * part, 8);
    x = _pext_u64(x, bytes);
    std::memcpy(out, &x, 8);
    out += __builtin_popcountll(bits);
  }
  return out;
}
#endif

inline uint64_t bits_below(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

class LineScanner {
 public:
  LineScanner(const uint8_t* text, int64_t size, LineScratch& scratch, std::vector<uint64_t>& keys)
      : end_(text + size), table_(word_table()), normal_(scratch.normal), keys_(keys) {
    if (normal_.size() < kFirstBytes) normal_.resize(kFirstBytes);
    out_ = normal_.data();
    const uint8_t* p = text;
    while (p < end_) p = next(p);
    end_line();
  }

 private:
  static constexpr size_t kFirstBytes = size_t{1} << 14;
  static constexpr int64_t kReset = 1 << 12;  // bytes of finished lines that may lie in the buffer
  static constexpr int64_t kSlack = 256;      // of one block: 64 bytes twice, and what the loads and stores overrun

  // Handles the next piece of at most 64 bytes, whole code points, and returns its end.
  const uint8_t* next(const uint8_t* p) {
    make_room();
    const uint8_t* stop = end_ - p > 64 ? p + 64 : end_;
#if defined(HK_LINE_BLOCKS)
    alignas(64) uint8_t tail[64];
    const uint8_t* in = p;
    if (stop - p < 64) {
      std::memset(tail, ' ', 64);
      std::memcpy(tail, p, stop - p);
      in = tail;
    }
    alignas(64) uint8_t folded[64];
    LineMasks masks = classify_line_block(in, folded);
    int count = static_cast<int>(stop - p);
    if (masks.high && !place_high(p, masks, folded, count)) return scan(p, stop);
    const uint64_t valid = bits_below(count), word = masks.word & valid;
    const uint64_t behind = ~word & (word << 1 | static_cast<uint64_t>(last_ != kSeparator)) & valid;
    uint64_t newlines = masks.newline & valid;
    const uint64_t keep = word | (behind & ~newlines);
    if (last_ == kUnspaced && (word & 1)) *out_++ = ' ';
    uint8_t* base = out_;
    out_ = compress_block(folded, keep, out_);
    last_ = word >> (count - 1) & 1 ? kWordPart : kSeparator;
    if (newlines) {
      uint8_t* block_end = out_;
      for (; newlines; newlines &= newlines - 1) {
        out_ = base + __builtin_popcountll(keep & bits_below(__builtin_ctzll(newlines)));
        end_line();
        begin_ = out_ - normal_.data();
      }
      out_ = block_end;
    }
    return p + count;
#else
    return scan(p, stop);
#endif
  }

  void make_room() {
    if (begin_ > kReset) {
      const int64_t held = out_ - (normal_.data() + begin_);
      std::memmove(normal_.data(), normal_.data() + begin_, held);
      begin_ = 0;
      out_ = normal_.data() + held;
    }
    const size_t used = out_ - normal_.data();
    if (used + kSlack > normal_.size()) {
      normal_.resize(2 * normal_.size());
      out_ = normal_.data() + used;
    }
  }

#if defined(HK_LINE_BLOCKS)
  // Puts the code points of a block that are not ASCII into masks and folded copy; `count` shrinks to where a code
  // point passes the end of the block. False if there is one of a script without spaces.
  bool place_high(const uint8_t* p, LineMasks& masks, uint8_t* folded, int& count) const {
    for (uint64_t todo = masks.high; todo;) {
      const int i = __builtin_ctzll(todo);
      uint32_t value, size;
      if (p[i] - 0xC2u < 0x1Eu && i + 1 < 64 && p + i + 1 < end_ && (p[i + 1] & 0xC0) == 0x80) {
        value = (p[i] & 0x1Fu) << 6 | (p[i + 1] & 0x3Fu);
        size = 2;
        if (const uint32_t other = table_.folded[value]) {
          folded[i] = static_cast<uint8_t>(0xC0 | other >> 6);
          folded[i + 1] = static_cast<uint8_t>(0x80 | (other & 0x3F));
        }
      } else {
        const DecodedCodePoint c = decode_utf8(p + i, end_);
        value = c.code_point;
        size = c.num_bytes;
        if (i + static_cast<int>(size) > count) {
          count = i;
          return count > 0;
        }
      }
      const uint8_t kind = size == 1 ? kWordPart : table_.word_class[value];
      if (kind == kUnspaced) return false;
      const uint64_t bits = bits_below(static_cast<int>(size)) << i;
      todo &= ~bits;
      if (kind == kWordPart) {
        masks.word |= bits;
      } else {
        folded[i] = ' ';
      }
    }
    return true;
  }
#endif

  // Code point by code point from p on until `stop` is reached or passed.
  const uint8_t* scan(const uint8_t* p, const uint8_t* stop) {
    while (p < stop) {
      const uint8_t c = *p;
      if (c < 0x80) {
        ++p;
        const bool letter = static_cast<uint8_t>((c | 0x20) - 'a') < 26, digit = static_cast<uint8_t>(c - '0') < 10;
        if (letter || digit || c == '_') {
          begin_piece(kWordPart);
          *out_++ = letter ? c | 0x20 : digit ? '0' : c;
          last_ = kWordPart;
        } else if (c == '\n') {
          end_line();
          out_ = normal_.data() + begin_;
          last_ = kSeparator;
        } else {
          end_piece();
        }
        continue;
      }
      const DecodedCodePoint point = decode_utf8(p, end_);
      const uint32_t size = point.num_bytes;
      const uint8_t kind = size == 1 ? kWordPart : table_.word_class[point.code_point];
      if (kind == kSeparator) {
        end_piece();
      } else {
        begin_piece(kind);
        const uint32_t other = size == 2 ? table_.folded[point.code_point] : 0;
        if (other) {
          *out_++ = static_cast<uint8_t>(0xC0 | other >> 6);
          *out_++ = static_cast<uint8_t>(0x80 | (other & 0x3F));
        } else {
          for (uint32_t i = 0; i < size; ++i) *out_++ = p[i];
        }
        last_ = kind;
      }
      p += size;
    }
    return p;
  }

  // Between the block's way and this one the buffer ends with a space exactly if a separator came after a piece.
  void begin_piece(uint8_t kind) {
    if (last_ != kind && last_ != kSeparator) *out_++ = ' ';
  }
  void end_piece() {
    if (last_ != kSeparator) *out_++ = ' ';
    last_ = kSeparator;
  }

  void end_line() {
    const uint8_t* line = normal_.data() + begin_;
    int64_t size = out_ - line;
    if (size > 0 && line[size - 1] == ' ') --size;
    keys_.push_back(size ? hash_line(line, size) : 0);
  }

  const uint8_t* const end_;
  const WordTable& table_;
  std::vector<uint8_t>& normal_;
  std::vector<uint64_t>& keys_;
  uint8_t* out_ = nullptr;     // the end of the normal form so far
  int64_t begin_ = 0;          // where the line began in it
  uint8_t last_ = kSeparator;  // class of the character before
};

void line_keys(const uint8_t* text, int64_t size, LineScratch& scratch, std::vector<uint64_t>& out) {
  LineScanner(text, size, scratch, out);
}

#define HK_STRING_OF(x) #x
#define HK_STRING(x) HK_STRING_OF(x)
LineKernels line_kernels() { return {HK_STRING(HK_LINE_LEVEL), line_keys}; }

}  // namespace herdkern::text::HK_LINE_LEVEL
