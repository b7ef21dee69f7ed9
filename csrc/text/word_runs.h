// Sorted runs of word counts on disk, and their merging. A run is a sequence of blocks, each readable by itself:
//
//   block:  payload length (uint32, little-endian), CRC-32 of the payload (uint32, that of zlib), payload
//   entry:  bytes shared with the word before it in the block, bytes that follow, those bytes, the count
//           (all numbers as LEB128; shared is as large as it can be, and 0 for the first entry of a block)
//
// Words rise strictly in byte order. A block ends with the first entry that reaches kBlockBytes, so equal counts give
// equal bytes. A reader refuses what is cut off, altered or out of order, with the file and the place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace herdkern::text {

class WordMap;

// What the system refused: becomes Python's OSError with its number.
struct FileError : std::runtime_error {
  FileError(int number, const std::string& name) : std::runtime_error(name), number(number) {}
  int number;
};

// A file at places of the caller's choice. Everything is written and read whole, or throws FileError.
class File {
 public:
  File(int descriptor, bool owned, std::string name) : descriptor_(descriptor), owned_(owned), name_(std::move(name)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();
  static std::shared_ptr<const File> open(const std::string& path);
  // A file without a name in this folder: whatever ends the process, nothing is left behind.
  static std::shared_ptr<const File> unnamed(const std::string& folder);

  void write_at(uint64_t place, const void* data, size_t size) const;
  void read_at(uint64_t place, void* data, size_t size) const;  // std::invalid_argument if the file ends before
  const std::string& name() const { return name_; }

 private:
  int descriptor_;
  bool owned_;
  std::string name_;
};

constexpr size_t kBlockBytes = 1 << 15;

// What a run holds. check: CRC-32 over the CRCs of the blocks, 4 little-endian bytes each.
struct RunTotals {
  uint64_t num_words = 0, num_blocks = 0, num_bytes = 0;
  unsigned __int128 num_occurrences = 0;
  uint32_t check = 0;
};

// A word of a block or more is written from where it lies, no copy of it is kept.
class RunWriter {
 public:
  RunWriter(const File& file, uint64_t begin) : file_(file), place_(begin), block_(8) {}
  void add(std::string_view word, int64_t count);  // words rise strictly, counts are positive
  const RunTotals& finish();

 private:
  void write_block(std::string_view tail = {}, const std::vector<uint8_t>& end = {});
  const File& file_;
  uint64_t place_;
  std::vector<uint8_t> block_;  // with room for its head
  std::string last_;
  RunTotals totals_;
};

// Bytes [begin, end) of a file that hold blocks.
struct Run {
  std::shared_ptr<const File> file;  // empty: `path` is opened when it is read
  std::string path;
  uint64_t begin = 0, end = 0;
  uint64_t weight = 1;      // counts are multiplied by it in a merge
  size_t reader_bytes = 0;  // filled in by a merge
};

class RunReader {
 public:
  explicit RunReader(const Run& run, uint64_t* bytes_read = nullptr);
  // Goes to the next word; false at the end. Throws std::invalid_argument if the blocks are damaged.
  bool next();
  std::string_view word() const { return word_; }
  int64_t count() const { return count_; }
  uint64_t prefix() const { return prefix_; }  // the first 8 bytes as a number that sorts as they do
  uint64_t weight() const { return weight_; }
  const RunTotals& totals() const { return totals_; }  // of what was read; num_words and num_bytes are not kept

 private:
  bool read_block();
  uint64_t number();
  void set_tail(size_t shared, std::string_view tail);
  [[noreturn]] void damaged(const char* what) const;

  std::shared_ptr<const File> file_;
  uint64_t place_, end_, weight_;  // place_: of the next block
  uint64_t* bytes_read_;
  std::unique_ptr<uint8_t[]> block_;
  size_t block_capacity_ = 0;
  const uint8_t *p_ = nullptr, *block_end_ = nullptr;
  bool first_of_block_ = false;
  std::string word_;
  int64_t count_ = 0;
  uint64_t prefix_ = 0;
  RunTotals totals_;
};

// The temporary file of a counting: many runs, one after the other. Threads may append. After an error nothing more is
// taken, and no run is given away: what it should have held is lost.
class RunFile {
 public:
  explicit RunFile(const std::string& folder) : file_(File::unnamed(folder)) {}
  // Writes the words of the map as one run and empties it.
  void append(WordMap& map);
  // Writes one word as a run of its own.
  void append(std::string_view word, int64_t count);
  std::vector<Run> take_runs();
  uint64_t num_bytes() const { return end_; }

 private:
  template <typename Write>
  void append_run(Write&& write);

  std::shared_ptr<const File> file_;
  std::mutex mutex_;
  uint64_t end_ = 0;
  std::vector<Run> runs_;
  std::exception_ptr error_;  // the first
};

struct MergeLimits {
  size_t max_bytes = size_t(64) << 20;  // for the readers
  size_t max_files = 128;               // open at a time
  std::string folder;                   // for what is merged in between
};

// Merges runs into one: the counts of equal words are summed exactly, then divided by `denominator` and rounded to the
// nearest whole number, a half upwards; words of 0 are left out. More runs than the limits allow are first merged in
// groups. tick(bytes read so far) is called now and then. Throws std::overflow_error for a count of 2^63 or more.
RunTotals merge_runs(std::vector<Run> runs, uint64_t denominator, const MergeLimits& limits, const File& file,
                     uint64_t begin, const std::function<void(uint64_t)>& tick);

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size);  // as zlib's

}  // namespace herdkern::text
