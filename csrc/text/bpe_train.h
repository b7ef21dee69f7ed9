// Byte-pair-encoding training from word counts: again and again the most frequent pair of adjacent symbols becomes a
// token. Ties: of equally frequent pairs the smallest (left id, right id) wins. A new token gets the next free id. A
// pair's frequency counts windows ("aaa" holds (a, a) twice), as Hugging Face tokenizers, rustbpe and bpeasy do. The
// result depends on the word counts alone, not on their order nor on the number of threads.
//
// Starting from the 256 bytes, two merges never spell the same token: a span whose borders no merge has crossed is in
// the state that the merges so far give its bytes alone, so once a token exists, every such span with its bytes is that
// token. Words may also start as tokens of an older vocabulary (`segment`). There a token need not be what its own
// bytes become, so a pair can spell a token that exists: it is merged into that token and takes no new id, as Hugging
// Face's trainer does.
// Source: Gage 1994; Sennrich et al. 2016 (arXiv:1508.07909), algorithm 1.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

#include "text/bpe_train_words.h"

namespace herdkern::text {

struct TrainOptions {
  int64_t max_new_tokens = 0;
  int64_t min_frequency = 1;               // stop before a pair that is rarer
  uint32_t max_token_length = 0;           // bytes; 0: no limit
  int64_t max_memory = 0;                  // bytes beyond the input; 0: no limit
  int num_threads = 1;                     // changes the speed alone
  std::vector<std::string> tokens;         // by id: those that exist, all single bytes among them
  Segmenter segment;                       // how a word starts; null: as its bytes
  std::unordered_set<std::string> vetoed;  // never become tokens
};

struct Merge {
  uint32_t left, right, token;
};

// The merges in order; they stop early when no pair is left. Calls progress(share of the work that is done) now and
// then; the share is an estimate of the symbols that are still to be merged. An exception from it ends the training.
// Throws std::overflow_error when pair counts could pass 2^63 - 1; std::length_error when the distinct words hold 2^32
// bytes or more, or more than max_memory has room for.
std::vector<Merge> train_merges(const WordStream& words, const TrainOptions& options,
                                const std::function<void(double)>& progress);

}  // namespace herdkern::text
