// The newest record of every URL, in 20 bytes a slot. Records lie in files ("pieces", one per shard) and are numbered
// through all of them; the table holds 96 bits of the key and the number of the best record so far. What decides is
// read from the files when a key is met again.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/url_keys.h"

namespace herdkern::text {

// 48 bytes, little-endian, as herdkern/dedup/urls.py writes them.
struct UrlRecord {
  uint64_t low, high;  // the key
  int64_t timestamp;
  uint32_t length, row;  // of the text in characters; of the document in its shard
  uint64_t id_prefix;    // first 8 bytes of the id, padded with zeros, as a big-endian number
  uint64_t name;         // where id and URL lie in the file of names: uint32 sizes of both, then the bytes
};
static_assert(sizeof(UrlRecord) == 48);

// What goes to the shard of a document that is dropped: the kept one's time stamp, then, behind this, its id and URL.
struct UrlDecision {
  int64_t timestamp;
  uint32_t row, id_bytes, url_bytes, zero;  // row: of the dropped document
};
static_assert(sizeof(UrlDecision) == 24);

// One shard's records of a partition.
struct UrlPiece {
  std::string records, names;  // paths
  uint32_t first, end;         // numbers of its records
};

// Reads pieces of files at random; at most 256 of the files are open.
class FileReader {
 public:
  explicit FileReader(std::vector<std::string> paths) : paths_(std::move(paths)), open_(256) {}
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;
  ~FileReader();
  // Throws std::runtime_error that names the file if it cannot be read or is too short.
  void read(size_t file, void* to, size_t size, uint64_t offset);
  // At most `size` bytes, fewer at the end of the file; returns how many.
  size_t read_some(size_t file, void* to, size_t size, uint64_t offset);

 private:
  struct Open {
    size_t file = 0;
    int descriptor = -1;
  };
  [[noreturn]] void fail(size_t file, const char* why) const;
  std::vector<std::string> paths_;
  std::vector<Open> open_;
};

// In which of num_parts equal shares of all keys it lies.
inline int64_t part_of_url_key(const UrlRecord& record, int64_t num_parts) {
  return static_cast<int64_t>((record.low >> 32) * static_cast<uint64_t>(num_parts) >> 32);
}

// Keys of parts [first_part, last_part) of num_parts; a table that is never more than 0.85 full.
class UrlTable {
 public:
  // num_records: that will enter it, at most.
  UrlTable(const std::vector<UrlPiece>& pieces, uint64_t num_records, int64_t first_part, int64_t last_part,
           int64_t num_parts);

  // The records numbered first, first + 1, ... enter the table. Throws std::runtime_error if a file cannot be read.
  void add(const UrlRecord* records, int64_t size, uint32_t first);
  // winners[i]: number of the record that stays for record i; its own if its key is not of this table's parts.
  void find(const UrlRecord* records, int64_t size, uint32_t first, uint32_t* winners) const;
  // Appends the decision that the document in `row` is dropped for the record numbered `winner`, and its names.
  void decide(uint32_t row, uint32_t winner, std::string& out);
  int64_t num_urls() const { return num_urls_; }
  int64_t table_bytes() const { return static_cast<int64_t>(slots_.size() * sizeof(Slot)); }

 private:
  struct Slot {
    uint32_t number_plus_1;  // 0: empty
    uint32_t key[3];
    uint32_t time;  // time_code of the record
  };
  struct Known {
    uint32_t number_plus_1 = 0;
    UrlRecord record{};
  };
  static constexpr uint32_t kKnown = 1 << 12;

  bool is_mine(const UrlRecord& record) const {
    const int64_t part = part_of_url_key(record, num_parts_);
    return part >= first_part_ && part < last_part_;
  }
  uint64_t home_of(const UrlRecord& r) const {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(r.high) * slots_.size() >> 64);
  }
  // The time stamp cut to 32 bits: what differs here is in the same order as the whole ones.
  static uint32_t time_code(int64_t timestamp) {
    return timestamp <= 0 ? 0 : timestamp >= 0xFFFFFFFF ? 0xFFFFFFFFu : static_cast<uint32_t>(timestamp);
  }
  static bool has_key(const Slot& slot, const UrlRecord& r) {
    return slot.key[0] == static_cast<uint32_t>(r.low) && slot.key[1] == static_cast<uint32_t>(r.high) &&
           slot.key[2] == static_cast<uint32_t>(r.high >> 32);
  }
  size_t piece_of(uint32_t number) const;
  const UrlRecord& read_record(uint32_t number);
  struct Names {
    std::string_view id, url;
  };
  // Of a record, in `memory`.
  Names read_names(uint32_t number, uint64_t name, std::string& memory);
  bool is_better(const UrlRecord& a, uint32_t a_number, const UrlRecord& b, uint32_t b_number);

  std::vector<std::pair<uint32_t, uint32_t>> numbers_;  // (first, end) of every piece
  FileReader files_;                                    // records and names of every piece
  std::vector<Slot> slots_;
  std::vector<Known> known_;  // records that were read lately
  std::string names_, other_names_;
  int64_t first_part_, last_part_, num_parts_, num_urls_ = 0;
};

}  // namespace herdkern::text
