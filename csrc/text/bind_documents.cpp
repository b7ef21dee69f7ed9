// Python classes over the lines of document files, which come piece by piece: DocumentColumns makes rows of columns of
// them, and signatures or texts, DocumentTexts takes the texts of some, DocumentDealer parts those that stay from those
// that go. The GIL is released meanwhile. The stages are herdkern/dedup/{sign_stage,cluster_stages,drop}.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>

#include "text/cluster_members.h"
#include "text/document_reader.h"
#include "text/record_file.h"

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

class DocumentColumns : public Documents {
 public:
  DocumentColumns(py::object plan, std::string score_key, bool use_groups, const std::string& file_name,
                  py::object reader)
      : Documents(file_name, std::move(reader)),
        held_plan_(std::move(plan)),
        plan_(held_plan_.is_none() ? nullptr : held_plan_.cast<const SignPlan*>()),
        score_key_(std::move(score_key)),
        use_groups_(use_groups) {}

  void scan(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    const py::gil_scoped_release release;
    feed(data, last, [&](std::string_view line, uint64_t number) {
      read(line, number);
      rows_.push_back(document.row(score_key_, use_groups_, names_));
      const std::string_view text = document.value(DocumentLine::kText);
      if (plan_ == nullptr) {
        texts_ += text;
        return;
      }
      const size_t begin = signatures_.size();
      signatures_.resize(begin + static_cast<size_t>(plan_->num_slots));
      best_kernels().sign(reinterpret_cast<const uint8_t*>(text.data()), static_cast<int64_t>(text.size()), *plan_,
                          scratch_, signatures_.data() + begin);
    });
  }

  // (rows, names, signatures) of the documents since the last call: uint8 (num_docs, 104), bytes, uint32 (num_docs,
  // num_slots); without a plan, a list of the texts (bytes) in place of the signatures.
  py::tuple take() {
    const auto count = static_cast<py::ssize_t>(rows_.size());
    py::array_t<uint8_t> rows({count, static_cast<py::ssize_t>(sizeof(DocumentRow))});
    if (count > 0) std::memcpy(rows.mutable_data(), rows_.data(), rows_.size() * sizeof(DocumentRow));
    const py::object made = plan_ == nullptr ? py::object(take_texts()) : py::object(take_signatures());
    const py::bytes names(names_);
    rows_.clear();
    names_.clear();
    return py::make_tuple(rows, names, made);
  }

 private:
  py::list take_texts() {
    py::list texts(rows_.size());
    size_t begin = 0;
    for (size_t i = 0; i < rows_.size(); begin += rows_[i++].text_bytes)
      texts[i] = py::bytes(texts_.data() + begin, rows_[i].text_bytes);
    texts_.clear();
    return texts;
  }
  py::array take_signatures() {
    py::array_t<uint32_t> signatures({static_cast<py::ssize_t>(rows_.size()), py::ssize_t(plan_->num_slots)});
    if (!signatures_.empty())
      std::memcpy(signatures.mutable_data(), signatures_.data(), signatures_.size() * sizeof(uint32_t));
    signatures_.clear();
    return signatures;
  }

  py::object held_plan_;
  const SignPlan* plan_;
  std::string score_key_, names_, texts_;
  bool use_groups_;
  std::vector<DocumentRow> rows_;
  std::vector<uint32_t> signatures_;
  Scratch scratch_;
};

// The rows of a file that are asked for, by one byte each.
std::vector<uint8_t> flags_of(const Array<uint8_t>& flags) { return {flags.data(), flags.data() + flags.size()}; }

class DocumentTexts : public Documents {
 public:
  DocumentTexts(const Array<uint8_t>& wanted, const std::string& file_name, py::object reader)
      : Documents(file_name, std::move(reader)), wanted_(flags_of(wanted)) {}

  // [(row, text)] of the wanted documents of a piece.
  py::list texts(const py::bytes& piece, bool last) {
    std::vector<std::pair<uint64_t, std::string>> found;
    scan(piece, last, [&](uint64_t row, std::string_view text) { found.emplace_back(row, text); });
    py::list out;
    for (const auto& [row, text] : found) out.append(py::make_tuple(row, py::bytes(text)));
    return out;
  }

