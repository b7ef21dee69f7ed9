// The words of training: see bpe_train_words.h.
#include "text/bpe_train_words.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "text/parallel.h"

namespace herdkern::text {

namespace {

constexpr size_t kTaskSlots = 1 << 16;  // words are segmented in runs of about this many slots

[[noreturn]] void refuse_size(const std::vector<std::pair<int64_t, uint64_t>>& slots_of_count, size_t num_slots,
                              size_t max_slots) {
  // The least count that has to go for the others to fit.
  size_t kept = 1;
  int64_t min_count = 0;
  for (const auto& [count, slots] : slots_of_count) {
    if (kept + slots > max_slots) {
      min_count = count + 1;
      break;
    }
    kept += slots;
  }
  throw std::length_error("train_bpe: the distinct words must have room in memory, which allows " +
                          std::to_string(max_slots) + " bytes of them, got " + std::to_string(num_slots) +
                          "; raise max_memory in that ratio, or drop the words that occur less than " +
                          std::to_string(min_count) + " times with WordCounts.prune");
}

}  // namespace

#ifdef __linux__
PageArray::PageArray(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
  data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    throw std::bad_alloc();
  }
#ifdef MADV_HUGEPAGE
  if (bytes_ >= size_t(4) << 20) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}
PageArray::~PageArray() {
  if (data_ != nullptr) munmap(data_, bytes_);
}
void PageArray::forget_behind(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t kept = (bytes + page - 1) / page * page;
  if (kept < bytes_) madvise(static_cast<char*>(data_) + kept, bytes_ - kept, MADV_DONTNEED);
}
#else
PageArray::PageArray(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)), data_(std::calloc(bytes_, 1)) {
  if (data_ == nullptr) throw std::bad_alloc();
}
PageArray::~PageArray() { std::free(data_); }
void PageArray::forget_behind(size_t) {}
#endif

std::vector<std::pair<int64_t, uint64_t>> PerCount::falling() const {
  std::vector<std::pair<int64_t, uint64_t>> list;
  for (const auto& [count, value] : sparse_) {
    if (value != 0) list.emplace_back(count, value);
  }
  std::sort(list.begin(), list.end(), std::greater<>());
  for (int64_t count = kDense - 1; count > 0; --count) {
    if (dense_[size_t(count)] != 0) list.emplace_back(count, dense_[size_t(count)]);
  }
  return list;
}

TrainWords::TrainWords(const WordStream& words, bool wide, size_t max_slots) : wide_(wide) {
  PerCount cursor = plan(words, max_slots);
  symbols_ = PageArray(num_slots_ * (wide ? sizeof(uint32_t) : sizeof(uint16_t)));
  with_symbols([&](auto* symbols) {
    using Symbol = std::remove_pointer_t<decltype(symbols)>;
    symbols[0] = kBorder<Symbol>;
    const auto lay_out = [&](std::string_view word, int64_t count) {
      if (word.size() < 2) return;
      uint64_t& slot = cursor[count];
      if (slot == 0 || slot + word.size() >= num_slots_) {
        throw std::runtime_error("train_bpe: the word counts must not change while they are read");
      }
      for (const char c : word) symbols[slot++] = uint8_t(c);
      symbols[slot++] = kBorder<Symbol>;
    };
    words(lay_out, true);
  });
}

// Where the words of each count begin.
PerCount TrainWords::plan(const WordStream& words, size_t max_slots) {
  PerCount place;
  int64_t total = 0;  // of all pair frequencies
  const auto add = [&](std::string_view word, int64_t count) {
    if (word.size() < 2) return;
    place[count] += word.size() + 1;
    num_slots_ += word.size() + 1;
    int64_t windows;
    if (__builtin_mul_overflow(count, int64_t(word.size() - 1), &windows) ||
        __builtin_add_overflow(total, windows, &total)) {
      throw std::overflow_error("train_bpe: the sum of word count times word length must stay below 2**63");
    }
  };
  words(add, false);
  const auto groups = place.falling();
  if (num_slots_ > max_slots) refuse_size(groups, num_slots_, max_slots);
  uint64_t begin = 1;
  for (const auto& [count, slots] : groups) {
    place[count] = begin;
    begin += slots;
    group_weight_.push_back(count);
    group_end_.push_back(uint32_t(begin));
  }
  return place;
}

