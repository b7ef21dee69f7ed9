// Sorted runs of word counts: see word_runs.h.
#include "text/word_runs.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "text/word_counts.h"

namespace herdkern::text {

namespace {

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    tables[0][i] = crc;
  }
  for (uint32_t i = 0; i < 256; ++i) {
    for (size_t t = 1; t < 8; ++t) tables[t][i] = tables[t - 1][i] >> 8 ^ tables[0][tables[t - 1][i] & 0xFF];
  }
  return tables;
}
constexpr CrcTables kCrc = make_crc_tables();

uint32_t load32(const uint8_t* p) {
  return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}
void store32(uint8_t* p, uint32_t value) {
  for (int i = 0; i < 4; ++i) p[i] = uint8_t(value >> 8 * i);
}

uint64_t prefix_of(std::string_view word) {
  uint64_t prefix = 0;
  for (size_t i = 0; i < 8; ++i) prefix = prefix << 8 | (i < word.size() ? uint8_t(word[i]) : 0);
  return prefix;
}

// Tables of 8 bytes at a time (Intel's slicing-by-8): a run is written at memory speed, not at CRC speed.
}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size) {
  crc = ~crc;
  for (; size >= 8; data += 8, size -= 8) {
    const uint32_t low = crc ^ load32(data), high = load32(data + 4);
    crc = kCrc[7][low & 0xFF] ^ kCrc[6][low >> 8 & 0xFF] ^ kCrc[5][low >> 16 & 0xFF] ^ kCrc[4][low >> 24] ^
          kCrc[3][high & 0xFF] ^ kCrc[2][high >> 8 & 0xFF] ^ kCrc[1][high >> 16 & 0xFF] ^ kCrc[0][high >> 24];
  }
  for (; size > 0; ++data, --size) crc = crc >> 8 ^ kCrc[0][(crc ^ *data) & 0xFF];
  return ~crc;
}

File::~File() {
  if (owned_) ::close(descriptor_);
}

std::shared_ptr<const File> File::open(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw FileError(errno, path);
  return std::make_shared<const File>(descriptor, true, path);
}

std::shared_ptr<const File> File::unnamed(const std::string& folder) {
#ifdef O_TMPFILE
  const int descriptor = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor >= 0) return std::make_shared<const File>(descriptor, true, folder);
#endif
  std::string path = folder + "/runs.XXXXXX.tmp";  // a file system without O_TMPFILE
  const int named = ::mkostemps(path.data(), 4, O_CLOEXEC);
  if (named < 0) throw FileError(errno, folder);
  ::unlink(path.c_str());
  return std::make_shared<const File>(named, true, folder);
}

void File::write_at(uint64_t place, const void* data, size_t size) const {
  const auto* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::pwrite(descriptor_, p, size, off_t(place));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) throw FileError(written < 0 ? errno : ENOSPC, name_);
    p += written;
    place += uint64_t(written);
    size -= size_t(written);
  }
}

void File::read_at(uint64_t place, void* data, size_t size) const {
  auto* p = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t got = ::pread(descriptor_, p, size, off_t(place));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw FileError(errno, name_);
    if (got == 0) throw std::invalid_argument(name_ + " is damaged: it ends at byte " + std::to_string(place));
    p += got;
    place += uint64_t(got);
    size -= size_t(got);
  }
}

namespace {

void put_number(std::vector<uint8_t>& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(uint8_t(value) | 0x80);
  out.push_back(uint8_t(value));
}

}  // namespace

void RunWriter::add(std::string_view word, int64_t count) {
  size_t shared = 0;
  if (block_.size() > 8) {
    const size_t most = std::min(last_.size(), word.size());
    while (shared < most && last_[shared] == word[shared]) ++shared;
  }
  const std::string_view tail = word.substr(shared);
  put_number(block_, shared);
  put_number(block_, tail.size());
  ++totals_.num_words;
  totals_.num_occurrences += uint64_t(count);
  if (tail.size() >= kBlockBytes) {
    std::vector<uint8_t> end;
    put_number(end, uint64_t(count));
    return write_block(tail, end);
  }
  block_.insert(block_.end(), tail.begin(), tail.end());
  put_number(block_, uint64_t(count));
  last_.replace(shared, std::string::npos, tail);
  if (block_.size() - 8 >= kBlockBytes) write_block();
}

