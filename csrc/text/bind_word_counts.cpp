// Python binding of word counting. herdkern/tokenizer checks arguments first.
#include "text/count_table.h"

namespace herdkern::text {

void bind_word_counts(py::module_& m) {
  py::class_<CountTable>(m, "WordTable")
      .def(py::init<>())
      .def("add_texts", &CountTable::add_texts, py::arg("texts"), py::arg("first_index"), py::arg("num_threads"))
      .def("add_words", &CountTable::add_words, py::arg("blob"), py::arg("lengths"), py::arg("counts"))
      .def("merge", &CountTable::merge, py::arg("other"))
      .def("prune", &CountTable::prune, py::arg("min_count"))
      .def("num_words", &CountTable::num_words)
      .def("num_occurrences", &CountTable::num_occurrences)
      .def("sorted", &CountTable::sorted);
}

}  // namespace herdkern::text
