// Python binding of encoding and decoding. herdkern/tokenizer/tokenizer.py checks arguments first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "text/any_text_batch.h"
#include "text/bpe_decode.h"
#include "text/bpe_encode.h"
#include "text/text_batch.h"

namespace herdkern::text {

namespace {

using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::string_view bytes_view(PyObject* object) {
  if (!PyBytes_Check(object)) throw py::type_error("Encoder: a token must be bytes");
  return {PyBytes_AS_STRING(object), size_t(PyBytes_GET_SIZE(object))};
}

uint32_t to_id(PyObject* object) {
  const unsigned long id = PyLong_AsUnsignedLong(object);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (id >= kMaxTokens) throw py::value_error("Encoder: an id must be below 2**21");
  return uint32_t(id);
}

// Views of the tokens of a dict (bytes -> id) or of a sequence of (bytes, id), which must outlive them.
TokenList to_tokens(const py::object& tokens) {
  TokenList list;
  if (PyDict_Check(tokens.ptr())) {
    list.reserve(size_t(PyDict_Size(tokens.ptr())));
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(tokens.ptr(), &at, &key, &value);) {
      list.emplace_back(bytes_view(key), to_id(value));
    }
    return list;
  }
  for (const py::handle item : tokens) {
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 2) {
      throw py::type_error("Encoder: tokens must be a dict or pairs of bytes and id");
    }
    list.emplace_back(bytes_view(PyTuple_GET_ITEM(item.ptr(), 0)), to_id(PyTuple_GET_ITEM(item.ptr(), 1)));
  }
  return list;
}

