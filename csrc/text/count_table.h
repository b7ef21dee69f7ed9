// The counts of words as Python holds them (_text.WordTable), which counting fills and training reads.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "text/any_text_batch.h"
#include "text/fork_safe_lock.h"
#include "text/splitter.h"
#include "text/word_counts.h"
#include "text/word_runs.h"

namespace herdkern::text {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Every method gives up the GIL before it takes the lock: a training holds the lock and wants the GIL for its progress
// callback.
class CountTable {
 public:
  explicit CountTable(std::shared_ptr<const Splitter> splitter) : splitter_(std::move(splitter)) {}

  void add_texts(const py::object& texts, int64_t first_index, int num_threads) {
    const AnyTextBatch batch(texts, "WordCounts.add: texts", Py_ssize_t(first_index));
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    count_words(batch.views(), *splitter_, num_threads, counts_,
                [&](size_t text, size_t place) { batch.refuse_surrogate(text, place); });
  }
  void add_words(const py::bytes& blob, const Int64Array& lengths, const Int64Array& counts) {
    const auto bytes = std::string_view(blob);
    const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
    const uint8_t* end = p + bytes.size();
    if (lengths.size() != counts.size()) throw py::value_error("WordTable: lengths and counts must be as many");
    const int64_t *length = lengths.data(), *count = counts.data();
    const int64_t num_words = lengths.size();
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    for (int64_t i = 0; i < num_words; p += length[i], ++i) {
      if (length[i] <= 0 || length[i] > end - p || count[i] <= 0) {
        throw std::invalid_argument("WordTable: lengths and counts must be positive and lengths end with the blob");
      }
      counts_.add(make_word(p, size_t(length[i]), end), count[i]);
    }
  }
  // Adds what a run holds and returns its totals, num_words and num_bytes apart.
  RunTotals add_run(const std::string& path, uint64_t begin, uint64_t end) {
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    RunReader reader({nullptr, path, begin, end});
    while (reader.next()) {
      const auto* word = reinterpret_cast<const uint8_t*>(reader.word().data());
      counts_.add(make_word(word, reader.word().size(), word + reader.word().size()), reader.count());
    }
    return reader.totals();
  }
  RunTotals write_run(int descriptor, const std::string& name, uint64_t begin) {
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    const File file(descriptor, false, name);
    RunWriter writer(file, begin);
    counts_.for_each_sorted([&](std::string_view word, int64_t count) { writer.add(word, count); });
    return writer.finish();
  }
  void merge(CountTable& other) {
    py::gil_scoped_release release;
    if (&other == this) {
      const std::lock_guard<ForkSafeLock> lock(mutex_);
      return counts_.merge(counts_);
    }
    const std::scoped_lock lock(mutex_, other.mutex_);
    counts_.merge(other.counts_);
  }
  void prune(int64_t min_count) {
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    WordCounts kept;
    counts_.for_each([&](std::string_view word, int64_t count) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(word.data());
      if (count >= min_count) kept.add(make_word(bytes, word.size(), bytes + word.size()), count);
    });
    counts_ = std::move(kept);
  }
  size_t num_words() {
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    return counts_.num_words();
  }
  int64_t num_occurrences() {
    py::gil_scoped_release release;
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    int64_t total = 0;
    counts_.for_each([&](std::string_view, int64_t count) {
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
      const std::lock_guard<ForkSafeLock> lock(mutex_);
      counts_.for_each_sorted([&](std::string_view word, int64_t count) {
        blob += word;
        lengths.push_back(int64_t(word.size()));
        counts.push_back(count);
      });
    }
    return py::make_tuple(py::bytes(blob), py::array_t<int64_t>(py::ssize_t(lengths.size()), lengths.data()),
                          py::array_t<int64_t>(py::ssize_t(counts.size()), counts.data()));
  }
  // f(counts) without the GIL; f may empty them.
  template <typename F>
  auto with_words(F&& f) {
    const std::lock_guard<ForkSafeLock> lock(mutex_);
    return f(counts_);
  }

 private:
  const std::shared_ptr<const Splitter> splitter_;
  ForkSafeLock mutex_;
  WordCounts counts_;
};

}  // namespace herdkern::text
