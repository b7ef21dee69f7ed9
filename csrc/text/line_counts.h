// Exact counts of line keys in 8 bytes a slot. A key is 64 bits: bit 0 says "does not count" (a line that its document
// has already), the upper 63 are the line. Keys are spread over partitions by bits 1 to 32, so that a table may count
// the keys of a range of them alone and a file may be counted in several passes.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace herdkern::text {

// The line key as it is counted: of its bucket alone, 63 bits; bit 0 is 0.
inline uint64_t salt_line_key(uint64_t key, uint64_t salt) {
  uint64_t x = (key ^ salt) * 0xD6E8FEB86659FD93u;
  x = (x ^ (x >> 32)) * 0xE7037ED1A0B428DBu;
  return (x ^ (x >> 29)) & ~uint64_t{1};
}

// In which of num_parts equal shares of all keys it lies.
inline int64_t part_of_line_key(uint64_t key, int64_t num_parts) {
  return static_cast<int64_t>(((key >> 1) & 0xFFFFFFFFu) * static_cast<uint64_t>(num_parts) >> 32);
}

struct LineDocuments {
  const uint64_t* keys;   // (begins[num_docs],); 0 for a line that is not counted
  const int64_t* begins;  // (num_docs + 1,)
  const uint64_t* salts;  // (num_docs,)
  int64_t num_docs;
  bool by_document;  // bit 0 is set on a line that its document has already
};

// Salted keys by partition, lines of one partition in the order of the input; 0 leaves no trace.
struct PartitionedLines {
  std::vector<uint64_t> keys;
  std::vector<uint32_t> origins;  // place of each in the input
  std::vector<int64_t> begins;    // (num_partitions + 1,)
};
PartitionedLines partition_lines(const LineDocuments& documents, int64_t num_partitions);

// Open-addressing table of the keys of parts [first_part, last_part) of num_parts. 2,048 segments by the upper bits
// grow one by one by half when they are 0.8 full, so a key takes 10 to 15 bytes and growing needs no second table. A
// slot is 52 bits of the key and a count up to 4,095; what goes beyond is counted in a map, so all counts are exact.
class LineCounts {
 public:
  // num_keys: that will be added, repeats included, or 0: room is made for three tenths of them, since growing costs
  // more than counting.
  LineCounts(int64_t first_part, int64_t last_part, int64_t num_parts, int64_t num_keys);

  void add(const uint64_t* keys, int64_t size);
  // Appends the place and count of every key that was counted more than max_count times, repeats included.
  void find_frequent(const uint64_t* keys, int64_t size, int64_t max_count, std::vector<int64_t>& places,
                     std::vector<uint64_t>& counts) const;
  int64_t num_keys() const;
  int64_t num_frequent(int64_t max_count) const;
  int64_t table_bytes() const;

 private:
  static constexpr int kSegmentBits = 11, kCountBits = 12;
  static constexpr int64_t kSegments = int64_t{1} << kSegmentBits;
  static constexpr uint64_t kMaxCount = (uint64_t{1} << kCountBits) - 1;
  static constexpr uint64_t kRestMask = (uint64_t{1} << (63 - kSegmentBits)) - 1;

  struct Segment {
    std::unique_ptr<uint64_t[]> slots;  // rest of the key << kCountBits | count; 0 is empty
    uint32_t capacity = 0, size = 0;
  };

  bool is_mine(uint64_t key) const {
    const int64_t part = part_of_line_key(key, num_parts_);
    return part >= first_part_ && part < last_part_;
  }
  static uint32_t home_of(uint64_t rest, uint32_t capacity) {
    return static_cast<uint32_t>((rest >> 20) * capacity >> 32);
  }
  void prefetch(uint64_t key) const;
  void add_one(uint64_t key);
  uint64_t count_of(uint64_t key) const;
  static void grow(Segment& segment, uint32_t capacity);

  int64_t first_part_, last_part_, num_parts_;
  std::vector<Segment> segments_;
  std::unordered_map<uint64_t, uint64_t> beyond_;  // key >> 1 -> count above kMaxCount
};

}  // namespace herdkern::text
