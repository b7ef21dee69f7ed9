// Splitters: see splitter.h.
#include "text/splitter.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "text/regex_dfa.h"
#include "text/splitter_blocks.h"

namespace herdkern::text {

namespace {

struct MemoState : Splitter::State {
  void forget() override { memo.forget(); }
  RegexDfa::Memo memo;
};

// Any one pattern, by its automaton.
class PatternSplitter : public Splitter {
 public:
  explicit PatternSplitter(const std::string& pattern) : dfa_(pattern) {}

 protected:
  size_t fill(Progress& progress, const uint8_t** ends) const override {
    RegexDfa::Memo& memo = memo_of(progress);
    const uint64_t steps_before = memo.num_steps;
    size_t num_ends = 0;
    while (progress.place < progress.end && num_ends + 2 <= kBatch)
      num_ends += cut_one(progress, memo, ends + num_ends);
    progress.num_steps += memo.num_steps - steps_before;
    return num_ends;
  }

  static RegexDfa::Memo& memo_of(Progress& progress) {
    if (!progress.state) progress.state = std::make_unique<MemoState>();
    return static_cast<MemoState&>(*progress.state).memo;
  }

  // The next match, with what lies before it as a word of its own: one or two ends.
  size_t cut_one(Progress& progress, RegexDfa::Memo& memo, const uint8_t** ends) const {
    const uint8_t* p = progress.place;
    const uint8_t* stop = dfa_.match(progress.begin, p, progress.end, memo);
    while (stop == nullptr) {
      const uint8_t* next = dfa_.skip_gap(p + decode_utf8(p, progress.end).num_bytes, progress.end);
      memo.num_steps += size_t(next - p);
      p = next;
      if (p == progress.end) break;
      stop = dfa_.match(progress.begin, p, progress.end, memo);
    }
    size_t num_ends = 0;
    if (p != progress.place) ends[num_ends++] = p;
    if (stop != nullptr) ends[num_ends++] = stop;
    progress.place = ends[num_ends - 1];
    return num_ends;
  }

 private:
  RegexDfa dfa_;
};

// A pattern that blocks know; the automaton cuts what they leave.
class BlockSplitter : public PatternSplitter {
 public:
  BlockSplitter(const std::string& pattern, BlockPattern block_pattern)
      : PatternSplitter(pattern), scan_(find_block_scan(block_pattern)) {}

 protected:
  size_t fill(Progress& progress, const uint8_t** ends) const override {
    BlockJob job{progress.place, progress.end, ends, kBatch, char_kinds()};
    size_t num_ends = 0;
    while (progress.place < progress.end && num_ends + 65 <= kBatch) {
      job.place = progress.place;
      job.ends = ends + num_ends;
      job.capacity = kBatch - num_ends;
      num_ends += scan_(job);
      progress.place = job.place;
      if (progress.place == progress.end || num_ends + 65 > kBatch) break;
      RegexDfa::Memo& memo = memo_of(progress);
      const uint64_t steps_before = memo.num_steps;
      num_ends += cut_one(progress, memo, ends + num_ends);
      progress.num_steps += memo.num_steps - steps_before;
    }
    progress.num_steps += 64 * job.num_blocks;
    return num_ends;
  }

 private:
  BlockScan scan_;
};

// Patterns of which each cuts the words of the one before.
class SequenceSplitter : public Splitter {
 public:
  explicit SequenceSplitter(std::vector<std::shared_ptr<const Splitter>> parts) : parts_(std::move(parts)) {}
  bool begins_anywhere() const override { return false; }  // a word of the first part may be far back

 protected:
  struct Levels : State {
    struct Level {
      Cursor cursor;
      const uint8_t* next;  // where its next word begins
    };
    void forget() override { levels.clear(); }
    std::vector<std::unique_ptr<Level>> levels;  // one a part
  };

  size_t fill(Progress& progress, const uint8_t** ends) const override {
    if (!progress.state) progress.state = std::make_unique<Levels>();
    auto& levels = static_cast<Levels&>(*progress.state).levels;
    if (levels.empty()) {
      for (const auto& part : parts_) {  // all but the first have no text yet
        const uint8_t* end = levels.empty() ? progress.end : progress.begin;
        levels.emplace_back(new Levels::Level{part->cursor(progress.begin, end), progress.begin});
      }
    }
    uint64_t steps_before = 0, steps = 0;
    for (const auto& level : levels) steps_before += level->cursor.num_steps();
    size_t num_ends = 0;
    while (num_ends < kBatch && progress.place < progress.end) ends[num_ends++] = progress.place = next_word(levels);
    for (const auto& level : levels) steps += level->cursor.num_steps();
    progress.num_steps += steps - steps_before;
    return num_ends;
  }

 private:
  // The end of the last part's next word, which there is.
  static const uint8_t* next_word(std::vector<std::unique_ptr<Levels::Level>>& levels) {
    size_t at = levels.size() - 1;
    for (;;) {
      Levels::Level& level = *levels[at];
      const uint8_t* end = level.cursor.next();
      if (end == nullptr) {
        --at;  // the word above is used up
        continue;
      }
      const uint8_t* begin = std::exchange(level.next, end);
      if (++at == levels.size()) return end;
      levels[at]->cursor.reset(begin, end);
      levels[at]->next = begin;
    }
  }

