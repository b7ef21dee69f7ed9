// Python binding of word counting: tables in memory, counting within a budget, merging and reading runs. The doors are
// herdkern/tokenizer/counts.py and shard_counts.py.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "text/count_table.h"

namespace herdkern::text {

namespace {

// (num_words, num_occurrences, num_blocks, num_bytes, check)
py::tuple to_tuple(const RunTotals& totals) {
  const py::int_ high(uint64_t(totals.num_occurrences >> 64)), low(uint64_t(totals.num_occurrences));
  const py::object occurrences = high.attr("__lshift__")(64).attr("__or__")(low);
  return py::make_tuple(totals.num_words, occurrences, totals.num_blocks, totals.num_bytes, totals.check);
}

// Calls progress(bytes read) with the GIL, and lets Ctrl-C through.
std::function<void(uint64_t)> make_tick(const py::object& progress) {
  return [&progress](uint64_t bytes_read) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(bytes_read);
  };
}

MergeLimits make_limits(size_t max_bytes, size_t max_files, std::string folder) {
  MergeLimits limits;
  limits.max_bytes = max_bytes;
  limits.max_files = max_files;
  limits.folder = std::move(folder);
  return limits;
}

// Counts any number of texts within a budget. One thread at a time may call it.
class BudgetCounter {
 public:
  BudgetCounter(std::shared_ptr<const Splitter> splitter, size_t max_bytes, const std::string& folder, int num_threads)
      : splitter_(std::move(splitter)),
        runs_(folder),
        max_bytes_(max_bytes),
        counts_(new WordCounts(max_bytes, &runs_)),
        threads_(num_threads) {}

  // Sets room for so much of lines aside, untouched: a buffer that grows is held twice for a moment.
  void expect_lines(size_t num_bytes) { lines_.reserve(num_bytes); }
  void add_texts(const py::object& texts, int64_t first_index) {
    const AnyTextBatch batch(texts, "count_shards: texts", Py_ssize_t(first_index));
    py::gil_scoped_release release;
    count_words(batch.views(), *splitter_, threads_, *counts_,
                [&](size_t text, size_t place) { batch.refuse_surrogate(text, place); });
  }
  // Writes the table to disk and gives its memory back: something large is coming that needs it.
  void spill() {
    py::gil_scoped_release release;
    counts_->drain(threads_);
    counts_.reset();
    give_back_memory();
    counts_.reset(new WordCounts(max_bytes_, &runs_));
  }
  // Pieces of a file of JSON lines, wherever they are cut. `last` ends the file. Returns (number from 1, line) of the
  // lines that Python has to read; their words are not counted. Lines are read where they lie; what is in two pieces
  // goes through lines_, which keeps its room.
  py::list add_json_lines(const std::vector<py::bytes>& pieces, const std::string& key, bool last) {
    struct Block {
      const char* place;  // null: in lines_, from `begin` on
      size_t begin, size;
    };
    std::vector<Block> blocks;
    size_t done = 0;  // of lines_: lines that are in blocks
    const auto end_line = [&] {
      blocks.push_back({nullptr, done, lines_.size() - done});
      done = lines_.size();
    };
    for (const py::bytes& piece : pieces) {
      auto view = std::string_view(piece);
      if (lines_.size() > done) {
        const size_t head = std::min(view.find('\n'), view.size() - 1) + 1;
        lines_.append(view.substr(0, head));
        view.remove_prefix(head);
        if (lines_.back() == '\n') end_line();
      }
      const size_t whole = view.rfind('\n') + 1;  // npos + 1 is 0
      if (whole != 0) blocks.push_back({view.data(), 0, whole});
      lines_.append(view.substr(whole));
    }
    if (last && lines_.size() > done) {
      lines_ += '\n';
      end_line();
    }
    std::vector<OtherLine> others;
    uint64_t num_lines = 0;
    {
      py::gil_scoped_release release;
      std::vector<std::string_view> views;
      for (const Block& block : blocks) {
        views.emplace_back(block.place == nullptr ? lines_.data() + block.begin : block.place, block.size);
      }
      if (num_lines_ == 0 && !views.empty() && views[0].substr(0, 3) == "\xEF\xBB\xBF") views[0].remove_prefix(3);
      others = count_json_lines(views, key, *splitter_, threads_, *counts_, num_lines);
    }
    py::list left;
    for (const OtherLine& other : others) {
      left.append(py::make_tuple(num_lines_ + other.number + 1, py::bytes(other.line.data(), other.line.size())));
    }
    lines_.erase(0, done);
    num_lines_ = last ? 0 : num_lines_ + num_lines;
    return left;
  }
  size_t num_pending_bytes() const { return lines_.size(); }
  uint64_t num_lines() const { return num_lines_; }
  // Writes the sum of all to the file as one run. Nothing can be added afterwards.
  py::tuple finish(int descriptor, const std::string& name, uint64_t begin, const std::function<size_t()>& merge_bytes,
                   const std::string& folder, const py::object& progress) {
    {
      py::gil_scoped_release release;
      counts_->drain(threads_);
      counts_.reset();
      std::string().swap(lines_);
      give_back_memory();
    }
    const MergeLimits limits = make_limits(merge_bytes(), 2, folder);  // asked now that the table is gone
    RunTotals totals;
    {
      py::gil_scoped_release release;
      const File file(descriptor, false, name);
      totals = merge_runs(runs_.take_runs(), 1, limits, file, begin, make_tick(progress));
      give_back_memory();
    }
    return to_tuple(totals);
  }
  uint64_t num_spilled_bytes() const { return runs_.num_bytes(); }

