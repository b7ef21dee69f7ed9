// Byte-pair-encoding training from word counts: again and again the most frequent pair of adjacent symbols becomes a
// token. Ties: of equally frequent pairs the smallest (left id, right id) wins. Ids 0..255 are the bytes in the
// caller's order, id 256 + i is the token of merge i. A pair's frequency counts windows ("aaa" holds (a, a) twice), as
// Hugging Face tokenizers, rustbpe and bpeasy do. The result depends on the word counts alone, not on their order. Two
// merges never spell the same token: a span whose borders no merge has crossed is in the state that the merges so far
// give its bytes alone, so once a token exists, every such span with its bytes is that token.
// Source: Gage 1994; Sennrich et al. 2016 (arXiv:1508.07909), algorithm 1.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "text/word_counts.h"

namespace herdkern::text {

struct TrainOptions {
  int64_t max_merges = 0;
  int64_t min_frequency = 1;         // stop before a pair that is rarer
  uint32_t max_token_length = 0;     // bytes; 0: no limit
  std::array<uint8_t, 256> byte_id;  // id of each byte
};

// (left id, right id) of each merge, in order; fewer than max_merges when no pair is left. Calls progress(merges so
// far) now and then; an exception from it ends the training. Throws std::overflow_error when pair counts could pass
// 2^63 - 1, std::length_error when the distinct words hold 2^32 bytes or more.
std::vector<std::pair<uint32_t, uint32_t>> train_merges(const WordCounts& words, const TrainOptions& options,
                                                        const std::function<void(int64_t)>& progress);

}  // namespace herdkern::text
