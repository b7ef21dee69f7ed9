// The merge loop of training: see bpe_train.h for what it computes, bpe_train_words.h and bpe_train_index.h for how
// words and pairs are held.
#include "text/bpe_train.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "text/bpe_train_index.h"
#include "text/parallel.h"

namespace herdkern::text {

namespace {

constexpr int kPrefetch = 8;
constexpr int kMaxThreads = 16;             // each holds two numbers a token
constexpr size_t kParallelMerge = 1 << 14;  // occurrences from which a merge is worth more threads
constexpr int64_t kFixedMemory = 48 << 20;  // pairs, heap, buckets and the scratch of one thread
constexpr int64_t kThresholdStep = 8;       // where a guess was too high

// What one merge does to the pairs that its occurrences make with one neighbour.
struct Change {
  int64_t weight = 0;  // of the pair lost and, if it is allowed, of the pair gained
  uint32_t num_occurrences = 0;
  uint32_t pair = kNone;  // where the gained pair went, kNone if it is too rare
};

// The neighbours on one side of the occurrences of a merge.
struct Side {
  std::vector<Change> changes;                             // by symbol
  std::vector<uint32_t> symbols;                           // those with a change
  std::vector<std::pair<uint32_t, uint32_t>> occurrences;  // (neighbour, slot of the gained pair)

  void note(uint32_t neighbour, int64_t weight, uint32_t slot) {
    Change& change = changes[neighbour];
    if (change.num_occurrences++ == 0) symbols.push_back(neighbour);
    change.weight += weight;
    occurrences.emplace_back(neighbour, slot);
  }
  // Takes over the changes of another part of the words, not the occurrences.
  void take_changes(Side& other) {
    for (const uint32_t symbol : other.symbols) {
      Change& change = changes[symbol];
      if (change.num_occurrences == 0) symbols.push_back(symbol);
      change.weight += other.changes[symbol].weight;
      change.num_occurrences += other.changes[symbol].num_occurrences;
      other.changes[symbol] = Change{};
    }
    other.symbols.clear();
  }
  void reset() {
    for (const uint32_t symbol : symbols) changes[symbol] = Change{};
    symbols.clear();
    occurrences.clear();
  }
};

struct Sides {
  Side before, after;
};

// An estimate of the share of the work that is done; work is symbols merged away.
class Progress {
 public:
  // At most num_symbols can be merged away.
  Progress(size_t num_symbols, int64_t max_new_tokens) : left_(int64_t(num_symbols)), max_new_tokens_(max_new_tokens) {}

  void add(int64_t num_replaced) {
    ++num_tokens_;
    done_ += num_replaced;
    left_ -= num_replaced;
    const double window = std::max(16.0, double(num_tokens_) / 8);
    recent_ += (double(num_replaced) - recent_) / std::min(double(num_tokens_), window);
  }
  // The k-th merge replaces about c / k occurrences (Zipf), so those to come replace c ln(wanted / k).
  double share() const {
    const double k = std::max<double>(1, double(num_tokens_));
    const double to_come = recent_ * k * std::log(std::max(1.0, double(max_new_tokens_) / k));
    return double(done_) / std::max(1.0, double(done_) + std::min(double(left_), to_come));
  }

 private:
  int64_t left_, max_new_tokens_, num_tokens_ = 0, done_ = 0;
  double recent_ = 0;  // mean replaced by the last merges
};

size_t num_symbols(const TrainOptions& options) { return options.tokens.size() + size_t(options.max_new_tokens) + 1; }

// Scratch of a thread.
int64_t thread_memory(const TrainOptions& options) { return int64_t(2 * sizeof(Change) * num_symbols(options)); }

class Trainer {
 public:
  Trainer(const WordStream& words, const TrainOptions& options);
  std::vector<Merge> run(const std::function<void(double)>& progress);

