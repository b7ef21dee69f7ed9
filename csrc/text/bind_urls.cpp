// Python functions of URL dedup: keys of URLs and the table of the newest. The GIL is released meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>

#include "text/parallel.h"
#include "text/url_table.h"

namespace py = pybind11;

namespace herdkern::text {

namespace {

constexpr int64_t kAhead = 8;  // URLs that are fetched while earlier ones are worked on

enum Found : uint8_t { kAskPython = 0, kHasKey = 1, kIsEmpty = 2 };

// The UTF-8 of a sequence of str, held while the GIL is released; not valid where UTF-8 cannot hold one.
class Strings {
 public:
  explicit Strings(const py::sequence& objects, const char* where) : held_(objects), views_(held_.size()) {
    for (size_t i = 0; i < views_.size(); ++i) {
      PyObject* object = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i));
      if (i + kAhead < views_.size())
        __builtin_prefetch(PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i + kAhead)));
      if (!PyUnicode_Check(object))
        throw py::type_error(std::string(where) + ": every URL must be str, got " + Py_TYPE(object)->tp_name +
                             " at index " + std::to_string(i));
      Py_ssize_t size = 0;
      const char* data = PyUnicode_AsUTF8AndSize(object, &size);
      if (data) {
        views_[i] = {data, static_cast<size_t>(size)};
      } else {
        PyErr_Clear();
        views_[i] = kNotUtf8;
      }
    }
  }
  static constexpr std::string_view kNotUtf8{"\xFF", 1};  // no URL, and no UTF-8
  const std::vector<std::string_view>& views() const { return views_; }

 private:
  py::tuple held_;
  std::vector<std::string_view> views_;
};

constexpr int64_t kUrlsPerTask = 4096;

// (keys uint64 (n, 2), found uint8 (n,)): 0 asks for canonical_url, 1 has its key, 2 is an empty URL.
py::tuple key_urls(const py::sequence& objects, const UrlRules& rules, int num_threads) {
  const Strings urls(objects, "url_keys");
  const auto size = static_cast<int64_t>(urls.views().size());
  py::array_t<uint64_t> keys({static_cast<py::ssize_t>(size), py::ssize_t{2}});
  py::array_t<uint8_t> found(size);
  uint64_t* key = keys.mutable_data();
  uint8_t* kind = found.mutable_data();
  {
    py::gil_scoped_release release;
    parallel_for((size + kUrlsPerTask - 1) / kUrlsPerTask, num_threads, [&](int64_t task) {
      UrlScratch scratch;
      for (int64_t i = task * kUrlsPerTask; i < std::min(size, (task + 1) * kUrlsPerTask); ++i) {
        if (i + kAhead < size)
          for (int line = 0; line < 2; ++line) __builtin_prefetch(urls.views()[i + kAhead].data() + 64 * line);
        const std::string_view url = urls.views()[i];
        UrlKey hash{0, 0};
        const std::string_view form = canonicalise_url(url, rules, scratch);
        kind[i] = url.empty() ? kIsEmpty : form.empty() ? kAskPython : kHasKey;
        if (!form.empty()) hash = hash_url(form);
        key[2 * i] = hash.low;
        key[2 * i + 1] = hash.high;
      }
    });
  }
  return py::make_tuple(keys, found);
}

// The canonical forms, None where other rules are needed.
py::list canonicalise(const py::sequence& objects, const UrlRules& rules) {
  const Strings urls(objects, "canonicalise_urls");
  UrlScratch scratch;
  py::list out;
  for (const std::string_view url : urls.views()) {
    const std::string_view form = canonicalise_url(url, rules, scratch);
    if (form.empty()) {
      out.append(py::none());
    } else {
      out.append(py::str(form.data(), form.size()));
    }
  }
  return out;
}

py::array_t<uint64_t> hash_urls(const py::sequence& objects) {
  const Strings urls(objects, "hash_urls");
  py::array_t<uint64_t> keys({static_cast<py::ssize_t>(urls.views().size()), py::ssize_t{2}});
  uint64_t* key = keys.mutable_data();
  for (const std::string_view url : urls.views()) {
    const UrlKey hash = hash_url(url);
    *key++ = hash.low;
    *key++ = hash.high;
  }
  return keys;
}

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Piece = std::tuple<std::string, std::string, uint32_t, uint32_t>;

const UrlRecord* records_of(const Bytes& bytes) {
  if (bytes.size() % static_cast<py::ssize_t>(sizeof(UrlRecord)))
    throw py::value_error("UrlTable: records must be whole records of 48 bytes, got " + std::to_string(bytes.size()));
  return reinterpret_cast<const UrlRecord*>(bytes.data());
}

}  // namespace

void bind_urls(py::module_& m) {
  py::class_<UrlRules>(m, "UrlRules")
      .def(py::init<bool, bool, const std::vector<std::string>&, const std::vector<std::string>&>());
  m.def("url_keys", &key_urls);
  m.def("canonicalise_urls", &canonicalise);
  m.def("hash_urls", &hash_urls);
  py::class_<UrlTable>(m, "UrlTable")
      .def(py::init(
          [](const std::vector<Piece>& pieces, uint64_t num_records, int64_t first, int64_t last, int64_t num_parts) {
            std::vector<UrlPiece> files;
            for (const auto& [records, names, begin, end] : pieces) files.push_back({records, names, begin, end});
            return std::make_unique<UrlTable>(files, num_records, first, last, num_parts);
          }))
      .def("add",
           [](UrlTable& table, const Bytes& bytes, uint32_t first) {
             const UrlRecord* records = records_of(bytes);
             py::gil_scoped_release release;
             table.add(records, bytes.size() / static_cast<int64_t>(sizeof(UrlRecord)), first);
           })
      .def("find",
           [](const UrlTable& table, const Bytes& bytes, uint32_t first) {
             const UrlRecord* records = records_of(bytes);
             const auto size = bytes.size() / static_cast<int64_t>(sizeof(UrlRecord));
             py::array_t<uint32_t> winners(size);
             {
               uint32_t* out = winners.mutable_data();
               py::gil_scoped_release release;
               table.find(records, size, first, out);
             }
             return winners;
           })
      .def("decide",
           [](UrlTable& table, const Array<uint32_t>& lost) {
             if (lost.ndim() != 2 || lost.shape(1) != 2)
               throw py::value_error("UrlTable: lost must have shape (number of documents, 2)");
             std::string out;
             {
               py::gil_scoped_release release;
               const uint32_t* pairs = lost.data();
               for (py::ssize_t i = 0; i < lost.shape(0); ++i) table.decide(pairs[2 * i], pairs[2 * i + 1], out);
             }
             return py::bytes(out);
           })
      .def("num_urls", &UrlTable::num_urls)
      .def("table_bytes", &UrlTable::table_bytes);
}

}  // namespace herdkern::text
