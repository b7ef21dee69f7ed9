// Banding out of core: see bands.h.
#include "text/bands.h"

#include <array>
#include <cstdio>
#include <cstring>

#include "text/forest.h"
#include "text/lsh.h"

namespace herdkern::text {

namespace {

constexpr size_t kLeastBuffer = 4 << 10, kMostBuffer = 1 << 20;  // bytes of a reader or a writer

size_t buffer_bytes(size_t max_bytes, size_t count) {
  return std::clamp(max_bytes / std::max<size_t>(1, count), kLeastBuffer, kMostBuffer);
}

// In place, by the upper bytes of the keys, which are evenly spread; small pieces by std::sort in the cache.
// (Tried std::sort alone: 2.5 times slower on 4 million records.)
void sort_records(BandRecord* begin, BandRecord* end, int shift = 56) {
  if (end - begin < 512 || shift < 32) {
    std::sort(begin, end);
    return;
  }
  std::array<size_t, 257> borders{};
  for (const BandRecord* r = begin; r < end; ++r) ++borders[(r->key >> shift & 255) + 1];
  for (size_t i = 1; i <= 256; ++i) borders[i] += borders[i - 1];
  std::array<size_t, 256> next;
  std::copy(borders.begin(), borders.end() - 1, next.begin());
  for (size_t bucket = 0; bucket < 256; ++bucket) {
    while (next[bucket] < borders[bucket + 1]) {
      const size_t wanted = begin[next[bucket]].key >> shift & 255;
      if (wanted == bucket) {
        ++next[bucket];
      } else {
        std::swap(begin[next[bucket]], begin[next[wanted]++]);
      }
    }
  }
  for (size_t i = 0; i < 256; ++i)
    if (borders[i + 1] - borders[i] > 1) sort_records(begin + borders[i], begin + borders[i + 1], shift - 8);
}

std::string part_path(const std::string& folder, uint64_t number) {
  char name[32];
  std::snprintf(name, sizeof(name), "/part-%05llu", static_cast<unsigned long long>(number));
  return folder + name;
}

Merge<BandRecord> merge_of(const std::vector<RunPlace>& runs, size_t max_bytes) {
  const size_t records = buffer_bytes(max_bytes, runs.size()) / sizeof(BandRecord);
  std::vector<RecordReader<BandRecord>> readers;
  readers.reserve(runs.size());
  for (const RunPlace& run : runs) readers.emplace_back(run.path, run.begin, run.end, records);
  return Merge<BandRecord>(std::move(readers));
}

}  // namespace

void RunFileWriter::finish() {
  for (const uint64_t begin : begins_) file_.add_record(begin);
  file_.add_record(static_cast<uint64_t>(begins_.size()));
  file_.finish();
}

std::vector<RunPlace> runs_of(const std::string& path) {
  const uint64_t size = file_bytes(path);
  const auto damaged = [&] { return std::invalid_argument(path + " is damaged: it does not end in a list of runs"); };
  uint64_t count = 0;
  if (size < sizeof(count)) throw damaged();
  const auto file = File::open(path);
  file->read_at(size - sizeof(count), &count, sizeof(count));
  if (count > size / sizeof(count) - 1) throw damaged();
  std::vector<uint64_t> begins(count);
  const uint64_t end = size - (count + 1) * sizeof(count);
  if (end % sizeof(BandRecord) != 0) throw damaged();
  file->read_at(end, begins.data(), count * sizeof(count));
  begins.push_back(end / sizeof(BandRecord));
  std::vector<RunPlace> runs;
  for (size_t i = 0; i < count; ++i) {
    if (begins[i] > begins[i + 1]) throw damaged();
    if (begins[i] < begins[i + 1]) runs.push_back({path, begins[i], begins[i + 1]});
  }
  return runs;
}

BandPartitioner::BandPartitioner(const std::string& folder, uint64_t num_partitions, size_t max_bytes,
                                 size_t expected_records)
    : max_buffered_(std::max<size_t>(1024, max_bytes * 3 / 4 / sizeof(BandRecord))) {
  parts_.reserve(num_partitions);
  for (uint64_t p = 0; p < num_partitions; ++p)
    parts_.emplace_back(part_path(folder, p), buffer_bytes(max_bytes / 4, num_partitions));
  buffer_.reserve(std::min(max_buffered_, expected_records));  // growing costs fresh pages again and again
}

void BandPartitioner::add(const BandRecord& record) {
  if (buffer_.size() == max_buffered_) write_run();
  if (buffer_.size() == buffer_.capacity())  // never beyond the limit, as doubling would
    buffer_.reserve(std::min(max_buffered_, std::max<size_t>(1024, buffer_.size() * 3 / 2)));
  buffer_.push_back(record);
  ++num_records_;
}

template <typename Slot>
void BandPartitioner::add_signatures(const Slot* signatures, int64_t count, int64_t num_bands, int64_t rows_per_band,
                                     const uint64_t* docs, const uint64_t* groups, const uint64_t* texts) {
  const int64_t num_slots = num_bands * rows_per_band;
  for (int64_t i = 0; i < count; ++i) {
    const Slot* signature = signatures + i * num_slots;
    const uint64_t group_mix = mix(groups[i]), sketch = sketch_of(signature, num_slots);
    add({mix(texts[i] ^ kGolden), docs[i], sketch});
    if (!has_shingles(signature, num_slots)) continue;
    for (int64_t band = 0; band < num_bands; ++band)
      add({key_of_band(signature + band * rows_per_band, rows_per_band, band, group_mix), docs[i], sketch});
  }
}

template void BandPartitioner::add_signatures(const uint32_t*, int64_t, int64_t, int64_t, const uint64_t*,
                                              const uint64_t*, const uint64_t*);
template void BandPartitioner::add_signatures(const uint64_t*, int64_t, int64_t, int64_t, const uint64_t*,
                                              const uint64_t*, const uint64_t*);

void BandPartitioner::write_run() {
  if (buffer_.empty()) return;
  sort_records(buffer_.data(), buffer_.data() + buffer_.size());
  size_t begin = 0;
  for (uint64_t p = 0; p < parts_.size() && begin < buffer_.size(); ++p) {
    size_t end = begin;
    if (p + 1 == parts_.size()) {
      end = buffer_.size();
    } else {
      const auto is_before = [&](const BandRecord& r, uint64_t part) {
        return partition_of(r.key, parts_.size()) < part;
      };
      end = static_cast<size_t>(std::lower_bound(buffer_.begin() + ptrdiff_t(begin), buffer_.end(), p + 1, is_before) -
                                buffer_.begin());
    }
    if (begin == end) continue;
    parts_[p].begin_run();
    parts_[p].add(buffer_.data() + begin, end - begin);
    parts_[p].flush();
    begin = end;
  }
  buffer_.clear();
}

void BandPartitioner::add_sorted(const std::string& path, uint64_t doc_offset) {
  write_run();
  const std::vector<RunPlace> runs = runs_of(path);
  if (runs.size() > 1)
    throw std::invalid_argument(path + " must hold one sorted run, got " + std::to_string(runs.size()));
  if (runs.empty()) return;
  RecordReader<BandRecord> reader(path, runs[0].begin, runs[0].end, kMostBuffer / sizeof(BandRecord));
  uint64_t last = ~uint64_t{0};
  while (const BandRecord* record = reader.take()) {
    const uint64_t part = partition_of(record->key, parts_.size());
    if (part != last) parts_[part].begin_run();
    parts_[part].add({record->key, record->doc + doc_offset, record->sketch});
    last = part;
    ++num_records_;
  }
}

void BandPartitioner::finish() {
  write_run();
  std::vector<BandRecord>().swap(buffer_);
  for (RunFileWriter& part : parts_) part.finish();
}

LinkCounts link_bands(const std::vector<std::string>& run_files, const std::string& out, int min_bits,
                      size_t max_bytes) {
  std::vector<RunPlace> runs;
  for (const std::string& path : run_files)
    for (RunPlace& run : runs_of(path)) runs.push_back(std::move(run));
  Merge<BandRecord> merge = merge_of(runs, max_bytes / 2);
  AppendFile edges(out, kMostBuffer);
  ForestFilter forest(max_bytes / 2);
  LinkCounts counts;
  std::vector<BandRecord> leaders;
  uint64_t key_size = 0;
  for (; const BandRecord* record = merge.peek(); merge.skip()) {
    const BandRecord doc = *record;
    ++counts.records;
    if (leaders.empty() || leaders[0].key != doc.key) {
      leaders.assign(1, doc);
      key_size = 1;
      counts.largest_key = std::max<uint64_t>(counts.largest_key, 1);
      continue;
    }
    counts.shared_keys += ++key_size == 2;
    counts.largest_key = std::max(counts.largest_key, key_size);
    bool follows = false;
    for (const BandRecord& leader : leaders) {
      if (leader.doc == doc.doc || 64 - __builtin_popcountll(leader.sketch ^ doc.sketch) < min_bits) continue;
      ++counts.links;
      follows = true;
      if (!forest.unite(leader.doc, doc.doc)) continue;
      edges.add_record(Edge{std::max(leader.doc, doc.doc), std::min(leader.doc, doc.doc)});
      ++counts.edges;
    }
    if (!follows && leaders.size() < kMaxLeaders) leaders.push_back(doc);
  }
  edges.finish();
  return counts;
}

void merge_band_runs(const std::string& run_file, const std::string& out, size_t max_bytes) {
  Merge<BandRecord> merge = merge_of(runs_of(run_file), max_bytes);
  RunFileWriter writer(out, kMostBuffer);
  writer.begin_run();
  for (; const BandRecord* record = merge.peek(); merge.skip()) writer.add(*record);
  writer.finish();
}

}  // namespace herdkern::text
