// Python texts as UTF-8 without a copy where that is possible: bytes and ASCII strings are viewed in place, other
// strings are encoded into objects that live as long as the batch. Make and destroy it with the GIL held; use it
// without.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <vector>

namespace herdkern::text {

namespace py = pybind11;

class TextBatch {
 public:
  // `where` starts the error messages: the public function and its argument; first_index is added to the place of a
  // text.
  TextBatch(const py::object& texts, const char* where, Py_ssize_t first_index = 0) {
    if (PyUnicode_Check(texts.ptr()) || PyBytes_Check(texts.ptr())) {
      throw py::type_error(std::string(where) + " must be a list of texts, got one " + Py_TYPE(texts.ptr())->tp_name +
                           "; pass [text]");
    }
    const py::object items =
        py::reinterpret_steal<py::object>(PySequence_Fast(texts.ptr(), "texts must be a sequence"));
    if (!items) throw py::error_already_set();
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(items.ptr());
    views_.reserve(size_t(n));
    for (Py_ssize_t i = 0; i < n; ++i) {
      add(py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(items.ptr(), i)), where, first_index + i);
    }
  }
  static TextBatch one(const py::object& text, const char* where) {
    TextBatch batch;
    batch.add(text, where, -1);
    return batch;
  }

  const std::vector<std::string_view>& views() const { return views_; }

  static std::string name_of(const char* where, Py_ssize_t place) {
    return place < 0 ? std::string(where) : std::string(where) + "[" + std::to_string(place) + "]";
  }
  [[noreturn]] static void refuse_surrogate(const std::string& name, const std::string& at) {
    throw py::value_error(name + " must be text that UTF-8 can hold, got a lone surrogate at character " + at +
                          "; pass text.encode('utf-8', 'replace') or drop the character");
  }

 private:
  TextBatch() = default;

  void add(py::object item, const char* where, Py_ssize_t place) {
    PyObject* object = item.ptr();
    if (PyUnicode_Check(object)) {
      if (PyUnicode_IS_COMPACT_ASCII(object)) {
        views_.emplace_back(reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(object)),
                            size_t(PyUnicode_GET_LENGTH(object)));
      } else {
        item = py::reinterpret_steal<py::object>(PyUnicode_AsUTF8String(object));
        if (!item) refuse_surrogates(name_of(where, place));
        object = item.ptr();
      }
    } else if (!PyBytes_Check(object)) {
      throw py::type_error(name_of(where, place) + " must be str or bytes, got " + Py_TYPE(object)->tp_name);
    }
    if (PyBytes_Check(object)) views_.emplace_back(PyBytes_AS_STRING(object), size_t(PyBytes_GET_SIZE(object)));
    owners_.push_back(std::move(item));
  }

  [[noreturn]] static void refuse_surrogates(const std::string& name) {
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
    py::error_already_set cause;
    refuse_surrogate(name, py::str(cause.value().attr("start")).cast<std::string>());
  }

  std::vector<std::string_view> views_;
  std::vector<py::object> owners_;
};

}  // namespace herdkern::text
