// The documents of one file for the Python classes over them (bind_documents.cpp, bind_line_documents.cpp): lines cut
// from pieces, and what the native parser leaves to Python. Make and destroy it with the GIL held; use it without.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "text/document_lines.h"

namespace herdkern::text {

namespace py = pybind11;

// What the parser leaves to Python, `reader` makes plain: it is called with (line, number of the line) and returns the
// plain line, or raises.
class Documents {
 public:
  Documents(const std::string& file_name, py::object reader)
      : document(best_kernels(), file_name), reader_(std::move(reader)) {}

  static const MinHashKernels& best_kernels() { return minhash_levels().front(); }

  // Calls use(line, number of the line) for every document of a piece.
  template <typename Use>
  void feed(std::string_view piece, bool is_last, Use&& use) {
    lines_.feed(piece, is_last, [&](std::string_view line) { use(line, lines_.number()); });
  }

  // Reads the line into `document`.
  void read(std::string_view line, uint64_t number) {
    if (document.read(line, number)) return;
    {
      const py::gil_scoped_acquire gil;
      plain_ = reader_(py::bytes(line.data(), line.size()), number).cast<std::string>();
    }
    if (!document.read(plain_, number, true))
      throw std::invalid_argument("line " + std::to_string(number) + ": what Python made of it is no document");
    document.set_not_plain();
  }

  uint64_t num_lines() const { return lines_.number(); }
  uint64_t num_pending_bytes() const { return lines_.num_pending_bytes(); }

  DocumentLine document;

 private:
  LineFeed lines_;
  py::object reader_;
  std::string plain_;
};

}  // namespace herdkern::text
