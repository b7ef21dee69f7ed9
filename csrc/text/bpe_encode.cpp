// Encoding of texts: see bpe_encode.h.
#include "text/bpe_encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "text/parallel.h"

namespace herdkern::text {

namespace {

constexpr size_t kTaskBytes = 1 << 17;  // documents are handed to threads in runs of about this size

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// Where ids go: into an array...
class IdSink {
 public:
  explicit IdSink(IdBuffer& ids) : ids_(ids) {}

  // Adds what entries hold; in registers, so nothing else may be added to the sink meanwhile.
  class Run {
   public:
    Run(IdSink& sink, size_t max_entries) : begin_(sink.ids_.room_for(4 * max_entries)), at_(begin_), sink_(sink) {}
    void add(const WordCache::Entry& entry) {
      static_assert(sizeof(entry.ids) + sizeof(entry.num_and_flags) == 16);
      std::memcpy(at_, entry.ids, 16);  // a fixed size is quicker than the right one
      at_ += entry.num_ids();
    }
    void close() { sink_.ids_.grow_by(size_t(at_ - begin_)); }

   private:
    uint32_t *begin_, *at_;
    IdSink& sink_;
  };

  void add(const void* ids, size_t num_ids) {
    std::memcpy(ids_.room_for(num_ids), ids, num_ids * sizeof(uint32_t));
    ids_.grow_by(num_ids);
  }
  void push(uint32_t id) { ids_.push(id); }
  // A new word's ids are appended to this buffer, then taken note of.
  IdBuffer& buffer() { return ids_; }
  void note(size_t) {}

 private:
  IdBuffer& ids_;
};

// ... or only their number.
class CountSink {
 public:
  class Run {
   public:
    Run(CountSink& sink, size_t) : sink_(sink) {}
    void add(const WordCache::Entry& entry) { num_ids_ += entry.num_ids(); }
    void close() { sink_.total_ += num_ids_; }

   private:
    size_t num_ids_ = 0;
    CountSink& sink_;
  };

  void add(const void*, size_t num_ids) { total_ += num_ids; }
  void push(uint32_t) { ++total_; }
  IdBuffer& buffer() {
    scratch_.clear();
    return scratch_;
  }
  void note(size_t num_ids) { total_ += num_ids; }
  size_t size() const { return total_; }

 private:
  size_t total_ = 0;
  IdBuffer scratch_;
};

}  // namespace

struct Encoder::Word {
  ShortKey key;
  uint64_t hash;
  const uint8_t* begin;
  size_t len;
};

struct Encoder::Worker {
  explicit Worker(size_t cache_bytes) : cache(cache_bytes) {}
  WordCache cache;
  WordEncoder::Scratch scratch;
};

// A worker of the encoder's pool for the life of this object.
class Encoder::BorrowedWorker {
 public:
  explicit BorrowedWorker(const Encoder& encoder) : encoder_(encoder) {
    if (const auto lock = lock_pool(); lock.owns_lock() && !encoder.idle_.empty()) {
      worker_ = std::move(encoder.idle_.back());
      encoder.idle_.pop_back();
    }
    if (!worker_) worker_ = std::make_unique<Worker>(encoder.cache_bytes_);
  }
  ~BorrowedWorker() {
    static const size_t max_idle = std::max(1u, std::thread::hardware_concurrency());
    worker_->scratch.shrink();
    const auto lock = lock_pool();
    if (lock.owns_lock() && encoder_.idle_.size() < max_idle) encoder_.idle_.push_back(std::move(worker_));
  }
  Worker& operator*() { return *worker_; }

 private:
  // Gives up after a while: a child forked while another thread held the lock would wait for ever.
  std::unique_lock<std::mutex> lock_pool() const {
    std::unique_lock<std::mutex> lock(encoder_.idle_mutex_, std::try_to_lock);
    for (int attempt = 0; attempt < 100 && !lock.owns_lock(); ++attempt) {
      std::this_thread::yield();
      lock.try_lock();
    }
    return lock;
  }

  const Encoder& encoder_;
  std::unique_ptr<Worker> worker_;
};

Encoder::Encoder(const TokenList& tokens, const TokenList& special_tokens, std::shared_ptr<const Splitter> splitter,
                 size_t cache_bytes)
    : splitter_(std::move(splitter)), words_(tokens), special_(special_tokens), cache_bytes_(cache_bytes) {}

Encoder::~Encoder() = default;  // here, where Worker is complete

void Encoder::encode(std::string_view text, const SpecialPolicy& policy, IdBuffer& out) const {
  BorrowedWorker worker(*this);
  IdSink sink(out);
  encode_with(text, policy, *worker, sink);
}

// Calls task(index, worker) for every index, with one worker a thread.
template <typename Task>
void Encoder::run_tasks(size_t num_tasks, int num_threads, Task&& task) const {
  std::atomic<size_t> next_task{0};
  const int64_t num_workers = std::min<int64_t>(std::max(1, num_threads), int64_t(num_tasks));
  parallel_for(num_workers, num_threads, [&](int64_t) {
    BorrowedWorker worker(*this);
    for (size_t index; (index = next_task.fetch_add(1)) < num_tasks;) task(index, *worker);
  });
}

void Encoder::encode_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                           IdBuffer& out, int64_t* offsets) const {
  const std::vector<size_t> borders = task_borders(texts, kTaskBytes);
  const size_t num_tasks = num_threads <= 1 ? std::min<size_t>(1, borders.size() - 1) : borders.size() - 1;
  std::vector<IdBuffer> pieces(num_tasks);
  const auto border = [&](size_t task) { return task == num_tasks ? texts.size() : borders[task]; };
  offsets[0] = 0;
  run_tasks(num_tasks, num_threads, [&](size_t task, Worker& worker) {
    IdSink sink(pieces[task]);
    for (size_t i = border(task); i < border(task + 1); ++i) {
      encode_with(texts[i], policy, worker, sink);
      offsets[i + 1] = int64_t(pieces[task].size());
    }
  });
  if (num_tasks == 0) return;
  if (num_tasks == 1) {
    out = std::move(pieces[0]);
    return;
  }
  std::vector<size_t> first(num_tasks + 1);
  for (size_t task = 0; task < num_tasks; ++task) {
    first[task + 1] = first[task] + pieces[task].size();
    for (size_t i = border(task); i < border(task + 1); ++i) offsets[i + 1] += int64_t(first[task]);
  }
  uint32_t* ids = out.room_for(first[num_tasks]);
  out.grow_by(first[num_tasks]);
  parallel_for(int64_t(num_tasks), num_threads, [&](int64_t task) {
    if (pieces[task].size() != 0) {
      std::memcpy(ids + first[task], pieces[task].data(), pieces[task].size() * sizeof(uint32_t));
    }
    pieces[task] = IdBuffer();
  });
}

