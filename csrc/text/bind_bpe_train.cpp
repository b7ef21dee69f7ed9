// Python binding of BPE training. herdkern/tokenizer/train.py checks arguments first.
#include <pybind11/stl.h>

#include <chrono>

#include "text/count_table.h"

namespace herdkern::text {

namespace {

py::array_t<uint32_t> train(CountTable& table, const std::vector<int>& byte_order, int64_t max_merges,
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

}  // namespace

void bind_bpe_train(py::module_& m) {
  m.def("train_merges", &train, py::arg("table"), py::arg("byte_order"), py::arg("max_merges"),
        py::arg("min_frequency"), py::arg("max_token_length"), py::arg("progress"));
}

}  // namespace herdkern::text
