// Python functions of document clusters: lines of documents, banding, components, whom to keep. Paths and arrays in,
// files and arrays out; the GIL is released meanwhile. The stages are herdkern/dedup/documents.py and clusters.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <map>

#include "text/bands.h"
#include "text/cluster_members.h"
#include "text/clusters.h"
#include "text/document_lines.h"

namespace py = pybind11;

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Paths = std::vector<std::string>;

void check_size(const char* function, const char* argument, py::ssize_t size, py::ssize_t wanted) {
  if (size != wanted)
    throw py::value_error(std::string(function) + ": " + argument + " must have " + std::to_string(wanted) +
                          " entries, got " + std::to_string(size));
}

// The lines of one file, handed in piece by piece; blank ones do not count as documents.
class DocumentLines {
 public:
  DocumentLines(std::string score_key, bool use_groups) : score_key_(std::move(score_key)), use_groups_(use_groups) {}

  // Takes the documents of a piece; [(row, line number, line)] of those that are not plain: `put` must follow for each.
  py::list scan(const py::bytes& piece, bool last) {
    const std::string_view data = piece;
    std::vector<Other> others;
    {
      py::gil_scoped_release release;
      for_each_line(data, last, [&](std::string_view line) {
        PlainLine fields;
        if (read_plain_line(line, score_key_, fields)) {
          rows_.push_back(make_row(line, fields, use_groups_, names_, texts_));
        } else {
          others.push_back({first_row_ + rows_.size(), number_, std::string(line)});
          rows_.push_back(DocumentRow{});
        }
      });
    }
    py::list found;
    for (const Other& other : others) found.append(py::make_tuple(other.row, other.number, py::bytes(other.line)));
    return found;
  }

  // The plain line that the line of a row stands for; without a row, the next document.
  void put(const py::bytes& plain_line, const py::object& row) {
    PlainLine fields;
    const std::string_view line = plain_line;
    if (!read_plain_line(line, score_key_, fields)) read_loosely(line, fields);
    std::pair<std::string, std::string> patch;
    DocumentRow made = make_row(line, fields, use_groups_, patch.first, patch.second);
    made.is_plain = 0;
    const size_t place = row.is_none() ? rows_.size() : row.cast<uint64_t>() - first_row_;
    if (row.is_none()) rows_.push_back(DocumentRow{});
    if (place >= rows_.size()) throw py::index_error("put: row must be one of those that scan gave");
    rows_[place] = made;
    patches_[place] = std::move(patch);
  }