 private:
  const std::shared_ptr<const Splitter> splitter_;
  RunFile runs_;
  const size_t max_bytes_;
  std::unique_ptr<WordCounts> counts_;
  const int threads_;
  std::string lines_;  // from the last line border on
  uint64_t num_lines_ = 0;
};

// runs: (path, begin, end, weight) each.
py::tuple merge_files(const std::vector<std::tuple<std::string, uint64_t, uint64_t, uint64_t>>& runs,
                      uint64_t denominator, size_t max_bytes, size_t max_files, const std::string& folder,
                      int descriptor, const std::string& name, uint64_t begin, const py::object& progress) {
  RunTotals totals;
  {
    py::gil_scoped_release release;
    std::vector<Run> given;
    for (const auto& [path, run_begin, run_end, weight] : runs)
      given.push_back({nullptr, path, run_begin, run_end, weight});
    const File file(descriptor, false, name);
    totals = merge_runs(std::move(given), denominator, make_limits(max_bytes, max_files, folder), file, begin,
                        make_tick(progress));
    give_back_memory();
  }
  return to_tuple(totals);
}

// (blob of the next words, their lengths, their counts), at most max_words; empty at the end.
py::tuple read_words(RunReader& reader, size_t max_words) {
  std::string blob;
  std::vector<int64_t> lengths, counts;
  {
    py::gil_scoped_release release;
    while (lengths.size() < max_words && reader.next()) {
      blob += reader.word();
      lengths.push_back(int64_t(reader.word().size()));
      counts.push_back(reader.count());
    }
  }
  return py::make_tuple(py::bytes(blob), py::array_t<int64_t>(py::ssize_t(lengths.size()), lengths.data()),
                        py::array_t<int64_t>(py::ssize_t(counts.size()), counts.data()));
}

}  // namespace

void bind_word_counts(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FileError& error) {
      const py::tuple arguments = py::make_tuple(error.number, std::strerror(error.number), error.what());
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
  py::class_<CountTable>(m, "WordTable")
      .def(py::init(
               [](std::shared_ptr<Splitter> splitter) { return std::make_unique<CountTable>(std::move(splitter)); }),
           py::arg("splitter"))
      .def("add_texts", &CountTable::add_texts, py::arg("texts"), py::arg("first_index"), py::arg("num_threads"))
      .def("add_words", &CountTable::add_words, py::arg("blob"), py::arg("lengths"), py::arg("counts"))
      .def(
          "add_run",
          [](CountTable& table, const std::string& path, uint64_t begin, uint64_t end) {
            return to_tuple(table.add_run(path, begin, end));
          },
          py::arg("path"), py::arg("begin"), py::arg("end"))
      .def(
          "write_run",
          [](CountTable& table, int descriptor, const std::string& name, uint64_t begin) {
            return to_tuple(table.write_run(descriptor, name, begin));
          },
          py::arg("descriptor"), py::arg("name"), py::arg("begin"))
      .def("merge", &CountTable::merge, py::arg("other"))
      .def("prune", &CountTable::prune, py::arg("min_count"))
      .def("num_words", &CountTable::num_words)
      .def("num_occurrences", &CountTable::num_occurrences)
      .def("sorted", &CountTable::sorted);
  py::class_<BudgetCounter>(m, "BudgetCounter")
      .def(py::init([](std::shared_ptr<Splitter> splitter, size_t max_bytes, const std::string& folder, int threads) {
             return std::make_unique<BudgetCounter>(std::move(splitter), max_bytes, folder, threads);
           }),
           py::arg("splitter"), py::arg("max_bytes"), py::arg("folder"), py::arg("num_threads"))
      .def("add_texts", &BudgetCounter::add_texts, py::arg("texts"), py::arg("first_index"))
      .def("expect_lines", &BudgetCounter::expect_lines, py::arg("num_bytes"))
      .def("spill", &BudgetCounter::spill)
      .def("add_json_lines", &BudgetCounter::add_json_lines, py::arg("pieces"), py::arg("key"), py::arg("last"))
      .def("finish", &BudgetCounter::finish, py::arg("descriptor"), py::arg("name"), py::arg("begin"),
           py::arg("merge_bytes"), py::arg("folder"), py::arg("progress"))
      .def_property_readonly("num_pending_bytes", &BudgetCounter::num_pending_bytes)
      .def_property_readonly("num_lines", &BudgetCounter::num_lines)
      .def_property_readonly("num_spilled_bytes", &BudgetCounter::num_spilled_bytes);
  m.def("merge_runs", &merge_files, py::arg("runs"), py::arg("denominator"), py::arg("max_bytes"), py::arg("max_files"),
        py::arg("folder"), py::arg("descriptor"), py::arg("name"), py::arg("begin"), py::arg("progress"));
  py::class_<RunReader>(m, "RunReader")
      .def(py::init([](const std::string& path, uint64_t begin, uint64_t end) {
             return std::make_unique<RunReader>(Run{nullptr, path, begin, end, 1});
           }),
           py::arg("path"), py::arg("begin"), py::arg("end"))
      .def("read", &read_words, py::arg("max_words"))
      .def("totals", [](const RunReader& reader) { return to_tuple(reader.totals()); });
}

}  // namespace herdkern::text