// The block is block_, tail and end.
void RunWriter::write_block(std::string_view tail, const std::vector<uint8_t>& end) {
  const size_t size = block_.size() - 8 + tail.size() + end.size();
  if (size > UINT32_MAX) throw std::length_error("word counts: a word must be shorter than 2**32 bytes");
  uint32_t crc = crc32(0, block_.data() + 8, block_.size() - 8);
  crc = crc32(crc, reinterpret_cast<const uint8_t*>(tail.data()), tail.size());
  crc = crc32(crc, end.data(), end.size());
  store32(block_.data(), uint32_t(size));
  store32(block_.data() + 4, crc);
  totals_.check = crc32(totals_.check, block_.data() + 4, 4);
  ++totals_.num_blocks;
  totals_.num_bytes += 8 + size;
  const auto put = [&](const void* data, size_t num_bytes) {
    file_.write_at(place_, data, num_bytes);
    place_ += num_bytes;
  };
  put(block_.data(), block_.size());
  put(tail.data(), tail.size());
  put(end.data(), end.size());
  block_.resize(8);
  last_.clear();
}

const RunTotals& RunWriter::finish() {
  if (block_.size() > 8) write_block();
  return totals_;
}

RunReader::RunReader(const Run& run, uint64_t* bytes_read)
    : file_(run.file ? run.file : File::open(run.path)),
      place_(run.begin),
      end_(run.end),
      weight_(run.weight),
      bytes_read_(bytes_read) {}

void RunReader::damaged(const char* what) const {
  throw std::invalid_argument(file_->name() + " is damaged: the block before byte " + std::to_string(place_) + " " +
                              what);
}

bool RunReader::read_block() {
  if (place_ == end_) return false;
  uint8_t head[8];
  if (end_ - place_ < 8) damaged("is followed by a piece of a block");
  file_->read_at(place_, head, 8);
  const uint64_t size = load32(head);
  if (size == 0 || size > end_ - place_ - 8) damaged("is followed by a block of a wrong length");
  if (block_capacity_ < size) {
    block_.reset();  // before there is another
    block_.reset(new uint8_t[size]);
    block_capacity_ = size;
  }
  file_->read_at(place_ + 8, block_.get(), size);
  place_ += 8 + size;
  if (crc32(0, block_.get(), size) != load32(head + 4)) damaged("does not match its checksum");
  totals_.check = crc32(totals_.check, head + 4, 4);
  ++totals_.num_blocks;
  if (bytes_read_ != nullptr) *bytes_read_ += 8 + size;
  p_ = block_.get();
  block_end_ = p_ + size;
  first_of_block_ = true;
  return true;
}

uint64_t RunReader::number() {
  uint64_t value = 0;
  for (int shift = 0; shift < 63 && p_ < block_end_; shift += 7) {
    value |= uint64_t(*p_ & 0x7F) << shift;
    if (*p_++ < 0x80) return value;
  }
  damaged("holds a number that is too long");
}

// A large word gets the memory it needs, and what the one before it had goes back first.
void RunReader::set_tail(size_t shared, std::string_view tail) {
  if (tail.size() >= kBlockBytes && shared + tail.size() > word_.capacity()) {
    word_.resize(shared);
    word_.shrink_to_fit();
    word_.reserve(shared + tail.size());
  }
  word_.replace(shared, std::string::npos, tail);
}

