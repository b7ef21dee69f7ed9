// Python texts for threads that do not hold the GIL: where each text lies, nothing copied. Make and destroy it with the
// GIL held. Strings do not change, so reading them needs no GIL.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "text/text_ref.h"

namespace herdkern::text {

namespace py = pybind11;

class PythonTexts {
 public:
  // `where` starts the error messages: the public function and its argument; first_index is added to the place of a
  // text.
  PythonTexts(const py::object& texts, const char* where, int64_t first_index)
      : where_(where), first_index_(first_index) {
    if (PyUnicode_Check(texts.ptr()) || PyBytes_Check(texts.ptr())) {
      throw py::type_error(where_ + " must be a list of texts, got one " + Py_TYPE(texts.ptr())->tp_name +
                           "; pass [text]");
    }
    const py::object items =
        py::reinterpret_steal<py::object>(PySequence_Fast(texts.ptr(), "texts must be a sequence"));
    if (!items) throw py::error_already_set();
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
    refs_.reserve(size_t(n));
    owners_.reserve(size_t(n));
    for (Py_ssize_t i = 0; i < n; ++i) {
      owners_.push_back(py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i)));
      refs_.push_back(ref(owners_.back().ptr(), i));
    }
  }

  const std::vector<TextRef>& refs() const { return refs_; }
  // For a text with a lone surrogate; needs no GIL.
  [[noreturn]] void refuse_surrogate(size_t place, size_t at) const {
    throw py::value_error(name_of(Py_ssize_t(place)) + " must be text that UTF-8 can hold, got a lone surrogate at " +
                          "character " + std::to_string(at) +
                          "; pass text.encode('utf-8', 'replace') or drop the character");
  }

 private:
  TextRef ref(PyObject* text, Py_ssize_t place) const {
    if (PyBytes_Check(text)) return {PyBytes_AS_STRING(text), size_t(PyBytes_GET_SIZE(text)), 0};
    if (!PyUnicode_Check(text)) {
      throw py::type_error(name_of(place) + " must be str or bytes, got " + Py_TYPE(text)->tp_name);
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(text) != 0) throw py::error_already_set();
#endif
    const int unit = PyUnicode_IS_ASCII(text) ? 0 : int(PyUnicode_KIND(text));
    return {PyUnicode_DATA(text), size_t(PyUnicode_GET_LENGTH(text)), unit};
  }
  std::string name_of(Py_ssize_t place) const { return where_ + "[" + std::to_string(first_index_ + place) + "]"; }

  const std::string where_;
  const int64_t first_index_;
  std::vector<TextRef> refs_;
  std::vector<py::object> owners_;
};

}  // namespace herdkern::text
