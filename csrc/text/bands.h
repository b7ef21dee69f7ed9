// Banding out of core. Every document gives a record for each band: the key of the band, the document's number and 64
// bits of its signature. Records are cut by the upper bits of the key into partitions, each a file of sorted runs; the
// runs of a partition are merged, and the documents of one key are linked by star edges. Documents are numbered in the
// order in which they are to be kept, so the first of a key is the one to be kept, and nothing depends on where a
// document lies or on how many runs and partitions there are.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "text/record_file.h"

namespace herdkern::text {

struct BandRecord {
  uint64_t key, doc;
  uint64_t sketch;  // one bit of each of 64 slots: documents of Jaccard similarity J agree in about 32 (1 + J) of them

  bool operator<(const BandRecord& other) const { return key != other.key ? key < other.key : doc < other.doc; }
};

inline uint64_t partition_of(uint64_t key, uint64_t num_partitions) {  // ascending with the key
  return static_cast<uint64_t>((static_cast<unsigned __int128>(key) * num_partitions) >> 64);
}

// A file of sorted runs: the records, the begin of every run, the number of runs.
class RunFileWriter {
 public:
  RunFileWriter(const std::string& path, size_t buffer_bytes) : file_(path, buffer_bytes) {}
  void begin_run() { begins_.push_back(file_.size() / sizeof(BandRecord)); }
  void add(const BandRecord& record) { file_.add_record(record); }
  void add(const BandRecord* records, size_t count) { file_.add(records, count * sizeof(BandRecord)); }
  void flush() { file_.flush(); }
  void finish();

 private:
  AppendFile file_;
  std::vector<uint64_t> begins_;
};

struct RunPlace {
  std::string path;
  uint64_t begin, end;  // records
};

// Throws std::invalid_argument if the file's end is not what RunFileWriter wrote.
std::vector<RunPlace> runs_of(const std::string& path);

// Takes the records of one shard in any order and writes them to folder/part-00000, part-00001, ….
class BandPartitioner {
 public:
  // expected_records: so many may come, 0 if unknown; there may be more.
  BandPartitioner(const std::string& folder, uint64_t num_partitions, size_t max_bytes, size_t expected_records);

  // Records of `count` signatures, (count, num_bands * rows_per_band): one for every band, unless the document has no
  // shingle (all bits are set in all slots), and one for the text, so that exact copies meet whatever group they are
  // in. docs: their numbers. groups: documents of different ones share no band. texts: hashes.
  template <typename Slot>
  void add_signatures(const Slot* signatures, int64_t count, int64_t num_bands, int64_t rows_per_band,
                      const uint64_t* docs, const uint64_t* groups, const uint64_t* texts);
  void add(const BandRecord& record);
  // The records of a file with one sorted run, their numbers raised by doc_offset: no sorting is needed.
  void add_sorted(const std::string& path, uint64_t doc_offset);
  void finish();
  uint64_t num_records() const { return num_records_; }

 private:
  void write_run();
  std::vector<RunFileWriter> parts_;
  std::vector<BandRecord> buffer_;
  size_t max_buffered_;
  uint64_t num_records_ = 0;
};

template <typename Slot>
bool has_shingles(const Slot* signature, int64_t num_slots) {
  for (int64_t i = 0; i < num_slots; ++i)
    if (signature[i] != static_cast<Slot>(0xFFFFFFFFu) && signature[i] != static_cast<Slot>(~uint64_t{0})) return true;
  return false;
}

template <typename Slot>
uint64_t sketch_of(const Slot* signature, int64_t num_slots) {
  uint64_t sketch = 0, round = 0;
  for (int64_t i = 0, slot = 0; i < 64; ++i) {  // slots in turn; a division for each was half of the work
    const uint64_t mixed = (static_cast<uint64_t>(signature[slot]) + round) * 0x9E3779B97F4A7C15u;
    sketch |= (mixed >> 63) << i;
    if (++slot == num_slots) {
      slot = 0;
      ++round;
    }
  }
  return sketch;
}

struct Edge {
  uint64_t high, low;
};

struct LinkCounts {
  uint64_t records = 0, shared_keys = 0, links = 0, edges = 0, largest_key = 0;
};

// Merges the runs of one partition and writes edges that connect what its star edges connect: each document of a key is
// linked to those leaders of the key with which it agrees in at least min_bits bits of the sketch, or leads itself
// while the key has fewer than 256 leaders. With min_bits = 0 all of a key are linked to its first.
LinkCounts link_bands(const std::vector<std::string>& run_files, const std::string& out, int min_bits,
                      size_t max_bytes);

// The runs of a file merged into one, in another file.
void merge_band_runs(const std::string& run_file, const std::string& out, size_t max_bytes);

}  // namespace herdkern::text
