// Python classes of URL dedup over the lines of document files, which come piece by piece: UrlScanner makes a record of
// every document with a web address, UrlDealer parts those that stay from those that go. The GIL is released meanwhile.
// The stages are in herdkern/dedup/urls.py.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "text/document_reader.h"
#include "text/record_file.h"
#include "text/url_table.h"

namespace herdkern::text {

namespace {

class UrlScanner : public Documents {
 public:
  // rules: None if there are some that are not known here.  canonical: the canonical form (bytes) of a URL (bytes),
  // empty if it is no web address; asked where the rules do not do.
  UrlScanner(py::object rules, py::object canonical, size_t num_parts, const std::string& file_name, py::object reader)
      : Documents(file_name, std::move(reader)),
        held_rules_(std::move(rules)),
        rules_(held_rules_.is_none() ? nullptr : held_rules_.cast<const UrlRules*>()),
        canonical_(std::move(canonical)),
        parts_(num_parts) {}

  void scan(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    const py::gil_scoped_release release;
    feed(data, last, [&](std::string_view line, uint64_t number) {
      read(line, number);
      const auto row = static_cast<uint32_t>(num_documents_++);
      UrlKey key;
      if (find_key(document.value(DocumentLine::kUrl), key)) add(key, row);
    });
  }

  // [(records, names)] of every partition, of the documents since the last call.
  py::list take() {
    py::list out;
    for (Part& part : parts_) {
      out.append(py::make_tuple(
          py::bytes(reinterpret_cast<const char*>(part.records.data()), part.records.size() * sizeof(UrlRecord)),
          py::bytes(part.names)));
      part.names_before += part.names.size();
      part.records.clear();
      part.names.clear();
    }
    return out;
  }
  uint64_t num_documents() const { return num_documents_; }
  uint64_t num_urls() const { return num_urls_; }

 private:
  struct Part {
    std::vector<UrlRecord> records;
    std::string names;
    uint64_t names_before = 0;
  };

  bool find_key(std::string_view url, UrlKey& key) {
    if (url.empty()) return false;
    const std::string_view form = rules_ ? canonicalise_url(url, *rules_, scratch_) : std::string_view();
    if (!form.empty()) {
      key = hash_url(form);
      return true;
    }
    const py::gil_scoped_acquire gil;
    const auto asked = canonical_(py::bytes(url.data(), url.size())).cast<std::string>();
    key = hash_url(asked);
    return !asked.empty();
  }

  void add(const UrlKey& key, uint32_t row) {
    const std::string_view id = document.value(DocumentLine::kId), url = document.value(DocumentLine::kUrl);
    uint64_t prefix = 0;
    std::memcpy(&prefix, id.data(), std::min<size_t>(8, id.size()));
    UrlRecord record{key.low, key.high, document.timestamp(), 0, row, __builtin_bswap64(prefix), 0};
    record.length = static_cast<uint32_t>(document.num_characters(document.value(DocumentLine::kText)));
    Part& part = parts_[static_cast<size_t>(part_of_url_key(record, static_cast<int64_t>(parts_.size())))];
    record.name = part.names_before + part.names.size();
    part.records.push_back(record);
    const uint32_t sizes[2] = {static_cast<uint32_t>(id.size()), static_cast<uint32_t>(url.size())};
    part.names.append(reinterpret_cast<const char*>(sizes), sizeof(sizes));
    part.names += id;
    part.names += url;
    ++num_urls_;
  }

  py::object held_rules_;
  const UrlRules* rules_;
  py::object canonical_;
  std::vector<Part> parts_;
  UrlScratch scratch_;
  uint64_t num_documents_ = 0, num_urls_ = 0;
};

// The decisions in one file, in the order of rows, read as they are needed.
class UrlDecisions {
 public:
  explicit UrlDecisions(const std::string& path) : file_(File::open(path)), size_(file_bytes(path)) { next(); }
  static constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t row() const { return row_; }  // of the decision at hand, kNone at the end
  const UrlDecision& decision() const { return decision_; }
  std::string_view kept_id() const { return {names(), decision_.id_bytes}; }
  std::string_view kept_url() const { return {names() + decision_.id_bytes, decision_.url_bytes}; }

  void next() {
    row_ = kNone;
    if (at_ == held_.size() && place_ == size_) return;
    need(sizeof(UrlDecision));
    std::memcpy(&decision_, held_.data() + at_, sizeof(UrlDecision));
    at_ += sizeof(UrlDecision);
    const size_t size = size_t{decision_.id_bytes} + decision_.url_bytes;
    need(size);
    at_ += size;
    row_ = decision_.row;
  }

