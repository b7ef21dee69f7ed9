// How words start when training goes on from an older vocabulary: by a list of merges, or as an encoder cuts them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/bpe_encode.h"
#include "text/bpe_train.h"
#include "text/bpe_train_index.h"

namespace herdkern::text {

// Applies each merge of a list once to a word, in the order of the list: the state that a training which made these
// merges has reached. Encoding by ranks gives the same where no two merges spell the same token. O(n log n).
class MergeList {
 public:
  // `tokens`: by id, with all single bytes. Throws std::invalid_argument for an id that is no token's.
  MergeList(const std::vector<std::string>& tokens, std::vector<Merge> merges);
  void segment(std::string_view word, std::vector<uint32_t>& ids) const;

 private:
  static constexpr uint32_t kNever = 0xFFFFFFFF;
  // The first merge of the pair that comes after merge `last` (-1: any), kNever without one.
  uint32_t merge_of(uint32_t left, uint32_t right, int64_t last) const;

  uint32_t byte_ids_[256] = {};
  std::vector<Merge> merges_;
  PairMap<uint32_t> first_;     // merge of a pair
  std::vector<uint32_t> next_;  // the merge of the same pair after this one
};

// A word as an encoder's ids, without its split pattern: the token that it is, else what the ranks make of it.
class EncoderStart {
 public:
  EncoderStart(const Encoder& encoder, const std::vector<std::string>& tokens);
  void segment(std::string_view word, std::vector<uint32_t>& ids) const;

 private:
  const Encoder& encoder_;
  std::unordered_map<std::string_view, uint32_t> ids_;
};

}  // namespace herdkern::text