  // (rows, hashes, begins): the shingles of the wanted document rows[i] are hashes[begins[i] : begins[i + 1]].
  py::tuple shingles(const py::bytes& piece, bool last, const SignPlan& plan) {
    std::vector<int64_t> rows, begins{0};
    std::vector<uint64_t> hashes;
    scan(piece, last, [&](uint64_t row, std::string_view text) {
      rows.push_back(static_cast<int64_t>(row));
      best_kernels().shingle(reinterpret_cast<const uint8_t*>(text.data()), static_cast<int64_t>(text.size()), plan,
                             scratch_, hashes);
      begins.push_back(static_cast<int64_t>(hashes.size()));
    });
    const auto array = [](const auto& values) {
      using Value = typename std::decay_t<decltype(values)>::value_type;
      return py::array_t<Value>(static_cast<py::ssize_t>(values.size()), values.data());
    };
    return py::make_tuple(array(rows), array(hashes), array(begins));
  }
  uint64_t num_documents() const { return row_; }

 private:
  template <typename Use>
  void scan(const py::bytes& piece, bool last, Use&& use) {
    const std::string_view data = piece;
    const py::gil_scoped_release release;
    feed(data, last, [&](std::string_view line, uint64_t number) {
      const uint64_t row = row_++;
      if (row >= wanted_.size() || !wanted_[row]) return;
      read(line, number);
      use(row, document.value(DocumentLine::kText));
    });
  }

  std::vector<uint8_t> wanted_;
  uint64_t row_ = 0;
  Scratch scratch_;
};

class DocumentDealer : public Documents {
 public:
  // is_plain: whether the line of each row may be copied.
  DocumentDealer(const Array<uint8_t>& is_plain, bool wants_dropped, const std::string& file_name, py::object reader)
      : Documents(file_name, std::move(reader)),
        is_plain_(flags_of(is_plain)),
        dropped_(is_plain_.size(), kStays),
        wants_dropped_(wants_dropped) {}

  // The documents at rows[i] go for reasons[i]. decisions: uint8 (num, 64), entries of cluster_members.h; names: the
  // file of the kept documents' names.
  void drop(const Array<int64_t>& rows, const Array<uint8_t>& decisions, const std::vector<std::string>& reasons,
            const std::string& names) {
    if (decisions.ndim() != 2 || decisions.shape(1) != static_cast<py::ssize_t>(sizeof(Decision)) ||
        decisions.shape(0) != rows.size())
      throw py::value_error("drop: decisions must have shape (number of rows, 64)");
    const auto file = File::open(names);
    for (py::ssize_t i = 0; i < rows.size(); ++i) {
      const int64_t row = rows.data()[i];
      if (row < 0 || static_cast<uint64_t>(row) >= dropped_.size())
        throw py::value_error("drop: rows must lie in [0, " + std::to_string(dropped_.size()) + ")");
      Decision decision;
      std::memcpy(&decision, decisions.data() + static_cast<size_t>(i) * sizeof(Decision), sizeof(Decision));
      if (decision.reason >= reasons.size()) throw py::value_error("drop: there must be a text for every reason");
      dropped_[static_cast<size_t>(row)] = static_cast<uint32_t>(goes_.size());
      Going going{names_.size(), decision.id_bytes, decision.url_bytes, decision.similarity, reasons[decision.reason]};
      const size_t size = size_t{decision.id_bytes} + decision.url_bytes;
      if (wants_dropped_ && size > 0) {
        names_.resize(names_.size() + size);
        file->read_at(decision.names_offset, names_.data() + going.names, size);
      }
      goes_.push_back(std::move(going));
    }
  }

  // (parts of the lines of those that stay, lines of those that go) of a piece. What can be copied is a view of it.
  py::tuple deal(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    kept_.clear();
    made_.clear();
    aside_.clear();
    {
      const py::gil_scoped_release release;
      feed(data, last, [&](std::string_view line, uint64_t number) {
        const uint64_t row = row_++;
        if (row >= dropped_.size()) return;  // the caller sees it by num_documents
        if (dropped_[row] != kStays) return put_aside(line, number, goes_[dropped_[row]]);
        const size_t begin = reinterpret_cast<uintptr_t>(line.data()) - reinterpret_cast<uintptr_t>(data.data());
        if (is_plain_[row] && begin < data.size() && line.size() < data.size() - begin)  // it lies in the piece
          return keep({false, begin, line.size() + 1});
        const size_t made = made_.size();
        if (is_plain_[row]) {
          made_ += line;
        } else {
          read(line, number);
          document.write(made_);
        }
        made_ += '\n';
        keep({true, made, made_.size() - made});
      });
    }
    return py::make_tuple(take_kept(piece), py::bytes(aside_));
  }
  uint64_t num_documents() const { return row_; }

