// Word counting: see word_counts.h.
#include "text/word_counts.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>

#include "text/grouped_words.h"
#include "text/json_lines.h"
#include "text/parallel.h"
#include "text/word_runs.h"

namespace herdkern::text {

namespace {

constexpr size_t kFirstCapacity = 64;
// Documents and lines are handed to threads in runs of about this size, smaller ones towards the end, so that the last
// of them end together.
constexpr size_t kTaskBytes = 1 << 16, kLeastTaskBytes = 1 << 13;
inline size_t task_bytes(size_t num_left, int num_threads) {
  return std::clamp(num_left / (8 * size_t(num_threads)), kLeastTaskBytes, kTaskBytes);
}

// The first 8 bytes of a word as a number that sorts as they do.
inline uint64_t in_order(uint64_t loaded) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return __builtin_bswap64(loaded);
#else
  return loaded;
#endif
}

}  // namespace

WordMap::WordMap() : pages_(kFirstCapacity * sizeof(Entry)) {
  entries_ = reinterpret_cast<Entry*>(pages_.data());
  capacity_ = kFirstCapacity;
  max_words_ = capacity_ / 4 * 3;
}

void WordMap::overflow() { throw std::overflow_error("word counts: the count of one word must stay below 2**63"); }

bool WordMap::insert(const Word& word, int64_t count, size_t slot) {
  if (word.len > UINT32_MAX) throw std::length_error("word counts: a word must be shorter than 2**32 bytes");
  const size_t arena_bytes = long_words_.num_bytes() + (word.len > 16 ? long_words_.cost(word.len) : 0);
  const bool must_fit = word.len >= kHugeWord || (word.len > 16 && num_words_ != 0);
  if (must_fit && arena_bytes + pages_.num_bytes() > max_bytes_) return false;
  if (num_words_ >= max_words_) {
    if (!grow(max_bytes_ - std::min(max_bytes_, arena_bytes))) return false;
    for (slot = home(word.hash); entries_[slot].count != 0;) slot = slot + 1 == capacity_ ? 0 : slot + 1;
  }
  Entry& entry = entries_[slot];
  entry = {word.key.low, word.key.high, count, uint32_t(word.len), uint32_t(word.hash >> 32)};
  if (word.len > 16) entry.high = reinterpret_cast<uint64_t>(long_words_.store(word.bytes, word.len));
  ++num_words_;
  return true;
}

// Slots are in order of the tag, so both tables are walked from front to back; what was read goes back to the system.
bool WordMap::grow(size_t max_table_bytes) {
  const size_t capacity = std::min(capacity_ + capacity_ / 2, max_table_bytes / sizeof(Entry));
  if (capacity < capacity_ + capacity_ / 8) return false;
  if (capacity > UINT32_MAX) throw std::length_error("word counts: too many different words for one table");
  Pages old = std::move(pages_);
  const Entry* old_entries = entries_;
  const size_t old_capacity = capacity_;
  pages_ = Pages(capacity * sizeof(Entry));
  entries_ = reinterpret_cast<Entry*>(pages_.data());
  capacity_ = capacity;
  max_words_ = capacity / 4 * 3;
  for (size_t i = 0; i < old_capacity; ++i) {
    if (i % (Pages::kHugePage / sizeof(Entry)) == 0) {
      old.give_back(i * sizeof(Entry));
      pages_.expect_writes((i * sizeof(Entry) + Pages::kHugePage) / old_capacity * capacity);
    }
    const Entry& entry = old_entries[i];
    if (entry.count == 0) continue;
    size_t slot = home(uint64_t(entry.tag) << 32);
    while (entries_[slot].count != 0) slot = slot + 1 == capacity_ ? 0 : slot + 1;
    entries_[slot] = entry;
  }
  return true;
}

bool WordMap::before(const Entry& a, const Entry& b) {
  if (a.low != b.low) return in_order(a.low) < in_order(b.low);
  if (a.len > 16 || b.len > 16) return word_of(a) < word_of(b);
  if (a.high != b.high) return in_order(a.high) < in_order(b.high);
  return a.len < b.len;  // words that differ in zeros at their ends alone
}

