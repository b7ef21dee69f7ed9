// Python functions of line dedup: keys, partitions, exact counts, removal. Texts and NumPy arrays in and out; the GIL
// is released meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "text/line_code.h"
#include "text/line_counts.h"
#include "text/line_keys.h"
#include "text/line_remove.h"
#include "text/parallel.h"

namespace py = pybind11;

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The UTF-8 of str and bytes objects, held while the GIL is released. A str with lone surrogates raises
// UnicodeEncodeError.
class Utf8Views {
 public:
  explicit Utf8Views(const py::sequence& objects) : held_(objects) {
    views_.reserve(held_.size());
    for (size_t i = 0; i < held_.size(); ++i) {
      PyObject* object = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i));
      Py_ssize_t size = 0;
      const char* data = nullptr;
      if (PyUnicode_Check(object)) {
        data = PyUnicode_AsUTF8AndSize(object, &size);
      } else if (PyBytes_Check(object)) {
        data = PyBytes_AS_STRING(object);
        size = PyBytes_GET_SIZE(object);
      } else {
        throw py::type_error("line_keys: every text must be str or bytes, got " +
                             std::string(Py_TYPE(object)->tp_name) + " at index " + std::to_string(i));
      }
      if (!data) throw py::error_already_set();
      views_.emplace_back(data, static_cast<size_t>(size));
    }
  }
  const std::vector<std::string_view>& views() const { return views_; }
  bool is_str(size_t i) const { return PyUnicode_Check(PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i))); }

 private:
  py::tuple held_;
  std::vector<std::string_view> views_;
};