  // (rows, names, texts) of the documents since the last call: uint8 (num_docs, 104), bytes, a list of bytes.
  py::tuple take() {
    const auto count = static_cast<py::ssize_t>(rows_.size());
    py::array_t<uint8_t> rows({count, static_cast<py::ssize_t>(sizeof(DocumentRow))});
    if (count > 0) std::memcpy(rows.mutable_data(), rows_.data(), rows_.size() * sizeof(DocumentRow));
    std::string names;
    py::list texts(rows_.size());
    size_t name = 0, text = 0;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const size_t name_bytes = size_t{rows_[i].id_bytes} + rows_[i].url_bytes;
      if (const auto patch = patches_.find(i); patch != patches_.end()) {
        names += patch->second.first;
        texts[i] = py::bytes(patch->second.second);
        continue;
      }
      names.append(names_, name, name_bytes);
      texts[i] = py::bytes(texts_.data() + text, rows_[i].text_bytes);
      name += name_bytes;
      text += rows_[i].text_bytes;
    }
    first_row_ += rows_.size();
    rows_.clear();
    names_.clear();
    texts_.clear();
    patches_.clear();
    return py::make_tuple(rows, py::bytes(names), texts);
  }

  // What `actions` (uint8, one a document) asks for of a piece, in order: bytes of neighbouring lines for kCopy, (row,
  // line number, line) for kLine, (row, line number, text) for kText, which only plain lines may have; nothing for
  // kSkip.
  py::list deal(const py::bytes& piece, bool last, const Array<uint8_t>& actions) {
    const std::string_view data = piece;
    std::vector<Other> found;
    std::string copied;
    const auto flush = [&] {
      if (!copied.empty()) found.push_back({0, 0, std::move(copied)});
      copied.clear();
    };
    {
      const uint8_t* action = actions.data();
      const auto count = static_cast<uint64_t>(actions.size());
      py::gil_scoped_release release;
      for_each_line(data, last, [&](std::string_view line) {
        const uint64_t row = first_row_++;
        if (row >= count) throw std::invalid_argument("deal: there are more documents than actions");
        if (action[row] == kSkip) return;
        if (action[row] == kCopy) {
          copied.append(line);
          copied += '\n';
          return;
        }
        flush();
        found.push_back({row, number_, {}});
        PlainLine fields;
        if (action[row] != kText) {
          found.back().line = line;
        } else if (read_plain_line(line, score_key_, fields)) {
          append_unescaped(fields.text, found.back().line);
        } else {
          throw std::invalid_argument("deal: line " + std::to_string(number_) + " is not plain");
        }
      });
      flush();
    }
    py::list segments;
    for (const Other& other : found) {
      if (other.number == 0) {
        segments.append(py::bytes(other.line));
      } else {
        segments.append(py::make_tuple(other.row, other.number, py::bytes(other.line)));
      }
    }
    return segments;
  }

  uint64_t num_documents() const { return first_row_ + rows_.size(); }
  uint64_t num_lines() const { return number_; }
  uint64_t num_pending_bytes() const { return pending_.size(); }
  uint64_t num_text_bytes() const { return texts_.size(); }

  enum Action : uint8_t { kSkip = 0, kCopy = 1, kLine = 2, kText = 3 };

 private:
  struct Other {
    uint64_t row, number;  // number 0: copied lines
    std::string line;
  };

  template <typename Use>
  void for_each_line(std::string_view data, bool last, Use&& use) {
    const auto line_of = [&](std::string_view line) {
      ++number_;
      if (line.find_first_not_of(" \t\r\v\f") != std::string_view::npos) use(line);
    };
    size_t begin = 0;
    for (size_t end; (end = data.find('\n', begin)) != std::string_view::npos; begin = end + 1) {
      if (pending_.empty()) {
        line_of(data.substr(begin, end - begin));
      } else {
        pending_.append(data, begin, end - begin);
        line_of(pending_);
        pending_.clear();
      }
    }
    pending_.append(data, begin);
    if (last && !pending_.empty()) {
      line_of(pending_);
      std::string().swap(pending_);
    }
  }

  // What Python has written is as it should be, but may hold numbers or keys that the parser leaves to it.
  void read_loosely(std::string_view line, PlainLine& fields) const {
    const py::module_ json = py::module_::import("json");
    const py::object values = json.attr("loads")(py::bytes(line.data(), line.size()));
    static thread_local std::string kept[4];
    const char* names[] = {"id", "text", "url", "lang"};
    std::string_view* views[] = {&fields.id, &fields.text, &fields.url, &fields.lang};
    for (int i = 0; i < 4; ++i) {
      const auto dumped = json.attr("dumps")(values[names[i]], py::arg("ensure_ascii") = false).cast<std::string>();
      kept[i] = dumped.substr(1, dumped.size() - 2);
      *views[i] = kept[i];
    }
    fields.timestamp = values["timestamp"].cast<int64_t>();
    const py::object score = values["meta"].attr("get")(score_key_);
    const bool is_number =
        (py::isinstance<py::float_>(score) || py::isinstance<py::int_>(score)) && !py::isinstance<py::bool_>(score);
    fields.score = is_number ? score.attr("__float__")().cast<double>() : -std::numeric_limits<double>::infinity();
  }

  std::string score_key_, pending_, names_, texts_;
  bool use_groups_;
  uint64_t first_row_ = 0, number_ = 0;
  std::vector<DocumentRow> rows_;
  std::map<size_t, std::pair<std::string, std::string>> patches_;
};

// Signatures of either width with what belongs to each.
struct SignatureBlock {
  py::array array;
  bool is_wide;
  int64_t count, num_slots;
};

SignatureBlock view_block(const char* function, const py::array& signatures, int64_t num_slots) {
  const bool is_wide = signatures.itemsize() == 8;
  const bool is_plain = signatures.ndim() == 2 && (signatures.flags() & py::array::c_style) != 0 &&
                        signatures.dtype().kind() == 'u' && (is_wide || signatures.itemsize() == 4);
  if (!is_plain || signatures.shape(1) != num_slots)
    throw py::value_error(std::string(function) + ": signatures must be uint32 or uint64 of shape (num_docs, " +
                          std::to_string(num_slots) + ")");
  return {signatures, is_wide, signatures.shape(0), num_slots};
}