void WordMap::sort_entries() {
  Entry* end = std::remove_if(entries_, entries_ + capacity_, [](const Entry& entry) { return entry.count == 0; });
  std::sort(entries_, end, before);
}

void WordMap::clear() {
  std::memset(static_cast<void*>(entries_), 0, capacity_ * sizeof(Entry));
  num_words_ = 0;
  long_words_.clear();
}

WordCounts::WordCounts(size_t max_bytes, RunFile* overflow)
    : num_parts_(parts_for_this_machine()), parts_(new Part[num_parts_]), overflow_(overflow) {
  for (size_t i = 0; i < num_parts_ && max_bytes != SIZE_MAX; ++i) parts_[i].map.limit_bytes(max_bytes / num_parts_);
}

// Enough that two of the threads seldom want the same part.
size_t WordCounts::parts_for_this_machine() {
  size_t parts = 16;
  while (parts < 8 * std::thread::hardware_concurrency() && parts < 512) parts *= 2;
  return parts;
}

void WordCounts::add(const Word& word, int64_t count) { add_to(parts_[word.hash & (num_parts_ - 1)].map, word, count); }

void WordCounts::make_room(WordMap& map, const Word& word, int64_t count) {
  if (overflow_ == nullptr) throw std::logic_error("word counts: a table with a limit needs a file for what passes it");
  const bool is_huge = word.len >= kHugeWord;
  // One that takes much of the room must not make it: the words of the map would be written for every such word.
  if (!is_huge || word.len < map.max_bytes() / 4) {
    overflow_->append(map);
    if (map.add(word, count)) return;
  }
  overflow_->append({reinterpret_cast<const char*>(word.bytes), word.len}, count);
}

void WordCounts::merge(const WordCounts& other) {
  // Of itself, every word is found, so nothing moves under the walk.
  other.for_each([this](std::string_view word, int64_t count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(word.data());
    add(make_word(bytes, word.size(), bytes + word.size()), count);
  });
}

void WordCounts::drain(int num_threads) {
  parallel_for(int64_t(num_parts_), num_threads, [&](int64_t i) {
    if (parts_[size_t(i)].map.num_words() != 0) overflow_->append(parts_[size_t(i)].map);
  });
}

size_t WordCounts::num_words() const {
  size_t total = 0;
  for (size_t i = 0; i < num_parts_; ++i) total += parts_[i].map.num_words();
  return total;
}

std::vector<const WordMap::Entry*> WordCounts::sorted() const {
  std::vector<const WordMap::Entry*> entries;
  entries.reserve(num_words());
  for (size_t i = 0; i < num_parts_; ++i) parts_[i].map.collect(entries);
  std::sort(entries.begin(), entries.end(), [](const auto* a, const auto* b) { return WordMap::before(*a, *b); });
  return entries;
}