void Encoder::count_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                          int64_t* counts) const {
  const std::vector<size_t> borders = task_borders(texts, kTaskBytes);
  run_tasks(borders.size() - 1, num_threads, [&](size_t task, Worker& worker) {
    for (size_t i = borders[task]; i < borders[task + 1]; ++i) {
      CountSink sink;
      encode_with(texts[i], policy, worker, sink);
      counts[i] = int64_t(sink.size());
    }
  });
}

template <typename Sink>
void Encoder::encode_with(std::string_view text, const SpecialPolicy& policy, Worker& worker, Sink& sink) const {
  size_t from = 0;
  while (from < text.size()) {
    const auto match = special_.find(text, from, policy);
    if (!match.found()) break;
    encode_ordinary(text.substr(from, match.begin - from), worker, sink);
    sink.push(match.id);
    from = match.end;
  }
  encode_ordinary(text.substr(from), worker, sink);
}

template <typename Sink>
void Encoder::encode_ordinary(std::string_view text, Worker& worker, Sink& sink) const {
  const uint8_t* begin = bytes_of(text);
  const uint8_t* end = begin + text.size();
  if (begin == end) return;
  splitter_->visit([&](const auto& scanner) {
    auto cursor = scanner.cursor(begin, end);
    encode_words(cursor, begin, end, worker, sink);
  });
}

// A word that is not in its bucket of the cache with at most three ids; `entry`: where it is nevertheless, or null.
template <typename Sink>
__attribute__((noinline)) void Encoder::encode_word(const Word& word, WordCache::Entry* entry, Worker& worker,
                                                    Sink& sink) const {
  WordCache& cache = worker.cache;
  const bool is_cached = word.len <= WordCache::kMaxWord;
  if (entry == nullptr && is_cached) entry = cache.find(word.key, word.hash);
  if (entry != nullptr) {
    entry->mark_seen();
    const auto found = cache.ids_of(*entry, word.begin, word.len);
    if (found.ids != nullptr) return sink.add(found.ids, found.num_ids);
  }
  IdBuffer& ids = sink.buffer();
  const size_t before = ids.size();
  words_.encode(word.begin, word.len, word.key, word.hash, worker.scratch, ids);
  const size_t num_ids = ids.size() - before;
  sink.note(num_ids);
  if (is_cached) cache.insert(word.key, word.hash, word.begin, word.len, ids.data() + before, num_ids);
}

// Words go through in groups: first all are cut and their cache lines asked for, then all are looked up. Tried: a
// second pass that asks for the ids in the ring, and asking for them eight words ahead: English lost what Hindi won.
template <typename Cursor, typename Sink>
void Encoder::encode_words(Cursor& cursor, const uint8_t* begin, const uint8_t* end, Worker& worker, Sink& sink) const {
  constexpr size_t kGroup = 32;
  Word words[kGroup];
  for (const uint8_t* stop = begin; stop != nullptr;) {
    WordCache::View cache = worker.cache.view();
    size_t num_words = 0;
    for (; num_words < kGroup && (stop = cursor.next()) != nullptr; ++num_words, begin = stop) {
      const size_t len = size_t(stop - begin);
      ShortKey key{0, 0};
      uint64_t hash = 0;
      if (len <= kShortKey) {
        key = short_key_before(begin, len, end);
        hash = hash_short(key);
      } else if (len <= WordCache::kMaxWord) {
        hash = hash_long(begin, len);
        key = WordCache::long_key(hash, len);
      }
      cache.prefetch(hash);
      words[num_words] = {key, hash, begin, len};
    }
    for (size_t i = 0; i < num_words;) {
      typename Sink::Run run(sink, num_words - i);
      WordCache::Entry* entry = nullptr;
      for (; i < num_words; ++i) {
        entry = words[i].key.high == 0 ? nullptr : cache.find(words[i].key, words[i].hash);
        if (entry == nullptr || !entry->is_inline()) break;
        entry->mark_seen();
        run.add(*entry);
      }
      run.close();
      if (i == num_words) break;
      encode_word(words[i++], entry, worker, sink);
      cache = worker.cache.view();
    }
  }
}

}  // namespace herdkern::text
