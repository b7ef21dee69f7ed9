// How the linear cross entropy is cut and where sums of dweight lie: by shapes alone, never by the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/linear_cross_entropy.h"

namespace herdkern::cpu::HK_ISA {

constexpr int64_t kVocabBlock = 96;   // rows of weight per task: a multiple of every kTileRows, and even
constexpr int64_t kDepthBlock = 128;  // of the logits' product: short chains of additions, a panel of hidden in L1
constexpr int64_t kVocabDepth = 192;  // of dhidden's product
constexpr int64_t kTokenDepth = 480;  // of dweight's product, as kDepthBlock
constexpr int64_t kMiB = int64_t{1} << 20;

// Memory. All that is kept between tasks shall take no more than kBudget for any number of tokens, first the logits of
// a chunk: as many tokens as keep them in the last cache, 480 if those are fewer, 1920 if more. Where not even those of
// one panel of tokens fit (vocab_size > 400,000), the vocabulary is gone through once for the statistics and then, with
// logits computed again, in passes for the gradients. A bf16 dweight is summed in fp32, which takes twice its size. The
// sums of half of its rows lie in its own memory, those of some more in what the budget leaves; rows beyond them (only
// where vocab_size * dim is large) get their gradient at the end, slab by slab, from logits that are computed again.
struct Plan {
  static constexpr int64_t kBudget = 50 * kMiB, kLatePanels = 8 * kMiB;
  int64_t chunk, num_blocks;
  int64_t pass_blocks;        // of the vocabulary, whose logits are held at once; even, or all
  int64_t rows_in_place = 0;  // of dweight, whose sums lie in its own memory; whole blocks
  int64_t held_rows;          // of dweight, that are summed while the chunks pass; whole blocks or all
  int64_t slab_rows = 0, late_chunk = 0;

  explicit Plan(const LinearCrossEntropy& args) {
    const int64_t vocab = args.vocab_size, dim = args.dim, all_tokens = round_up(args.num_tokens, kPanel);
    num_blocks = (vocab + kVocabBlock - 1) / kVocabBlock;
    pass_blocks = num_blocks;
    held_rows = vocab;
    const int64_t partial_bytes = num_blocks * 12;  // of a token, where statistics are made
    const bool wants_gradient = args.dhidden != nullptr || args.dweight != nullptr;
    constexpr int64_t kUsualTokens = 480, kMaxTokens = 1920, kCachedLogits = 4 * kMiB;
    if (!wants_gradient) {
      chunk = std::min(kUsualTokens, std::max<int64_t>(kBudget / partial_bytes / kPanel, 1) * kPanel);
      chunk = std::min(chunk, all_tokens);
      return;
    }
    const bool rounds = args.dweight != nullptr && args.weight_is_bf16;
    rows_in_place = rounds ? vocab / 2 / kVocabBlock * kVocabBlock : 0;
    const int64_t more_sums = rounds ? (vocab - rows_in_place) * dim * 4 : 0;
    const int64_t token_bytes = vocab * 4 + dim * 12;  // logits, two packings of hidden, the sum of dhidden
    const int64_t wanted = std::clamp(kCachedLogits / vocab, kUsualTokens, kMaxTokens);
    int64_t fitting = (kBudget - std::min(more_sums, 20 * kMiB)) / token_bytes;
    if (fitting < kVocabBlock) fitting = kBudget / token_bytes;
    chunk = std::max<int64_t>(std::min(wanted, fitting) / kPanel * kPanel, kPanel);
    chunk = std::min(chunk, all_tokens);
    const int64_t of_logits = kBudget - chunk * (dim * 12 + (fitting < kPanel ? partial_bytes : 0));
    if (chunk * vocab * 4 > of_logits)
      pass_blocks = std::max<int64_t>(of_logits / (chunk * kVocabBlock * 4) / 2 * 2, 2);
    if (!rounds) return;
    const int64_t left = std::max<int64_t>(kBudget - chunk * token_bytes, 0);
    if (more_sums <= left) return;
    held_rows = rows_in_place + left / (dim * 4) / kVocabBlock * kVocabBlock;
    slab_rows = std::max(chunk * pass_rows(vocab) / dim / kVocabBlock, int64_t{1}) * kVocabBlock;
    late_chunk = std::max<int64_t>(std::min(kUsualTokens, kLatePanels / (dim * 4)) / kPanel * kPanel, kPanel);
    late_chunk = std::min(late_chunk, all_tokens);
  }

  int64_t pass_rows(int64_t vocab) const { return std::min(pass_blocks * kVocabBlock, vocab); }
  int64_t block_rows(int64_t block, int64_t vocab) const { return std::min(kVocabBlock, vocab - block * kVocabBlock); }
};

// What a token's dlogits are made of: dz[v] = exp(z[v] - top) factor + constant, but at_target where v is the target.
// Entries beyond limit are not small against the gradient. Ignored tokens have zeros.
struct TokenTerms {
  float top, factor, constant, at_target, limit;
};

// p_target - 1 comes from expm1: the gradient of a confident and right token is a difference that must not cancel.
inline TokenTerms terms_of_token(const LinearCrossEntropy& args, int64_t token, float dloss, float dlogp) {
  const float* stats = args.stats + token;
  const float top = stats[kTop * args.num_tokens], total = stats[kTotal * args.num_tokens];
  if (args.targets[token] == args.ignore_index) return {top, 0.0f, 0.0f, 0.0f, 0.0f};
  const float target = stats[kTargetLogit * args.num_tokens], logp = target - top - std::log(total);
  const float lse = top + std::log(total), z_term = 2.0f * args.z_loss * lse;
  const float share = args.label_smoothing / static_cast<float>(args.total_vocab_size);
  const float a = dloss * (1.0f + z_term) - dlogp;
  float at_target = a * std::expm1(logp) + dloss * (z_term + args.label_smoothing - share);
  if (args.softcap > 0.0f) at_target *= 1.0f - (target / args.softcap) * (target / args.softcap);
  constexpr float kHigh = 1.0f / 16;  // at most about 16 entries of a token
  const float limit = kHigh * std::max(std::fabs(a), std::fabs(dloss) + std::fabs(dlogp));
  return {top, a / total, -dloss * share, at_target, limit};
}

// The loss and the log-probability at the target, in an order in which a loss near 0 keeps its digits.
struct TokenLoss {
  float loss, logp;
};
inline TokenLoss loss_of_token(const LinearCrossEntropy& args, int64_t token) {
  if (args.targets[token] == args.ignore_index) return {0.0f, 0.0f};
  const float* stats = args.stats + token;
  const float top = stats[kTop * args.num_tokens], log_total = std::log(stats[kTotal * args.num_tokens]);
  const float nll = log_total - (stats[kTargetLogit * args.num_tokens] - top);
  float loss = nll;
  if (args.label_smoothing > 0.0f) {
    const float mean = stats[kLogitSum * args.num_tokens] / static_cast<float>(args.total_vocab_size);
    loss = (1.0f - args.label_smoothing) * nll + args.label_smoothing * (log_total - (mean - top));
  }
  if (args.z_loss != 0.0f) loss += args.z_loss * (top + log_total) * (top + log_total);
  return {loss, -nll};
}

}  // namespace herdkern::cpu::HK_ISA
