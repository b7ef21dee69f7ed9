// The body of the block scanners, compiled once per x86-64 level (HK_BLOCK_LEVEL names it, and its namespace). See
// splitter_blocks.h. Everything here has internal linkage or lies in the level's namespace.
#pragma once
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "text/splitter_blocks.h"
#include "text/utf8.h"

namespace herdkern::text::HK_BLOCK_LEVEL {

namespace {

using Mask = uint64_t;

// 64 bytes; every comparison gives one bit a byte.
struct Bytes64 {
#if defined(__AVX512BW__)
  __m512i v;
  explicit Bytes64(const uint8_t* p) : v(_mm512_loadu_si512(p)) {}
  Mask equal(uint8_t c) const { return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(char(c))); }
  Mask within(uint8_t first, uint8_t count) const {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(char(first))), _mm512_set1_epi8(char(count)));
  }
  Mask any(uint8_t bits) const { return _mm512_test_epi8_mask(v, _mm512_set1_epi8(char(bits))); }
  Mask high() const { return _mm512_movepi8_mask(v); }
#elif defined(__AVX2__)
  __m256i v[2];
  explicit Bytes64(const uint8_t* p) {
    for (int i = 0; i < 2; ++i) v[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
  }
  template <typename F>
  Mask each(const F& f) const {
    return Mask(uint32_t(_mm256_movemask_epi8(f(v[0])))) | Mask(uint32_t(_mm256_movemask_epi8(f(v[1])))) << 32;
  }
  Mask equal(uint8_t c) const {
    return each([c](__m256i x) { return _mm256_cmpeq_epi8(x, _mm256_set1_epi8(char(c))); });
  }
  Mask within(uint8_t first, uint8_t count) const {
    return each([=](__m256i x) {
      const __m256i index = _mm256_sub_epi8(x, _mm256_set1_epi8(char(first)));
      return _mm256_cmpeq_epi8(_mm256_min_epu8(index, _mm256_set1_epi8(char(count - 1))), index);
    });
  }
  Mask any(uint8_t bits) const {
    return ~each([bits](__m256i x) {
      return _mm256_cmpeq_epi8(_mm256_and_si256(x, _mm256_set1_epi8(char(bits))), _mm256_setzero_si256());
    });
  }
  Mask high() const {
    return each([](__m256i x) { return x; });
  }
#elif defined(__SSE2__)
  __m128i v[4];
  explicit Bytes64(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
  }
  template <typename F>
  Mask each(const F& f) const {
    Mask mask = 0;
    for (int i = 0; i < 4; ++i) mask |= Mask(uint32_t(_mm_movemask_epi8(f(v[i])))) << 16 * i;
    return mask;
  }
  Mask equal(uint8_t c) const {
    return each([c](__m128i x) { return _mm_cmpeq_epi8(x, _mm_set1_epi8(char(c))); });
  }
  Mask within(uint8_t first, uint8_t count) const {
    return each([=](__m128i x) {
      const __m128i index = _mm_sub_epi8(x, _mm_set1_epi8(char(first)));
      return _mm_cmpeq_epi8(_mm_min_epu8(index, _mm_set1_epi8(char(count - 1))), index);
    });
  }
  Mask any(uint8_t bits) const {
    return ~each(
        [bits](__m128i x) { return _mm_cmpeq_epi8(_mm_and_si128(x, _mm_set1_epi8(char(bits))), _mm_setzero_si128()); });
  }
  Mask high() const {
    return each([](__m128i x) { return x; });
  }
#else
  const uint8_t* v;
  explicit Bytes64(const uint8_t* p) : v(p) {}
  template <typename F>
  Mask each(const F& f) const {
    Mask mask = 0;
    for (int i = 0; i < 64; ++i) mask |= Mask(bool(f(v[i]))) << i;
    return mask;
  }
  Mask equal(uint8_t c) const {
    return each([c](uint8_t x) { return x == c; });
  }
  Mask within(uint8_t first, uint8_t count) const {
    return each([=](uint8_t x) { return uint8_t(x - first) < count; });
  }
  Mask any(uint8_t bits) const {
    return each([bits](uint8_t x) { return x & bits; });
  }
  Mask high() const {
    return each([](uint8_t x) { return x >> 7; });
  }
#endif
};

