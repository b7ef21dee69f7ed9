// Byte-pair encoding with ranks of whole texts: special tokens, words of the split pattern, their ids by bpe_word.h or
// from a cache of words. A rank is the token's id. Linear in the text. Threads share nothing but read-only tables; each
// borrows a word cache of bounded size.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "text/bpe_parts.h"
#include "text/bpe_special.h"
#include "text/bpe_word.h"
#include "text/bpe_word_cache.h"
#include "text/id_buffer.h"
#include "text/splitter.h"

namespace herdkern::text {

class Encoder {
 public:
  static constexpr size_t kCacheBytes = size_t(1) << 26;

  // `tokens` must hold the 256 single bytes, each id once, each byte string once; the caller checks. cache_bytes: of
  // the word cache of each thread.
  Encoder(const TokenList& tokens, const TokenList& special_tokens, std::shared_ptr<const Splitter> splitter,
          size_t cache_bytes);
  ~Encoder();

  // All throw ForbiddenToken or LoneSurrogate if a text holds one; texts are changed to UTF-8 where that helps.
  void encode(const Texts& texts, IdBuffer& out) const;  // one text
  // ids of text i are out[offsets[i] .. offsets[i + 1]).
  void encode_batch(Texts& texts, int num_threads, IdBuffer& out, int64_t* offsets) const;
  // counts[i]: the number of ids of text i, which are not kept.
  void count_batch(Texts& texts, int num_threads, int64_t* counts) const;
  std::vector<uint32_t> parts_of(std::string_view bytes, uint32_t id) const { return words_.parts_of(bytes, id); }
  const SpecialTokens& special_tokens() const { return special_; }

 private:
  struct Worker;  // word cache and scratch of one thread
  struct Word;    // with its key
  struct Run {    // what lies between two special tokens, and where in it to begin
    size_t begin, from, end;
  };
  struct Range {
    const uint8_t *begin, *end, *readable_end;
  };
  class BorrowedWorker;

  template <typename Sink>
  void encode_text(const Texts& texts, size_t index, Worker& worker, Sink& sink) const;
  template <typename Sink>
  void encode_ordinary(std::string_view text, Worker& worker, Sink& sink) const;
  template <typename SinkOf>
  void encode_parts(const Texts& texts, int num_threads, std::vector<TextPart>& parts, int64_t* ends,
                    SinkOf&& sink_of) const;
  std::vector<TextPart> parts_for(Texts& texts, int num_threads) const;
  template <typename Sink>
  bool encode_part(const Texts& texts, TextPart& part, Worker& worker, Sink& sink) const;
  template <typename Sink>
  bool encode_run(const Texts& texts, const Run& run, TextPart& part, Worker& worker, Sink& sink) const;
  template <typename Sink>
  const uint8_t* encode_words(Splitter::Cursor& cursor, const Range& range, Worker& worker, Sink& sink) const;
  template <typename Sink>
  bool encode_word(const Word& word, const uint8_t* readable_end, WordCache::Entry* entry, Worker& worker,
                   Sink& sink) const;
  template <typename Task>
  void run_tasks(size_t num_tasks, int num_threads, Task&& task) const;

  std::shared_ptr<const Splitter> splitter_;
  WordEncoder words_;
  SpecialTokens special_;
  size_t cache_bytes_;
  mutable std::mutex idle_mutex_;
  mutable std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace herdkern::text
