// Python classes of line dedup over the lines of document files, which come piece by piece: LineKeys makes the keys of
// all lines of the texts, LineDealer takes the frequent ones out. The GIL is released meanwhile. The stages are in
// herdkern/dedup/lines.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "text/blake2b.h"
#include "text/document_reader.h"
#include "text/line_keys.h"
#include "text/line_remove.h"

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

struct LineDocumentRow {  // of documents.bin; herdkern/dedup/line_files.py names the fields
  uint64_t id_hash;
  uint32_t num_lines, language;
};
static_assert(sizeof(LineDocumentRow) == 16);

// Documents of some sources are neither counted nor changed: their text counts as empty, a line without a key.
class CountedDocuments : public Documents {
 public:
  CountedDocuments(std::vector<std::string> exempt_sources, const std::string& file_name, py::object reader)
      : Documents(file_name, std::move(reader)), exempt_sources_(std::move(exempt_sources)) {}

  std::string_view counted_text() {
    const std::string_view source = document.value(DocumentLine::kSource);
    const bool is_exempt = std::find(exempt_sources_.begin(), exempt_sources_.end(), source) != exempt_sources_.end();
    return is_exempt ? std::string_view() : document.value(DocumentLine::kText);
  }

 private:
  std::vector<std::string> exempt_sources_;
};

class LineKeys : public CountedDocuments {
 public:
  LineKeys(std::vector<std::string> exempt_sources, bool within_language, const std::string& file_name,
           py::object reader)
      : CountedDocuments(std::move(exempt_sources), file_name, std::move(reader)), within_language_(within_language) {}

  void scan(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    const py::gil_scoped_release release;
    feed(data, last, [&](std::string_view line, uint64_t number) {
      read(line, number);
      Blake2b64 hash;
      hash.add(document.value(DocumentLine::kId));
      const std::string_view text = counted_text();
      const size_t begin = keys_.size();
      line_levels().front().keys(reinterpret_cast<const uint8_t*>(text.data()), static_cast<int64_t>(text.size()),
                                 scratch_, keys_);
      const std::string_view language = within_language_ ? document.value(DocumentLine::kLang) : std::string_view();
      rows_.push_back({hash.finish(), static_cast<uint32_t>(keys_.size() - begin), number_of(language)});
    });
  }

  // (rows, keys) of the documents since the last call: uint8 (num_docs, 16), uint64 (num_lines,).
  py::tuple take() {
    const auto count = static_cast<py::ssize_t>(rows_.size());
    py::array_t<uint8_t> rows({count, static_cast<py::ssize_t>(sizeof(LineDocumentRow))});
    if (count > 0) std::memcpy(rows.mutable_data(), rows_.data(), rows_.size() * sizeof(LineDocumentRow));
    const py::array_t<uint64_t> keys(static_cast<py::ssize_t>(keys_.size()), keys_.data());
    rows_.clear();
    keys_.clear();
    return py::make_tuple(rows, keys);
  }
  const std::vector<std::string>& languages() const { return languages_; }

 private:
  uint32_t number_of(std::string_view language) {
    if (last_ < languages_.size() && languages_[last_] == language) return last_;
    const auto [at, is_new] = numbers_.try_emplace(std::string(language), static_cast<uint32_t>(languages_.size()));
    if (is_new) languages_.emplace_back(language);
    return last_ = at->second;
  }

  bool within_language_;
  uint32_t last_ = 0;
  std::unordered_map<std::string, uint32_t> numbers_;
  std::vector<std::string> languages_;  // in the order in which they came
  std::vector<LineDocumentRow> rows_;
  std::vector<uint64_t> keys_;
  LineScratch scratch_;
};

class LineDealer : public CountedDocuments {
 public:
  LineDealer(std::vector<std::string> exempt_sources, bool code_aware, double min_kept_share,
             const std::string& file_name, py::object reader)
      : CountedDocuments(std::move(exempt_sources), file_name, std::move(reader)),
        code_aware_(code_aware),
        min_kept_share_(min_kept_share) {}

  // Keeps the lines of a piece for `deal`; returns how many documents are kept so.
  size_t hold(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    const py::gil_scoped_release release;
    feed(data, last, [&](std::string_view line, uint64_t number) {
      held_.push_back({lines_.size(), line.size(), number});
      lines_ += line;
    });
    return held_.size();
  }
  size_t num_held_bytes() const { return lines_.size(); }

