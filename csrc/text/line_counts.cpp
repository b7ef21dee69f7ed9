#include "text/line_counts.h"

#include <algorithm>

namespace herdkern::text {

namespace {

// Which of one document's keys came before; kept small by clearing only what a document used.
class SeenKeys {
 public:
  // Forgets everything and makes room for num_keys.
  void start(int64_t num_keys) {
    size_t capacity = 16;
    while (capacity < 2 * static_cast<size_t>(num_keys)) capacity *= 2;
    if (slots_.size() < capacity) slots_.resize(capacity);
    std::fill(slots_.begin(), slots_.begin() + static_cast<int64_t>(capacity), 0);
    mask_ = capacity - 1;
  }
  // True if the key, which is not 0, came before.
  bool add(uint64_t key) {
    for (size_t at = (key >> 17) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at] == key) return true;
      if (slots_[at] == 0) {
        slots_[at] = key;
        return false;
      }
    }
  }

 private:
  std::vector<uint64_t> slots_;
  size_t mask_ = 0;
};

constexpr int kAhead = 32;  // keys whose slots are fetched while earlier ones are worked on

}  // namespace

PartitionedLines partition_lines(const LineDocuments& documents, int64_t num_partitions) {
  const int64_t num_lines = documents.begins[documents.num_docs];
  std::vector<uint64_t> salted(static_cast<size_t>(num_lines));
  std::vector<int64_t> next(static_cast<size_t>(num_partitions) + 1, 0);
  SeenKeys seen;
  for (int64_t doc = 0; doc < documents.num_docs; ++doc) {
    const int64_t begin = documents.begins[doc], end = documents.begins[doc + 1];
    if (documents.by_document) seen.start(end - begin);
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t raw = documents.keys[i];
      if (raw == 0) continue;
      uint64_t key = salt_line_key(raw, documents.salts[doc]);
      if (key == 0) key = 2;
      ++next[part_of_line_key(key, num_partitions) + 1];
      if (documents.by_document && seen.add(key)) key |= 1;
      salted[i] = key;
    }
  }
  for (int64_t p = 0; p < num_partitions; ++p) next[p + 1] += next[p];
  PartitionedLines out;
  out.begins = next;
  out.keys.resize(static_cast<size_t>(next[num_partitions]));
  out.origins.resize(out.keys.size());
  for (int64_t i = 0; i < num_lines; ++i) {
    if (salted[i] == 0) continue;
    const int64_t place = next[part_of_line_key(salted[i], num_partitions)]++;
    out.keys[place] = salted[i];
    out.origins[place] = static_cast<uint32_t>(i);
  }
  return out;
}

LineCounts::LineCounts(int64_t first_part, int64_t last_part, int64_t num_parts, int64_t num_keys)
    : first_part_(first_part), last_part_(last_part), num_parts_(num_parts), segments_(kSegments) {
  const int64_t expected = num_keys / kSegments * 3 / 10 * 5 / 4;
  if (expected >= 8)
    for (Segment& segment : segments_) grow(segment, static_cast<uint32_t>(expected));
}

void LineCounts::grow(Segment& segment, uint32_t capacity) {
  auto slots = std::make_unique<uint64_t[]>(capacity);
  for (uint32_t i = 0; i < segment.capacity; ++i) {
    const uint64_t slot = segment.slots[i];
    if (slot == 0) continue;
    uint32_t at = home_of(slot >> kCountBits, capacity);
    while (slots[at]) at = at + 1 == capacity ? 0 : at + 1;
    slots[at] = slot;
  }
  segment.slots = std::move(slots);
  segment.capacity = capacity;
}

void LineCounts::prefetch(uint64_t key) const {
  const uint64_t line = key >> 1;
  const Segment& segment = segments_[line >> (63 - kSegmentBits)];
  if (segment.capacity) __builtin_prefetch(&segment.slots[home_of(line & kRestMask, segment.capacity)]);
}

void LineCounts::add_one(uint64_t key) {
  const uint64_t line = key >> 1, rest = line & kRestMask;
  Segment& segment = segments_[line >> (63 - kSegmentBits)];
  if (uint64_t{segment.size} * 5 >= uint64_t{segment.capacity} * 4)
    grow(segment, std::max<uint32_t>(8, segment.capacity + segment.capacity / 2));
  uint32_t at = home_of(rest, segment.capacity);
  for (;; at = at + 1 == segment.capacity ? 0 : at + 1) {
    uint64_t& slot = segment.slots[at];
    if (slot == 0) {
      slot = rest << kCountBits | 1;
      ++segment.size;
      return;
    }
    if (slot >> kCountBits != rest) continue;
    if ((slot & kMaxCount) == kMaxCount) {
      ++beyond_[line];
    } else {
      ++slot;
    }
    return;
  }
}

uint64_t LineCounts::count_of(uint64_t key) const {
  const uint64_t line = key >> 1, rest = line & kRestMask;
  const Segment& segment = segments_[line >> (63 - kSegmentBits)];
  if (segment.capacity == 0) return 0;
  for (uint32_t at = home_of(rest, segment.capacity);; at = at + 1 == segment.capacity ? 0 : at + 1) {
    const uint64_t slot = segment.slots[at];
    if (slot == 0) return 0;
    if (slot >> kCountBits != rest) continue;
    const uint64_t count = slot & kMaxCount;
    if (count < kMaxCount) return count;
    const auto found = beyond_.find(line);
    return count + (found == beyond_.end() ? 0 : found->second);
  }
}

void LineCounts::add(const uint64_t* keys, int64_t size) {
  const bool all = first_part_ == 0 && last_part_ == num_parts_;
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) prefetch(keys[i + kAhead]);
    if ((keys[i] & 1) == 0 && (all || is_mine(keys[i]))) add_one(keys[i]);
  }
}

void LineCounts::find_frequent(const uint64_t* keys, int64_t size, int64_t max_count, std::vector<int64_t>& places,
                               std::vector<uint64_t>& counts) const {
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) prefetch(keys[i + kAhead]);
    if (!is_mine(keys[i])) continue;
    const uint64_t count = count_of(keys[i]);
    if (count <= static_cast<uint64_t>(max_count)) continue;
    places.push_back(i);
    counts.push_back(count);
  }
}

int64_t LineCounts::num_keys() const {
  int64_t total = 0;
  for (const Segment& segment : segments_) total += segment.size;
  return total;
}

int64_t LineCounts::num_frequent(int64_t max_count) const {
  if (max_count >= static_cast<int64_t>(kMaxCount)) {
    int64_t total = 0;
    for (const auto& [line, above] : beyond_) total += static_cast<int64_t>(kMaxCount + above) > max_count;
    return total;
  }
  int64_t total = 0;
  for (const Segment& segment : segments_)
    for (uint32_t i = 0; i < segment.capacity; ++i)
      total += static_cast<int64_t>(segment.slots[i] & kMaxCount) > max_count;
  return total;
}

int64_t LineCounts::table_bytes() const {
  int64_t bytes = 0;
  for (const Segment& segment : segments_) bytes += segment.capacity * 8 + 32;
  return bytes;
}

}  // namespace herdkern::text
