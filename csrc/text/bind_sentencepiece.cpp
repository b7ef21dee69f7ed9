// Python binding of SentencePiece BPE models. The door is herdkern/tokenizer/formats/sentencepiece.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "text/sentencepiece.h"
#include "text/text_batch.h"

namespace herdkern::text {

void bind_sentencepiece(py::module_& m) {
  py::class_<CharsMap>(m, "CharsMap")
      .def(py::init([](const py::bytes& blob) { return std::make_unique<CharsMap>(std::string_view(blob)); }),
           py::arg("blob"))
      .def(
          "map",
          [](const CharsMap& map, const py::bytes& text) {
            const auto view = std::string_view(text);
            std::string mapped;
            {
              const py::gil_scoped_release release;
              mapped = map.map(view);
            }
            return py::bytes(mapped);
          },
          py::arg("text"));
  py::class_<SentencePiece>(m, "SentencePiece")
      .def(py::init([](std::string text, double score, bool is_merged, bool is_user_defined, std::vector<int32_t> ids) {
             return SentencePiece{std::move(text), score, is_merged, is_user_defined, std::move(ids)};
           }),
           py::arg("text"), py::arg("score"), py::arg("is_merged"), py::arg("is_user_defined"), py::arg("ids"));
  py::class_<SentencePieceCutter>(m, "SentencePieceCutter")
      .def(py::init<std::vector<SentencePiece>, int32_t, std::vector<int32_t>>(), py::arg("pieces"), py::arg("unk_id"),
           py::arg("byte_ids"))
      .def(
          "encode",
          [](const SentencePieceCutter& cutter, const py::object& text) {
            const TextBatch batch = TextBatch::one(text, "encode: text");
            std::vector<int32_t> ids;
            {
              const py::gil_scoped_release release;
              cutter.encode(batch.views()[0], ids);
            }
            return ids;
          },
          py::arg("text"));
}

}  // namespace herdkern::text
