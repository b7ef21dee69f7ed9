// Python binding of merge recovery. herdkern/tokenizer/formats/merge_recovery.py checks arguments first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "text/merge_recovery.h"
#include "text/text_batch.h"

namespace herdkern::text {

namespace {

// ((n, 2) places of the two parts, (n,) number of parts)
py::tuple recover(const py::object& tokens, bool characters) {
  const TextBatch batch(tokens, "recover_merges: tokens");
  RecoveredMerges merges;
  {
    py::gil_scoped_release release;
    merges = recover_merges(batch.views(), characters ? MergeUnit::kCharacter : MergeUnit::kByte);
  }
  const auto num_tokens = py::ssize_t(merges.num_parts.size());
  return py::make_tuple(py::array_t<uint32_t>({num_tokens, py::ssize_t(2)}, merges.pairs.data()),
                        py::array_t<uint32_t>(num_tokens, merges.num_parts.data()));
}

}  // namespace

void bind_merge_recovery(py::module_& m) {
  m.def("recover_merges", &recover, py::arg("tokens"), py::arg("characters"));
}

}  // namespace herdkern::text
