// Python functions of the MinHash kernel: texts or hashes in, signatures and shingles out; the GIL is released
// meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "text/lsh.h"
#include "text/minhash.h"
#include "text/minhash_texts.h"
#include "text/parallel.h"
#include "text/unicode_sets.h"

namespace herdkern::text {

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const MinHashKernels& kernels_of(const std::string& level) {
  std::string known;
  for (const MinHashKernels& kernels : minhash_levels()) {
    if (level == "auto" || level == kernels.level) return kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels.level;
  }
  throw py::value_error("minhash: level must be auto or one of " + known + ", got " + level);
}

Family family_of(const std::string& name) {
  if (name == "fast32") return Family::kFast32;
  if (name == "m61") return Family::kM61;
  if (name == "oph") return Family::kOph;
  throw py::value_error("minhash: family must be fast32, m61 or oph, got " + name);
}

// fast32 and m61: multipliers and offsets of the slots; oph: one multiplier, its salt.
SignPlan make_plan(const std::string& family, const std::string& unit, const Array<uint64_t>& word_factors,
                   int64_t num_slots, const Array<uint64_t>& multipliers, const Array<uint64_t>& offsets) {
  SignPlan plan;
  plan.family = family_of(family);
  if (unit != "word" && unit != "char") throw py::value_error("minhash: unit must be word or char, got " + unit);
  plan.unit = unit == "word" ? Unit::kWord : Unit::kChar;
  plan.ngram_size = word_factors.size();
  plan.num_slots = num_slots;
  const int64_t num_parameters = plan.family == Family::kOph ? 1 : num_slots;
  if (plan.ngram_size < 1 || num_slots < 0 || multipliers.size() != num_parameters || offsets.size() != num_parameters)
    throw py::value_error("minhash: there must be factors, and multipliers and offsets for every slot");
  if (plan.family == Family::kOph && num_slots > 4096)
    throw py::value_error("minhash: oph must have at most 4096 slots, got " + std::to_string(num_slots));
  plan.word_factors.assign(word_factors.data(), word_factors.data() + plan.ngram_size);
  const int64_t padded = (num_slots + 15) / 16 * 16;
  if (plan.family == Family::kFast32) {
    plan.multipliers.assign(padded, 1);
    plan.offsets.assign(padded, kNoShingle);
    std::copy(multipliers.data(), multipliers.data() + num_slots, plan.multipliers.begin());
    std::copy(offsets.data(), offsets.data() + num_slots, plan.offsets.begin());
  } else if (plan.family == Family::kM61) {
    plan.wide_multipliers.assign(padded, 1);
    plan.wide_offsets.assign(padded, 0);
    std::copy(multipliers.data(), multipliers.data() + num_slots, plan.wide_multipliers.begin());
    std::copy(offsets.data(), offsets.data() + num_slots, plan.wide_offsets.begin());
  } else {
    plan.salt = multipliers.data()[0];
  }
  finish_plan(plan);
  return plan;
}

py::array_t<uint32_t> sign_texts(const py::sequence& objects, const SignPlan& plan, int num_threads,
                                 const std::string& level) {
  const PlainTexts texts(objects);
  const MinHashKernels& kernels = kernels_of(level);
  py::array_t<uint32_t> out({texts.count(), plan.num_slots});
  uint32_t* rows = out.mutable_data();
  {
    py::gil_scoped_release release;
    for_each_plain_text(texts, num_threads, [&](int64_t doc, const Utf8Text& text, Scratch& scratch) {
      kernels.sign(text.data, text.size, plan, scratch, rows + doc * plan.num_slots);
    });
  }
  return out;
}

void check_begins(const Array<int64_t>& begins, int64_t num_values) {
  const int64_t last = begins.size() - 1;
  bool is_good = last >= 0 && begins.data()[0] == 0 && begins.data()[last] == num_values;
  for (int64_t i = 0; is_good && i < last; ++i) is_good = begins.data()[i] <= begins.data()[i + 1];
  if (!is_good) throw py::value_error("minhash: begins must rise from 0 to the number of hashes");
}

// The set of document i is hashes[begins[i], begins[i + 1]).
py::array_t<uint32_t> sign_hashes(const Array<uint64_t>& hashes, const Array<int64_t>& begins, const SignPlan& plan,
                                  int num_threads, const std::string& level) {
  const MinHashKernels& kernels = kernels_of(level);
  check_begins(begins, hashes.size());
  const int64_t num_docs = begins.size() - 1;
  py::array_t<uint32_t> out({num_docs, plan.num_slots});
  uint32_t* rows = out.mutable_data();
  const uint64_t* values = hashes.data();
  const int64_t* begin = begins.data();
  {
    py::gil_scoped_release release;
    ScratchPool pool;
    parallel_for((num_docs + 255) / 256, num_threads, [&](int64_t block) {
      std::unique_ptr<Scratch> scratch = pool.take();
      for (int64_t doc = block * 256; doc < std::min(num_docs, block * 256 + 256); ++doc) {
        uint32_t* row = rows + doc * plan.num_slots;
        std::fill(row, row + plan.num_slots, kNoShingle);
        kernels.lower(values + begin[doc], begin[doc + 1] - begin[doc], plan, *scratch, row);
      }
      pool.give(std::move(scratch));
    });
  }
  return out;
}

// `row` lowered by more hashes of its set.
py::array_t<uint32_t> lower_row(const Array<uint64_t>& hashes, const Array<uint32_t>& row, const SignPlan& plan) {
  if (row.size() != plan.num_slots || plan.family == Family::kOph)
    throw py::value_error("minhash: row must have the slots of a plan of fast32 or m61");
  py::array_t<uint32_t> out(plan.num_slots);
  std::copy(row.data(), row.data() + plan.num_slots, out.mutable_data());
  Scratch scratch;
  kernels_of("auto").lower(hashes.data(), hashes.size(), plan, scratch, out.mutable_data());
  return out;
}

// (values, begins): the shingle hashes of text i are values[begins[i] : begins[i + 1]].
py::tuple shingle_texts(const py::sequence& objects, const SignPlan& plan, int num_threads, const std::string& level) {
  const PlainTexts texts(objects);
  const MinHashKernels& kernels = kernels_of(level);
  std::vector<std::vector<uint64_t>> lists(texts.count());
  {
    py::gil_scoped_release release;
    for_each_plain_text(texts, num_threads, [&](int64_t doc, const Utf8Text& text, Scratch& scratch) {
      kernels.shingle(text.data, text.size, plan, scratch, lists[doc]);
    });
  }
  py::array_t<int64_t> begins(static_cast<py::ssize_t>(lists.size()) + 1);
  int64_t* begin = begins.mutable_data();
  begin[0] = 0;
  for (size_t i = 0; i < lists.size(); ++i) begin[i + 1] = begin[i] + static_cast<int64_t>(lists[i].size());
  py::array_t<uint64_t> values(begin[lists.size()]);
  for (size_t i = 0; i < lists.size(); ++i)
    std::copy(lists[i].begin(), lists[i].end(), values.mutable_data() + begin[i]);
  return py::make_tuple(values, begins);
}

py::array_t<double> jaccard_of_pairs(const py::sequence& objects, const Array<int64_t>& pairs, const SignPlan& plan,
                                     int num_threads) {
  const PlainTexts texts(objects);
  if (pairs.ndim() != 2 || pairs.shape(1) != 2)
    throw py::value_error("exact_jaccard: pairs must have shape (num_pairs, 2)");
  for (py::ssize_t i = 0; i < pairs.size(); ++i)
    if (pairs.data()[i] < 0 || pairs.data()[i] >= texts.count())
      throw py::value_error("exact_jaccard: pairs must lie in [0, " + std::to_string(texts.count()) + "), got " +
                            std::to_string(pairs.data()[i]));
  const MinHashKernels& kernels = kernels_of("auto");
  const int64_t num_pairs = pairs.shape(0);
  py::array_t<double> out(num_pairs);
  double* similarity = out.mutable_data();
  const int64_t* pair = pairs.data();
  {
    py::gil_scoped_release release;
    std::vector<uint8_t> wanted(texts.count(), 0);
    for (int64_t i = 0; i < 2 * num_pairs; ++i) wanted[pair[i]] = 1;
    std::vector<std::vector<uint64_t>> sets(texts.count());
    for_each_plain_text(texts, num_threads, [&](int64_t doc, const Utf8Text& text, Scratch& scratch) {
      if (!wanted[doc]) return;
      auto& set = sets[doc];
      kernels.shingle(text.data, text.size, plan, scratch, set);
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

}  // namespace

void bind_signatures(py::module_& m) {
  m.attr("unicode_version") = kUnicodeVersion;
  m.def("minhash_levels", [] {
    py::list names;
    for (const MinHashKernels& kernels : minhash_levels()) names.append(kernels.level);
    return names;
  });
  py::class_<SignPlan>(m, "SignPlan").def(py::init(&make_plan));
  m.def("minhash_sign", &sign_texts);
  m.def("minhash_sign_hashes", &sign_hashes);
  m.def("minhash_lower", &lower_row);
  m.def("minhash_shingle", &shingle_texts);
  m.def("jaccard_of_pairs", &jaccard_of_pairs);
}

}  // namespace herdkern::text