inline Mask below(size_t n) { return n >= 64 ? ~Mask(0) : (Mask(1) << n) - 1; }
inline int first_bit(Mask mask) { return __builtin_ctzll(mask); }

// Up to 64 code points from the start of a word; masks have one bit for each.
struct Block {
  Mask upper = 0, lower = 0, other_letter = 0, mark = 0, number = 0;
  Mask symbol = 0, cjk = 0;  // as kSymbolBit and kCjkBit
  Mask ascii = 0, ascii_letter = 0;
  Mask newline = 0, space = 0;                // CR and LF; all other white space
  Mask blank = 0, apostrophe = 0, slash = 0;  // U+0020, U+0027, U+002F
  Mask valid = 0;
  bool at_end = false;  // the text ends behind the last code point
  bool is_ascii = true;
  size_t num_bytes = 0;
  const uint8_t *text, *end;  // the first code point; the end of the document
  uint16_t offsets[65];       // where code point i begins, unless is_ascii
  const uint8_t* place(int i) const { return text + (is_ascii ? size_t(i) : offsets[i]); }
};

// The masks of ASCII characters among 64 bytes.
inline void read_ascii(const Bytes64& bytes, Block& block) {
  block.ascii = ~bytes.high();
  block.upper = bytes.within('A', 26);
  block.lower = bytes.within('a', 26);
  block.ascii_letter = block.upper | block.lower;
  block.number = bytes.within('0', 10);
  block.newline = bytes.equal('\n') | bytes.equal('\r');
  block.blank = bytes.equal(' ');
  block.space = block.blank | bytes.equal('\t') | bytes.within(0x0B, 2);
  block.apostrophe = bytes.equal('\'');
  block.slash = bytes.equal('/');
  block.symbol = bytes.within(0x21, 94) & ~(block.upper | block.lower | block.number);
}

// Code points on their way into a block; a vector may be written behind the 64th.
struct CodePoints {
  alignas(64) uint8_t plain[192];  // the character if it is ASCII, else any byte from 0x80 on
  alignas(64) uint8_t kind[192];   // CharKind bits, 0 for ASCII
  uint16_t offsets[192];           // where it begins
  int count = 0;
};

inline const uint8_t* decode_one(const uint8_t* p, const uint8_t* end, const uint8_t* kinds, CodePoints& found) {
  if (*p < 0x80) {
    found.plain[found.count] = *p;
    found.kind[found.count++] = 0;
    return p + 1;
  }
  const DecodedCodePoint c = decode_utf8(p, end);
  found.plain[found.count] = 0x80;
  found.kind[found.count++] = kinds[c.code_point];
  return p + c.num_bytes;
}