 private:
  static constexpr uint32_t kStays = 0xFFFFFFFFu;
  struct Going {
    size_t names;
    uint32_t id_bytes, url_bytes;
    double similarity;
    std::string reason;
  };

  struct Part {  // of what stays: made here, or as it is in the piece
    bool is_made;
    size_t begin, size;
  };

  void keep(const Part& part) {
    if (!kept_.empty() && kept_.back().is_made == part.is_made && kept_.back().begin + kept_.back().size == part.begin)
      kept_.back().size += part.size;
    else
      kept_.push_back(part);
  }

  py::list take_kept(const py::bytes& piece) {
    const py::memoryview view(piece);
    py::list parts;
    for (const Part& part : kept_) {
      const auto begin = static_cast<py::ssize_t>(part.begin), size = static_cast<py::ssize_t>(part.size);
      if (part.is_made)
        parts.append(py::bytes(made_.data() + begin, part.size));
      else
        parts.append(view[py::slice(begin, begin + size, 1)]);
    }
    return parts;
  }

  void put_aside(std::string_view line, uint64_t number, const Going& going) {
    if (!wants_dropped_) return;
    read(line, number);
    const std::string_view id(names_.data() + going.names, going.id_bytes);
    const std::string_view url(names_.data() + going.names + going.id_bytes, going.url_bytes);
    for (const auto& [key, text] : {std::pair{"kept_id", id}, std::pair{"kept_url", url}}) {
      std::string json = "\"";
      append_escaped(text, json);
      document.set_meta(key, json + '"');
    }
    document.set_meta("similarity", json_rounded(going.similarity));
    document.write(aside_, going.reason);
    aside_ += '\n';
  }

  std::vector<uint8_t> is_plain_;
  std::vector<uint32_t> dropped_;  // of every row: kStays, or its place in goes_
  std::vector<Going> goes_;
  std::string names_, made_, aside_;
  std::vector<Part> kept_;
  bool wants_dropped_;
  uint64_t row_ = 0;
};

}  // namespace

void bind_documents(py::module_& m) {
  const auto lines = py::class_<Documents>(m, "DocumentLines")
                         .def_property_readonly("num_lines", &Documents::num_lines)
                         .def_property_readonly("num_pending_bytes", &Documents::num_pending_bytes);
  py::class_<DocumentColumns, Documents>(m, "DocumentColumns")
      .def(py::init<py::object, std::string, bool, const std::string&, py::object>(), py::arg("plan"),
           py::arg("score_key"), py::arg("use_groups"), py::arg("file_name"), py::arg("reader"))
      .def("scan", &DocumentColumns::scan, py::arg("piece"), py::arg("last"))
      .def("take", &DocumentColumns::take);
  py::class_<DocumentTexts, Documents>(m, "DocumentTexts")
      .def(py::init<const Array<uint8_t>&, const std::string&, py::object>(), py::arg("wanted"), py::arg("file_name"),
           py::arg("reader"))
      .def("texts", &DocumentTexts::texts, py::arg("piece"), py::arg("last"))
      .def("shingles", &DocumentTexts::shingles, py::arg("piece"), py::arg("last"), py::arg("plan"))
      .def_property_readonly("num_documents", &DocumentTexts::num_documents);
  py::class_<DocumentDealer, Documents>(m, "DocumentDealer")
      .def(py::init<const Array<uint8_t>&, bool, const std::string&, py::object>(), py::arg("is_plain"),
           py::arg("wants_dropped"), py::arg("file_name"), py::arg("reader"))
      .def("drop", &DocumentDealer::drop, py::arg("rows"), py::arg("decisions"), py::arg("reasons"), py::arg("names"))
      .def("deal", &DocumentDealer::deal, py::arg("piece"), py::arg("last"))
      .def_property_readonly("num_documents", &DocumentDealer::num_documents);
}

}  // namespace herdkern::text