py::array_t<uint32_t> to_array(IdBuffer& ids) {
  const size_t size = ids.size();
  uint32_t* data = ids.release().release();
  return py::array_t<uint32_t>(py::ssize_t(size), data, py::capsule(data, [](void* p) { std::free(p); }));
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

[[noreturn]] void refuse_special(const Encoder& encoder, uint32_t id, const char* where) {
  const auto name = py::repr(py::str(encoder.special_tokens().name_of(id))).cast<std::string>();
  throw py::value_error(std::string(where) + ": text must not hold a disallowed special token, got " + name +
                        "; pass allowed_special={" + name +
                        "} to encode it as one token, or disallowed_special=() or encode_ordinary to encode it as "
                        "text");
}

// What the caller asked for: special tokens of `special` become their ids, those of `forbidden` are an error.
struct Task {
  AnyTextBatch batch;
  const char* where;
  py::object special, forbidden;
  size_t part_bytes = TextPart::kBytes;
};

// Calls work(texts) without the GIL. What it cannot encode is named: a lone surrogate first, then a forbidden token.
template <typename Work>
void run_task(const Encoder& encoder, const Task& task, Work&& work) {
  Texts texts{task.batch.views(), to_policy(task.special), to_policy(task.forbidden),
              std::max<size_t>(task.part_bytes, 16)};
  bool is_refused = false;
  {
    py::gil_scoped_release release;
    try {
      work(texts);
    } catch (const LoneSurrogate&) {
      is_refused = true;
    } catch (const ForbiddenToken&) {
      is_refused = true;
    }
  }
  if (!is_refused) return;
  const TextBatch utf8 = task.batch.utf8();
  for (const std::string_view text : utf8.views()) {
    const auto match = encoder.special_tokens().find(text, 0, texts.forbidden);
    if (match.found()) refuse_special(encoder, match.id, task.where);
  }
}

py::list encode(const Encoder& encoder, const py::object& text, const py::object& special,
                const py::object& forbidden) {
  const Task task{AnyTextBatch::one(text, "encode: text"), "encode", special, forbidden};
  IdBuffer ids;
  run_task(encoder, task, [&](const Texts& texts) { encoder.encode(texts, ids); });
  return to_list(ids.data(), ids.size());
}

// (ids, offsets) of many texts. part_bytes: see bpe_parts.h.
std::pair<IdBuffer, py::array_t<int64_t>> encode_texts(const Encoder& encoder, const Task& task, int num_threads) {
  IdBuffer ids;
  py::array_t<int64_t> offsets(py::ssize_t(task.batch.size()) + 1);
  int64_t* offsets_data = offsets.mutable_data();
  run_task(encoder, task, [&](Texts& all) { encoder.encode_batch(all, num_threads, ids, offsets_data); });
  return {std::move(ids), std::move(offsets)};
}

py::tuple encode_arrays(const Encoder& encoder, const py::object& texts, const py::object& special,
                        const py::object& forbidden, int num_threads, size_t part_bytes) {
  const Task task{{texts, "encode: texts"}, "encode_to_numpy", special, forbidden, part_bytes};
  auto [ids, offsets] = encode_texts(encoder, task, num_threads);
  return py::make_tuple(to_array(ids), offsets);
}

py::list encode_lists(const Encoder& encoder, const py::object& texts, const py::object& special,
                      const py::object& forbidden, int num_threads) {
  const Task task{{texts, "encode: texts"}, "encode_batch", special, forbidden};
  auto [ids, offsets] = encode_texts(encoder, task, num_threads);
  py::list lists;
  for (py::ssize_t i = 0; i + 1 < offsets.size(); ++i) {
    lists.append(to_list(ids.data() + offsets.at(i), size_t(offsets.at(i + 1) - offsets.at(i))));
  }
  return lists;
}

py::array_t<int64_t> count(const Encoder& encoder, const py::object& texts, int num_threads, size_t part_bytes) {
  const Task task{{texts, "count_tokens: texts"}, "count_tokens", py::bool_(false), py::bool_(false), part_bytes};
  py::array_t<int64_t> counts(py::ssize_t(task.batch.size()));
  int64_t* counts_data = counts.mutable_data();
  run_task(encoder, task, [&](Texts& all) { encoder.count_batch(all, num_threads, counts_data); });
  return counts;
}

// Calls use(ids, size) with the ids of a list or tuple of ints or of an array of uint32 or int64.
template <typename Use>
void with_ids(const py::object& ids, Use&& use) {
  if (py::isinstance<py::array_t<uint32_t, py::array::c_style>>(ids)) {
    const auto array = py::reinterpret_borrow<py::array_t<uint32_t, py::array::c_style>>(ids);
    return use(array.data(), size_t(array.size()));
  }
  if (!PyList_CheckExact(ids.ptr()) && !PyTuple_CheckExact(ids.ptr())) {
    const auto array = ids.cast<Int64Array>();
    return use(array.data(), size_t(array.size()));
  }
  const auto size = size_t(PySequence_Fast_GET_SIZE(ids.ptr()));
  std::vector<int64_t> values(size);
  for (size_t i = 0; i < size; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(ids.ptr(), Py_ssize_t(i));
    int overflow = 0;
    if (PyLong_Check(item)) {
      values[i] = PyLong_AsLongLongAndOverflow(item, &overflow);
    } else if (PyIndex_Check(item) && !PySequence_Check(item)) {  // an integer of numpy
      const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(item));
      if (!number) throw py::error_already_set();
      values[i] = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    } else {
      overflow = 1;
    }
    if (overflow != 0) {
      throw py::type_error("decode: ids must be a flat list of integers, got " +
                           py::repr(item).cast<std::string>().substr(0, 80) + " at " + std::to_string(i));
    }
  }
  use(values.data(), size);
}

py::bytes decode(const Decoder& decoder, const py::object& ids) {
  py::object result;
  with_ids(ids, [&](const auto* data, size_t size) {
    const size_t num_bytes = decoder.num_bytes(data, size);
    result = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(num_bytes)));
    if (!result) throw py::error_already_set();
    char* out = PyBytes_AS_STRING(result.ptr());
    py::gil_scoped_release release;
    decoder.decode(data, size, out, num_bytes);
  });
  return result;
}

