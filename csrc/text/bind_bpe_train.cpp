// Python binding of BPE training. herdkern/tokenizer/train.py and extend.py check arguments first.
#include <pybind11/stl.h>

#include <chrono>
#include <optional>

#include "text/bpe_train.h"
#include "text/bpe_train_start.h"
#include "text/count_table.h"
#include "text/word_runs.h"

namespace herdkern::text {

namespace {

using MergeArray = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// (n, 3): left, right, token.
std::vector<Merge> to_merges(const MergeArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) throw py::value_error("train_merges: merges must be (n, 3)");
  std::vector<Merge> merges;
  for (py::ssize_t i = 0; i < array.shape(0); ++i) merges.push_back({array.at(i, 0), array.at(i, 1), array.at(i, 2)});
  return merges;
}

MergeArray to_array(const std::vector<Merge>& merges) {
  MergeArray array({py::ssize_t(merges.size()), py::ssize_t(3)});
  uint32_t* out = array.mutable_data();
  for (const Merge& merge : merges) *out++ = merge.left, *out++ = merge.right, *out++ = merge.token;
  return array;
}

// Reports to Python at most ten times a second; an exception there, or Ctrl-C, ends the training.
class Reporter {
 public:
  explicit Reporter(const py::object& progress) : progress_(progress) {}
  void operator()(double share) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_report_ < std::chrono::milliseconds(100)) return;
    last_report_ = now;
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress_.is_none()) progress_(share);
  }

 private:
  const py::object& progress_;
  std::chrono::steady_clock::time_point last_report_ = std::chrono::steady_clock::now();
};

struct Limits {
  int64_t max_new_tokens, min_frequency;
  uint32_t max_token_length;
  int64_t max_memory;
};

// The words of a file of counts, read as a stream, as often as someone asks.
struct WordRun {
  std::string path;
  uint64_t begin, end, num_blocks;
  uint32_t check;

  void for_each(const WordVisitor& visit) const {
    RunReader reader({nullptr, path, begin, end});
    while (reader.next()) visit(reader.word(), reader.count());
    if (reader.totals().num_blocks != num_blocks || reader.totals().check != check) {
      throw std::invalid_argument(path + " is damaged: its blocks are not those of its header");
    }
  }
};

// Words start as `encoder` cuts them, else by `merges`, else as bytes. keep_words: else a table is empty afterwards.
MergeArray train(const py::object& words, bool keep_words, std::vector<std::string> tokens,
                 const std::optional<MergeArray>& merges, const Encoder* encoder,
                 const std::vector<std::string>& vetoed, const Limits& limits, int num_threads,
                 const py::object& progress) {
  TrainOptions options;
  options.max_new_tokens = limits.max_new_tokens;
  options.min_frequency = limits.min_frequency;
  options.max_token_length = limits.max_token_length;
  options.max_memory = limits.max_memory;
  options.num_threads = num_threads;
  options.tokens = std::move(tokens);
  options.vetoed.insert(vetoed.begin(), vetoed.end());
  std::optional<MergeList> list;
  std::optional<EncoderStart> start;
  if (encoder != nullptr) {
    start.emplace(*encoder, options.tokens);
    options.segment = [&](std::string_view word, std::vector<uint32_t>& ids) { start->segment(word, ids); };
  } else if (merges) {
    list.emplace(options.tokens, to_merges(*merges));
    options.segment = [&](std::string_view word, std::vector<uint32_t>& ids) { list->segment(word, ids); };
  }
  std::vector<Merge> result;
  {
    auto* run = py::isinstance<WordRun>(words) ? words.cast<WordRun*>() : nullptr;
    auto* table = run == nullptr ? words.cast<CountTable*>() : nullptr;
    py::gil_scoped_release release;
    Reporter report(progress);
    if (run != nullptr) {
      result = train_merges([&](const WordVisitor& visit, bool) { run->for_each(visit); }, options, report);
    } else {
      result = table->with_words([&](WordCounts& counts) {
        const auto words = [&](const WordVisitor& visit, bool is_last) {
          is_last && !keep_words ? counts.give_away(visit) : counts.for_each(visit);
        };
        return train_merges(words, options, report);
      });
    }
    give_back_memory();
  }
  return to_array(result);
}

// (ids, offsets, counts) of the words in byte order, each as `encoder` cuts it: word i has ids[offsets[i]:offsets[i +
// 1]].
py::tuple encode_words(CountTable& table, const std::vector<std::string>& tokens, const Encoder& encoder) {
  std::vector<uint32_t> ids;
  std::vector<int64_t> offsets{0}, counts;
  {
    py::gil_scoped_release release;
    const EncoderStart start(encoder, tokens);
    table.with_words([&](const WordCounts& words) {
      std::vector<uint32_t> of_word;
      words.for_each_sorted([&](std::string_view word, int64_t count) {
        start.segment(word, of_word);
        ids.insert(ids.end(), of_word.begin(), of_word.end());
        offsets.push_back(int64_t(ids.size()));
        counts.push_back(count);
      });
    });
  }
  return py::make_tuple(py::array_t<uint32_t>(py::ssize_t(ids.size()), ids.data()),
                        py::array_t<int64_t>(py::ssize_t(offsets.size()), offsets.data()),
                        py::array_t<int64_t>(py::ssize_t(counts.size()), counts.data()));
}

}  // namespace

void bind_bpe_train(py::module_& m) {
  py::class_<WordRun>(m, "WordRun")
      .def(py::init([](std::string path, uint64_t begin, uint64_t end, uint64_t num_blocks, uint32_t check) {
             return WordRun{std::move(path), begin, end, num_blocks, check};
           }),
           py::arg("path"), py::arg("begin"), py::arg("end"), py::arg("num_blocks"), py::arg("check"));
  m.def(
      "train_merges",
      [](const py::object& words, bool keep_words, std::vector<std::string> tokens,
         const std::optional<MergeArray>& merges, const Encoder* encoder, const std::vector<std::string>& vetoed,
         int64_t max_new_tokens, int64_t min_frequency, uint32_t max_token_length, int64_t max_memory, int num_threads,
         const py::object& progress) {
        const Limits limits{max_new_tokens, min_frequency, max_token_length, max_memory};
        return train(words, keep_words, std::move(tokens), merges, encoder, vetoed, limits, num_threads, progress);
      },
      py::arg("words"), py::arg("keep_words"), py::arg("tokens"), py::arg("merges"), py::arg("encoder"),
      py::arg("vetoed"), py::arg("max_new_tokens"), py::arg("min_frequency"), py::arg("max_token_length"),
      py::arg("max_memory"), py::arg("num_threads"), py::arg("progress"));
  m.def("encode_words", &encode_words, py::arg("table"), py::arg("tokens"), py::arg("encoder"));
}

}  // namespace herdkern::text
