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

  void encode(std::string_view text, const SpecialPolicy& policy, IdBuffer& out) const;
  // ids of texts[i] are out[offsets[i] .. offsets[i + 1]).
  void encode_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                    IdBuffer& out, int64_t* offsets) const;
  // counts[i]: the number of ids of texts[i], which are not kept.
  void count_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                   int64_t* counts) const;
  std::vector<uint32_t> parts_of(std::string_view bytes, uint32_t id) const { return words_.parts_of(bytes, id); }
  const SpecialTokens& special_tokens() const { return special_; }

 private:
  struct Worker;  // word cache and scratch of one thread
  struct Word;    // with its key
  class BorrowedWorker;

  template <typename Sink>
  void encode_with(std::string_view text, const SpecialPolicy& policy, Worker& worker, Sink& sink) const;
  template <typename Sink>
  void encode_ordinary(std::string_view text, Worker& worker, Sink& sink) const;
  template <typename Cursor, typename Sink>
  void encode_words(Cursor& cursor, const uint8_t* begin, const uint8_t* end, Worker& worker, Sink& sink) const;
  template <typename Sink>
  void encode_word(const Word& word, WordCache::Entry* entry, Worker& worker, Sink& sink) const;
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
