// Python texts for kernels that read each once: bytes and ASCII strings are viewed in place, other strings are encoded
// one at a time into memory of the thread that works on them, so that neither Python's cache of a string's UTF-8 nor a
// copy of all texts takes memory. Lone surrogates are encoded as "surrogatepass" does.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "text/minhash.h"
#include "text/parallel.h"

namespace herdkern::text {

namespace py = pybind11;

struct Utf8Text {
  const uint8_t* data;
  int64_t size;
};

// Encodes code units of 1 (Latin-1), 2 or 4 bytes; returns the end of what was written. out: 4 bytes a unit and 8 more.
template <typename Unit>
inline uint8_t* encode_utf8(const Unit* units, int64_t count, uint8_t* out) {
  constexpr int64_t kStep = 8;
  for (int64_t i = 0; i < count;) {
    if (i + kStep <= count) {
      uint32_t all = 0;
      for (int64_t j = 0; j < kStep; ++j) all |= units[i + j];
      if (all < 0x80) {
        for (int64_t j = 0; j < kStep; ++j) out[j] = static_cast<uint8_t>(units[i + j]);
        out += kStep;
        i += kStep;
        continue;
      }
    }
    for (const int64_t end = i + kStep < count ? i + kStep : count; i < end; ++i) {
      const uint32_t c = units[i];
      if (sizeof(Unit) == 4 && c >= 0x10000) {
        const uint32_t four = (0xF0 | c >> 18) | (0x80 | (c >> 12 & 0x3F)) << 8 | (0x80 | (c >> 6 & 0x3F)) << 16 |
                              (0x80 | (c & 0x3F)) << 24;
        std::memcpy(out, &four, 4);
        out += 4;
        continue;
      }
      // All forms are made and one is chosen: scripts mix one, two and three bytes too wildly for branches.
      const uint32_t two = (0xC0 | c >> 6) | (0x80 | (c & 0x3F)) << 8;
      const uint32_t three = (0xE0 | c >> 12) | (0x80 | (c >> 6 & 0x3F)) << 8 | (0x80 | (c & 0x3F)) << 16;
      const uint32_t bytes = c < 0x80 ? c : c < 0x800 ? two : three;
      std::memcpy(out, &bytes, 4);
      out += 1 + (c >= 0x80) + (c >= 0x800);
    }
  }
  return out;
}

// The str and bytes objects of a sequence, held by a tuple of its own while the GIL is released.
class PlainTexts {
 public:
  explicit PlainTexts(const py::sequence& objects) : held_(objects), texts_(held_.size()) {
    for (size_t i = 0; i < texts_.size(); ++i) {
      PyObject* object = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i));
      if (PyBytes_Check(object)) {
        texts_[i] = {PyBytes_AS_STRING(object), PyBytes_GET_SIZE(object), 0};
      } else if (PyUnicode_Check(object)) {
#if PY_VERSION_HEX < 0x030C0000
        if (PyUnicode_READY(object) != 0) throw py::error_already_set();
#endif
        const int width = PyUnicode_IS_ASCII(object) ? 0 : static_cast<int>(PyUnicode_KIND(object));
        texts_[i] = {PyUnicode_DATA(object), PyUnicode_GET_LENGTH(object), width};
      } else {
        throw py::type_error("texts: every text must be str or bytes, got " + std::string(Py_TYPE(object)->tp_name) +
                             " at index " + std::to_string(i));
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(texts_.size()); }

  // Valid until the next call with the same memory.
  Utf8Text utf8(int64_t i, std::vector<uint8_t>& memory) const {
    const Text& text = texts_[i];
    if (text.width == 0) return {static_cast<const uint8_t*>(text.data), text.length};
    const size_t room = static_cast<size_t>(text.length) * (text.width == 1 ? 2 : text.width == 2 ? 3 : 4) + 8;
    if (memory.size() < room) memory.resize(room);
    uint8_t* out = memory.data();
    uint8_t* end = text.width == 1   ? encode_utf8(static_cast<const uint8_t*>(text.data), text.length, out)
                   : text.width == 2 ? encode_utf8(static_cast<const uint16_t*>(text.data), text.length, out)
                                     : encode_utf8(static_cast<const uint32_t*>(text.data), text.length, out);
    return {out, end - out};
  }

  // Begins of pieces of neighbouring texts, about 256 kB each, and the end: the tasks of a parallel loop.
  std::vector<int64_t> pieces() const {
    std::vector<int64_t> begins{0};
    int64_t bytes = 0;
    for (int64_t i = 0; i < count(); ++i) {
      bytes += texts_[i].length + 64;
      if (bytes < (1 << 18) && i + 1 < count()) continue;
      begins.push_back(i + 1);
      bytes = 0;
    }
    return begins;
  }

 private:
  struct Text {
    const void* data;
    int64_t length;  // in units of `width` bytes
    int width;       // 0: UTF-8
  };

  py::tuple held_;
  std::vector<Text> texts_;
};

// Lends a Scratch to each task, so that there are no more than threads.
class ScratchPool {
 public:
  std::unique_ptr<Scratch> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Scratch>();
    std::unique_ptr<Scratch> scratch = std::move(free_.back());
    free_.pop_back();
    return scratch;
  }
  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// Calls work(doc, text, scratch) for every text, pieces of them on several threads.
template <typename Work>
void for_each_plain_text(const PlainTexts& texts, int num_threads, Work&& work) {
  const std::vector<int64_t> begins = texts.pieces();
  ScratchPool pool;
  parallel_for(static_cast<int64_t>(begins.size()) - 1, num_threads, [&](int64_t piece) {
    std::unique_ptr<Scratch> scratch = pool.take();
    for (int64_t doc = begins[piece]; doc < begins[piece + 1]; ++doc)
      work(doc, texts.utf8(doc, scratch->utf8), *scratch);
    pool.give(std::move(scratch));
  });
}

}  // namespace herdkern::text