 private:
  bool rebuild(bool lower);
  bool merge(const Candidate& top);
  size_t replace(const Candidate& pair, uint32_t token);
  template <typename Symbol>
  size_t replace_range(Symbol* symbols, const Candidate& pair, uint32_t token, const uint32_t* begin,
                       const uint32_t* end, Sides& sides) const;
  template <typename Symbol>
  std::vector<size_t> cut_occurrences(const Symbol* symbols, const uint32_t* occurrences, size_t size) const;
  bool update_index(uint32_t left, uint32_t right, uint32_t token);
  template <typename PairOf>
  void gain_pairs(Side Sides::* which, PairOf&& pair_of);
  const std::string& spelling(uint32_t token) const {
    return token < options_.tokens.size() ? options_.tokens[token] : spellings_[token - options_.tokens.size()];
  }
  static int affordable_threads(const TrainOptions& options);
  int64_t fixed_memory() const;
  size_t max_slots() const;
  size_t room() const;

  const TrainOptions& options_;
  const int num_threads_;
  const int64_t min_frequency_;
  const bool spells_;  // whether a pair may spell a token that exists or is vetoed
  TrainWords words_;
  std::vector<uint32_t> lengths_;                       // bytes of each token
  std::vector<uint32_t> widths_;                        // slots of each token
  std::vector<std::string> spellings_;                  // of new tokens, and ...
  std::unordered_map<std::string, uint32_t> token_of_;  // ... of all: kept when spells_
  PairIndex index_;
  std::vector<Sides> sides_;  // scratch of one merge, for each thread
  std::vector<Merge> merges_;
  Progress progress_;
  int64_t num_new_tokens_ = 0;
  uint32_t alias_ = kNone, original_ = kNone;  // what the last merge made if it spelled a token that existed, and that
};

Trainer::Trainer(const WordStream& words, const TrainOptions& options)
    : options_(options),
      num_threads_(affordable_threads(options)),
      min_frequency_(std::max<int64_t>(1, options.min_frequency)),
      spells_(options.segment != nullptr || !options.vetoed.empty()),
      words_(words, options.tokens.size() >= kInside<uint16_t>, max_slots()),
      widths_(options.tokens.size(), 1),
      index_(words_, lengths_, options.max_token_length ? options.max_token_length : UINT32_MAX, num_threads_),
      sides_(size_t(num_threads_)),
      progress_(words_.num_slots(), options.max_new_tokens) {
  uint32_t byte_ids[256] = {};
  for (size_t id = 0; id < options.tokens.size(); ++id) {
    const std::string& token = options.tokens[id];
    lengths_.push_back(uint32_t(token.size()));
    if (token.size() == 1) byte_ids[uint8_t(token[0])] = uint32_t(id);
    if (spells_) token_of_.emplace(token, uint32_t(id));
  }
  if (options.segment) {
    words_.segment(options.segment, num_threads_);
    words_.compact(widths_, kNone, kNone);
  } else {
    words_.name_bytes(byte_ids);
  }
  for (Sides& sides : sides_) {
    sides.before.changes.resize(num_symbols(options));
    sides.after.changes.resize(num_symbols(options));
  }
}

// Those whose scratch takes at most a sixteenth of the memory; one is always there. Which words fit does not depend on
// it.
int Trainer::affordable_threads(const TrainOptions& options) {
  const int wanted = std::clamp(options.num_threads, 1, kMaxThreads);
  if (options.max_memory == 0) return wanted;
  return int(std::clamp<int64_t>(1 + options.max_memory / 16 / thread_memory(options), 1, wanted));
}

// What does not grow with the words.
int64_t Trainer::fixed_memory() const { return kFixedMemory + (num_threads_ - 1) * thread_memory(options_); }

// Symbols and borders that max_memory has room for: each needs two or four bytes and as much as an occurrence.
size_t Trainer::max_slots() const {
  constexpr size_t kMost = kInside<uint32_t>;
  if (options_.max_memory == 0) return kMost;
  const bool wide = options_.tokens.size() >= kInside<uint16_t>;
  return std::min(kMost, size_t(std::max<int64_t>(0, options_.max_memory - kFixedMemory)) / (wide ? 8 : 6));
}

// How many occurrences the index may hold.
size_t Trainer::room() const {
  const size_t most = 2 * words_.num_slots() + 64;  // half for the pairs of a scan, half for theirs
  if (options_.max_memory == 0) return most;
  const auto left = std::max<int64_t>(0, options_.max_memory - fixed_memory() - int64_t(words_.memory()));
  return std::min(most, size_t(left) / sizeof(uint32_t));
}

// Scans the words for the pairs to merge next; false if none is frequent enough. `lower`: those above the threshold
// are used up.
bool Trainer::rebuild(bool lower) {
  if (!merges_.empty()) words_.compact(widths_, alias_, original_);
  if (alias_ != kNone) {
    lengths_.pop_back();
    widths_.pop_back();
    alias_ = kNone;
  }
  std::fill(widths_.begin(), widths_.end(), 1);
  if (!words_.fits(uint32_t(lengths_.size()))) words_.widen();
  int64_t threshold = index_.threshold();
  const int64_t top = index_.scan();
  if (lower) {
    // By Zipf's law the last merge's frequency is about top * done / wanted: with half of that one scan is enough.
    const double share = std::max(1.0, double(num_new_tokens_)) / double(options_.max_new_tokens) / 2;
    threshold = std::max(min_frequency_, std::min(threshold / 2, int64_t(double(top) * share)));
  }
  for (;; threshold = std::max(min_frequency_, threshold / kThresholdStep)) {
    index_.build(threshold, room());
    if (!index_.empty() || threshold <= min_frequency_) break;
  }
  index_.forget_scan();
  return !index_.empty();
}

std::vector<Merge> Trainer::run(const std::function<void(double)>& progress) {
  bool more = options_.max_new_tokens > 0 && rebuild(true);
  while (more && num_new_tokens_ < options_.max_new_tokens) {
    if (!words_.fits(uint32_t(lengths_.size()))) {
      more = rebuild(false);
      continue;
    }
    const Candidate top = index_.pop();
    if (top.pair == kNone) {
      more = index_.threshold() > min_frequency_ && rebuild(true);
    } else if (!merge(top)) {
      rebuild(false);
    }
    if (merges_.size() % 64 == 0) progress(progress_.share());
  }
  return std::move(merges_);
}

// False if the index lacks pairs that this merge made.
bool Trainer::merge(const Candidate& top) {
  const auto token = uint32_t(lengths_.size());
  uint32_t id = token;
  if (spells_) {
    std::string bytes = spelling(top.left) + spelling(top.right);
    if (options_.vetoed.count(bytes) != 0) {
      index_.forget(top.pair);
      return true;
    }
    const auto [known, is_new] = token_of_.emplace(bytes, token);
    id = known->second;
    if (is_new) spellings_.push_back(std::move(bytes));
  }
  lengths_.push_back(lengths_[top.left] + lengths_[top.right]);
  widths_.push_back(widths_[top.left] + widths_[top.right]);
  merges_.push_back({top.left, top.right, id});
  const size_t num_replaced = replace(top, token);
  index_.forget(top.pair);
  if (id == token) {
    ++num_new_tokens_;
    progress_.add(int64_t(num_replaced));
    return update_index(top.left, top.right, token);
  }
  // The pairs of a token that existed can grow, which the index does not allow for.
  for (Sides& sides : sides_) sides.before.reset(), sides.after.reset();
  alias_ = token;
  original_ = id;
  return false;
}

size_t Trainer::replace(const Candidate& top, uint32_t token) {
  const Pair& pair = index_.pair(top.pair);
  const uint32_t* occurrences = index_.occurrences(pair);
  return words_.with_symbols([&](auto* symbols) {
    if (num_threads_ == 1 || pair.num_occurrences < kParallelMerge) {
      return replace_range(symbols, top, token, occurrences, occurrences + pair.num_occurrences, sides_[0]);
    }
    const std::vector<size_t> borders = cut_occurrences(symbols, occurrences, pair.num_occurrences);
    std::vector<size_t> num_replaced(borders.size() - 1);
    parallel_for(int64_t(num_replaced.size()), num_threads_, [&](int64_t part) {
      num_replaced[size_t(part)] = replace_range(symbols, top, token, occurrences + borders[size_t(part)],
                                                 occurrences + borders[size_t(part) + 1], sides_[size_t(part)]);
    });
    return std::accumulate(num_replaced.begin(), num_replaced.end(), size_t(0));
  });
}

// Where to cut a list of occurrences into num_threads_ parts: between words, so that the parts share no slot.
template <typename Symbol>
std::vector<size_t> Trainer::cut_occurrences(const Symbol* symbols, const uint32_t* occurrences, size_t size) const {
  std::vector<size_t> borders{0};
  for (int part = 1; part < num_threads_; ++part) {
    size_t cut = std::max(borders.back(), size * size_t(part) / size_t(num_threads_));
    const auto same_word = [&](size_t i) {
      const Symbol *begin = symbols + occurrences[i - 1], *end = symbols + occurrences[i];
      return std::find(begin, end, kBorder<Symbol>) == end;
    };
    while (cut > 0 && cut < size && same_word(cut)) ++cut;
    borders.push_back(cut);
  }
  borders.push_back(size);
  return borders;
}

template <typename Symbol>
size_t Trainer::replace_range(Symbol* symbols, const Candidate& pair, uint32_t token, const uint32_t* begin,
                              const uint32_t* end, Sides& sides) const {
  const Symbol left = Symbol(pair.left), right = Symbol(pair.right);
  const uint32_t left_width = widths_[pair.left], width = widths_[token];
  size_t group = 0, num_replaced = 0;
  for (const uint32_t* at = begin; at < end; ++at) {
    if (at + kPrefetch < end) __builtin_prefetch(symbols + at[kPrefetch], 1);
    const uint32_t slot = *at;
    Symbol* first = symbols + slot;
    if (*first != left || first[left_width] != right) continue;
    const int64_t weight = words_.weight_at(slot, group);
    const Symbol before = first[-1], after = first[width];
    if (before != kBorder<Symbol>) sides.before.note(before, weight, slot - widths_[before]);
    if (after != kBorder<Symbol>) sides.after.note(after, weight, slot);
    first[left_width - 1] = first[left_width] = kInside<Symbol>;
    first[0] = first[width - 1] = Symbol(token);
    ++num_replaced;
  }
  return num_replaced;
}

// Pairs of the merged symbols with a neighbour become rarer, those of the token with it are new; false if there is no
// room for them. In a run of merges ("abab") the first notes (token, left) as gained and the second, whose left
// neighbour is the new token, notes it as lost: the two are netted here.
bool Trainer::update_index(uint32_t left, uint32_t right, uint32_t token) {
  auto& [before, after] = sides_[0];
  for (size_t i = 1; i < sides_.size(); ++i) {
    before.take_changes(sides_[i].before);
    after.take_changes(sides_[i].after);
  }
  for (const uint32_t symbol : before.symbols) index_.lose(pair_key(symbol, left), before.changes[symbol].weight);
  for (const uint32_t symbol : after.symbols) index_.lose(pair_key(right, symbol), after.changes[symbol].weight);
  after.changes[left].weight -= before.changes[token].weight;
  size_t num_gained = 0;
  for (const Side* side : {&before, &after}) {
    for (const uint32_t symbol : side->symbols) {
      if (side->changes[symbol].weight >= index_.threshold()) num_gained += side->changes[symbol].num_occurrences;
    }
  }
  const bool has_room = index_.has_room(num_gained);
  if (has_room) {
    gain_pairs(&Sides::before, [token](uint32_t symbol) { return std::pair(symbol, token); });
    gain_pairs(&Sides::after, [token](uint32_t symbol) { return std::pair(token, symbol); });
  }
  for (Sides& sides : sides_) sides.before.reset(), sides.after.reset();
  return has_room;
}

// pair_of(neighbour): the pair that it makes with the new token.
template <typename PairOf>
void Trainer::gain_pairs(Side Sides::* which, PairOf&& pair_of) {
  Side& all = sides_[0].*which;
  for (const uint32_t symbol : all.symbols) {
    Change& change = all.changes[symbol];
    const auto [left, right] = pair_of(symbol);
    if (change.weight < index_.threshold() || !index_.allows(left, right)) continue;
    change.pair = index_.add(left, right, change.weight, change.num_occurrences);
  }
  for (const Sides& sides : sides_) {  // parts of the words in their order
    for (const auto& [symbol, slot] : (sides.*which).occurrences) {
      if (all.changes[symbol].pair != kNone) index_.add_occurrence(all.changes[symbol].pair, slot);
    }
  }
}

}  // namespace

std::vector<Merge> train_merges(const WordStream& words, const TrainOptions& options,
                                const std::function<void(double)>& progress) {
  return Trainer(words, options).run(progress);
}

}  // namespace herdkern::text