#if defined(__AVX512VBMI2__)
// Decodes what 64 bytes hold, up to the first code point of four bytes or malformed byte; returns how far it came.
// `offset`: of p. The vector way has no branch for each code point, and lengths change at every word.
inline size_t decode_64(const uint8_t* p, const uint8_t* end, const uint8_t* kinds, size_t offset, CodePoints& found) {
  const size_t size = end - p < 64 ? size_t(end - p) : 64;
  const Mask inside = size < 64 ? (Mask(1) << size) - 1 : ~Mask(0);
  const __m512i first = _mm512_maskz_loadu_epi8(inside, p);
  const __m512i second = _mm512_maskz_loadu_epi8(inside >> 1, p + 1);
  const __m512i third = _mm512_maskz_loadu_epi8(inside >> 2, p + 2);
  const auto set = [](uint8_t byte) { return _mm512_set1_epi8(char(byte)); };
  const Mask later = _mm512_cmplt_epi8_mask(first, set(0xC0));  // 0x80 to 0xBF
  const Mask lead = _mm512_cmpge_epu8_mask(first, set(0xC2)), lead_3 = _mm512_cmpge_epu8_mask(first, set(0xE0));
  Mask bad = (lead << 1 | lead_3 << 2) ^ later;
  bad |= _mm512_cmpge_epu8_mask(first, set(0xF0)) | (_mm512_movepi8_mask(first) & ~(later | lead));
  // Two bytes would have done; half of a surrogate pair.
  bad |= _mm512_cmpeq_epi8_mask(first, set(0xE0)) & _mm512_cmplt_epu8_mask(second, set(0xA0));
  bad |= _mm512_cmpeq_epi8_mask(first, set(0xED)) & _mm512_cmpge_epu8_mask(second, set(0xA0));
  size_t limit = bad == 0 ? size : size_t(__builtin_ctzll(bad));
  if (limit > size) limit = size;
  Mask starts = inside & ~later;
  starts &= limit < 64 ? (Mask(1) << limit) - 1 : ~Mask(0);
  if (starts == 0) return 0;
  const int last = 63 - __builtin_clzll(starts);
  if (size_t(last) + 1 + (lead >> last & 1) + (lead_3 >> last & 1) > limit) {
    starts ^= Mask(1) << last;
    limit = size_t(last);
  }
  const int count = __builtin_popcountll(starts);
  const __m512i lead_bytes = _mm512_maskz_compress_epi8(starts, first);
  const __m512i low_6 = set(0x3F);
  const __m512i seconds = _mm512_and_si512(_mm512_maskz_compress_epi8(starts, second), low_6);
  const __m512i thirds = _mm512_and_si512(_mm512_maskz_compress_epi8(starts, third), low_6);
  alignas(64) static constexpr auto kIota = [] {
    struct {
      uint8_t values[64];
    } iota{};
    for (uint8_t i = 0; i < 64; ++i) iota.values[i] = i;
    return iota;
  }();
  const __m512i places = _mm512_maskz_compress_epi8(starts, _mm512_load_si512(kIota.values));
  const Mask is_long = _mm512_movepi8_mask(lead_bytes), is_3 = _mm512_cmpge_epu8_mask(lead_bytes, set(0xE0));
  alignas(64) uint16_t codes[64];
  _mm512_storeu_si512(found.plain + found.count, lead_bytes);
  const auto widen = [](__m512i bytes, int half) {
    return _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(bytes, 1) : _mm512_castsi512_si256(bytes));
  };
  for (int half = 0; half < 2; ++half) {
    const __m512i lead_16 = _mm512_and_si512(widen(lead_bytes, half), _mm512_set1_epi16(0x1F));
    const __m512i two = _mm512_or_si512(_mm512_slli_epi16(lead_16, 6), widen(seconds, half));
    const __m512i three = _mm512_or_si512(_mm512_slli_epi16(two, 6), widen(thirds, half));
    const __m512i code = _mm512_mask_mov_epi16(two, __mmask32(is_3 >> 32 * half), three);
    _mm512_store_si512(codes + 32 * half, _mm512_maskz_mov_epi16(__mmask32(is_long >> 32 * half), code));
    const __m512i place = _mm512_add_epi16(widen(places, half), _mm512_set1_epi16(short(offset)));
    _mm512_storeu_si512(found.offsets + found.count + 32 * half, place);
    if (count <= 32) break;
  }
  uint8_t* kind = found.kind + found.count;  // that of U+0000 is 0, which stands for all of ASCII
  for (int i = 0; i < count; ++i) kind[i] = kinds[codes[i]];
  found.count += count;
  return limit;
}
#endif