void bind_bands(py::module_& m) {
  py::class_<BandPartitioner>(m, "BandPartitioner")
      .def(py::init<const std::string&, uint64_t, size_t>(), py::arg("folder"), py::arg("num_partitions"),
           py::arg("max_bytes"))
      .def(
          "add_signatures",
          [](BandPartitioner& self, const py::array& signatures, int64_t num_bands, int64_t rows_per_band,
             const Array<uint64_t>& docs, const Array<uint64_t>& groups, const Array<uint64_t>& texts) {
            const SignatureBlock block = view_block("add_signatures", signatures, num_bands * rows_per_band);
            check_size("add_signatures", "docs", docs.size(), block.count);
            check_size("add_signatures", "groups", groups.size(), block.count);
            check_size("add_signatures", "texts", texts.size(), block.count);
            const void* data = block.array.data();
            py::gil_scoped_release release;
            if (block.is_wide) {
              self.add_signatures(static_cast<const uint64_t*>(data), block.count, num_bands, rows_per_band,
                                  docs.data(), groups.data(), texts.data());
            } else {
              self.add_signatures(static_cast<const uint32_t*>(data), block.count, num_bands, rows_per_band,
                                  docs.data(), groups.data(), texts.data());
            }
          },
          py::arg("signatures"), py::arg("num_bands"), py::arg("rows_per_band"), py::arg("docs"), py::arg("groups"),
          py::arg("texts"))
      .def("add_sorted", &BandPartitioner::add_sorted, py::arg("path"), py::arg("doc_offset"),
           py::call_guard<py::gil_scoped_release>())
      .def("finish", &BandPartitioner::finish, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_records", &BandPartitioner::num_records);
  m.def(
      "link_bands",
      [](const Paths& run_files, const std::string& out, int min_bits, size_t max_bytes) {
        LinkCounts c;
        {
          py::gil_scoped_release release;
          c = link_bands(run_files, out, min_bits, max_bytes);
        }
        return py::dict(py::arg("records") = c.records, py::arg("shared_keys") = c.shared_keys,
                        py::arg("links") = c.links, py::arg("edges") = c.edges, py::arg("largest_key") = c.largest_key);
      },
      py::arg("run_files"), py::arg("out"), py::arg("min_bits"), py::arg("max_bytes"));
  m.def("merge_band_runs", &merge_band_runs, py::arg("run_file"), py::arg("out"), py::arg("max_bytes"),
        py::call_guard<py::gil_scoped_release>());
}

void bind_components(py::module_& m) {
  m.def("number_documents", &number_documents, py::arg("keys"), py::arg("ties"), py::arg("first"), py::arg("folder"),
        py::arg("max_bytes"), py::call_guard<py::gil_scoped_release>());
  m.def("label_components", &label_components, py::arg("edge_files"), py::arg("num_docs"), py::arg("folder"),
        py::arg("out"), py::arg("max_bytes"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "deal_labels",
      [](const std::string& labels, const std::string& shards, uint64_t first, uint64_t num_shards,
         const std::string& folder, size_t max_bytes) {
        py::gil_scoped_release release;
        const LabelCounts c = deal_labels(labels, shards, first, num_shards, folder, max_bytes);
        return std::make_pair(c.members, c.clusters);
      },
      py::arg("labels"), py::arg("shards"), py::arg("first"), py::arg("num_shards"), py::arg("folder"),
      py::arg("max_bytes"));
}

// Adds the members of a block of signatures: rows[i] is a row of `documents` and of the block from `begin` on.
void add_members(MemberWriter& self, const py::array& signatures, int64_t begin, const Array<int64_t>& rows,
                 const Array<uint8_t>& documents, const Array<uint64_t>& labels, const Array<uint64_t>& docs,
                 uint32_t shard, const py::buffer& names, const Array<int64_t>& name_begins,
                 const Array<uint64_t>& shingles, const Array<int64_t>& shingle_begins) {
  if (signatures.ndim() != 2) throw py::value_error("add: signatures must have two dimensions");
  const SignatureBlock block = view_block("add", signatures, signatures.shape(1));
  const py::ssize_t count = rows.size();
  const auto num_documents = documents.size() / static_cast<py::ssize_t>(sizeof(DocumentRow));
  check_size("add", "labels", labels.size(), num_documents);
  check_size("add", "docs", docs.size(), num_documents);
  check_size("add", "name_begins", name_begins.size(), num_documents + 1);
  check_size("add", "shingle_begins", shingle_begins.size(), count + 1);
  const py::buffer_info name_info = names.request();
  if (name_begins.data()[num_documents] > name_info.size * name_info.itemsize)
    throw py::value_error("add: names must hold the names of all documents");
  if (count > 0 && shingle_begins.data()[count] > shingles.size())
    throw py::value_error("add: shingles must hold those of all rows");
  const auto* document = reinterpret_cast<const DocumentRow*>(documents.data());
  const auto* signature = static_cast<const char*>(block.array.data());
  const auto* name = static_cast<const char*>(name_info.ptr);
  const size_t bytes = static_cast<size_t>(block.num_slots * block.array.itemsize());
  py::gil_scoped_release release;
  std::vector<uint64_t> set;
  for (py::ssize_t i = 0; i < count; ++i) {
    const int64_t row = rows.data()[i];
    if (row < begin || row >= begin + block.count || row >= num_documents)
      throw std::invalid_argument("add: rows must lie in the block of signatures");
    set.assign(shingles.data() + shingle_begins.data()[i], shingles.data() + shingle_begins.data()[i + 1]);
    std::sort(set.begin(), set.end());
    set.erase(std::unique(set.begin(), set.end()), set.end());
    self.add(document[row], labels.data()[row], docs.data()[row], uint64_t{shard} << 32 | static_cast<uint64_t>(row),
             name + name_begins.data()[row], {signature + static_cast<size_t>(row - begin) * bytes, bytes}, set.data(),
             set.size());
  }
}

py::dict resolve(const Paths& pieces, const std::string& folder, const std::string& verify, int64_t num_bands,
                 int64_t rows_per_band, int64_t slot_bytes, int64_t min_matches, double min_similarity,
                 size_t max_bytes) {
  ResolveRules rules{};
  rules.verify = verify == "exact" ? Verify::kExact : verify == "signature" ? Verify::kSignature : Verify::kNone;
  rules.num_bands = num_bands;
  rules.rows_per_band = rows_per_band;
  rules.slot_bytes = slot_bytes;
  rules.min_matches = min_matches;
  rules.min_similarity = min_similarity;
  rules.max_bytes = max_bytes;
  ResolveCounts c;
  {
    py::gil_scoped_release release;
    c = resolve_members(pieces, folder, rules);
  }
  return py::dict(py::arg("components") = c.components, py::arg("clusters") = c.clusters,
                  py::arg("largest_cluster") = c.largest_cluster, py::arg("largest_component") = c.largest_component,
                  py::arg("compared") = c.compared, py::arg("similar") = c.similar, py::arg("sizes") = c.sizes);
}

}  // namespace

void bind_clusters(py::module_& m) {
  py::class_<DocumentLines>(m, "DocumentLines")
      .def(py::init<std::string, bool>(), py::arg("score_key"), py::arg("use_groups"))
      .def("scan", &DocumentLines::scan, py::arg("piece"), py::arg("last"))
      .def("put", &DocumentLines::put, py::arg("plain_line"), py::arg("row") = py::none())
      .def("take", &DocumentLines::take)
      .def("deal", &DocumentLines::deal, py::arg("piece"), py::arg("last"), py::arg("actions"))
      .def_property_readonly("num_documents", &DocumentLines::num_documents)
      .def_property_readonly("num_lines", &DocumentLines::num_lines)
      .def_property_readonly("num_text_bytes", &DocumentLines::num_text_bytes)
      .def_property_readonly("num_pending_bytes", &DocumentLines::num_pending_bytes);
  bind_bands(m);
  bind_components(m);
  py::class_<MemberWriter>(m, "MemberWriter")
      .def(py::init<const std::string&, uint64_t, size_t>(), py::arg("folder"), py::arg("num_partitions"),
           py::arg("max_bytes"))
      .def("add", &add_members, py::arg("signatures"), py::arg("begin"), py::arg("rows"), py::arg("documents"),
           py::arg("labels"), py::arg("docs"), py::arg("shard"), py::arg("names"), py::arg("name_begins"),
           py::arg("shingles"), py::arg("shingle_begins"))
      .def("finish", &MemberWriter::finish, py::call_guard<py::gil_scoped_release>());
  m.def("resolve_members", &resolve, py::arg("pieces"), py::arg("folder"), py::arg("verify"), py::arg("num_bands"),
        py::arg("rows_per_band"), py::arg("slot_bytes"), py::arg("min_matches"), py::arg("min_similarity"),
        py::arg("max_bytes"));
}

}  // namespace herdkern::text