void TrainWords::name_bytes(const uint32_t* byte_ids) {
  with_symbols([&](auto* symbols) {
    using Symbol = std::remove_pointer_t<decltype(symbols)>;
    for (size_t slot = 0; slot < num_slots_; ++slot) {
      if (symbols[slot] != kBorder<Symbol>) symbols[slot] = Symbol(byte_ids[symbols[slot]]);
    }
  });
}

void TrainWords::segment(const Segmenter& segment, int num_threads) {
  with_symbols([&](auto* symbols) {
    using Symbol = std::remove_pointer_t<decltype(symbols)>;
    std::vector<size_t> borders{1};  // of runs of whole words
    while (borders.back() < num_slots_) {
      size_t end = std::min(num_slots_, borders.back() + kTaskSlots);
      while (symbols[end - 1] != kBorder<Symbol>) ++end;
      borders.push_back(end);
    }
    parallel_for(int64_t(borders.size()) - 1, num_threads, [&](int64_t task) {
      segment_range(segment, symbols, borders[size_t(task)], borders[size_t(task) + 1]);
    });
  });
}

template <typename Symbol>
void TrainWords::segment_range(const Segmenter& segment, Symbol* symbols, size_t begin, size_t end) {
  std::string word;
  std::vector<uint32_t> ids;
  for (size_t slot = begin; slot < end; ++slot) {
    if (symbols[slot] != kBorder<Symbol>) {
      word.push_back(char(symbols[slot]));
      continue;
    }
    segment(word, ids);
    Symbol* out = symbols + slot - word.size();
    if (ids.size() > word.size()) throw std::length_error("train_bpe: a word must have at most one token a byte");
    for (const uint32_t id : ids) *out++ = Symbol(id);
    std::fill(out, symbols + slot, kInside<Symbol>);
    word.clear();
  }
}

void TrainWords::compact(const std::vector<uint32_t>& widths, uint32_t alias, uint32_t original) {
  num_slots_ = with_symbols([&](auto* symbols) { return compact_symbols(symbols, widths, alias, original); });
  symbols_.forget_behind(memory());
}

template <typename Symbol>
size_t TrainWords::compact_symbols(Symbol* symbols, const std::vector<uint32_t>& widths, uint32_t alias,
                                   uint32_t original) {
  size_t out = 1, word_begin = 1, group = 0, num_kept = 0, slot = 1;
  const auto end_groups = [&] {  // those whose words are all behind; an empty one is dropped
    for (; group < group_end_.size() && group_end_[group] <= slot; ++group) {
      if (out == (num_kept == 0 ? 1 : group_end_[num_kept - 1])) continue;
      group_weight_[num_kept] = group_weight_[group];
      group_end_[num_kept++] = uint32_t(out);
    }
  };
  while (slot < num_slots_) {
    const Symbol symbol = symbols[slot];
    if (symbol == kInside<Symbol>) {  // behind the ids of a segmented word
      ++slot;
    } else if (symbol != kBorder<Symbol>) {
      symbols[out++] = symbol == alias ? Symbol(original) : symbol;
      slot += widths[symbol];
    } else {
      if (out - word_begin < 2) {
        out = word_begin;
      } else {
        symbols[out++] = symbol;
      }
      word_begin = out;
      ++slot;
      end_groups();
    }
  }
  group_end_.resize(num_kept);
  group_weight_.resize(num_kept);
  return out;
}

void TrainWords::widen() {
  if (wide_) return;
  PageArray fresh(num_slots_ * sizeof(uint32_t));
  auto* to = static_cast<uint32_t*>(fresh.data());
  with_symbols([&](auto* symbols) {
    using Symbol = std::remove_pointer_t<decltype(symbols)>;
    for (size_t slot = 0; slot < num_slots_; ++slot) {
      to[slot] = symbols[slot] == kBorder<Symbol> ? kBorder<uint32_t> : uint32_t(symbols[slot]);
    }
  });
  symbols_ = std::move(fresh);
  wide_ = true;
}

}  // namespace herdkern::text
