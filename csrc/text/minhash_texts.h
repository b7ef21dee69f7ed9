// Python texts for kernels that read each once: bytes and ASCII strings are viewed in place, other strings are encoded
// one at a time into memory of the thread that works on them, so that neither Python's cache of a string's UTF-8 nor a
// copy of all texts takes memory. Lone surrogates are encoded as "surrogatepass" does.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "text/any_text.h"
#include "text/minhash.h"
#include "text/parallel.h"

namespace herdkern::text {

namespace py = pybind11;

struct Utf8Text {
  const uint8_t* data;
  int64_t size;
};

// The str and bytes objects of a sequence, held by a tuple of its own while the GIL is released.
class PlainTexts {
 public:
  explicit PlainTexts(const py::sequence& objects) : held_(objects) {
    texts_.reserve(held_.size());
    for (size_t i = 0; i < held_.size(); ++i) {
      PyObject* object = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i));
      if (PyBytes_Check(object)) {
        texts_.emplace_back(PyBytes_AS_STRING(object), static_cast<size_t>(PyBytes_GET_SIZE(object)), 0u);
      } else if (PyUnicode_Check(object)) {
#if PY_VERSION_HEX < 0x030C0000
        if (PyUnicode_READY(object) != 0) throw py::error_already_set();
#endif
        const unsigned unit_bytes = PyUnicode_IS_ASCII(object) ? 0 : static_cast<unsigned>(PyUnicode_KIND(object));
        texts_.emplace_back(PyUnicode_DATA(object), static_cast<size_t>(PyUnicode_GET_LENGTH(object)), unit_bytes);
      } else {
        throw py::type_error("texts: every text must be str or bytes, got " + std::string(Py_TYPE(object)->tp_name) +
                             " at index " + std::to_string(i));
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(texts_.size()); }

  // Valid until the next call with the same memory.
  Utf8Text utf8(int64_t i, std::vector<uint8_t>& memory) const {
    const AnyText& text = texts_[i];
    if (memory.size() < text.max_written()) memory.resize(text.max_written());
    uint8_t* out = memory.data();
    const std::string_view utf8 = to_utf8(text, out);
    return {reinterpret_cast<const uint8_t*>(utf8.data()), static_cast<int64_t>(utf8.size())};
  }

  // Begins of pieces of neighbouring texts, about 256 kB each, and the end: the tasks of a parallel loop.
  std::vector<int64_t> pieces() const {
    std::vector<int64_t> begins{0};
    int64_t bytes = 0;
    for (int64_t i = 0; i < count(); ++i) {
      bytes += static_cast<int64_t>(texts_[i].size) + 64;
      if (bytes < (1 << 18) && i + 1 < count()) continue;
      begins.push_back(i + 1);
      bytes = 0;
    }
    return begins;
  }

 private:
  py::tuple held_;
  std::vector<AnyText> texts_;
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
