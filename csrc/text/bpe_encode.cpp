// Encoding: see bpe_encode.h for the rules.
#include "text/bpe_encode.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <thread>

#include "text/parallel.h"

namespace herdkern::text {

namespace {

constexpr size_t kShortWord = 48;       // bytes; up to here a linear search for the lowest rank beats the heap
constexpr size_t kTaskBytes = 1 << 17;  // documents are handed to threads in runs of about this size
constexpr size_t kMaxIdleWorkers = 64;
constexpr size_t kKeptLongWord = 1 << 16;  // scratch for longer words is given back

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

}  // namespace

struct Encoder::Worker {
  WordCache cache;
  // A long word as a linked list of symbols, by the place of a symbol's first byte.
  std::vector<uint32_t> ids, next, previous, ranks;  // ranks: of the pair with the next symbol
  std::vector<uint64_t> heap;                        // rank << 32 | place; stale when ranks says otherwise

  void free_scratch() {
    for (auto* array : {&ids, &next, &previous, &ranks}) std::vector<uint32_t>().swap(*array);
    std::vector<uint64_t>().swap(heap);
  }
};

// A worker of the encoder's pool for the life of this object.
class Encoder::BorrowedWorker {
 public:
  explicit BorrowedWorker(const Encoder& encoder) : encoder_(encoder) {
    if (const auto lock = lock_pool(); lock.owns_lock() && !encoder.idle_.empty()) {
      worker_ = std::move(encoder.idle_.back());
      encoder.idle_.pop_back();
    }
    if (!worker_) worker_ = std::make_unique<Worker>();
  }
  ~BorrowedWorker() {
    if (worker_->ids.capacity() > kKeptLongWord) worker_->free_scratch();
    const auto lock = lock_pool();
    if (lock.owns_lock() && encoder_.idle_.size() < kMaxIdleWorkers) encoder_.idle_.push_back(std::move(worker_));
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

Encoder::Encoder(const TokenList& tokens, const TokenList& special_tokens)
    : table_(tokens), pairs_(tokens, table_), special_(special_tokens), byte_pairs_(256 * 256) {
  for (int b = 0; b < 256; ++b) {
    const uint8_t byte = uint8_t(b);
    byte_ids_[b] = table_.find(&byte, 1, &byte + 1);
    if (byte_ids_[b] == kNoToken) throw std::invalid_argument("Encoder: the single bytes must all be tokens");
  }
  for (int pair = 0; pair < 256 * 256; ++pair) {
    byte_pairs_[pair] = pairs_.find(byte_ids_[pair >> 8], byte_ids_[pair & 255]);
  }
}

Encoder::~Encoder() = default;  // here, where Worker is complete

void Encoder::encode(std::string_view text, const SpecialPolicy& policy, IdBuffer& out) const {
  BorrowedWorker worker(*this);
  encode_with(text, policy, *worker, out);
}

void Encoder::encode_batch(const std::vector<std::string_view>& texts, const SpecialPolicy& policy, int num_threads,
                           IdBuffer& out, int64_t* offsets) const {
  const std::vector<size_t> borders = task_borders(texts, kTaskBytes);
  const size_t num_tasks = borders.size() - 1;
  std::vector<IdBuffer> pieces(num_tasks);
  std::atomic<size_t> next_task{0};
  const int64_t num_workers = std::min<int64_t>(std::max(1, num_threads), int64_t(num_tasks));
  parallel_for(num_workers, num_threads, [&](int64_t) {
    BorrowedWorker worker(*this);
    for (size_t task; (task = next_task.fetch_add(1)) < num_tasks;) {
      for (size_t i = borders[task]; i < borders[task + 1]; ++i) {
        const size_t before = pieces[task].size();
        encode_with(texts[i], policy, *worker, pieces[task]);
        offsets[i + 1] = int64_t(pieces[task].size() - before);
      }
    }
  });
  offsets[0] = 0;
  for (size_t i = 0; i < texts.size(); ++i) offsets[i + 1] += offsets[i];
  if (num_tasks == 1) {
    out = std::move(pieces[0]);
    return;
  }
  uint32_t* ids = out.room_for(size_t(offsets[texts.size()]));
  out.grow_by(size_t(offsets[texts.size()]));
  parallel_for(int64_t(num_tasks), num_threads, [&](int64_t task) {
    if (pieces[task].size() != 0) {
      std::memcpy(ids + offsets[borders[task]], pieces[task].data(), pieces[task].size() * sizeof(uint32_t));
    }
    pieces[task] = IdBuffer();
  });
}

void Encoder::encode_with(std::string_view text, const SpecialPolicy& policy, Worker& worker, IdBuffer& out) const {
  size_t from = 0;
  while (!policy.none() && from < text.size()) {
    const auto match = special_.find(text, from, policy.all ? nullptr : &policy.ids);
    if (match.begin == text.npos) break;
    encode_ordinary(text.substr(from, match.begin - from), worker, out);
    out.push(match.id);
    from = match.end;
  }
  encode_ordinary(text.substr(from), worker, out);
}

// Words go through in groups: first all are cut and their cache lines asked for, then all are looked up.
void Encoder::encode_ordinary(std::string_view text, Worker& worker, IdBuffer& out) const {
  struct Word {
    const uint8_t* begin;
    size_t len, bucket;
    uint64_t key[4];
  };
  constexpr size_t kGroup = 16;
  Word words[kGroup];
  const uint8_t* p = bytes_of(text);
  const uint8_t* end = p + text.size();
  while (p < end) {
    size_t num_words = 0;
    for (; num_words < kGroup && p < end; ++num_words) {
      Word& word = words[num_words];
      word.begin = p;
      p = scanner_.next(p, end);
      word.len = size_t(p - word.begin);
      if (word.len > WordCache::kMaxBytes) continue;
      WordCache::make_key(word.begin, word.len, end, word.key);
      word.bucket = WordCache::bucket_of(word.key, word.len);
      worker.cache.prefetch(word.bucket);
    }
    for (size_t i = 0; i < num_words; ++i) {
      const Word& word = words[i];
      if (word.len > WordCache::kMaxBytes) {
        encode_word(word.begin, word.len, end, worker, out);
      } else if (const auto* entry = worker.cache.find(word.key, word.len, word.bucket)) {
        std::memcpy(out.room_for(WordCache::kMaxIds), entry->ids, sizeof(entry->ids));
        out.grow_by(entry->num_ids);
      } else {
        const size_t before = out.size();
        encode_word(word.begin, word.len, end, worker, out);
        worker.cache.insert(word.key, word.len, word.bucket, out.data() + before, out.size() - before);
      }
    }
  }
}

void Encoder::encode_word(const uint8_t* word, size_t len, const uint8_t* end, Worker& worker, IdBuffer& out) const {
  const uint32_t whole = table_.find(word, len, end);
  if (whole != kNoToken) {
    out.push(whole);
  } else if (len <= kShortWord) {
    merge_short(word, len, kNoToken, out);
  } else {
    merge_long(word, len, kNoToken, worker, out);
  }
}

void Encoder::merge_short(const uint8_t* word, size_t len, uint32_t limit, IdBuffer& out) const {
  uint32_t ids[kShortWord], ranks[kShortWord];  // ranks[i]: of ids[i] with ids[i + 1]; below limit or kNoToken
  const auto rank_at = [&](size_t i) {
    const uint32_t rank = pairs_.find(ids[i], ids[i + 1]);
    return rank < limit ? rank : kNoToken;
  };
  size_t n = len;
  for (size_t i = 0; i < n; ++i) ids[i] = byte_ids_[word[i]];
  for (size_t i = 0; i + 1 < n; ++i) {
    const uint32_t rank = byte_pairs_[word[i] << 8 | word[i + 1]];
    ranks[i] = rank < limit ? rank : kNoToken;
  }
  while (n > 1) {
    uint32_t lowest = kNoToken;
    for (size_t i = 0; i + 1 < n; ++i) lowest = std::min(lowest, ranks[i]);
    if (lowest == kNoToken) break;
    const size_t at = size_t(std::find(ranks, ranks + n - 1, lowest) - ranks);
    ids[at] = lowest;
    std::copy(ids + at + 2, ids + n, ids + at + 1);
    std::copy(ranks + at + 1, ranks + n - 1, ranks + at);
    --n;
    if (at + 1 < n) ranks[at] = rank_at(at);
    if (at > 0) ranks[at - 1] = rank_at(at - 1);
  }
  std::copy(ids, ids + n, out.room_for(n));
  out.grow_by(n);
}

void Encoder::merge_long(const uint8_t* word, size_t len, uint32_t limit, Worker& worker, IdBuffer& out) const {
  if (len >= kNoToken) throw std::length_error("encode: a word must be shorter than 2**32 bytes");
  auto& [cache, ids, next, previous, ranks, heap] = worker;
  ids.resize(len), next.resize(len), previous.resize(len), ranks.resize(len);
  heap.clear();
  const auto later = std::greater<uint64_t>();
  for (size_t i = 0; i < len; ++i) {
    ids[i] = byte_ids_[word[i]];
    next[i] = uint32_t(i + 1);
    previous[i] = uint32_t(i - 1);
    const uint32_t rank = i + 1 < len ? byte_pairs_[word[i] << 8 | word[i + 1]] : kNoToken;
    ranks[i] = rank < limit ? rank : kNoToken;
    if (ranks[i] != kNoToken) heap.push_back(uint64_t(ranks[i]) << 32 | i);
  }
  std::make_heap(heap.begin(), heap.end(), later);
  const auto update = [&](uint32_t at) {
    const uint32_t rank = next[at] < len ? pairs_.find(ids[at], ids[next[at]]) : kNoToken;
    ranks[at] = rank < limit ? rank : kNoToken;
    if (ranks[at] == kNoToken) return;
    heap.push_back(uint64_t(ranks[at]) << 32 | at);
    std::push_heap(heap.begin(), heap.end(), later);
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const auto rank = uint32_t(heap.back() >> 32), at = uint32_t(heap.back());
    heap.pop_back();
    if (ranks[at] != rank) continue;
    const uint32_t gone = next[at];
    ids[at] = rank;
    ranks[gone] = kNoToken;
    next[at] = next[gone];
    if (next[at] < len) previous[next[at]] = at;
    update(at);
    if (at > 0) update(previous[at]);
  }
  for (uint32_t at = 0; at < len; at = next[at]) out.push(ids[at]);
}

std::vector<uint32_t> Encoder::parts_of(std::string_view bytes, uint32_t id) const {
  IdBuffer out;
  if (bytes.size() <= kShortWord) {
    merge_short(bytes_of(bytes), bytes.size(), id, out);
  } else {
    BorrowedWorker worker(*this);
    merge_long(bytes_of(bytes), bytes.size(), id, *worker, out);
  }
  return {out.data(), out.data() + out.size()};
}

}  // namespace herdkern::text
