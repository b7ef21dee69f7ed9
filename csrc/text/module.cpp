// pybind11 module _text: each bind_*.cpp adds the functions of one kernel. Buffers in, buffers out, GIL released.
#include <pybind11/pybind11.h>

namespace herdkern::text {
void bind_bpe(pybind11::module_& m);       // bind_bpe.cpp
void bind_minhash(pybind11::module_& m);   // bind_minhash.cpp
void bind_splitter(pybind11::module_& m);  // bind_splitter.cpp
}  // namespace herdkern::text

PYBIND11_MODULE(_text, m) {
  m.doc() = "Text kernels of herdkern: byte-level BPE, MinHash, clustering. Use herdkern.tokenizer and herdkern.dedup.";
  herdkern::text::bind_bpe(m);
  herdkern::text::bind_minhash(m);
  herdkern::text::bind_splitter(m);
}