  // (lines of those that stay, lines of those that go) of the documents held. counts: of every line of their texts, 0
  // for one that stays, those of text i from begins[i] on.
  py::tuple deal(const Array<int64_t>& begins, const Array<uint64_t>& counts, const Array<uint64_t>& keys,
                 RemovedLines& removed) {
    const auto num_docs = static_cast<int64_t>(held_.size());
    if (begins.size() != num_docs + 1 || counts.size() != keys.size() || begins.data()[0] != 0 ||
        begins.data()[num_docs] != counts.size())
      throw py::value_error("deal: begins must hold one border more than there are documents, up to len(counts)");
    kept_.clear();
    gone_.clear();
    {
      const py::gil_scoped_release release;
      for (int64_t i = 0; i < num_docs; ++i) {
        const Held& held = held_[static_cast<size_t>(i)];
        const std::string_view line = std::string_view(lines_).substr(held.begin, held.size);
        read(line, held.number);
        const std::string_view text = counted_text();
        const int64_t begin = begins.data()[i], num_lines = begins.data()[i + 1] - begin;
        if (begin < 0 || num_lines != 1 + std::count(text.begin(), text.end(), '\n'))
          throw std::invalid_argument("deal: there must be a count for every line of line " +
                                      std::to_string(held.number) + " of the file");
        deal_one(line, text, counts.data() + begin, counts.data() + begin + num_lines, keys.data() + begin, removed);
      }
    }
    held_.clear();
    lines_.clear();
    return py::make_tuple(py::bytes(kept_), py::bytes(gone_));
  }

  py::dict counters() const {
    py::dict out;
    out["docs_in"] = docs_in_;
    out["docs_out"] = docs_in_ - docs_dropped_;
    out["bytes_in"] = bytes_in_;
    out["bytes_out"] = bytes_out_;
    out["docs_changed"] = docs_changed_;
    out["lines_removed"] = num_removed_;
    return out;
  }

 private:
  struct Held {
    size_t begin, size;
    uint64_t number;
  };

  void deal_one(std::string_view line, std::string_view text, const uint64_t* counts, const uint64_t* counts_end,
                const uint64_t* keys, RemovedLines& removed) {
    const size_t old_bytes = document.value(DocumentLine::kText).size();
    ++docs_in_;
    bytes_in_ += old_bytes;
    LineRemoval removal;
    if (std::any_of(counts, counts_end, [](uint64_t count) { return count != 0; }))
      removal = remove_lines(text, counts, keys, code_aware_, removed);
    if (removal.num_removed == 0) {
      bytes_out_ += old_bytes;
      if (document.is_plain()) {
        kept_ += line;
      } else {
        document.write(kept_);
      }
      kept_ += '\n';
      return;
    }
    ++docs_changed_;
    num_removed_ += static_cast<uint64_t>(removal.num_removed);
    document.set_meta("lines_removed", std::to_string(removal.num_removed));
    const auto before = static_cast<double>(document.num_characters(text));
    const auto after = static_cast<double>(document.num_characters(removal.text));
    if (!is_blank(removal.text) && after >= min_kept_share_ * before) {
      document.set_text(removal.text);
      document.write(kept_);
      kept_ += '\n';
      bytes_out_ += removal.text.size();
    } else {
      document.set_meta("share_removed", json_rounded(1 - after / before));
      document.write(gone_, "duplicate_lines");
      gone_ += '\n';
      ++docs_dropped_;
    }
  }

  bool code_aware_;
  double min_kept_share_;
  std::vector<Held> held_;
  std::string lines_, kept_, gone_;
  uint64_t docs_in_ = 0, docs_dropped_ = 0, bytes_in_ = 0, bytes_out_ = 0, docs_changed_ = 0, num_removed_ = 0;
};

}  // namespace

void bind_line_documents(py::module_& m) {
  py::class_<LineKeys, Documents>(m, "LineKeys")
      .def(py::init<std::vector<std::string>, bool, const std::string&, py::object>(), py::arg("exempt_sources"),
           py::arg("within_language"), py::arg("file_name"), py::arg("reader"))
      .def("scan", &LineKeys::scan, py::arg("piece"), py::arg("last"))
      .def("take", &LineKeys::take)
      .def_property_readonly("languages", &LineKeys::languages);
  py::class_<LineDealer, Documents>(m, "LineDealer")
      .def(py::init<std::vector<std::string>, bool, double, const std::string&, py::object>(),
           py::arg("exempt_sources"), py::arg("code_aware"), py::arg("min_kept_share"), py::arg("file_name"),
           py::arg("reader"))
      .def("hold", &LineDealer::hold, py::arg("piece"), py::arg("last"))
      .def_property_readonly("num_held_bytes", &LineDealer::num_held_bytes)
      .def("deal", &LineDealer::deal, py::arg("begins"), py::arg("counts"), py::arg("keys"), py::arg("removed"))
      .def_property_readonly("counters", &LineDealer::counters);
}

}  // namespace herdkern::text
