// pybind11 module _text: each bind_*.cpp adds the functions of one kernel. Buffers in, buffers out, GIL released.
#include <pybind11/pybind11.h>

namespace herdkern::text {
void bind_bpe_encode(pybind11::module_& m);      // bind_bpe_encode.cpp
void bind_bpe_train(pybind11::module_& m);       // bind_bpe_train.cpp
void bind_lines(pybind11::module_& m);           // bind_lines.cpp
void bind_clusters(pybind11::module_& m);        // bind_clusters.cpp
void bind_documents(pybind11::module_& m);       // bind_documents.cpp
void bind_line_documents(pybind11::module_& m);  // bind_line_documents.cpp
void bind_merge_recovery(pybind11::module_& m);  // bind_merge_recovery.cpp
void bind_minhash(pybind11::module_& m);         // bind_minhash.cpp
void bind_sentencepiece(pybind11::module_& m);   // bind_sentencepiece.cpp
void bind_signatures(pybind11::module_& m);      // bind_signatures.cpp
void bind_splitter(pybind11::module_& m);        // bind_splitter.cpp
void bind_url_documents(pybind11::module_& m);   // bind_url_documents.cpp
void bind_urls(pybind11::module_& m);            // bind_urls.cpp
void bind_word_counts(pybind11::module_& m);     // bind_word_counts.cpp
}  // namespace herdkern::text

PYBIND11_MODULE(_text, m) {
  m.doc() =
      "Text kernels of herdkern: byte-level BPE, MinHash, clustering, lines, URLs. Use herdkern.tokenizer and "
      "herdkern.dedup.";
  herdkern::text::bind_word_counts(m);  // first: training names its class
  herdkern::text::bind_bpe_train(m);
  herdkern::text::bind_bpe_encode(m);
  herdkern::text::bind_merge_recovery(m);
  herdkern::text::bind_minhash(m);
  herdkern::text::bind_lines(m);
  herdkern::text::bind_urls(m);
  herdkern::text::bind_sentencepiece(m);
  herdkern::text::bind_signatures(m);
  herdkern::text::bind_clusters(m);
  herdkern::text::bind_documents(m);  // after the signatures, whose plan it takes
  herdkern::text::bind_line_documents(m);
  herdkern::text::bind_url_documents(m);
  herdkern::text::bind_splitter(m);
}
