// Numbers and components out of core: see clusters.h.
#include "text/clusters.h"

#include <cstdio>
#include <numeric>

namespace herdkern::text {

namespace {

constexpr size_t kBuffer = 1 << 20;

std::string numbered(const std::string& folder, const char* name, uint64_t number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "-%05llu", static_cast<unsigned long long>(number));
  return folder + "/" + name + digits;
}

size_t share(size_t max_bytes, size_t count) {
  return std::clamp<size_t>(max_bytes / std::max<size_t>(1, count), 4 << 10, kBuffer);
}

struct Question {  // what is the label of `low`? asked for the component `root` of a higher block
  uint64_t low, root;
};

class Sweep {
 public:
  Sweep(uint64_t num_docs, const std::string& folder, size_t max_bytes) : num_docs_(num_docs), folder_(folder) {
    // A document of the block in memory takes 20 bytes; half of the memory is for them, half for buffers.
    const uint64_t fits = std::max<uint64_t>(1 << 16, max_bytes / 2 / 20);
    num_blocks_ = std::max<uint64_t>(1, (num_docs + fits - 1) / fits);
    block_docs_ = (num_docs + num_blocks_ - 1) / std::max<uint64_t>(1, num_blocks_);
    const size_t buffer = share(max_bytes / 2, 4 * num_blocks_);
    for (uint64_t b = 0; b < num_blocks_; ++b) {
      edges_.emplace_back(buffer / sizeof(Edge));
      questions_.emplace_back(buffer / sizeof(Question));
      answers_.emplace_back(buffer / sizeof(Question));
      states_.emplace_back(buffer / sizeof(uint64_t));
    }
  }

  void add(const Edge& edge) {
    if (edge.high >= num_docs_ || edge.low >= edge.high) throw std::invalid_argument("an edge must join two documents");
    edges_[edge.high / block_docs_].add(edge, folder_);
  }
  bool is_single() const { return num_blocks_ <= 1; }

  void run(const std::string& out) {
    for (uint64_t b = num_blocks_; b-- > 0;) contract(b);
    std::vector<uint32_t>().swap(parents_);
    std::vector<uint8_t>().swap(touched_);
    AppendFile labels(out, kBuffer);
    for (uint64_t b = 0; b < num_blocks_; ++b) resolve(b, labels);
    labels.finish();
  }

 private:
  uint32_t root(uint32_t x) {
    while (parents_[x] != x) x = parents_[x] = parents_[parents_[x]];
    return x;
  }

  // One lower neighbour more for the component `x` of the block.
  void hang(uint32_t x, uint64_t low) {
    uint64_t& known = below_[x];
    if (known == kNoCluster) {
      known = low;
    } else if (known != low) {
      add({std::max(known, low), std::min(known, low)});
      known = std::min(known, low);
    }
  }

  void contract(uint64_t block) {
    const uint64_t begin = block * block_docs_, end = std::min(num_docs_, begin + block_docs_);
    parents_.resize(end - begin);
    std::iota(parents_.begin(), parents_.end(), 0u);
    below_.assign(end - begin, kNoCluster);  // lowest document of a lower block that the component of a root touches
    touched_.assign(end - begin, 0);
    edges_[block].for_each([&](const Edge& edge) {
      const auto high = static_cast<uint32_t>(edge.high - begin);
      touched_[high] = 1;
      if (edge.low < begin) {
        hang(root(high), edge.low);  // seen in its own block too: it is asked for its label, or gets an edge there
        return;
      }
      touched_[edge.low - begin] = 1;
      uint32_t x = root(high), y = root(static_cast<uint32_t>(edge.low - begin));
      if (x == y) return;
      if (x > y) std::swap(x, y);
      parents_[y] = x;
      if (below_[y] != kNoCluster) hang(x, below_[y]);
    });
    edges_[block].clear();
    // The state of a document: its parent in the block, or kNoCluster if no edge touches it.
    for (uint32_t x = 0; x < parents_.size(); ++x) {
      const uint32_t r = root(x);
      states_[block].add(touched_[x] ? begin + r : kNoCluster, folder_);
      if (r == x && below_[x] != kNoCluster) questions_[below_[x] / block_docs_].add({below_[x], begin + x}, folder_);
    }
  }