const LineKernels& kernels_of(const std::string& level) {
  std::string known;
  for (const LineKernels& kernels : line_levels()) {
    if (level == "auto" || level == kernels.level) return kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels.level;
  }
  throw py::value_error("line_keys: level must be auto or one of " + known + ", got " + level);
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// (keys, begins): the keys of text i are keys[begins[i] : begins[i + 1]].
py::tuple key_lines(const py::sequence& objects, int num_threads, const std::string& level) {
  const Utf8Views texts(objects);
  const LineKernels& kernels = kernels_of(level);
  const auto& views = texts.views();
  py::array_t<int64_t> begins(static_cast<py::ssize_t>(views.size()) + 1);
  int64_t* begin = begins.mutable_data();
  begin[0] = 0;
  const std::vector<size_t> borders = task_borders(views, 1 << 18);
  std::vector<std::vector<uint64_t>> keys(borders.size() - 1);
  {
    py::gil_scoped_release release;
    parallel_for(static_cast<int64_t>(keys.size()), num_threads, [&](int64_t task) {
      LineScratch scratch;
      for (size_t i = borders[task]; i < borders[task + 1]; ++i) {
        kernels.keys(reinterpret_cast<const uint8_t*>(views[i].data()), static_cast<int64_t>(views[i].size()), scratch,
                     keys[task]);
        begin[i + 1] = static_cast<int64_t>(keys[task].size());
      }
    });
    int64_t total = 0;
    for (size_t task = 0; task < keys.size(); ++task) {
      for (size_t i = borders[task]; i < borders[task + 1]; ++i) begin[i + 1] += total;
      total += static_cast<int64_t>(keys[task].size());
    }
  }
  py::array_t<uint64_t> values(begin[views.size()]);
  uint64_t* next = values.mutable_data();
  for (const auto& some : keys) next = std::copy(some.begin(), some.end(), next);
  return py::make_tuple(values, begins);
}

py::tuple partition(const Array<uint64_t>& keys, const Array<int64_t>& begins, const Array<uint64_t>& salts,
                    bool by_document, int64_t num_partitions) {
  const int64_t num_docs = salts.size();
  bool fits = begins.size() == num_docs + 1 && num_partitions >= 1 && begins.data()[0] == 0 &&
              begins.data()[num_docs] == keys.size() && keys.size() < (int64_t{1} << 32);
  for (int64_t i = 0; fits && i < num_docs; ++i) fits = begins.data()[i] <= begins.data()[i + 1];
  if (!fits) throw py::value_error("partition_lines: begins must rise from 0 to the number of keys, one for each salt");
  PartitionedLines out;
  {
    py::gil_scoped_release release;
    out = partition_lines({keys.data(), begins.data(), salts.data(), num_docs, by_document}, num_partitions);
  }
  return py::make_tuple(to_array(out.keys), to_array(out.origins), to_array(out.begins));
}

py::tuple find_frequent(const LineCounts& counts, const Array<uint64_t>& keys, int64_t max_count) {
  std::vector<int64_t> places;
  std::vector<uint64_t> found;
  {
    py::gil_scoped_release release;
    counts.find_frequent(keys.data(), keys.size(), max_count, places, found);
  }
  return py::make_tuple(to_array(places), to_array(found));
}

py::object decode(const std::string& text, bool as_str) {
  if (!as_str) return py::bytes(text);
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogatepass"));
}

// ([new text, or None where nothing went], number of lines that went of each text)
py::tuple remove_from_texts(const py::sequence& objects, const Array<int64_t>& begins, const Array<uint64_t>& counts,
                            const Array<uint64_t>& keys, bool code_aware, RemovedLines& removed) {
  const Utf8Views texts(objects);
  const auto& views = texts.views();
  const auto num_texts = static_cast<int64_t>(views.size());
  if (begins.size() != num_texts + 1 || counts.size() != keys.size() || begins.data()[0] != 0 ||
      begins.data()[num_texts] != counts.size())
    throw py::value_error("remove_lines: begins must hold one border more than there are texts, up to len(counts)");
  std::vector<LineRemoval> results(views.size());
  int64_t wrong = -1;
  {
    py::gil_scoped_release release;
    for (int64_t i = 0; i < num_texts && wrong < 0; ++i) {
      const int64_t begin = begins.data()[i], size = begins.data()[i + 1] - begin;
      const int64_t num_lines = 1 + std::count(views[i].begin(), views[i].end(), '\n');
      if (begin < 0 || size != num_lines) wrong = i;
      if (wrong < 0 && std::any_of(counts.data() + begin, counts.data() + begin + size, [](uint64_t c) { return c; }))
        results[i] = remove_lines(views[i], counts.data() + begin, keys.data() + begin, code_aware, removed);
    }
  }
  if (wrong >= 0)
    throw py::value_error("remove_lines: counts must hold one entry per line of text " + std::to_string(wrong));
  py::list out(views.size());
  py::array_t<int64_t> num_removed(num_texts);
  for (int64_t i = 0; i < num_texts; ++i) {
    num_removed.mutable_data()[i] = results[i].num_removed;
    out[i] = results[i].num_removed ? decode(results[i].text, texts.is_str(i)) : py::none();
    results[i].text = std::string();
  }
  return py::make_tuple(out, num_removed);
}

py::list list_removed(const RemovedLines& removed) {
  py::list out;
  for (const auto& [count, line] : removed.entries()) out.append(py::make_tuple(count, decode(line, true)));
  return out;
}

py::array_t<bool> find_code(const py::sequence& objects) {
  const Utf8Views lines(objects);
  py::array_t<bool> out(static_cast<py::ssize_t>(lines.views().size()));
  bool* next = out.mutable_data();
  for (const std::string_view line : lines.views())
    *next++ = is_code_or_formula(reinterpret_cast<const uint8_t*>(line.data()), static_cast<int64_t>(line.size()));
  return out;
}

}  // namespace

void bind_lines(py::module_& m) {
  m.def("line_keys", &key_lines);
  m.def("partition_lines", &partition);
  m.def("is_code_or_formula", &find_code);
  m.def("remove_lines", &remove_from_texts);
  py::class_<RemovedLines>(m, "RemovedLines").def(py::init<int64_t>()).def("entries", &list_removed);
  py::class_<LineCounts>(m, "LineCounts")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), py::arg("first_part"), py::arg("last_part"),
           py::arg("num_parts"), py::arg("num_keys") = 0)
      .def("add",
           [](LineCounts& counts, const Array<uint64_t>& keys) {
             py::gil_scoped_release release;
             counts.add(keys.data(), keys.size());
           })
      .def("find_frequent", &find_frequent)
      .def("num_frequent", &LineCounts::num_frequent)
      .def("num_keys", &LineCounts::num_keys)
      .def("table_bytes", &LineCounts::table_bytes);
}

}  // namespace herdkern::text
