// Python functions of LSH and clustering. Arrays in, arrays out; the GIL is released meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "text/lsh.h"
#include "text/union_find.h"

namespace py = pybind11;

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void check_pairs(const std::string& function, const Array<int64_t>& pairs, int64_t num_docs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2)
    throw py::value_error(function + ": pairs must have shape (num_pairs, 2)");
  for (py::ssize_t i = 0; i < pairs.size(); ++i)
    if (pairs.data()[i] < 0 || pairs.data()[i] >= num_docs)
      throw py::value_error(function + ": pairs must lie in [0, " + std::to_string(num_docs) + "), got " +
                            std::to_string(pairs.data()[i]));
}

Signatures view_signatures(const Array<uint32_t>& signatures, int64_t num_bands, int64_t rows_per_band,
                           const Array<uint64_t>& groups) {
  const bool is_2d = signatures.ndim() == 2;  // the product is formed of sizes that cannot overflow
  if (!is_2d || num_bands < 1 || rows_per_band < 1 || num_bands > signatures.shape(1) ||
      rows_per_band > signatures.shape(1) / num_bands || signatures.shape(1) != num_bands * rows_per_band)
    throw py::value_error("candidates: signatures must have shape (num_docs, num_bands * rows_per_band)");
  if (groups.size() != 0 && groups.size() != signatures.shape(0))
    throw py::value_error("candidates: groups must have one entry per document");
  return {signatures.data(), signatures.shape(0), num_bands, rows_per_band, groups.size() ? groups.data() : nullptr};
}

py::array_t<uint64_t> key_bands(const Array<uint32_t>& signatures, int64_t num_bands, int64_t rows_per_band,
                                const Array<uint64_t>& groups) {
  const Signatures s = view_signatures(signatures, num_bands, rows_per_band, groups);
  py::array_t<uint64_t> out({s.num_docs, s.num_bands});
  uint64_t* keys = out.mutable_data();
  py::gil_scoped_release release;
  for (int64_t doc = 0; doc < s.num_docs; ++doc)
    for (int64_t band = 0; band < num_bands; ++band) *keys++ = band_key(s, doc, band);
  return out;
}

py::array_t<int64_t> pair_candidates(const Array<uint32_t>& signatures, int64_t num_bands, int64_t rows_per_band,
                                     const Array<uint64_t>& groups, int64_t min_matches, int num_threads) {
  const Signatures s = view_signatures(signatures, num_bands, rows_per_band, groups);
  std::vector<Pair> pairs;
  {
    py::gil_scoped_release release;
    pairs = candidate_pairs(s, min_matches, num_threads);
  }
  py::array_t<int64_t> out({static_cast<py::ssize_t>(pairs.size()), py::ssize_t{2}});
  int64_t* next = out.mutable_data();
  for (const Pair& pair : pairs) {
    *next++ = pair.first;
    *next++ = pair.second;
  }
  return out;
}

py::array_t<int64_t> label_components(const Array<int64_t>& pairs, int64_t num_docs) {
  check_pairs("connected_components", pairs, num_docs);
  py::array_t<int64_t> out(num_docs);
  int64_t* labels = out.mutable_data();
  py::gil_scoped_release release;
  UnionFind components(num_docs);
  for (py::ssize_t i = 0; i < pairs.shape(0); ++i) components.unite(pairs.data()[2 * i], pairs.data()[2 * i + 1]);
  for (int64_t doc = 0; doc < num_docs; ++doc) labels[doc] = components.find(doc);
  return out;
}

}  // namespace

void bind_minhash(py::module_& m) {
  m.def("band_keys", &key_bands);
  m.def("candidate_pairs", &pair_candidates);
  m.def("connected_components", &label_components);
}

}  // namespace herdkern::text
