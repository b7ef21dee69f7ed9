// Encoding: see bpe_encode.h for the rules.
#include "text/bpe_encode.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
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

size_t table_size(size_t num_entries) {
  size_t size = 16;
  while (size < 2 * num_entries) size *= 2;
  return size;
}

// Words seen lately with their ids. Two-way buckets of one cache line an entry; the older entry of a bucket is
// replaced.
class WordCache {
 public:
  static constexpr size_t kMaxBytes = 32, kMaxIds = 7;
  struct Entry {
    uint64_t key[4];  // the word, padded with zeros
    uint32_t ids[kMaxIds];
    uint8_t len, num_ids;  // len 0: free
  };
  static_assert(sizeof(Entry) == 64);

  // calloc: pages of the cache that no word reaches cost nothing.
  WordCache() : entries_(static_cast<Entry*>(std::calloc(2 * kBuckets, sizeof(Entry))), &std::free) {
    if (entries_ == nullptr) throw std::bad_alloc();
  }

  static void make_key(const uint8_t* word, size_t len, const uint8_t* end, uint64_t key[4]) {
    const WordKey first = load_key(word, std::min<size_t>(len, 16), end);
    const WordKey second = len > 16 ? load_key(word + 16, len - 16, end) : WordKey{0, 0};
    key[0] = first.low, key[1] = first.high, key[2] = second.low, key[3] = second.high;
  }
  static size_t bucket_of(const uint64_t key[4], size_t len) {
    uint64_t hash = mix(key[0] ^ 0x9E3779B97F4A7C15ull, key[1] ^ 0xD1B54A32D192ED03ull ^ len);
    if (len > 16) hash ^= mix(key[2] ^ 0xE7037ED1A0B428DBull, key[3] ^ 0x8EBC6AF09C88C6E3ull);
    return (hash ^ hash >> 29) & (kBuckets - 1);
  }
  void prefetch(size_t bucket) const {
    __builtin_prefetch(&entries_[2 * bucket]);
    __builtin_prefetch(&entries_[2 * bucket + 1]);
  }
  const Entry* find(const uint64_t key[4], size_t len, size_t bucket) const {
    const Entry* entry = &entries_[2 * bucket];
    for (int way = 0; way < 2; ++way, ++entry) {
      if (entry->len != len || entry->key[0] != key[0] || entry->key[1] != key[1]) continue;
      if (len <= 16 || (entry->key[2] == key[2] && entry->key[3] == key[3])) return entry;
    }
    return nullptr;
  }
  void insert(const uint64_t key[4], size_t len, size_t bucket, const uint32_t* ids, size_t num_ids) {
    if (num_ids > kMaxIds) return;
    Entry* entry = &entries_[2 * bucket];
    entry[1] = entry[0];
    std::copy(key, key + 4, entry->key);
    std::copy(ids, ids + num_ids, entry->ids);
    entry->len = uint8_t(len);
    entry->num_ids = uint8_t(num_ids);
  }

 private:
  static constexpr size_t kBuckets = 1 << 16;  // 8 MiB
  std::unique_ptr<Entry[], decltype(&std::free)> entries_;
};

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

TokenTable::TokenTable(const TokenList& tokens) : entries_(table_size(tokens.size())) {
  for (const auto& [token, id] : tokens) {
    const uint8_t* bytes = bytes_of(token);
    Entry entry;
    entry.id = id;
    entry.len = uint32_t(token.size());
    uint64_t hash;
    if (token.size() <= kInline) {
      entry.key = load_key(bytes, token.size(), bytes + token.size());
      hash = hash_key(entry.key, token.size());
    } else {
      hash = hash_bytes(bytes, token.size());
      entry.key = {hash, long_tokens_.size()};
      long_tokens_ += token;
    }
    size_t slot = hash & (entries_.size() - 1);
    while (entries_[slot].id != kNoToken) slot = (slot + 1) & (entries_.size() - 1);
    entries_[slot] = entry;
    max_length_ = std::max(max_length_, token.size());
  }
}

uint32_t TokenTable::find(const uint8_t* bytes, size_t len, const uint8_t* readable_end) const {
  if (len == 0 || len > max_length_) return kNoToken;
  const bool is_inline = len <= kInline;
  const WordKey key = is_inline ? load_key(bytes, len, readable_end) : WordKey{hash_bytes(bytes, len), 0};
  const uint64_t hash = is_inline ? hash_key(key, len) : key.low;
  for (size_t slot = hash & (entries_.size() - 1);; slot = (slot + 1) & (entries_.size() - 1)) {
    const Entry& entry = entries_[slot];
    if (entry.id == kNoToken) return kNoToken;
    if (entry.len != len) continue;
    if (is_inline ? entry.key == key
                  : entry.key.low == hash && std::memcmp(&long_tokens_[entry.key.high], bytes, len) == 0) {
      return entry.id;
    }
  }
}

PairTable::PairTable(const TokenList& tokens, const TokenTable& table) {
  std::vector<uint64_t> packed;
  for (const auto& [token, id] : tokens) {
    const uint8_t* begin = bytes_of(token);
    const uint8_t* end = begin + token.size();
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const uint32_t left = table.find(begin, cut, end);
      if (left == kNoToken) continue;
      const uint32_t right = table.find(begin + cut, token.size() - cut, end);
      if (right != kNoToken) packed.push_back(uint64_t(left) << 42 | uint64_t(right) << 21 | id);
    }
  }
  slots_.assign(table_size(packed.size()), kFree);
  mask_ = slots_.size() - 1;
  for (uint64_t slot : packed) {
    size_t i = home(slot >> 21);
    while (slots_[i] != kFree) i = (i + 1) & mask_;
    slots_[i] = slot;
  }
}

SpecialTokens::SpecialTokens(const TokenList& tokens) {
  for (const auto& [token, id] : tokens) {
    if (ids_.empty()) prefix_ = token;
    ids_.emplace(token, id);
    lengths_.push_back(token.size());
    starts_[uint8_t(token[0])] = true;
    const size_t common =
        std::mismatch(prefix_.begin(), prefix_.begin() + std::min(prefix_.size(), token.size()), token.begin()).first -
        prefix_.begin();
    prefix_.resize(common);
  }
  std::sort(lengths_.begin(), lengths_.end(), std::greater<size_t>());
  lengths_.erase(std::unique(lengths_.begin(), lengths_.end()), lengths_.end());
}

SpecialTokens::Match SpecialTokens::find(std::string_view text, size_t from,
                                         const std::vector<uint32_t>* wanted) const {
  if (ids_.empty()) return {text.npos, text.npos, kNoToken};
  for (size_t at = from; at < text.size(); ++at) {
    if (!prefix_.empty()) {
      at = text.find(prefix_, at);
      if (at == text.npos) break;
    } else if (!starts_[uint8_t(text[at])]) {
      continue;
    }
    for (size_t length : lengths_) {
      if (length > text.size() - at) continue;
      const auto found = ids_.find(std::string(text.substr(at, length)));
      if (found == ids_.end()) continue;
      if (wanted == nullptr || std::binary_search(wanted->begin(), wanted->end(), found->second)) {
        return {at, at + length, found->second};
      }
    }
  }
  return {text.npos, text.npos, kNoToken};
}

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