  void resolve(uint64_t block, AppendFile& out) {
    const uint64_t begin = block * block_docs_, end = std::min(num_docs_, begin + block_docs_);
    std::vector<uint64_t>& labels = below_;
    labels.clear();
    states_[block].for_each([&](uint64_t state) { labels.push_back(state); });
    states_[block].clear();
    if (labels.size() != end - begin) throw std::logic_error("label_components: a block has lost documents");
    questions_[block].for_each([&](const Question& question) {  // an asked document has neighbours above
      uint64_t& state = labels[question.low - begin];
      if (state == kNoCluster) state = question.low;
    });
    // Answers from below are about roots; a parent is smaller than its child, so one pass upwards hands them on.
    answers_[block].for_each([&](const Question& answer) { labels[answer.root - begin] = answer.low; });
    answers_[block].clear();
    for (uint64_t x = 0; x < labels.size(); ++x)
      if (labels[x] != kNoCluster && labels[x] >= begin && labels[x] != begin + x)
        labels[x] = labels[labels[x] - begin];
    questions_[block].for_each([&](const Question& question) {
      answers_[question.root / block_docs_].add({labels[question.low - begin], question.root}, folder_);
    });
    questions_[block].clear();
    for (const uint64_t label : labels) out.add_record(label);
  }

  uint64_t num_docs_, num_blocks_, block_docs_;
  std::string folder_;
  std::vector<Spool<Edge>> edges_;
  std::vector<Spool<Question>> questions_, answers_;  // of documents in the block; for roots in the block
  std::vector<Spool<uint64_t>> states_;
  std::vector<uint32_t> parents_;
  std::vector<uint64_t> below_;
  std::vector<uint8_t> touched_;
};

}  // namespace

void number_documents(const std::vector<std::string>& keys, const std::vector<uint64_t>& ties, uint64_t first,
                      const std::string& folder, size_t max_bytes) {
  std::vector<size_t> order(keys.size());  // the merge prefers the earlier reader
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ties[a] < ties[b]; });
  const size_t buffer = share(max_bytes / 2, 2 * keys.size());
  std::vector<RecordReader<SortKey>> readers;
  std::vector<AppendFile> numbers;
  for (const size_t shard : order) readers.emplace_back(keys[shard], buffer / sizeof(SortKey));
  for (size_t shard = 0; shard < keys.size(); ++shard) numbers.emplace_back(numbered(folder, "numbers", shard), buffer);
  AppendFile shards(folder + "/shards", kBuffer);
  Merge<SortKey> merge(std::move(readers));
  uint64_t number = first;
  for (; merge.peek(); merge.skip()) {
    const size_t shard = order[merge.source()];
    numbers[shard].add_record(number++);
    shards.add_record(static_cast<uint32_t>(shard));
  }
  for (AppendFile& file : numbers) file.finish();
  shards.finish();
}

void label_components(const std::vector<std::string>& edge_files, uint64_t num_docs, const std::string& folder,
                      const std::string& out, size_t max_bytes) {
  Sweep sweep(num_docs, folder, max_bytes);
  for (const std::string& path : edge_files) {
    RecordReader<Edge> reader(path, kBuffer / sizeof(Edge));
    while (const Edge* edge = reader.take()) sweep.add(*edge);
  }
  sweep.run(out);
}

LabelCounts deal_labels(const std::string& labels, const std::string& shards, uint64_t first, uint64_t num_shards,
                        const std::string& folder, size_t max_bytes) {
  RecordReader<uint32_t> shard_of(shards, kBuffer / sizeof(uint32_t));
  RecordReader<uint64_t> label_of(labels, first, count_records<uint64_t>(labels), kBuffer / sizeof(uint64_t));
  std::vector<AppendFile> files;
  for (uint64_t shard = 0; shard < num_shards; ++shard)
    files.emplace_back(numbered(folder, "labels", shard), share(max_bytes / 2, num_shards));
  LabelCounts counts;
  uint64_t doc = first;
  for (; const uint32_t* shard = shard_of.take(); ++doc) {
    const uint64_t* label = label_of.take();
    if (!label || *shard >= num_shards) throw std::invalid_argument(labels + " does not go with " + shards);
    files[*shard].add_record(*label);
    counts.members += *label != kNoCluster;
    counts.clusters += *label == doc;
  }
  for (AppendFile& file : files) file.finish();
  return counts;
}

}  // namespace herdkern::text