// Decodes the next 64 code points, or as many as there are.
inline void read_any(const uint8_t* p, const uint8_t* end, const uint8_t* kinds, Block& block) {
  CodePoints found;
  const uint8_t* const start = p;
  while (found.count < 64 && p < end) {
#if defined(__AVX512VBMI2__)
    if (const size_t done = decode_64(p, end, kinds, size_t(p - start), found)) {
      p += done;
      continue;
    }
#endif
    found.offsets[found.count] = uint16_t(p - start);
    p = decode_one(p, end, kinds, found);
  }
  found.offsets[found.count] = uint16_t(p - start);
  const int count = found.count < 64 ? found.count : 64;
  p = start + found.offsets[count];
  std::memcpy(block.offsets, found.offsets, sizeof block.offsets);
  std::memset(found.plain + count, 0x80, 64);
  std::memset(found.kind + count, 0, 64);
  read_ascii(Bytes64(found.plain), block);
  const Bytes64 bits(found.kind);
  block.upper |= bits.any(kUpperBit);
  block.lower |= bits.any(kLowerBit);
  block.other_letter = bits.any(kOtherLetterBit);
  block.mark = bits.any(kMarkBit);
  block.number |= bits.any(kNumberBit);
  block.space |= bits.any(kSpaceBit);
  block.symbol |= bits.any(kSymbolBit);
  block.cjk = bits.any(kCjkBit);
  block.valid = below(size_t(count));
  block.num_bytes = size_t(p - start);
  block.at_end = p == end;
  block.is_ascii = false;
}

inline void read_block(const uint8_t* p, const uint8_t* end, const uint8_t* kinds, Block& block) {
  block.text = p;
  block.end = end;
  alignas(64) uint8_t tail[64];
  const uint8_t* source = p;
  size_t count = size_t(end - p);
  if (count < 64) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, p, count);
    source = tail;
  } else {
    count = 64;
  }
  const Bytes64 bytes(source);
  if (const Mask high = bytes.high()) {
    if (first_bit(high) < 32) return read_any(p, end, kinds, block);
    count = size_t(first_bit(high));
  }
  read_ascii(bytes, block);
  block.other_letter = block.mark = block.cjk = 0;
  block.valid = below(count);
  block.num_bytes = count;
  block.at_end = p + count == end;
  block.is_ascii = true;
}

