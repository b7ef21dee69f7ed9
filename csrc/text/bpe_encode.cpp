// Encoding of texts: see bpe_encode.h.
#include "text/bpe_encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "text/bpe_sinks.h"
#include "text/parallel.h"

namespace herdkern::text {

namespace {

// A text that was cut is UTF-8.
std::string_view utf8_of_part(const Texts& texts, const TextPart& part) {
  const AnyText& text = texts.views[part.first_text];
  return {static_cast<const char*>(text.data), text.size};
}

// Memory that is not written to costs nothing; growing costs a copy, or new page tables. Tried: large pages for it (no
// faster).
size_t likely_ids(const Texts& texts, const TextPart& part) {
  size_t num_bytes = part.is_cut ? part.end - part.begin : 0;
  for (size_t i = part.first_text; i < part.last_text && !part.is_cut; ++i) num_bytes += texts.views[i].size;
  return num_bytes / 3 + 256;
}

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

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
  Utf8Buffer utf8;
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
    worker_->utf8.shrink();
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

void Encoder::encode(const Texts& texts, IdBuffer& out) const {
  BorrowedWorker worker(*this);
  IdSink sink(out);
  encode_text(texts, 0, *worker, sink);
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

// Encodes each part into sink_of(its index), and joins the parts of long texts: then ids [first_id, last_id) of a part
// count. ends[i]: where the ids of text i end among those of its part, unless it was cut.
template <typename SinkOf>
void Encoder::encode_parts(const Texts& texts, int num_threads, std::vector<TextPart>& parts, int64_t* ends,
                           SinkOf&& sink_of) const {
  const std::unique_ptr<std::atomic<bool>[]> gave_up(new std::atomic<bool>[parts.size()]());
  run_tasks(parts.size(), num_threads, [&](size_t index, Worker& worker) {
    TextPart& part = parts[index];
    auto sink = sink_of(index);
    if (!part.is_cut) {
      for (size_t i = part.first_text; i < part.last_text; ++i) {
        encode_text(texts, i, worker, sink);
        ends[i] = int64_t(sink.size());
      }
    } else if (!gave_up[part.group] && !encode_part(texts, part, worker, sink)) {
      gave_up[part.group] = true;
    }
    part.last_id = sink.size();
  });
  for (size_t first = 0, last; first < parts.size(); first = last) {
    for (last = first + 1; last < parts.size() && parts[last].group == first;) ++last;
    if (!gave_up[first] && join_parts(parts, first, last)) continue;
    for (size_t i = first; i < last; ++i) parts[i].first_id = parts[i].last_id;
    BorrowedWorker worker(*this);
    auto sink = sink_of(first);
    parts[first].first_id = sink.size();
    encode_text(texts, parts[first].first_text, *worker, sink);
    parts[first].last_id = sink.size();
  }
}

void Encoder::encode_batch(Texts& texts, int num_threads, IdBuffer& out, int64_t* offsets) const {
  std::vector<TextPart> parts = parts_for(texts, num_threads);
  std::vector<IdBuffer> pieces(parts.size());
  for (size_t index = 0; index < parts.size(); ++index) pieces[index].reserve(likely_ids(texts, parts[index]));
  encode_parts(texts, num_threads, parts, offsets + 1, [&](size_t index) { return IdSink(pieces[index]); });
  offsets[0] = 0;
  if (parts.size() == 1 && !parts[0].is_cut) {
    out = std::move(pieces[0]);
    return;
  }
  std::vector<size_t> begins(parts.size() + 1);
  for (size_t index = 0; index < parts.size(); ++index) {
    const TextPart& part = parts[index];
    begins[index + 1] = begins[index] + part.last_id - part.first_id;
    if (part.is_cut) offsets[part.last_text] = int64_t(begins[index + 1]);
    for (size_t i = part.first_text; i < part.last_text && !part.is_cut; ++i) offsets[i + 1] += int64_t(begins[index]);
  }
  uint32_t* ids = out.room_for(begins.back());
  out.grow_by(begins.back());
  parallel_for(int64_t(parts.size()), num_threads, [&](int64_t index) {
    const size_t num_ids = begins[index + 1] - begins[index];
    if (num_ids != 0) std::memcpy(ids + begins[index], pieces[index].data() + parts[index].first_id, 4 * num_ids);
    pieces[index] = IdBuffer();
  });
}

void Encoder::count_batch(Texts& texts, int num_threads, int64_t* counts) const {
  std::vector<TextPart> parts = parts_for(texts, num_threads);
  encode_parts(texts, num_threads, parts, counts, [](size_t) { return CountSink(); });
  for (const TextPart& part : parts) {
    if (part.is_cut) {
      int64_t& count = counts[part.first_text];
      count = (part.begin == 0 ? 0 : count) + int64_t(part.last_id - part.first_id);
    } else {
      for (size_t i = part.last_text; --i > part.first_text;) counts[i] -= counts[i - 1];
    }
  }
}

std::vector<TextPart> Encoder::parts_for(Texts& texts, int num_threads) const {
  if (texts.views.empty()) return {};
  if (num_threads <= 1) return {{0, texts.views.size(), 0}};
  return cut_into_parts(texts, special_, splitter_->begins_anywhere());
}

// False if a word reaches far behind the part's end.
template <typename Sink>
bool Encoder::encode_part(const Texts& texts, TextPart& part, Worker& worker, Sink& sink) const {
  const std::string_view up_to_end = utf8_of_part(texts, part).substr(0, part.end);
  Run run{part.is_open_begin ? part.run_begin : part.begin, part.begin, 0};
  for (;;) {
    const auto match = special_.find(up_to_end, run.from, texts.special);
    run.end = match.found() ? match.begin : part.is_open_end ? part.next_run_end : part.end;
    if (!encode_run(texts, run, part, worker, sink)) return false;
    if (!match.found()) return true;
    sink.push(match.id);
    run.begin = run.from = match.end;
  }
}

// The words of the run up to the part's end, or a little further if that is open.
template <typename Sink>
bool Encoder::encode_run(const Texts& texts, const Run& run, TextPart& part, Worker& worker, Sink& sink) const {
  const uint8_t* const text_begin = bytes_of(utf8_of_part(texts, part));
  const uint8_t* const end = text_begin + run.end;
  const uint8_t* const limit = std::min(end, text_begin + part.end);
  const uint8_t* place = text_begin + run.from;
  auto cursor = splitter_->cursor(text_begin + run.begin, end);
  cursor.start_at(place);
  const auto note = [&](std::vector<TextPart::Border>& borders, const uint8_t* stop) {
    borders.push_back({size_t(place - text_begin), sink.size()});
    while (borders.size() < TextPart::kBorders && place < stop) {
      place = encode_words(cursor, {place, place + 1, end}, worker, sink);
      borders.push_back({size_t(place - text_begin), sink.size()});
    }
  };
  if (part.is_open_begin && run.from == part.begin) note(part.head, limit);
  place = encode_words(cursor, {place, limit, end}, worker, sink);
  if (place > limit && size_t(place - limit) > 2 * texts.part_bytes) return false;
  if (end > limit) note(part.tail, end);
  return true;
}

template <typename Sink>
void Encoder::encode_text(const Texts& texts, size_t index, Worker& worker, Sink& sink) const {
  const std::string_view text = worker.utf8.utf8_of(texts.views[index]);
  if (special_.find(text, 0, texts.forbidden).found()) throw ForbiddenToken();
  size_t from = 0;
  while (from < text.size()) {
    const auto match = special_.find(text, from, texts.special);
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
  auto cursor = splitter_->cursor(begin, end);
  encode_words(cursor, {begin, end, end}, worker, sink);
}

// A word that is not in the cache with at most three ids; `entry`: where it is nevertheless, or null. Says whether it
// was new.
template <typename Sink>
__attribute__((noinline)) bool Encoder::encode_word(const Word& word, const uint8_t* readable_end,
                                                    WordCache::Entry* entry, Worker& worker, Sink& sink) const {
  WordCache& cache = worker.cache;
  if (entry != nullptr) {
    entry->mark_seen();
    const auto found = cache.ids_of(*entry, word.begin, word.len);
    if (found.ids != nullptr) {
      sink.add(found.ids, found.num_ids);
      return false;
    }
  }
  IdBuffer& ids = sink.buffer();
  const size_t before = ids.size();
  words_.encode(word.begin, word.len, word.key, word.hash, readable_end, worker.scratch, ids);
  const size_t num_ids = ids.size() - before;
  sink.note(num_ids);
  if (word.len <= WordCache::kMaxWord) {
    cache.insert(word.key, word.hash, word.begin, word.len, ids.data() + before, num_ids);
  }
  return true;
}

// The words that begin in the range; returns where the last one ends.
//
// Words go through in groups: first all are cut and their cache lines asked for, then all are looked up. Where the
// group before had new words, a pass between asks for the tokens that such words may be. Tried: the same for ids in the
// ring (1.3x where it is in no cache, 0.7x where it is), and a pass that merges eight new words by turns (no faster
// than one by one).
template <typename Sink>
const uint8_t* Encoder::encode_words(Splitter::Cursor& cursor, const Range& range, Worker& worker, Sink& sink) const {
  constexpr size_t kGroup = 32, kSomeNew = 2;
  Word words[kGroup];
  const uint8_t *begin = range.begin, *const end = range.readable_end;
  size_t num_new = 0;  // of the group before
  while (begin < range.end) {
    WordCache::View cache = worker.cache.view();
    size_t num_words = 0;
    for (; num_words < kGroup && begin < range.end; ++num_words) {
      const uint8_t* stop = cursor.next();
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
      begin = stop;
    }
    for (size_t i = 0; num_new > kSomeNew && i < num_words; ++i) {
      const WordCache::Entry* entry = cache.find(words[i].key, words[i].hash);
      __builtin_prefetch(entry != nullptr ? static_cast<const void*>(entry) : words_.table().line(words[i].hash));
    }
    num_new = 0;
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
      num_new += encode_word(words[i++], end, entry, worker, sink);
      cache = worker.cache.view();
    }
  }
  return begin;
}

}  // namespace herdkern::text
