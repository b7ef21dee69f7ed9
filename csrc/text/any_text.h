// Texts in the forms that Python holds them in, and their UTF-8.
//
// A str that is not ASCII is an array of code points of 1, 2 or 4 bytes. Turned into UTF-8 one by one by the thread
// that needs it, in memory that is used again, it takes half of the time of Python's own encoder, which does all
// texts first, one after the other, with the interpreter's lock held.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

namespace herdkern::text {

struct AnyText {
  AnyText(std::string_view utf8) : data(utf8.data()), size(utf8.size()) {}
  AnyText(const void* units, size_t num_units, unsigned bytes_of_unit)
      : data(units), size(num_units), unit_bytes(bytes_of_unit) {}
  size_t num_bytes() const { return size * (unit_bytes == 0 ? 1 : unit_bytes); }  // of UTF-8, about
  // What the UTF-8 of it needs, with what a writer may write behind the end.
  size_t max_written() const { return unit_bytes == 0 ? 0 : (unit_bytes == 4 ? 4 : unit_bytes + 1) * size + 64; }

  const void* data;
  size_t size;              // units
  unsigned unit_bytes = 0;  // 0: UTF-8
};

// A text that has no UTF-8: half of a surrogate pair alone.
struct LoneSurrogate {};

// One code point as UTF-8 in the low bytes of a word, without branches: text changes between lengths at every word.
// Tried: a branch for each length (5 % slower on units of one and two bytes, 12 % quicker on four).
template <unsigned kUnitBytes>
inline uint32_t utf8_word(uint32_t c, unsigned& num_bytes) {
  const uint32_t last = 0x80 | (c & 63), middle = 0x80 | (c >> 6 & 63);
  const uint32_t is_two = 0u - (c >= 0x80), is_three = 0u - (c >= 0x800), is_four = 0u - (c >= 0x10000);
  num_bytes = 1 - is_two;
  uint32_t word = (c & ~is_two) | (is_two & (0xC0 | c >> 6 | last << 8));
  if (kUnitBytes >= 2) {
    word = (word & ~is_three) | (is_three & (0xE0 | c >> 12 | middle << 8 | last << 16));
    num_bytes -= is_three;
  }
  if (kUnitBytes == 4) {
    const uint32_t high = 0x80 | (c >> 12 & 63);
    word = (word & ~is_four) | (is_four & (0xF0 | c >> 18 | high << 8 | middle << 16 | last << 24));
    num_bytes -= is_four;
  }
  return word;
}

template <typename Word>
inline void store_little_endian(Word word, uint8_t* out) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = sizeof word == 2 ? Word(__builtin_bswap16(uint16_t(word))) : Word(__builtin_bswap32(word));
#endif
  std::memcpy(out, &word, sizeof word);
}

// Where UTF-8 ends, and whether it holds a lone surrogate, which is written like any other code point.
struct Utf8End {
  uint8_t* end;
  bool has_surrogate;
};

// Writes up to 3 bytes behind the end.
template <typename Unit>
inline Utf8End write_utf8(const Unit* units, size_t size, uint8_t* out) {
  constexpr size_t kGroup = 16;
  uint32_t has_surrogate = 0;
  const auto write = [&](uint32_t c) {
    has_surrogate |= uint32_t(c - 0xD800 < 0x800);
    unsigned num_bytes;
    const uint32_t word = utf8_word<sizeof(Unit)>(c, num_bytes);
    store_little_endian(word, out);
    out += num_bytes;
  };
  size_t i = 0;
  for (; i + kGroup <= size; i += kGroup) {
    const Unit* group = units + i;
    uint32_t all = 0;
    for (size_t k = 0; k < kGroup; ++k) all |= group[k];
    if (all < 0x80) {
      for (size_t k = 0; k < kGroup; ++k) out[k] = uint8_t(group[k]);
      out += kGroup;
    } else if (all < 0x800) {
      for (size_t k = 0; k < kGroup; ++k) {
        const uint32_t c = group[k], is_two = 0u - (c >= 0x80);
        const uint32_t word = (c & ~is_two) | (is_two & (0xC0 | c >> 6 | (0x80 | (c & 63)) << 8));
        store_little_endian(uint16_t(word), out);
        out += 1 - is_two;
      }
    } else {
      for (size_t k = 0; k < kGroup; ++k) write(group[k]);
    }
  }
  for (; i < size; ++i) write(units[i]);
  return {out, has_surrogate != 0};
}

// The same for a text that is not UTF-8; writes up to 64 bytes behind the end.
using Utf8Writer = Utf8End (*)(const AnyText& text, uint8_t* out);
// The fastest that this processor runs (any_text_vbmi2.cpp, any_text_avx2.cpp). HERDKERN_ISA forces a plainer one.
Utf8Writer best_utf8_writer();

// The text as UTF-8: in place, or written to `out`, which then stands behind it.
inline std::string_view to_utf8(const AnyText& text, uint8_t*& out) {
  if (text.unit_bytes == 0) return {static_cast<const char*>(text.data), text.size};
  static const Utf8Writer write = best_utf8_writer();
  const uint8_t* const begin = out;
  out = write(text, out).end;
  return {reinterpret_cast<const char*>(begin), size_t(out - begin)};
}

template <typename Unit>
size_t first_surrogate(const Unit* units, size_t size) {
  constexpr size_t kBlock = 256;
  for (size_t begin = 0; begin < size; begin += kBlock) {
    const size_t end = size - begin < kBlock ? size : begin + kBlock;
    bool any = false;
    for (size_t i = begin; i < end; ++i) any |= (units[i] & Unit(~Unit(0x7FF))) == 0xD800;
    for (size_t i = begin; any && i < end; ++i) {
      if ((units[i] & Unit(~Unit(0x7FF))) == 0xD800) return i;
    }
  }
  return size;
}

// The place of the first surrogate, which UTF-8 cannot hold; `size` if there is none.
inline size_t first_surrogate(const AnyText& text) {
  if (text.unit_bytes == 2) return first_surrogate(static_cast<const uint16_t*>(text.data), text.size);
  if (text.unit_bytes == 4) return first_surrogate(static_cast<const uint32_t*>(text.data), text.size);
  return text.size;
}

class Utf8Buffer {
 public:
  // Good until the next call. Throws LoneSurrogate.
  std::string_view utf8_of(const AnyText& text) {
    if (text.unit_bytes == 0) return {static_cast<const char*>(text.data), text.size};
    reserve(text.max_written());
    const Utf8End written = write_(text, bytes_.get());
    if (written.has_surrogate) throw LoneSurrogate();
    return {reinterpret_cast<const char*>(bytes_.get()), size_t(written.end - bytes_.get())};
  }
  void shrink() {
    if (capacity_ <= kKept) return;
    bytes_.reset();
    capacity_ = 0;
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  static constexpr size_t kKept = size_t(1) << 20;

  void reserve(size_t size) {
    if (size <= capacity_) return;
    bytes_.reset();
    capacity_ = 0;
    bytes_.reset(static_cast<uint8_t*>(std::malloc(size)));
    if (!bytes_) throw std::bad_alloc();
    capacity_ = size;
  }

  std::unique_ptr<uint8_t[], Free> bytes_;
  size_t capacity_ = 0;
  Utf8Writer write_ = best_utf8_writer();
};

}  // namespace herdkern::text
