// Python functions of the MinHash kernel, LSH and clustering. Texts in, NumPy arrays out; the GIL is released
// meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "text/lsh.h"
#include "text/minhash.h"
#include "text/parallel.h"
#include "text/unicode_classes.h"
#include "text/union_find.h"

namespace py = pybind11;

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

struct Text {
  const uint8_t* data;
  int64_t size;
};

// The UTF-8 of str and bytes objects, held by a tuple of its own while the GIL is released.
class Texts {
 public:
  explicit Texts(const py::sequence& objects) : held_(objects), texts_(held_.size()) {
    for (size_t i = 0; i < texts_.size(); ++i) {
      PyObject* object = PyTuple_GET_ITEM(held_.ptr(), static_cast<Py_ssize_t>(i));
      Py_ssize_t size = 0;
      const char* data = nullptr;
      if (PyUnicode_Check(object)) {
        data = PyUnicode_AsUTF8AndSize(object, &size);
      } else if (PyBytes_Check(object)) {
        data = PyBytes_AS_STRING(object);
        size = PyBytes_GET_SIZE(object);
      } else {
        throw py::type_error("texts: every text must be str or bytes, got " + std::string(Py_TYPE(object)->tp_name) +
                             " at index " + std::to_string(i));
      }
      if (!data) throw py::error_already_set();
      texts_[i] = {reinterpret_cast<const uint8_t*>(data), size};
    }
  }

  int64_t count() const { return static_cast<int64_t>(texts_.size()); }
  const Text& operator[](int64_t i) const { return texts_[i]; }

  // Begins of pieces of neighbouring texts, about 256 kB each, and the end: the tasks of a parallel loop.
  std::vector<int64_t> pieces() const {
    std::vector<int64_t> begins{0};
    int64_t bytes = 0;
    for (int64_t i = 0; i < count(); ++i) {
      bytes += texts_[i].size + 64;
      if (bytes < (1 << 18) && i + 1 < count()) continue;
      begins.push_back(i + 1);
      bytes = 0;
    }
    return begins;
  }

 private:
  py::tuple held_;
  std::vector<Text> texts_;
};

// Calls work(doc, scratch) for every text, pieces of them on several threads.
template <typename Work>
void for_each_text(const Texts& texts, int num_threads, Work&& work) {
  const std::vector<int64_t> begins = texts.pieces();
  parallel_for(static_cast<int64_t>(begins.size()) - 1, num_threads, [&](int64_t piece) {
    Scratch scratch;
    for (int64_t doc = begins[piece]; doc < begins[piece + 1]; ++doc) work(doc, scratch);
  });
}

const MinHashKernels& kernels_of(const std::string& level) {
  std::string known;
  for (const MinHashKernels& kernels : minhash_levels()) {
    if (level == "auto" || level == kernels.level) return kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels.level;
  }
  throw py::value_error("minhash: level must be auto or one of " + known + ", got " + level);
}

SignPlan make_plan(int64_t ngram_size, const Array<uint64_t>& word_factors) {
  if (ngram_size < 1 || word_factors.ndim() != 1 || word_factors.shape(0) != ngram_size)
    throw py::value_error("minhash: word_factors must have ngram_size >= 1 entries");
  SignPlan plan;
  plan.ngram_size = ngram_size;
  plan.word_factors.assign(word_factors.data(), word_factors.data() + ngram_size);
  return plan;
}

py::array_t<uint32_t> sign_texts(const py::sequence& objects, const Array<uint64_t>& word_factors,
                                 const Array<uint32_t>& multipliers, const Array<uint32_t>& offsets, int num_threads,
                                 const std::string& level) {
  const Texts texts(objects);
  const MinHashKernels& kernels = kernels_of(level);
  SignPlan plan = make_plan(word_factors.size(), word_factors);
  plan.num_slots = multipliers.size();
  if (offsets.size() != plan.num_slots) throw py::value_error("minhash: multipliers and offsets must match");
  plan.multipliers.assign((plan.num_slots + 15) / 16 * 16, 1);
  plan.offsets.assign(plan.multipliers.size(), 0xFFFFFFFFu);
  std::copy(multipliers.data(), multipliers.data() + plan.num_slots, plan.multipliers.begin());
  std::copy(offsets.data(), offsets.data() + plan.num_slots, plan.offsets.begin());
  py::array_t<uint32_t> out({texts.count(), plan.num_slots});
  uint32_t* rows = out.mutable_data();
  {
    py::gil_scoped_release release;
    for_each_text(texts, num_threads, [&](int64_t doc, Scratch& scratch) {
      kernels.sign(texts[doc].data, texts[doc].size, plan, scratch, rows + doc * plan.num_slots);
    });
  }
  return out;
}