  std::vector<std::shared_ptr<const Splitter>> parts_;
};

// How tiktoken 0.14 spells two patterns. Its cl100k takes white space at the end of a text as one word, newlines in it
// or not (no token of cl100k's ranks can tell); its r50k finds what GPT-2's pattern finds.
constexpr char kTiktokenCl100k[] =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s)";
constexpr char kTiktokenR50k[] = R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s)";

// DeepSeek V3's sequence as one pattern: what its first two patterns set apart (numbers, CJK) begins and ends a word
// wherever it is, so the parts of the third are told within CJK and without. Last comes what the third does not match.
constexpr char kDeepseek3Word[] =
    R"(\p{N}{1,3}|[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}\p{N}一-龥぀-ヿ]?[\p{L}\p{M}--[一-龥぀-ヿ]]+)"
    R"(|[一-龥぀-ヿ--[\p{L}\p{P}\p{S}]]?[一-龥぀-ヿ&&[\p{L}\p{M}]]+)"
    R"(| ?[\p{P}\p{S}--[一-龥぀-ヿ]]+[\r\n]*|[一-龥぀-ヿ&&[\p{P}\p{S}]]+)"
    R"(|\s*[\r\n]+|\s+(?![^\s\p{N}一-龥぀-ヿ])|\s+)"
    R"(|(?:[^\s\p{L}\p{M}\p{N}\p{P}\p{S}一-龥぀-ヿ](?![\p{L}\p{M}--[一-龥぀-ヿ]]))+)"
    R"(|(?:[一-龥぀-ヿ--[\p{L}\p{M}\p{P}\p{S}]](?![一-龥぀-ヿ&&[\p{L}\p{M}]]))+)";

// Mistral's tekken files: o200k without contractions, numbers one by one.
constexpr char kTekken[] = R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
                           R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
                           R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

std::optional<BlockPattern> block_pattern_of(const std::string& name, const std::string& pattern) {
  if (name == "llama3") return BlockPattern::kLlama3;
  if (name == "o200k") return BlockPattern::kO200k;
  if (name == "gpt2" || pattern == kTiktokenR50k) return BlockPattern::kGpt2;
  if (name == "qwen2") return BlockPattern::kQwen2;
  if (pattern == kTekken) return BlockPattern::kTekken;
  if (pattern == kTiktokenCl100k) return BlockPattern::kCl100k;
  return std::nullopt;
}

std::unique_ptr<Splitter> make_splitter(const std::string& name, const std::vector<std::string>& patterns) {
  if (patterns.size() == 1) {
    const auto block_pattern = block_pattern_of(name, patterns[0]);
    if (!block_pattern) return std::make_unique<PatternSplitter>(patterns[0]);
    return std::make_unique<BlockSplitter>(patterns[0], *block_pattern);
  }
  if (name == "deepseek3") return std::make_unique<BlockSplitter>(kDeepseek3Word, BlockPattern::kDeepseek3);
  std::vector<std::shared_ptr<const Splitter>> parts;
  for (const std::string& pattern : patterns) parts.push_back(Splitter::from_patterns({pattern}));
  return std::make_unique<SequenceSplitter>(std::move(parts));
}

}  // namespace

const std::vector<std::pair<std::string, std::vector<std::string>>>& Splitter::all_named() {
  static const std::vector<std::pair<std::string, std::vector<std::string>>> named = {
      {"llama3",
       {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+)"
        R"(|\s+(?!\S)|\s+)"}},
      {"o200k",
       {R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
        R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
        R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}},
      {"gpt2", {R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"}},
      {"qwen2",
       {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+)"
        R"(|\s+(?!\S)|\s+)"}},
      {"deepseek3",
       {R"(\p{N}{1,3})", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+)"
        R"(| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}},
  };
  return named;
}

namespace {

// With \r and \n for the characters themselves, which some files hold.
std::string escaped(const std::string& pattern) {
  std::string result;
  for (const char c : pattern) result += c == '\r' ? "\\r" : c == '\n' ? "\\n" : std::string(1, c);
  return result;
}

}  // namespace

std::shared_ptr<const Splitter> Splitter::from_patterns(const std::vector<std::string>& patterns) {
  if (patterns.empty()) throw std::invalid_argument("must be at least one pattern, got none");
  std::vector<std::string> plain;
  for (const std::string& pattern : patterns) plain.push_back(escaped(pattern));
  std::string name;
  for (const auto& [known, its_patterns] : all_named()) {
    if (plain == its_patterns) name = known;
  }
  std::unique_ptr<Splitter> splitter = make_splitter(name, plain);
  splitter->name_ = name;
  splitter->patterns_ = patterns;
  return splitter;
}

std::shared_ptr<const Splitter> Splitter::named(std::string_view name) {
  std::string names;
  for (const auto& [known, patterns] : all_named()) {
    if (name == known || (name == "cl100k" && known == "llama3")) return from_patterns(patterns);
    names += known + ", ";
  }
  throw std::invalid_argument("must be one of " + names + "cl100k, got '" + std::string(name) + "'");
}

}  // namespace herdkern::text
