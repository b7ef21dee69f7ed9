// Python binding of the tokenizer: word tables, training, encoding, decoding. herdkern/tokenizer checks arguments
// first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>

#include "text/bpe_decode.h"
#include "text/bpe_encode.h"
#include "text/bpe_train.h"
#include "text/text_batch.h"
#include "text/word_counts.h"

namespace herdkern::text {

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::array_t<uint32_t> to_array(IdBuffer& ids) {
  const size_t size = ids.size();
  ids.room_for(1);  // an array needs an address even when it is empty
  uint32_t* data = ids.release().release();
  return py::array_t<uint32_t>(py::ssize_t(size), data,
                               py::capsule(data, [](void* p) { delete[] static_cast<uint32_t*>(p); }));
}

py::list to_list(const uint32_t* ids, size_t size) {
  py::list list(size);
  for (size_t i = 0; i < size; ++i) PyList_SET_ITEM(list.ptr(), py::ssize_t(i), PyLong_FromUnsignedLong(ids[i]));
  return list;
}

// True: every special token; False: none; else a sequence of their ids.
SpecialPolicy to_policy(const py::object& special) {
  SpecialPolicy policy;
  if (py::isinstance<py::bool_>(special)) {
    policy.all = special.cast<bool>();
  } else {
    policy.ids = special.cast<std::vector<uint32_t>>();
    std::sort(policy.ids.begin(), policy.ids.end());
  }
  return policy;
}

// Word counts as one table for each counting thread, brought together when someone asks. Every method gives up the GIL
// before it takes the lock: a training holds the lock and wants the GIL for its progress callback.
class WordTable {
 public:
  void add_texts(const py::object& texts, int64_t first_index, int num_threads) {
    const TextBatch batch(texts, "WordCounts.add: texts", first_index);
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    count_words(batch.views(), num_threads, tables_);
  }
  void add_words(const py::bytes& blob, const Int64Array& lengths, const Int64Array& counts) {
    const auto bytes = std::string_view(blob);
    const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
    const uint8_t* end = p + bytes.size();
    if (lengths.size() != counts.size()) throw py::value_error("WordTable: lengths and counts must be as many");
    const int64_t *length = lengths.data(), *count = counts.data();
    const int64_t num_words = lengths.size();
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    WordCounts& table = whole();
    for (int64_t i = 0; i < num_words; p += length[i], ++i) {
      if (length[i] <= 0 || length[i] > end - p || count[i] <= 0) {
        throw std::invalid_argument("WordTable: lengths and counts must be positive and lengths end with the blob");
      }
      table.add(WordCounts::make_word(p, size_t(length[i]), end), count[i]);
    }
  }
  void merge(WordTable& other) {
    py::gil_scoped_release release;
    WordCounts copy;
    {
      const std::lock_guard<std::mutex> lock(other.mutex_);
      copy = other.whole();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    whole().merge(copy);
  }
  void prune(int64_t min_count) {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    WordCounts kept;
    whole().for_each([&](std::string_view word, int64_t count) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(word.data());
      if (count >= min_count) kept.add(WordCounts::make_word(bytes, word.size(), bytes + word.size()), count);
    });
    tables_[0] = std::move(kept);
  }
  size_t num_words() {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return whole().num_words();
  }
  int64_t num_occurrences() {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t total = 0;
    whole().for_each([&](std::string_view, int64_t count) {
      if (__builtin_add_overflow(total, count, &total)) throw std::overflow_error("WordCounts: the total passes 2**63");
    });
    return total;
  }
  // (blob of all words by byte order, their lengths, their counts)
  py::tuple sorted() {
    std::vector<int64_t> lengths, counts;
    std::string blob;
    {
      py::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(mutex_);
      std::vector<std::pair<std::string_view, int64_t>> words;
      size_t num_bytes = 0;
      whole().for_each([&](std::string_view word, int64_t count) {
        words.emplace_back(word, count);
        num_bytes += word.size();
      });
      std::sort(words.begin(), words.end());
      blob.reserve(num_bytes);
      for (const auto& [word, count] : words) {
        blob += word;
        lengths.push_back(int64_t(word.size()));
        counts.push_back(count);
      }
    }
    return py::make_tuple(py::bytes(blob), py::array_t<int64_t>(py::ssize_t(lengths.size()), lengths.data()),
                          py::array_t<int64_t>(py::ssize_t(counts.size()), counts.data()));
  }
  // Without the GIL.
  std::vector<std::pair<uint32_t, uint32_t>> train(const TrainOptions& options,
                                                   const std::function<void(int64_t)>& progress) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return train_merges(whole(), options, progress);
  }