// (values, begins): the values of text i are values[begins[i] : begins[i + 1]].
py::tuple join(const std::vector<std::vector<uint64_t>>& lists) {
  py::array_t<int64_t> begins(static_cast<py::ssize_t>(lists.size()) + 1);
  int64_t* begin = begins.mutable_data();
  begin[0] = 0;
  for (size_t i = 0; i < lists.size(); ++i) begin[i + 1] = begin[i] + static_cast<int64_t>(lists[i].size());
  py::array_t<uint64_t> values(begin[lists.size()]);
  for (size_t i = 0; i < lists.size(); ++i)
    std::copy(lists[i].begin(), lists[i].end(), values.mutable_data() + begin[i]);
  return py::make_tuple(values, begins);
}

py::tuple shingle_texts(const py::sequence& objects, const Array<uint64_t>& word_factors, int num_threads,
                        const std::string& level) {
  const Texts texts(objects);
  const MinHashKernels& kernels = kernels_of(level);
  const SignPlan plan = make_plan(word_factors.size(), word_factors);
  std::vector<std::vector<uint64_t>> lists(texts.count());
  {
    py::gil_scoped_release release;
    for_each_text(texts, num_threads, [&](int64_t doc, Scratch& scratch) {
      kernels.shingle(texts[doc].data, texts[doc].size, plan, scratch, lists[doc]);
    });
  }
  return join(lists);
}

void check_pairs(const std::string& function, const Array<int64_t>& pairs, int64_t num_docs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2)
    throw py::value_error(function + ": pairs must have shape (num_pairs, 2)");
  for (py::ssize_t i = 0; i < pairs.size(); ++i)
    if (pairs.data()[i] < 0 || pairs.data()[i] >= num_docs)
      throw py::value_error(function + ": pairs must lie in [0, " + std::to_string(num_docs) + "), got " +
                            std::to_string(pairs.data()[i]));
}

py::array_t<double> jaccard_of_pairs(const py::sequence& objects, const Array<int64_t>& pairs,
                                     const Array<uint64_t>& word_factors, int num_threads) {
  const Texts texts(objects);
  check_pairs("exact_jaccard", pairs, texts.count());
  const MinHashKernels& kernels = kernels_of("auto");
  const SignPlan plan = make_plan(word_factors.size(), word_factors);
  const int64_t num_pairs = pairs.shape(0);
  py::array_t<double> out(num_pairs);
  double* similarity = out.mutable_data();
  const int64_t* pair = pairs.data();
  {
    py::gil_scoped_release release;
    std::vector<uint8_t> wanted(texts.count(), 0);
    for (int64_t i = 0; i < 2 * num_pairs; ++i) wanted[pair[i]] = 1;
    std::vector<std::vector<uint64_t>> sets(texts.count());
    for_each_text(texts, num_threads, [&](int64_t doc, Scratch& scratch) {
      if (!wanted[doc]) return;
      auto& set = sets[doc];
      kernels.shingle(texts[doc].data, texts[doc].size, plan, scratch, set);
      std::sort(set.begin(), set.end());
      set.erase(std::unique(set.begin(), set.end()), set.end());
    });
    parallel_for((num_pairs + 255) / 256, num_threads, [&](int64_t block) {
      for (int64_t i = block * 256; i < std::min(num_pairs, block * 256 + 256); ++i)
        similarity[i] = jaccard(sets[pair[2 * i]], sets[pair[2 * i + 1]]);
    });
  }
  return out;
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
  m.attr("unicode_version") = kUnicodeVersion;
  m.def("minhash_levels", [] {
    py::list names;
    for (const MinHashKernels& kernels : minhash_levels()) names.append(kernels.level);
    return names;
  });
  m.def("minhash_sign", &sign_texts);
  m.def("minhash_shingle", &shingle_texts);
  m.def("jaccard_of_pairs", &jaccard_of_pairs);
  m.def("band_keys", &key_bands);
  m.def("candidate_pairs", &pair_candidates);
  m.def("connected_components", &label_components);
}

}  // namespace herdkern::text
