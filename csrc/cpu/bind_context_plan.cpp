// Binds the planner of context parallelism: int64 arrays in and out, checked by herdkern/parallel/context_plan.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/context_plan.h"

namespace py = pybind11;

namespace herdkern::cpu {
namespace {

py::array_t<int64_t> array_of(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

// Document and offset of each segment, their borders, and the cuts.
py::tuple balanced_context_cuts(const py::array_t<int64_t, py::array::c_style>& lengths, int64_t num_ranks,
                                int64_t align, bool causal, int64_t reach) {
  using namespace herdkern::context_plan;
  const Segments segments = by_work_per_token(lengths.data(), lengths.size(), num_ranks, align, causal);
  const auto cuts = balanced_cuts(Line(segments, lengths.data(), Work{causal, reach}), num_ranks, align);
  return py::make_tuple(array_of(segments.document), array_of(segments.offset), array_of(segments.borders),
                        array_of(cuts));
}

}  // namespace

void bind_context_plan(py::module_& m) {
  m.def("balanced_context_cuts", &balanced_context_cuts, py::arg("lengths"), py::arg("num_ranks"), py::arg("align"),
        py::arg("causal"), py::arg("reach"));
}

}  // namespace herdkern::cpu