bool RunReader::next() {
  if (p_ == block_end_ && !read_block()) return false;
  const uint64_t shared = number(), rest = number();
  if (rest == 0 || rest > uint64_t(block_end_ - p_) || shared > (first_of_block_ ? 0 : word_.size())) {
    damaged("holds a word of a wrong length");
  }
  const std::string_view tail(reinterpret_cast<const char*>(p_), rest);
  const bool rises = first_of_block_ ? tail > std::string_view(word_)
                                     : shared == word_.size() || uint8_t(tail[0]) > uint8_t(word_[shared]);
  if (!rises) damaged("holds words out of order");
  set_tail(shared, tail);
  if (shared < 8) prefix_ = prefix_of(word_);
  p_ += rest;
  count_ = int64_t(number());
  if (count_ <= 0) damaged("holds a count of 0");
  totals_.num_occurrences += uint64_t(count_);
  first_of_block_ = false;
  return true;
}

template <typename Write>
void RunFile::append_run(Write&& write) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  try {
    RunWriter writer(*file_, end_);
    write(writer);
    const uint64_t begin = end_;
    end_ += writer.finish().num_bytes;
    runs_.push_back({file_, {}, begin, end_});
  } catch (...) {
    error_ = std::current_exception();
    throw;
  }
}

void RunFile::append(WordMap& map) {
  map.drain([&](auto&& words) {  // sorted before the file is taken, so that threads sort at once
    append_run(
        [&](RunWriter& writer) { words([&](std::string_view word, int64_t count) { writer.add(word, count); }); });
  });
}

void RunFile::append(std::string_view word, int64_t count) {
  append_run([&](RunWriter& writer) { writer.add(word, count); });
}

std::vector<Run> RunFile::take_runs() {
  if (error_) std::rethrow_exception(error_);
  return std::move(runs_);
}

namespace {

// The smallest of many readers, by a tree of losers: one comparison for each level when a reader moves on.
class LoserTree {
 public:
  explicit LoserTree(std::vector<RunReader>& readers)
      : readers_(readers), alive_(readers.size()), tree_(readers.size()) {
    for (size_t i = 0; i < readers.size(); ++i) alive_[i] = readers[i].next();
    winner_ = readers.empty() ? 0 : play(1);
  }
  bool empty() const { return readers_.empty() || !alive_[winner_]; }
  RunReader& top() { return readers_[winner_]; }
  void advance() {
    alive_[winner_] = readers_[winner_].next();
    for (size_t node = (winner_ + readers_.size()) / 2; node > 0; node /= 2) {
      if (wins(tree_[node], winner_)) std::swap(tree_[node], winner_);
    }
  }

 private:
  // Leaves are nodes [n, 2n), the parent of a node is its half; leaves the loser of each match below `node` in tree_.
  size_t play(size_t node) {
    const size_t n = readers_.size();
    if (node >= n) return node - n;
    const size_t left = play(2 * node), right = play(2 * node + 1);
    const bool left_wins = wins(left, right);
    tree_[node] = left_wins ? right : left;
    return left_wins ? left : right;
  }
  bool wins(size_t a, size_t b) const {
    if (!alive_[a] || !alive_[b]) return alive_[a];
    const RunReader &x = readers_[a], &y = readers_[b];
    if (x.prefix() != y.prefix()) return x.prefix() < y.prefix();
    return x.word() < y.word();
  }