 private:
  static constexpr size_t kBufferBytes = 1 << 15;
  const char* names() const { return held_.data() + at_ - decision_.id_bytes - decision_.url_bytes; }
  // Has `size` bytes behind at_ in memory.
  void need(size_t size) {
    if (held_.size() - at_ >= size) return;
    held_.erase(0, at_);
    at_ = 0;
    const size_t had = held_.size();
    held_.resize(had + static_cast<size_t>(std::min<uint64_t>(std::max(kBufferBytes, size), size_ - place_)));
    file_->read_at(place_, held_.data() + had, held_.size() - had);
    place_ += held_.size() - had;
    if (held_.size() < size) throw std::invalid_argument(file_->name() + " is damaged: it ends within a decision");
  }

  std::shared_ptr<const File> file_;
  uint64_t size_, place_ = 0, row_ = kNone;
  std::string held_;
  size_t at_ = 0;
  UrlDecision decision_{};
};

class UrlDealer : public Documents {
 public:
  // decisions: files of them about this file's documents.
  UrlDealer(const std::vector<std::string>& decisions, const std::string& file_name, py::object reader)
      : Documents(file_name, std::move(reader)) {
    for (const std::string& path : decisions) decisions_.emplace_back(path);
    find_next();
  }

  // (lines of those that stay, lines of those that go) of a piece
  py::tuple deal(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    kept_.clear();
    gone_.clear();
    {
      const py::gil_scoped_release release;
      feed(data, last, [&](std::string_view line, uint64_t number) {
        read(line, number);
        deal_one(line);
      });
    }
    return py::make_tuple(py::bytes(kept_), py::bytes(gone_));
  }

  py::dict counters() const {
    py::dict out;
    out["docs_in"] = row_;
    out["docs_out"] = row_ - docs_dropped_;
    out["bytes_in"] = bytes_in_;
    out["bytes_out"] = bytes_out_;
    return out;
  }

 private:
  void deal_one(std::string_view line) {
    const size_t text_bytes = document.value(DocumentLine::kText).size();
    bytes_in_ += text_bytes;
    if (row_++ != next_row_) {
      bytes_out_ += text_bytes;
      if (document.is_plain()) {
        kept_ += line;
      } else {
        document.write(kept_);
      }
      kept_ += '\n';
      return;
    }
    const UrlDecisions& made = decisions_[next_file_];
    document.set_meta("kept_id", quoted(made.kept_id()));
    document.set_meta("kept_url", quoted(made.kept_url()));
    document.set_meta("kept_timestamp", std::to_string(made.decision().timestamp));
    document.write(gone_, "duplicate_url");
    gone_ += '\n';
    ++docs_dropped_;
    decisions_[next_file_].next();
    find_next();
  }

  static std::string quoted(std::string_view text) {
    std::string json = "\"";
    append_escaped(text, json);
    return json + '"';
  }

  void find_next() {
    next_row_ = UrlDecisions::kNone;
    for (size_t i = 0; i < decisions_.size(); ++i)
      if (decisions_[i].row() < next_row_) next_row_ = decisions_[next_file_ = i].row();
  }

  std::vector<UrlDecisions> decisions_;
  size_t next_file_ = 0;
  uint64_t next_row_ = UrlDecisions::kNone, row_ = 0, docs_dropped_ = 0, bytes_in_ = 0, bytes_out_ = 0;
  std::string kept_, gone_;
};

}  // namespace

void bind_url_documents(py::module_& m) {
  py::class_<UrlScanner, Documents>(m, "UrlScanner")
      .def(py::init<py::object, py::object, size_t, const std::string&, py::object>(), py::arg("rules"),
           py::arg("canonical"), py::arg("num_parts"), py::arg("file_name"), py::arg("reader"))
      .def("scan", &UrlScanner::scan, py::arg("piece"), py::arg("last"))
      .def("take", &UrlScanner::take)
      .def_property_readonly("num_documents", &UrlScanner::num_documents)
      .def_property_readonly("num_urls", &UrlScanner::num_urls);
  py::class_<UrlDealer, Documents>(m, "UrlDealer")
      .def(py::init<const std::vector<std::string>&, const std::string&, py::object>(), py::arg("decisions"),
           py::arg("file_name"), py::arg("reader"))
      .def("deal", &UrlDealer::deal, py::arg("piece"), py::arg("last"))
      .def_property_readonly("counters", &UrlDealer::counters);
}

}  // namespace herdkern::text
