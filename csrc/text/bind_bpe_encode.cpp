// Python binding of encoding and decoding. herdkern/tokenizer/tokenizer.py checks arguments first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "text/bpe_decode.h"
#include "text/bpe_encode.h"
#include "text/text_batch.h"

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

void bind_bpe_encode(py::module_& m) {
  m.def("split_ends", &split_ends, py::arg("text"));
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