// How many code points the contraction 's 't 're 've 'm 'll 'd at the apostrophe p takes; 0 if there is none. U+017F
// is an s when case is ignored.
template <bool kIgnoreCase>
inline int contraction(const uint8_t* p, const uint8_t* end) {
  if (end - p < 2) return 0;
  constexpr uint8_t kFold = kIgnoreCase ? 0x20 : 0;
  const uint8_t a = p[1] | kFold;
  if (p[1] >= 0x80) return kIgnoreCase && end - p >= 3 && p[1] == 0xC5 && p[2] == 0xBF ? 2 : 0;
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if (end - p < 3 || p[2] >= 0x80) return 0;
  const uint8_t b = p[2] | kFold;
  return (b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l') ? 3 : 0;
}

// Every third of a run of numbers.
inline Mask number_starts(Mask number) {
  const Mask later = number & number << 1 & number << 2 & number << 3;  // those with three before them
  Mask step = number & ~(number << 1), starts = step;
  if (later != 0) {
    while ((step = step << 3 & later) != 0) starts |= step;
  }
  return starts;
}

// The starts within white space of \s*[\r\n]+|\s+(?!\S)|\s+, where `newline` and `space` are what no other part of the
// pattern has taken: the first of a run; behind its last newline; and the last one before what is no white space.
// With keep_tail white space at the end of the text is not cut behind a newline. What is set apart does not follow.
inline Mask white_space_starts(const Block& block, Mask newline, bool keep_tail = false, Mask apart = 0) {
  const Mask space = block.space, white = space | newline, others = block.valid & ~(white | block.newline | apart);
  Mask starts = (white & ~(white << 1)) | (space & others >> 1);
  if (Mask behind = space & newline << 1) {
    Mask to_newline = space & newline >> 1;  // spaces from which only spaces lead to a newline
    if (to_newline != 0) {
      Mask run = space;
      for (int step = 1; step < 64; step *= 2) {
        to_newline |= run & to_newline >> step;
        run &= run >> step;
      }
    }
    behind &= ~to_newline;
    if (!block.at_end || keep_tail) {  // a newline may follow the spaces that reach the block's end
      const Mask gaps = block.valid & ~space;
      behind &= gaps == 0 ? 0 : below(size_t(63 - __builtin_clzll(gaps)));
    }
    starts |= behind;
  }
  return starts;
}

// Each pattern gives the starts of words. `limit` becomes the first code point that masks do not decide, if any.
enum class Numbers { kUpToThree, kSingle };
template <Numbers kNumbers, bool kKeepTail>
struct Llama3Like {
  static Mask starts(const Block& block, int&) {
    const Mask letter = block.upper | block.lower | block.other_letter;
    const Mask symbol = block.valid & ~(letter | block.number | block.space | block.newline);
    // Newlines right behind symbols belong to them.
    const Mask hanging = block.newline & ~(block.newline + (block.newline & symbol << 1));
    const Mask symbol_start = symbol & ~((symbol | block.blank) << 1);
    Mask starts = white_space_starts(block, block.newline & ~hanging, kKeepTail);
    starts |= symbol_start | (kNumbers == Numbers::kSingle ? block.number : number_starts(block.number));
    starts |= letter & ~((letter | block.space | symbol_start) << 1);
    starts |= hanging << 1 & ~hanging;
    for (Mask marks = block.apostrophe & symbol_start & letter >> 1; marks != 0; marks &= marks - 1) {
      const int at = first_bit(marks);
      const int length = contraction<true>(block.place(at), block.end);
      if (length != 0 && at + length < 64) starts |= Mask(1) << (at + length);
    }
    return starts;
  }
};

using Llama3 = Llama3Like<Numbers::kUpToThree, false>;
using Cl100k = Llama3Like<Numbers::kUpToThree, true>;
using Qwen2 = Llama3Like<Numbers::kSingle, false>;

struct Gpt2 {
  static Mask starts(const Block& block, int&) {
    const Mask letter = block.upper | block.lower | block.other_letter;
    const Mask white = block.space | block.newline;
    const Mask symbol = block.valid & ~(letter | block.number | white);
    const Mask symbol_start = symbol & ~((symbol | block.blank) << 1);
    Mask starts = symbol_start | (letter & ~((letter | block.blank) << 1));
    starts |= block.number & ~((block.number | block.blank) << 1);
    starts |= white & (~(white << 1) | (block.valid & ~white) >> 1);
    for (Mask marks = block.apostrophe & symbol_start & letter >> 1; marks != 0; marks &= marks - 1) {
      const int at = first_bit(marks);
      const int length = contraction<false>(block.place(at), block.end);
      if (length == 0) continue;
      starts &= ~(Mask(2) << at);  // the letters that follow belong to the apostrophe
      if (at + length < 64) starts |= Mask(1) << (at + length) & block.valid;
    }
    return starts;
  }
};

template <Numbers kNumbers, bool kContractions>
struct O200kLike {
  static Mask starts(const Block& block, int& limit) {
    const Mask letter = block.upper | block.lower | block.other_letter | block.mark;
    Mask symbol = block.valid & ~(letter | block.number | block.space | block.newline);
    // 's and its like hang on the word before, unless that is such a one itself; then ' starts a word.
    Mask contracted = 0, after_contraction = 0;
    int last_end = -1;
    const Mask followed = letter >> 1 | ~(block.valid >> 1);  // by a letter, or by what lies behind the block
    Mask marks = kContractions ? block.apostrophe & letter << 1 & followed : 0;
    for (; marks != 0; marks &= marks - 1) {
      const int at = first_bit(marks);
      if (at == last_end) continue;
      const int length = contraction<true>(block.place(at), block.end);
      if (length == 0) continue;
      last_end = at + length;
      contracted |= below(size_t(last_end)) & ~below(size_t(at));
      if (last_end < 64) after_contraction |= Mask(1) << last_end;
    }
    symbol &= ~contracted;
    // Behind symbols hang newlines, and slashes behind those.
    const Mask tail = block.newline | (block.slash & symbol), first = block.newline & symbol << 1;
    const Mask hanging = (tail & ~(tail + first)) | first;
    symbol &= ~hanging;
    const Mask symbol_start = symbol & ~((symbol | block.blank) << 1);
    Mask starts = white_space_starts(block, block.newline & ~hanging);
    starts |= symbol_start | (kNumbers == Numbers::kSingle ? block.number : number_starts(block.number));
    starts |= letter & ~((letter | block.space | symbol_start) << 1);
    starts |= block.upper & block.lower << 1;
    starts |= hanging << 1 & ~hanging;
    starts = (starts & ~contracted) | after_contraction;
    // An upper-case letter behind one without case, and a mark behind symbols that are a word of their own.
    const Mask open =
        (block.upper & (block.other_letter | block.mark) << 1) | (block.mark & (symbol & ~symbol_start) << 1);
    if (open != 0) limit = first_bit(open);
    return starts;
  }
};
using O200k = O200kLike<Numbers::kUpToThree, true>;
using Tekken = O200kLike<Numbers::kSingle, false>;

struct Deepseek3 {
  static Mask starts(const Block& block, int&) {
    const Mask ascii_letter = block.ascii_letter, letter = block.upper | block.lower | block.other_letter | block.mark;
    const Mask white = block.space | block.newline, symbol = block.symbol;
    const Mask rest = block.valid & ~(letter | block.number | white | symbol);  // controls, private ones and such
    // Numbers and CJK are set apart first: what begins here knows nothing of what lies before it, nor the other way.
    const Mask apart = number_starts(block.number) | ((block.number ^ block.number << 1) & ~block.number) |
                       (block.cjk ^ block.cjk << 1);
    const auto after = [apart](Mask kind) { return kind << 1 & ~apart; };
    const auto before = [apart](Mask kind) { return (kind & ~apart) >> 1; };
    const Mask hanging = block.newline & ~(block.newline + (block.newline & after(symbol)));
    const Mask symbol_start = symbol & ~after(symbol | block.blank);
    Mask starts = apart | white_space_starts(block, block.newline & ~hanging, false, apart);
    starts |= symbol_start | (hanging << 1 & ~hanging);
    // A sign of ASCII leads ASCII letters, and no others.
    const Mask led = ascii_letter & (symbol_start & block.ascii) << 1;
    starts |= letter & ~after(letter | block.space | rest) & ~led;
    starts |= (ascii_letter + led) & ~ascii_letter & letter;
    starts |= rest & (~after(rest) | before(letter));
    return starts;
  }
};

template <typename Pattern>
size_t scan(BlockJob& job) {
  size_t num_ends = 0;
  Block block;
  while (job.place < job.end && num_ends + 64 < job.capacity) {
    ++job.num_blocks;
    read_block(job.place, job.end, job.kinds, block);
    int limit = 64;
    Mask starts = Pattern::starts(block, limit) & block.valid & ~Mask(1);
    const bool whole = block.at_end && limit == 64;
    starts &= below(size_t(limit));
    if (starts == 0 && !whole) break;
    const uint8_t** out = job.ends + num_ends;
    num_ends += size_t(__builtin_popcountll(starts)) + whole;
    if (block.is_ascii) {
      for (; starts != 0; starts &= starts - 1) *out++ = block.text + first_bit(starts);
    } else {
      for (; starts != 0; starts &= starts - 1) *out++ = block.text + block.offsets[first_bit(starts)];
    }
    if (whole) *out++ = job.end;
    job.place = out[-1];
  }
  return num_ends;
}

}  // namespace

BlockScan block_scan(BlockPattern pattern) {
  switch (pattern) {
    case BlockPattern::kLlama3:
      return scan<Llama3>;
    case BlockPattern::kCl100k:
      return scan<Cl100k>;
    case BlockPattern::kQwen2:
      return scan<Qwen2>;
    case BlockPattern::kGpt2:
      return scan<Gpt2>;
    case BlockPattern::kO200k:
      return scan<O200k>;
    case BlockPattern::kTekken:
      return scan<Tekken>;
    case BlockPattern::kDeepseek3:
      return scan<Deepseek3>;
  }
  return nullptr;
}

}  // namespace herdkern::text::HK_BLOCK_LEVEL
