// Python texts in the form that they have, kept alive. Make and destroy it with the GIL held; use it without.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "text/any_text.h"
#include "text/text_batch.h"

namespace herdkern::text {

class AnyTextBatch {
 public:
  // `where` starts the error messages: the public function and its argument; first_index is added to the place of a
  // text.
  AnyTextBatch(const py::object& texts, const char* where, Py_ssize_t first_index = 0)
      : where_(where), first_index_(first_index) {
    if (PyUnicode_Check(texts.ptr()) || PyBytes_Check(texts.ptr())) refuse(texts);
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(texts.ptr(), "texts must be a sequence"));
    if (!items) throw py::error_already_set();
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
    views_.reserve(size_t(n));
    owners_ = py::list(n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (!PyUnicode_Check(item) && !PyBytes_Check(item)) refuse(texts);
      PyList_SET_ITEM(owners_.ptr(), i, Py_NewRef(item));
      views_.push_back(view_of(item));
    }
  }
  static AnyTextBatch one(const py::object& text, const char* where) {
    if (!PyUnicode_Check(text.ptr()) && !PyBytes_Check(text.ptr())) TextBatch::one(text, where);
    AnyTextBatch batch(py::make_tuple(text), where);
    batch.is_one_ = true;
    return batch;
  }

  const std::vector<AnyText>& views() const { return views_; }
  size_t size() const { return views_.size(); }
  // The texts as UTF-8. Throws a ValueError that names the first that has none.
  TextBatch utf8() const {
    return is_one_ ? TextBatch::one(py::object(owners_[0]), where_) : TextBatch(owners_, where_, first_index_);
  }
  // Throws the same for the text at `place`, whose character `at` is a lone surrogate; needs no GIL.
  [[noreturn]] void refuse_surrogate(size_t place, size_t at) const {
    TextBatch::refuse_surrogate(TextBatch::name_of(where_, first_index_ + Py_ssize_t(place)), std::to_string(at));
  }

 private:
  static AnyText view_of(PyObject* item) {
    if (PyBytes_Check(item)) return std::string_view(PyBytes_AS_STRING(item), size_t(PyBytes_GET_SIZE(item)));
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(item) != 0) throw py::error_already_set();
#endif
    const auto size = size_t(PyUnicode_GET_LENGTH(item));
    if (PyUnicode_IS_ASCII(item)) return std::string_view(static_cast<const char*>(PyUnicode_DATA(item)), size);
    return {PyUnicode_DATA(item), size, unsigned(PyUnicode_KIND(item))};
  }
  // Throws what TextBatch says of texts that are none.
  void refuse(const py::object& texts) const {
    TextBatch(texts, where_, first_index_);
    throw py::type_error(std::string(where_) + " must be str or bytes");
  }

  const char* where_;
  Py_ssize_t first_index_;
  bool is_one_ = false;
  std::vector<AnyText> views_;
  py::list owners_;
};

}  // namespace herdkern::text