  std::vector<RunReader>& readers_;
  std::vector<char> alive_;
  std::vector<size_t> tree_;
  size_t winner_ = 0;
};

// sum / denominator to the nearest whole number, a half upwards.
int64_t rounded(unsigned __int128 sum, uint64_t denominator) {
  unsigned __int128 whole = sum / denominator;
  const auto rest = uint64_t(sum % denominator);
  if (rest >= denominator - rest) ++whole;
  if (whole > INT64_MAX) throw std::overflow_error("word counts: the count of one word must stay below 2**63");
  return int64_t(whole);
}

struct Progress {
  const std::function<void(uint64_t)>& tick;
  uint64_t bytes_read = 0;
};

// One pass over runs that may all be open at a time.
RunTotals merge_once(const std::vector<Run>& runs, uint64_t denominator, const File& file, uint64_t begin,
                     Progress& progress) {
  std::vector<RunReader> readers;
  readers.reserve(runs.size());
  for (const Run& run : runs) readers.emplace_back(run, &progress.bytes_read);
  LoserTree tree(readers);
  RunWriter writer(file, begin);
  std::string word;
  for (uint64_t i = 0; !tree.empty(); ++i) {
    if (i % 65536 == 0 && progress.tick) progress.tick(progress.bytes_read);
    word.assign(tree.top().word());
    unsigned __int128 sum = 0;
    do {
      const unsigned __int128 more = (unsigned __int128)(tree.top().count()) * tree.top().weight();
      if (__builtin_add_overflow(sum, more, &sum)) {
        throw std::overflow_error("word counts: the weighted sum of one word must stay below 2**128");
      }
      tree.advance();
    } while (!tree.empty() && tree.top().word() == word);
    if (const int64_t count = rounded(sum, denominator)) writer.add(word, count);
  }
  return writer.finish();
}

// What a reader of the run holds: its largest block, a word, itself.
size_t reader_bytes(const Run& run) {
  const auto file = run.file ? run.file : File::open(run.path);
  uint64_t largest = 0;
  for (uint64_t place = run.begin; run.end - place >= 8;) {
    uint8_t head[8];
    file->read_at(place, head, 8);
    const uint64_t size = load32(head);
    if (size > run.end - place - 8) break;  // damaged: the reader says so
    largest = std::max(largest, size);
    place += 8 + size;
  }
  return std::max(kBlockBytes + 4096, size_t(2 * largest + 4096));
}

}  // namespace

RunTotals merge_runs(std::vector<Run> runs, uint64_t denominator, const MergeLimits& limits, const File& file,
                     uint64_t begin, const std::function<void(uint64_t)>& tick) {
  Progress progress{tick};
  const size_t max_files = std::max<size_t>(limits.max_files, 2);
  size_t word_bytes = 0;  // of the longest that is being summed
  for (Run& run : runs) {
    run.reader_bytes = reader_bytes(run);
    word_bytes = std::max(word_bytes, run.reader_bytes / 2);
  }
  const size_t max_bytes = limits.max_bytes - std::min(limits.max_bytes, word_bytes);
  const auto fits = [&](const std::vector<Run>& some, size_t num_files) {
    size_t num_bytes = 0;
    for (const Run& run : some) num_bytes += run.reader_bytes;
    return some.size() <= 2 || (num_bytes <= max_bytes && num_files <= max_files);
  };
  const auto num_files = [](const std::vector<Run>& all) {
    return size_t(std::count_if(all.begin(), all.end(), [](const Run& run) { return !run.file; }));
  };
  while (!fits(runs, num_files(runs))) {
    std::stable_sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.weight < b.weight; });
    const auto between = File::unnamed(limits.folder);
    std::vector<Run> merged, group;
    uint64_t place = 0;
    const bool had_files = num_files(runs) != 0;
    const auto merge_group = [&] {
      if (group.empty()) return;
      const uint64_t weight = group[0].weight;
      for (Run& run : group) run.weight = 1;
      const RunTotals totals = merge_once(group, 1, *between, place, progress);
      merged.push_back({between, {}, place, place + totals.num_bytes, weight});
      merged.back().reader_bytes = reader_bytes(merged.back());
      place += totals.num_bytes;
      group.clear();
    };
    for (Run& run : runs) {
      group.push_back(std::move(run));
      const bool full = !fits(group, num_files(group));
      if (!full && (group.size() == 1 || group[0].weight == group.back().weight)) continue;
      Run next = std::move(group.back());
      group.pop_back();
      merge_group();
      group.push_back(std::move(next));
    }
    merge_group();
    if (merged.size() == runs.size() && !had_files) {
      throw std::invalid_argument("merge_counts: max_memory must allow more readers than there are different weights");
    }
    runs = std::move(merged);
  }
  return merge_once(runs, denominator, file, begin, progress);
}

}  // namespace herdkern::text
