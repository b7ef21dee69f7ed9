// The start of a training that goes on: see bpe_train_start.h.
#include "text/bpe_train_start.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace herdkern::text {

MergeList::MergeList(const std::vector<std::string>& tokens, std::vector<Merge> merges)
    : merges_(std::move(merges)), next_(merges_.size(), kNever) {
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].size() == 1) byte_ids_[uint8_t(tokens[id][0])] = uint32_t(id);
  }
  for (size_t i = merges_.size(); i-- > 0;) {
    const auto& [left, right, token] = merges_[i];
    if (std::max({left, right, token}) >= tokens.size()) {
      throw std::invalid_argument("MergeList: merge " + std::to_string(i) + " must be of tokens that exist");
    }
    uint32_t& first = first_.at_or_new(pair_key(left, right));  // 0 without one, else the merge plus 1
    next_[i] = first - 1;
    first = uint32_t(i + 1);
  }
}

uint32_t MergeList::merge_of(uint32_t left, uint32_t right, int64_t last) const {
  const uint32_t* first = first_.find(pair_key(left, right));
  uint32_t merge = first == nullptr ? kNever : *first - 1;
  while (merge != kNever && merge <= last) merge = next_[merge];
  return merge;
}

void MergeList::segment(std::string_view word, std::vector<uint32_t>& ids) const {
  struct Node {
    uint32_t id, next, previous, merge;  // merge: the next one of this symbol with its right neighbour
  };
  const auto size = uint32_t(word.size());
  std::vector<Node> nodes(size);
  std::vector<uint64_t> heap;  // merge << 32 | place; stale when the node says otherwise
  const auto later = std::greater<uint64_t>();
  const auto update = [&](uint32_t at, int64_t last) {
    Node& node = nodes[at];
    node.merge = node.next < size ? merge_of(node.id, nodes[node.next].id, last) : kNever;
    if (node.merge == kNever) return;
    heap.push_back(uint64_t(node.merge) << 32 | at);
    std::push_heap(heap.begin(), heap.end(), later);
  };
  for (uint32_t i = 0; i < size; ++i) nodes[i] = {byte_ids_[uint8_t(word[i])], i + 1, i - 1, kNever};
  for (uint32_t i = 0; i < size; ++i) update(i, -1);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const auto merge = uint32_t(heap.back() >> 32), at = uint32_t(heap.back());
    heap.pop_back();
    Node& node = nodes[at];
    if (node.merge != merge) continue;
    nodes[node.next].merge = kNever;
    node.id = merges_[merge].token;
    node.next = nodes[node.next].next;
    if (node.next < size) nodes[node.next].previous = at;
    update(at, merge);
    if (at > 0) update(node.previous, merge);
  }
  ids.clear();
  for (uint32_t at = 0; at < size; at = nodes[at].next) ids.push_back(nodes[at].id);
}

EncoderStart::EncoderStart(const Encoder& encoder, const std::vector<std::string>& tokens) : encoder_(encoder) {
  for (size_t id = 0; id < tokens.size(); ++id) ids_.emplace(tokens[id], uint32_t(id));
}

void EncoderStart::segment(std::string_view word, std::vector<uint32_t>& ids) const {
  if (const auto whole = ids_.find(word); whole != ids_.end()) {
    ids.assign(1, whole->second);
  } else {
    ids = encoder_.parts_of(word, kNoToken);
  }
}

}  // namespace herdkern::text