// The texts of ids[offsets[i]:offsets[i + 1]]; errors as in bytes.decode.
py::list decode_texts(const Decoder& decoder, const py::object& ids, const Int64Array& offsets, const char* errors) {
  py::list texts;
  with_ids(ids, [&](const auto* data, size_t size) {
    const int64_t* at = offsets.data();
    std::vector<size_t> begins{0};
    std::unique_ptr<char[]> bytes;
    {
      py::gil_scoped_release release;
      for (py::ssize_t i = 0; i + 1 < offsets.size(); ++i) {
        if (at[i] < 0 || at[i + 1] < at[i] || at[i + 1] > int64_t(size)) {
          throw std::invalid_argument("decode_batch: offsets must rise from 0 to at most " + std::to_string(size) +
                                      ", got " + std::to_string(at[i]) + " and " + std::to_string(at[i + 1]));
        }
        begins.push_back(begins.back() + decoder.num_bytes(data + at[i], size_t(at[i + 1] - at[i])));
      }
      bytes.reset(new char[begins.back() + 1]);
      for (size_t i = 0; i + 1 < begins.size(); ++i) {
        decoder.decode(data + at[i], size_t(at[i + 1] - at[i]), bytes.get() + begins[i], begins[i + 1] - begins[i]);
      }
    }
    for (size_t i = 0; i + 1 < begins.size(); ++i) {
      auto text = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeUTF8(bytes.get() + begins[i], Py_ssize_t(begins[i + 1] - begins[i]), errors));
      if (!text) throw py::error_already_set();
      texts.append(text);
    }
  });
  return texts;
}

// (total, 2): where each id of the texts begins and ends in its text, in characters of a str and bytes of a bytes. A
// token that ends inside a character reaches to its end, one that begins inside it begins where the character does.
py::array_t<int64_t> spans(const Decoder& decoder, const py::array_t<uint32_t, py::array::c_style>& ids,
                           const Int64Array& offsets, const py::list& texts) {
  const TextBatch batch(texts, "encode_with_offsets: texts");
  py::array_t<int64_t> result({ids.size(), py::ssize_t(2)});
  int64_t* out = result.mutable_data();
  for (size_t i = 0; i < batch.views().size(); ++i) {
    const std::string_view text = batch.views()[i];
    const bool in_characters = PyUnicode_Check(py::object(texts[i]).ptr());
    const auto begins_character = [&](size_t at) { return !in_characters || (text[at] & 0xC0) != 0x80; };
    size_t at = 0;
    int64_t characters = 0;  // that begin before `at`
    for (int64_t k = offsets.at(py::ssize_t(i)); k < offsets.at(py::ssize_t(i) + 1); ++k) {
      const size_t end = std::min(text.size(), at + decoder.length_of(ids.at(k)));
      *out++ = at < end && !begins_character(at) ? characters - 1 : characters;
      for (; at < end; ++at) characters += begins_character(at);
      *out++ = characters;
    }
  }
  return result;
}

}  // namespace

void bind_bpe_encode(py::module_& m) {
  py::class_<Encoder>(m, "Encoder")
      .def(py::init([](const py::object& tokens, const py::object& special_tokens,
                       const std::shared_ptr<Splitter>& splitter, size_t cache_bytes) {
             return std::make_unique<Encoder>(to_tokens(tokens), to_tokens(special_tokens), splitter, cache_bytes);
           }),
           py::arg("tokens"), py::arg("special_tokens"), py::arg("splitter"),
           py::arg("cache_bytes") = Encoder::kCacheBytes)
      .def("encode", &encode, py::arg("text"), py::arg("special"), py::arg("forbidden"))
      .def("encode_arrays", &encode_arrays, py::arg("texts"), py::arg("special"), py::arg("forbidden"),
           py::arg("num_threads"), py::arg("part_bytes") = TextPart::kBytes)
      .def("encode_lists", &encode_lists, py::arg("texts"), py::arg("special"), py::arg("forbidden"),
           py::arg("num_threads"))
      .def("count", &count, py::arg("texts"), py::arg("num_threads"), py::arg("part_bytes") = TextPart::kBytes);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init([](const py::object& tokens, const py::object& special_tokens) {
             TokenList list = to_tokens(tokens);
             const TokenList special = to_tokens(special_tokens);
             list.insert(list.end(), special.begin(), special.end());
             return std::make_unique<Decoder>(list);
           }),
           py::arg("tokens"), py::arg("special_tokens"))
      .def("decode", &decode, py::arg("ids"))
      .def("decode_texts", &decode_texts, py::arg("ids"), py::arg("offsets"), py::arg("errors"))
      .def("spans", &spans, py::arg("ids"), py::arg("offsets"), py::arg("texts"));
}

}  // namespace herdkern::text