 private:
  WordCounts& whole() {
    if (tables_.empty()) tables_.resize(1);
    for (size_t i = 1; i < tables_.size(); ++i) tables_[0].merge(tables_[i]);
    tables_.resize(1);
    return tables_[0];
  }
  std::mutex mutex_;
  std::vector<WordCounts> tables_;
};

py::array_t<uint32_t> train(WordTable& table, const std::vector<int>& byte_order, int64_t max_merges,
                            int64_t min_frequency, uint32_t max_token_length, const py::object& progress) {
  TrainOptions options;
  options.max_merges = max_merges;
  options.min_frequency = min_frequency;
  options.max_token_length = max_token_length;
  for (size_t i = 0; i < 256; ++i) options.byte_id[byte_order.at(i)] = uint8_t(i);
  std::vector<std::pair<uint32_t, uint32_t>> merges;
  {
    py::gil_scoped_release release;
    auto last_report = std::chrono::steady_clock::now();
    merges = table.train(options, [&](int64_t num_merges) {
      const auto now = std::chrono::steady_clock::now();
      if (now - last_report < std::chrono::milliseconds(100)) return;
      last_report = now;
      py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(num_merges, max_merges);
    });
  }
  if (!progress.is_none()) progress(merges.size(), max_merges);
  py::array_t<uint32_t> result({py::ssize_t(merges.size()), py::ssize_t(2)});
  for (size_t i = 0; i < merges.size(); ++i) {
    result.mutable_at(i, 0) = merges[i].first;
    result.mutable_at(i, 1) = merges[i].second;
  }
  return result;
}

py::array_t<int64_t> split_ends(const py::object& text) {
  const TextBatch batch = TextBatch::one(text, "split_words: text");
  std::vector<int64_t> ends;
  {
    py::gil_scoped_release release;
    const WordScanner scanner;
    const auto* begin = reinterpret_cast<const uint8_t*>(batch.views()[0].data());
    const uint8_t* end = begin + batch.views()[0].size();
    for (const uint8_t* p = begin; p < end;) {
      p = scanner.next(p, end);
      ends.push_back(p - begin);
    }
  }
  return py::array_t<int64_t>(py::ssize_t(ends.size()), ends.data());
}

py::list encode(const Encoder& encoder, const py::object& text, const py::object& special) {
  const TextBatch batch = TextBatch::one(text, "encode: text");
  const SpecialPolicy policy = to_policy(special);
  IdBuffer ids;
  {
    py::gil_scoped_release release;
    encoder.encode(batch.views()[0], policy, ids);
  }
  return to_list(ids.data(), ids.size());
}

// (ids, offsets) of many texts.
std::pair<IdBuffer, py::array_t<int64_t>> encode_texts(const Encoder& encoder, const py::object& texts,
                                                       const py::object& special, int num_threads) {
  const TextBatch batch(texts, "encode: texts");
  const SpecialPolicy policy = to_policy(special);
  IdBuffer ids;
  py::array_t<int64_t> offsets(py::ssize_t(batch.views().size()) + 1);
  int64_t* offsets_data = offsets.mutable_data();
  {
    py::gil_scoped_release release;
    encoder.encode_batch(batch.views(), policy, num_threads, ids, offsets_data);
  }
  return {std::move(ids), std::move(offsets)};
}

