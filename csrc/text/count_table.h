// The counts of words as Python holds them (_text.WordTable), which counting fills and training reads.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <mutex>

#include "text/bpe_train.h"
#include "text/text_batch.h"
#include "text/word_counts.h"

namespace herdkern::text {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Word counts as one table for each counting thread, brought together when someone asks. Every method gives up the GIL
// before it takes the lock: a training holds the lock and wants the GIL for its progress callback.
class CountTable {
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
  void merge(CountTable& other) {
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

}  // namespace herdkern::text
