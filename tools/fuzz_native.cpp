// Fuzz targets of the native readers, for libFuzzer: `fuzz_native READER [options] CORPUS`, started by
// fuzz_tokenizer.py. A refusal is std::invalid_argument or std::overflow_error that says something; any other
// exception, a report of a sanitizer, a second of CPU time for an input, or a property below that does not hold ends
// the run.
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "text/bpe_decode.h"
#include "text/bpe_encode.h"
#include "text/json_lines.h"
#include "text/merge_recovery.h"
#include "text/regex_parse.h"
#include "text/splitter.h"
#include "text/utf8.h"
#include "text/word_runs.h"

using namespace herdkern::text;

namespace {

#define HOLDS(condition)                                     \
  if (!(condition)) {                                        \
    std::fprintf(stderr, "does not hold: %s\n", #condition); \
    std::abort();                                            \
  }

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

bool is_utf8(std::string_view text) {
  const uint8_t* end = bytes_of(text) + text.size();
  for (const uint8_t* p = bytes_of(text); p < end;) {
    const DecodedCodePoint c = decode_utf8(p, end);
    if (c.code_point - 0xDC00u < 0x400u) return false;
    p += c.num_bytes;
  }
  return true;
}

// A line of JSON: its text is UTF-8 and lies in the line, or in the scratch and nothing behind it was touched.
void read_json_line(std::string_view line) {
  std::vector<char> scratch(line.size());
  char* free = scratch.data();
  std::string_view text;
  if (text_of_json_line(line, "text", free, text) != JsonLine::kText) {
    HOLDS(free == scratch.data());
    return;
  }
  HOLDS(is_utf8(text));
  const bool in_line = text.data() >= line.data() && text.data() + text.size() <= line.data() + line.size();
  HOLDS(in_line || (text.data() == scratch.data() && free == scratch.data() + text.size()));
}

// A split pattern, and behind NUL what is repeated to a text of some thousand bytes: its words cover the text. Making
// an automaton takes a hundred times as long as reading the pattern, so one input in 64 gets that far.
void read_pattern(std::string_view input) {
  const size_t cut = std::min(input.find('\0'), input.size());
  const std::string pattern(input.substr(0, cut));
  std::string unit(input.substr(std::min(cut + 1, input.size())));
  const auto root = parse_regex(pattern);
  HOLDS(root != nullptr);
  if (crc32(0, bytes_of(input), input.size()) % 64 != 0) return;
  const auto splitter = Splitter::from_patterns({pattern});
  if (unit.empty()) unit = "The  cat's 1234 \u00e9t\u00e9s \u4e2d\u6587\n\n\t x\xff  ";
  std::string text;
  while (text.size() < 2000) text += unit;
  const std::unique_ptr<char[]> exact(new char[text.size()]);  // so that a byte read behind it is reported
  std::memcpy(exact.get(), text.data(), text.size());
  const auto* begin = reinterpret_cast<const uint8_t*>(exact.get());
  auto cursor = splitter->cursor(begin, begin + text.size());
  const uint8_t* last = begin;
  while (const uint8_t* end = cursor.next()) {
    HOLDS(end > last);
    last = end;
  }
  HOLDS(last == begin + text.size());
}

// Tokens, a line each: parts of two are earlier tokens, or units, that make the token.
void read_tokens(std::string_view input) {
  if (input.empty()) return;
  const MergeUnit unit = input[0] & 1 ? MergeUnit::kCharacter : MergeUnit::kByte;
  input.remove_prefix(1);
  std::vector<std::string_view> tokens;
  std::set<std::string_view> seen;
  while (!input.empty()) {
    const size_t size = std::min(input.find('\n'), input.size());
    if (size > 0 && seen.insert(input.substr(0, size)).second) tokens.push_back(input.substr(0, size));
    input.remove_prefix(std::min(size + 1, input.size()));
  }
  const RecoveredMerges merges = recover_merges(tokens, unit);
  HOLDS(merges.num_parts.size() == tokens.size() && merges.pairs.size() == 2 * tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    HOLDS(merges.num_parts[i] >= 1);
    const uint32_t left = merges.pairs[2 * i], right = merges.pairs[2 * i + 1];
    if (left == kNoToken || right == kNoToken) continue;
    HOLDS(merges.num_parts[i] == 2 && left < tokens.size() && right < tokens.size());
    HOLDS(std::string(tokens[left]) + std::string(tokens[right]) == tokens[i]);
  }
}

// A file in memory that holds what it is given.
class MemoryFile {
 public:
  explicit MemoryFile(const char* name) : descriptor_(memfd_create(name, 0)) {
    file_ = std::make_shared<File>(descriptor_, true, name);
  }
  void hold(const std::string& content) {
    if (ftruncate(descriptor_, 0) != 0) std::abort();
    file_->write_at(0, content.data(), content.size());
    size_ = content.size();
  }
  Run run(uint64_t weight = 1) const { return {file_, "", 0, size_, weight, 0}; }
  const File& file() const { return *file_; }
  std::shared_ptr<const File> shared() const { return file_; }

 private:
  int descriptor_;
  std::shared_ptr<const File> file_;
  uint64_t size_ = 0;
};

// The blocks with the lengths and checksums that they should have: checksums hide all else.
std::string with_checksums(std::string_view run) {
  std::string result;
  while (run.size() >= 8) {
    uint32_t size = 0;
    std::memcpy(&size, run.data(), 4);
    size = std::min<uint32_t>(size, uint32_t(run.size()) - 8);
    const uint32_t check = crc32(0, bytes_of(run) + 8, size);
    result.append(reinterpret_cast<const char*>(&size), 4);
    result.append(reinterpret_cast<const char*>(&check), 4);
    result += run.substr(8, size);
    run.remove_prefix(8 + size);
  }
  return result;
}

// Words of a run rise and have counts; a merge of two such runs reads as one.
void read_run(const std::string& content) {
  static MemoryFile input("run"), output("merged");
  static const std::string folder = "/tmp";
  input.hold(content);
  RunReader reader(input.run());
  std::string last;
  unsigned __int128 sum = 0;
  for (bool first = true; reader.next(); first = false) {
    HOLDS(reader.count() > 0);
    HOLDS(first || std::string(reader.word()) > last);
    last = reader.word();
    sum += uint64_t(reader.count());
  }
  HOLDS(reader.totals().num_occurrences == sum);
  MergeLimits limits;
  limits.folder = folder;
  limits.max_bytes = 1 << 20;
  output.hold("");
  const RunTotals totals = merge_runs({input.run(), input.run(2)}, 2, limits, output.file(), 0, [](uint64_t) {});
  RunReader merged(Run{output.shared(), "", 0, totals.num_bytes, 1, 0});
  while (merged.next()) {
  }
  HOLDS(merged.totals().num_occurrences == totals.num_occurrences && merged.totals().check == totals.check);
}

// The first byte chooses a pattern. The masks of that pattern and its automaton cut the bytes alike; ids decode to
// them.
struct Vocabularies {
  struct One {
    std::shared_ptr<const Splitter> masks, automaton;
    std::unique_ptr<Encoder> encoder;
  };
  std::vector<std::string> strings;
  TokenList tokens, special{{"<|end|>", 400}, {"<|e", 401}};
  std::vector<One> all;
  std::unique_ptr<Decoder> decoder;

  Vocabularies() {
    for (int byte = 0; byte < 256; ++byte) strings.emplace_back(1, char(byte));
    for (const char* token : {"ab", "abab", " t", "th", " th", "  ", "    ", "\n\n", "\u00e9", "aa", "aaaa", "'s",
                              "aaaaaaaa", "aaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "12", "123"})
      strings.emplace_back(token);
    for (size_t i = 0; i < strings.size(); ++i) tokens.emplace_back(strings[i], uint32_t(i));
    for (const auto& [name, patterns] : Splitter::all_named()) {
      std::vector<std::string> grouped;
      for (const std::string& pattern : patterns) grouped.push_back("(?:" + pattern + ")");
      One one{Splitter::named(name), Splitter::from_patterns(grouped), nullptr};
      one.encoder = std::make_unique<Encoder>(tokens, special, one.masks, size_t(1) << 17);
      all.push_back(std::move(one));
    }
    TokenList both = tokens;
    both.insert(both.end(), special.begin(), special.end());
    decoder = std::make_unique<Decoder>(both);
  }
};

void read_text(std::string_view input) {
  static const Vocabularies texts;
  if (input.empty()) return;
  const Vocabularies::One& one = texts.all[uint8_t(input[0]) % texts.all.size()];
  const bool with_special = input[0] & 0x40;
  input.remove_prefix(1);
  const uint8_t* begin = bytes_of(input);
  auto masks = one.masks->cursor(begin, begin + input.size());
  auto automaton = one.automaton->cursor(begin, begin + input.size());
  for (;;) {
    const uint8_t* end = masks.next();
    HOLDS(end == automaton.next());
    if (end == nullptr) break;
  }
  herdkern::text::Texts given{{input}, {}, {}};
  given.special.all = with_special;
  IdBuffer ids;
  one.encoder->encode(given, ids);
  const size_t size = texts.decoder->num_bytes(ids.data(), ids.size());
  HOLDS(size == input.size());
  const std::unique_ptr<char[]> decoded(new char[size + 1]);
  texts.decoder->decode(ids.data(), ids.size(), decoded.get(), size);
  HOLDS(std::memcmp(decoded.get(), input.data(), size) == 0);
  int64_t count = 0;
  one.encoder->count_batch(given, 1, &count);
  HOLDS(count == int64_t(ids.size()));
  if (crc32(0, begin, input.size()) % 64 != 0) return;
  given.part_bytes = std::max<size_t>(16, input.size() / 64);  // two threads, and parts of a few words
  IdBuffer again;
  int64_t offsets[2];
  one.encoder->encode_batch(given, 2, again, offsets);
  HOLDS(again.size() == ids.size() && offsets[1] == count);
  HOLDS(std::memcmp(again.data(), ids.data(), ids.size() * sizeof(uint32_t)) == 0);
}

void read_runs(std::string_view input) {
  const std::string repaired = with_checksums(input);
  try {
    read_run(std::string(input));
  } catch (const std::invalid_argument& error) {
    HOLDS(*error.what() != '\0');
  } catch (const std::overflow_error& error) {
    HOLDS(*error.what() != '\0');
  }
  read_run(repaired);
}

constexpr struct {
  const char* name;
  void (*read)(std::string_view);
} kReaders[] = {
    {"json_lines", read_json_line}, {"patterns", read_pattern}, {"merges", read_tokens}, {"runs", read_runs},
    {"texts", read_text},
};
void (*reader)(std::string_view) = nullptr;

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments) {
  for (const auto& one : kReaders) {
    if (*count > 1 && std::strcmp((*arguments)[1], one.name) == 0) reader = one.read;
  }
  if (reader == nullptr) {
    std::fprintf(stderr, "fuzz_native: the first argument must be a reader\n");
    std::exit(2);
  }
  for (int i = 1; i + 1 < *count; ++i) (*arguments)[i] = (*arguments)[i + 1];
  --*count;
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // CPU time, not the clock on the wall: a machine that does something else is no hang. SIGPROF ends an endless loop.
  const itimerval limit{{0, 0}, {20, 0}};
  setitimer(ITIMER_PROF, &limit, nullptr);
  const clock_t begin = std::clock();
  try {
    reader({reinterpret_cast<const char*>(data), size});
  } catch (const std::invalid_argument& error) {
    HOLDS(*error.what() != '\0');
  } catch (const std::overflow_error& error) {
    HOLDS(*error.what() != '\0');
  }
  const double seconds = double(std::clock() - begin) / CLOCKS_PER_SEC;
  if (seconds > 1) std::fprintf(stderr, "%zu bytes took %.1f s\n", size, seconds);
  HOLDS(seconds <= 1);
  return 0;
}
