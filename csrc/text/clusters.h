// From documents to numbers and from edges to components, both out of core.
//
// Numbers: the documents of all shards are numbered 0, 1, … in the order in which they are to be kept. Every shard
// brings its sort keys in ascending order; a merge gives each document its place among all.
//
// Components: documents are cut into blocks of neighbouring numbers, few enough for memory. From the highest block
// down, the edges whose higher end lies in the block are united within it; of the lower documents that one component of
// the block touches, the lowest becomes its parent and an edge to each other one goes down to the block of that one's
// higher end. Then every component hangs on one lower document at most. From the lowest block up, labels (the smallest
// document of the component) are handed to the components above that asked for them. An edge moves down at most once
// per block; each document is written and read once. With one block this is union-find in memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "text/bands.h"

namespace herdkern::text {

constexpr uint64_t kNoCluster = ~uint64_t{0};  // the label of a document that no edge touches

struct SortKey {
  static constexpr int kWords = 8;
  uint64_t words[kWords];
  bool operator<(const SortKey& other) const {
    for (int i = 0; i < kWords; ++i)
      if (words[i] != other.words[i]) return words[i] < other.words[i];
    return false;
  }
};

// Numbers from `first` on for the documents of all shards. keys[i]: shard i's sorted keys (SortKey records). ties: a
// hash of each shard's contents; of documents with equal keys, that of the shard with the smaller tie comes first.
// Writes folder/numbers-00000, …: the numbers (uint64) of each shard's documents, ascending; and folder/shards: the
// shard (uint32) of every number.
void number_documents(const std::vector<std::string>& keys, const std::vector<uint64_t>& ties, uint64_t first,
                      const std::string& folder, size_t max_bytes);

// The label of every document, in order, to `out` (uint64 each). Temporary files lie in `folder` and have no names.
void label_components(const std::vector<std::string>& edge_files, uint64_t num_docs, const std::string& folder,
                      const std::string& out, size_t max_bytes);

// Deals the labels of documents [first, first + number of shards' documents) out to folder/labels-00000, …, in the
// order of `shards` (uint32 per document). Returns the number of documents that have a label, and of labels that are
// their own.
struct LabelCounts {
  uint64_t members = 0, clusters = 0;
};
LabelCounts deal_labels(const std::string& labels, const std::string& shards, uint64_t first, uint64_t num_shards,
                        const std::string& folder, size_t max_bytes);

}  // namespace herdkern::text
