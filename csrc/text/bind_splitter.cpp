// Python binding of the splitters. herdkern/tokenizer/pretokenize.py is the door.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "text/splitter.h"
#include "text/text_batch.h"

namespace herdkern::text {

namespace {

// A name or a pattern as str, or a sequence of patterns.
std::shared_ptr<const Splitter> make_splitter(const py::object& pattern) {
  if (!PyUnicode_Check(pattern.ptr())) return Splitter::from_patterns(pattern.cast<std::vector<std::string>>());
  const auto text = pattern.cast<std::string>();
  for (const auto& [name, patterns] : Splitter::all_named()) {
    if (text == name || text == "cl100k") return Splitter::named(text);
  }
  return Splitter::from_patterns({text});
}

// (num_words,) where each word of the text ends, in bytes.
py::array_t<int64_t> word_ends(const Splitter& splitter, const py::object& text) {
  const TextBatch batch = TextBatch::one(text, "split_words: text");
  std::vector<int64_t> ends;
  {
    py::gil_scoped_release release;
    const auto* begin = reinterpret_cast<const uint8_t*>(batch.views()[0].data());
    auto cursor = splitter.cursor(begin, begin + batch.views()[0].size());
    while (const uint8_t* end = cursor.next()) ends.push_back(end - begin);
  }
  return py::array_t<int64_t>(py::ssize_t(ends.size()), ends.data());
}

// (number of words, steps of work): what tests of linear time ask.
py::tuple count_steps(const Splitter& splitter, const py::object& text) {
  const TextBatch batch = TextBatch::one(text, "count_steps: text");
  uint64_t num_words = 0, num_steps = 0;
  {
    py::gil_scoped_release release;
    const auto* begin = reinterpret_cast<const uint8_t*>(batch.views()[0].data());
    auto cursor = splitter.cursor(begin, begin + batch.views()[0].size());
    while (cursor.next() != nullptr) ++num_words;
    num_steps = cursor.num_steps();
  }
  return py::make_tuple(num_words, num_steps);
}

py::dict split_patterns() {
  py::dict result;
  for (const auto& [name, patterns] : Splitter::all_named()) {
    if (patterns.size() == 1) {
      result[py::str(name)] = py::str(patterns[0]);
    } else {
      result[py::str(name)] = py::tuple(py::cast(patterns));
    }
  }
  return result;
}

}  // namespace

void bind_splitter(py::module_& m) {
  m.def("split_patterns", &split_patterns);
  py::class_<Splitter, std::shared_ptr<Splitter>>(m, "Splitter")
      .def(
          py::init([](const py::object& pattern) { return std::const_pointer_cast<Splitter>(make_splitter(pattern)); }),
          py::arg("pattern"))
      .def("word_ends", &word_ends, py::arg("text"))
      .def("count_steps", &count_steps, py::arg("text"))
      .def_property_readonly("name", &Splitter::name)
      .def_property_readonly("patterns",
                             [](const Splitter& splitter) { return py::tuple(py::cast(splitter.patterns())); });
}

}  // namespace herdkern::text