py::tuple encode_arrays(const Encoder& encoder, const py::object& texts, const py::object& special, int num_threads) {
  auto [ids, offsets] = encode_texts(encoder, texts, special, num_threads);
  return py::make_tuple(to_array(ids), offsets);
}

py::list encode_lists(const Encoder& encoder, const py::object& texts, const py::object& special, int num_threads) {
  auto [ids, offsets] = encode_texts(encoder, texts, special, num_threads);
  py::list lists;
  for (py::ssize_t i = 0; i + 1 < offsets.size(); ++i) {
    lists.append(to_list(ids.data() + offsets.at(i), size_t(offsets.at(i + 1) - offsets.at(i))));
  }
  return lists;
}

// (begin, end) in bytes and id of the first special token in the text, or None.
py::object find_special(const Encoder& encoder, const py::object& text, const py::object& special) {
  const TextBatch batch = TextBatch::one(text, "encode: text");
  const SpecialPolicy policy = to_policy(special);
  if (policy.none()) return py::none();
  const auto match = encoder.special_tokens().find(batch.views()[0], 0, policy.all ? nullptr : &policy.ids);
  if (match.begin == std::string_view::npos) return py::none();
  return py::make_tuple(match.begin, match.end, match.id);
}

// (n, 2): for each token, in the given order, the two ids that it is merged from, or kNoToken twice.
py::array_t<uint32_t> merges_of(const Encoder& encoder, const TokenList& tokens) {
  py::array_t<uint32_t> result({py::ssize_t(tokens.size()), py::ssize_t(2)});
  uint32_t* out = result.mutable_data();
  py::gil_scoped_release release;
  for (const auto& [bytes, id] : tokens) {
    const std::vector<uint32_t> parts = encoder.parts_of(bytes, id);
    const bool is_merge = parts.size() == 2;
    *out++ = is_merge ? parts[0] : kNoToken;
    *out++ = is_merge ? parts[1] : kNoToken;
  }
  return result;
}

py::bytes decode(const Decoder& decoder, const Int64Array& ids) {
  std::string bytes;
  {
    py::gil_scoped_release release;
    decoder.decode(ids.data(), size_t(ids.size()), bytes);
  }
  return py::bytes(bytes);
}

}  // namespace

void bind_bpe(py::module_& m) {
  m.def("split_ends", &split_ends, py::arg("text"));
  m.def("train_merges", &train, py::arg("table"), py::arg("byte_order"), py::arg("max_merges"),
        py::arg("min_frequency"), py::arg("max_token_length"), py::arg("progress"));
  py::class_<WordTable>(m, "WordTable")
      .def(py::init<>())
      .def("add_texts", &WordTable::add_texts, py::arg("texts"), py::arg("first_index"), py::arg("num_threads"))
      .def("add_words", &WordTable::add_words, py::arg("blob"), py::arg("lengths"), py::arg("counts"))
      .def("merge", &WordTable::merge, py::arg("other"))
      .def("prune", &WordTable::prune, py::arg("min_count"))
      .def("num_words", &WordTable::num_words)
      .def("num_occurrences", &WordTable::num_occurrences)
      .def("sorted", &WordTable::sorted);
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<const TokenList&, const TokenList&>(), py::arg("tokens"), py::arg("special_tokens"))
      .def("encode", &encode, py::arg("text"), py::arg("special"))
      .def("encode_arrays", &encode_arrays, py::arg("texts"), py::arg("special"), py::arg("num_threads"))
      .def("encode_lists", &encode_lists, py::arg("texts"), py::arg("special"), py::arg("num_threads"))
      .def("find_special", &find_special, py::arg("text"), py::arg("special"))
      .def("merges_of", &merges_of, py::arg("tokens"));
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<const TokenList&>(), py::arg("tokens"))
      .def("decode", &decode, py::arg("ids"));
}

}  // namespace herdkern::text
