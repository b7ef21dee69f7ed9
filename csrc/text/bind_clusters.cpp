// Python functions of document clusters: banding, components, whom to keep. Paths and arrays in, files and arrays out;
// the GIL is released meanwhile. The stages are herdkern/dedup/cluster_stages.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

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
      .def(py::init<const std::string&, uint64_t, size_t, size_t>(), py::arg("folder"), py::arg("num_partitions"),
           py::arg("max_bytes"), py::arg("expected_records") = 0)
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