namespace {

// Memory that is not touched before it is written to.
class Scratch {
 public:
  uint8_t* with_room(size_t size) {
    if (size > size_) {
      data_.reset();
      data_.reset(new uint8_t[size]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t size_ = 0;
};

template <typename Scanner>
void push_words(const Scanner& scanner, std::string_view text, GroupedWords& words) {
  const auto* word = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = word + text.size();
  auto cursor = scanner.cursor(word, end);
  while (const uint8_t* stop = cursor.next()) {
    words.push(make_word(word, size_t(stop - word), end));
    word = stop;
  }
}

}  // namespace

void count_words(const std::vector<AnyText>& texts, const Splitter& splitter, int num_threads, WordCounts& counts,
                 const std::function<void(size_t, size_t)>& refuse) {
  num_threads = std::max(1, num_threads);
  const auto borders = task_borders(texts.size(), kTaskBytes, [&](size_t i) { return texts[i].num_bytes(); });
  const auto num_tasks = int64_t(borders.size()) - 1;
  std::atomic<size_t> refused{texts.size()};
  parallel_for(num_tasks, num_threads, [&](int64_t task) {
    for (size_t i = borders[size_t(task)]; i < borders[size_t(task) + 1]; ++i) {
      if (first_surrogate(texts[i]) == texts[i].size) continue;
      for (size_t first = refused; i < first && !refused.compare_exchange_weak(first, i);) continue;
    }
  });
  if (refused < texts.size()) refuse(refused, first_surrogate(texts[refused]));
  std::atomic<size_t> next_task{0};
  splitter.visit([&](const auto& scanner) {
    parallel_for(num_threads, num_threads, [&](int64_t) {
      GroupedWords words(counts);
      Scratch scratch;
      for (size_t task; (task = next_task.fetch_add(1)) + 1 < borders.size();) {
        size_t written = 0;
        for (size_t i = borders[task]; i < borders[task + 1]; ++i) written += texts[i].max_written();
        uint8_t* free = scratch.with_room(written);
        for (size_t i = borders[task]; i < borders[task + 1]; ++i) push_words(scanner, to_utf8(texts[i], free), words);
        if (written != 0) words.flush();  // the next task writes over them
      }
      words.finish();
    });
  });
}

namespace {

// Whole lines of about kTaskBytes, or one longer line.
struct LineTask {
  std::string_view lines;
  uint64_t first_number;
};

// num_lines: set to the number of all lines.
std::vector<LineTask> line_tasks(const std::vector<std::string_view>& blocks, int num_threads, uint64_t& num_lines) {
  std::vector<LineTask> tasks;
  size_t num_left = 0;
  for (const std::string_view block : blocks) num_left += block.size();
  num_lines = 0;
  for (const std::string_view block : blocks) {
    const char* begin = block.data();
    const char* const end = begin + block.size();
    uint64_t first = num_lines;
    for (const char* p = begin; p < end;) {
      p = static_cast<const char*>(std::memchr(p, '\n', size_t(end - p))) + 1;
      ++num_lines;
      const auto size = size_t(p - begin);
      if (size < task_bytes(num_left, num_threads) && p < end) continue;
      tasks.push_back({{begin, size}, first});
      num_left -= size;
      begin = p;
      first = num_lines;
    }
  }
  return tasks;
}

// Counts the lines of one task; those that are left go to `others`. Texts without escapes stay where they are, the
// others lie in the scratch until the words are in the table.
template <typename Scanner>
void count_task(const LineTask& task, std::string_view key, const Scanner& scanner, Scratch& scratch,
                GroupedWords& words, std::vector<OtherLine>& others) {
  char* free = reinterpret_cast<char*>(scratch.with_room(task.lines.size()));
  const char* p = task.lines.data();
  const char* const end = p + task.lines.size();
  for (uint64_t number = task.first_number; p < end; ++number) {
    const auto* stop = static_cast<const char*>(std::memchr(p, '\n', size_t(end - p)));
    const std::string_view line(p, size_t(stop - p));
    std::string_view text;
    const JsonLine kind = text_of_json_line(line, key, free, text);
    if (kind == JsonLine::kText) push_words(scanner, text, words);
    if (kind == JsonLine::kOther) others.push_back({number, line});
    p = stop + 1;
  }
  words.flush();
}

}  // namespace

std::vector<OtherLine> count_json_lines(const std::vector<std::string_view>& blocks, std::string_view key,
                                        const Splitter& splitter, int num_threads, WordCounts& counts,
                                        uint64_t& num_lines) {
  for (const std::string_view block : blocks) {
    if (block.empty() || block.back() != '\n') throw std::invalid_argument("count_json_lines: a line must end");
  }
  num_threads = std::max(1, num_threads);
  const std::vector<LineTask> tasks = line_tasks(blocks, num_threads, num_lines);
  std::vector<std::vector<OtherLine>> others(tasks.size());
  std::atomic<size_t> next_task{0};
  splitter.visit([&](const auto& scanner) {
    parallel_for(num_threads, num_threads, [&](int64_t) {
      GroupedWords words(counts);
      Scratch scratch;
      for (size_t task; (task = next_task.fetch_add(1)) < tasks.size();) {
        count_task(tasks[task], key, scanner, scratch, words, others[task]);
      }
      words.finish();
    });
  });
  std::vector<OtherLine> all;
  for (const auto& some : others) all.insert(all.end(), some.begin(), some.end());
  return all;
}

}  // namespace herdkern::text
