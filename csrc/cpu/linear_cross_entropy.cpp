#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {
namespace {

constexpr int64_t kVocabBlock = 96;    // rows of weight per task: a multiple of every kTileRows, and even
constexpr int64_t kDepthBlock = 128;   // of the logits' product: short chains of additions, a panel of x in L1
constexpr int64_t kVocabDepth = 192;   // of dx's product
constexpr int64_t kTokenQuantum = 96;  // a multiple of kTileRows and kPanel
constexpr int64_t kTokenDepth = 480;   // of dweight's product, as kDepthBlock
// Tokens of a chunk: as many as keep its logits in the last cache, 480 if those are fewer, 1920 if more (each chunk
// costs a few meetings of all threads), and never so many that the logits take more than 64 MiB, unless that is
// below 96.
constexpr int64_t kCachedLogits = int64_t{4} << 20, kUsualTokens = 480, kMaxTokens = 1920;
constexpr int64_t kMaxLogits = int64_t{16} << 20;

// The sum of part(0) ... part(count - 1) by groups: small parts meet each other before they meet a large one.
template <typename Part>
HK_INLINE Vec grouped_sum(int64_t count, int64_t group, const Part& part) {
  Vec total(0.0f);
  for (int64_t first = 0; first < count; first += group) {
    Vec of_group = part(first);
    for (int64_t i = first + 1; i < std::min(first + group, count); ++i) of_group = of_group + part(i);
    total = total + of_group;
  }
  return total;
}

// How the work is cut: by shape alone, never by the number of threads.
struct Plan {
  int64_t chunk, num_blocks, padded_dim;
  explicit Plan(const LinearCrossEntropy& args) {
    const int64_t cached = std::clamp(kCachedLogits / args.vocab_size, kUsualTokens, kMaxTokens);
    const int64_t tokens = std::max(std::min(cached, kMaxLogits / args.vocab_size), kTokenQuantum);
    chunk = std::min(tokens / kTokenQuantum * kTokenQuantum, round_up(args.num_tokens, kPanel));
    num_blocks = (args.vocab_size + kVocabBlock - 1) / kVocabBlock;
    padded_dim = round_up(args.dim, kPanel);
  }
};

// What the steps share for one chunk of tokens. Kind is how products are done, T how x and weight are stored.
// With pairs of bf16 the dlogits are rounded; the few that are not small against the gradient, at the target and where
// the probability is high, get back what the rounding took, in fp32 (Correction).
template <typename Kind, typename T>
class Chunks {
  using Word = typename Kind::Word;
  static constexpr bool kPairs = Kind::kDepthPerWord == 2;

 public:
  explicit Chunks(const LinearCrossEntropy& arguments)
      : args_(arguments),
        plan_(arguments),
        num_threads_(threads_for(args_.num_tokens * args_.vocab_size * args_.dim / 8, args_.num_threads)),
        wants_gradient_(args_.dx != nullptr || args_.dweight != nullptr),
        token_scale_(args_.reduction == Reduction::kMean ? 1.0f / static_cast<float>(count_targets()) : 1.0f),
        padded_(plan_.padded_dim != args_.dim),
        x_panels_(plan_.chunk * words(args_.dim)),
        x_columns_(args_.dweight != nullptr ? plan_.padded_dim * words(plan_.chunk) : 0),
        logits_(wants_gradient_ ? round_up(args_.vocab_size, 2) * plan_.chunk : 0),
        partials_(plan_.num_blocks * 2 * plan_.chunk),
        tokens_(5 * plan_.chunk),
        dx_sum_(args_.dx != nullptr && padded_ ? plan_.chunk * plan_.padded_dim : 0),
        dweight_sum_(args_.dweight != nullptr && padded_ ? args_.vocab_size * plan_.padded_dim : 0),
        corrections_(kPairs ? plan_.num_blocks : 0) {}

  void run() {
    for (int64_t first = 0; first < args_.num_tokens; first += plan_.chunk) {
      first_ = first;
      count_ = std::min(plan_.chunk, args_.num_tokens - first);
      pitch_ = round_up(count_, kPanel);
      pack_tokens();
      parallel_tasks(plan_.num_blocks, num_threads_, [&](int64_t block) { logits_of(block); });
      finish_losses();
      if (!wants_gradient_) continue;
      parallel_tasks(plan_.num_blocks, num_threads_, [&](int64_t block) { gradient_of(block); });
      if (args_.dx != nullptr) finish_dx();
    }
    if (args_.dweight != nullptr) finish_dweight();
    if (args_.loss != nullptr) *args_.loss = reduced_loss();
  }

 private:
  static int64_t words(int64_t depth) { return (depth + Kind::kDepthPerWord - 1) / Kind::kDepthPerWord; }
  const T* x_row(int64_t token) const { return static_cast<const T*>(args_.x) + (first_ + token) * args_.x_stride; }
  const T* weight_row(int64_t v) const { return static_cast<const T*>(args_.weight) + v * args_.weight_stride; }
  int64_t block_rows(int64_t block) const { return std::min(kVocabBlock, args_.vocab_size - block * kVocabBlock); }
  // Arrays over the tokens of the chunk.
  float* top() const { return tokens_.data(); }                              // largest logit
  float* inverse_total() const { return tokens_.data() + 4 * plan_.chunk; }  // 1 / sum_v exp(logit - top)
  float* target_logit() const { return tokens_.data() + plan_.chunk; }
  float* scale() const { return tokens_.data() + 2 * plan_.chunk; }
  float* target_dlogit() const { return tokens_.data() + 3 * plan_.chunk; }
  // Where the gradients are summed: in place, or in rows that whole panels fit into.
  float* dx() const { return padded_ ? dx_sum_.data() : args_.dx + first_ * args_.dim; }
  float* dweight() const { return padded_ ? dweight_sum_.data() : args_.dweight; }

  // Calls visit(token, row of the block) for the tokens whose target lies in the block.
  template <typename Visit>
  void for_targets_in(int64_t block, const Visit& visit) const {
    const int64_t begin = block * kVocabBlock, end = begin + block_rows(block);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t target = args_.targets[first_ + t];
      if (target >= begin && target < end && target != args_.ignore_index) visit(t, target - begin);
    }
  }

  int64_t count_targets() const {
    int64_t count = 0;
    for (int64_t t = 0; t < args_.num_tokens; ++t) count += args_.targets[t] != args_.ignore_index;
    return count;
  }

  float reduced_loss() const {
    double total = 0.0;
    for (int64_t t = 0; t < args_.num_tokens; ++t) total += static_cast<double>(args_.losses[t]);
    return static_cast<float>(args_.reduction == Reduction::kMean ? total / static_cast<double>(count_targets())
                                                                  : total);
  }

  void pack_tokens() {
    const int64_t num_panels = pitch_ / kPanel, num_column_panels = plan_.padded_dim / kPanel;
    const int64_t columns = args_.dweight != nullptr ? num_column_panels : 0;
    parallel_tasks(num_panels + columns, num_threads_, [&](int64_t task) {
      if (task < num_panels) {
        const int64_t t = task * kPanel;
        pack_transposed<Kind>(x_row(t), args_.x_stride, std::min<int64_t>(kPanel, count_ - t), args_.dim,
                              x_panels_.data() + t * words(args_.dim));
      } else {
        const int64_t d = (task - num_panels) * kPanel;
        pack_straight<Kind>(x_row(0) + d, args_.x_stride, std::min<int64_t>(kPanel, args_.dim - d), count_,
                            x_columns_.data() + d * words(count_));
      }
    });
  }

  // Logits of one block of the vocabulary, their maximum and the sum of exponentials for every token.
  void logits_of(int64_t block) {
    const int64_t num_rows = block_rows(block), depth = words(args_.dim);
    [[maybe_unused]] const typename Kind::Session session;
    Workspace<float> own_logits(wants_gradient_ ? 0 : num_rows * pitch_);
    float* logits = wants_gradient_ ? logits_.data() + block * kVocabBlock * pitch_ : own_logits.data();
    // Fp32 words of a bf16 weight are made here; otherwise the rows are words as they lie.
    constexpr bool kConvert = !kPairs && !std::is_same_v<T, float>;
    Workspace<Word> converted(kConvert ? num_rows * args_.dim : 0);
    const Word* rows;
    int64_t row_words;
    if constexpr (kConvert) {
      for (int64_t i = 0; i < num_rows; ++i)
        widen(weight_row(block * kVocabBlock + i), converted.data() + i * args_.dim);
      rows = converted.data();
      row_words = args_.dim;
    } else {
      rows = reinterpret_cast<const Word*>(weight_row(block * kVocabBlock));
      row_words = args_.weight_stride / Kind::kDepthPerWord;
    }
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t run = std::min(kDepthBlock, depth - k);
      for (int64_t t = 0; t < pitch_; t += kPanel)
        multiply_panel<Kind, true>(rows + k, row_words, num_rows, x_panels_.data() + t * depth + k * kPanel, run,
                                   logits + t, pitch_, k > 0);
    }
    float* maxima = partials_.data() + block * 2 * plan_.chunk;
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      Vec top = Vec::load(logits + t);
      for (int64_t i = 1; i < num_rows; ++i) top = max(Vec::load(logits + i * pitch_ + t), top);
      const Vec total =
          grouped_sum(num_rows, 8, [&](int64_t i) { return exp(Vec::load(logits + i * pitch_ + t) - top); });
      top.store(maxima + t);
      total.store(maxima + plan_.chunk + t);
    }
    for_targets_in(block, [&](int64_t t, int64_t row) { target_logit()[t] = logits[row * pitch_ + t]; });
  }

  void widen(const T* source, float* out) const {
    for (int64_t k = 0; k < args_.dim; ++k) out[k] = to_float(source[k]);
  }

  // Joins the blocks' maxima and sums in order; then losses and, for the gradient, the entry at the target.
  void finish_losses() {
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      const float* maxima = partials_.data() + t;
      Vec highest = Vec::load(maxima);
      for (int64_t block = 1; block < plan_.num_blocks; ++block)
        highest = max(Vec::load(maxima + block * 2 * plan_.chunk), highest);
      const Vec total = grouped_sum(plan_.num_blocks, 32, [&](int64_t block) {
        const float* partial = maxima + block * 2 * plan_.chunk;
        return Vec::load(partial + plan_.chunk) * exp(Vec::load(partial) - highest);
      });
      highest.store(top() + t);
      total.store(inverse_total() + t);
    }
    for (int64_t t = 0; t < pitch_; ++t) {
      const float total = inverse_total()[t];
      inverse_total()[t] = 1.0f / total;
      const bool counts = t < count_ && args_.targets[first_ + t] != args_.ignore_index;
      // in this order a loss near 0 keeps its digits
      const float loss = counts ? std::log(total) - (target_logit()[t] - top()[t]) : 0.0f;
      if (t < count_) args_.losses[first_ + t] = loss;
      if (!wants_gradient_) continue;
      const float own_scale = args_.dlosses != nullptr && t < count_ ? args_.dlosses[first_ + t] : token_scale_;
      scale()[t] = counts ? own_scale : 0.0f;
      target_dlogit()[t] = std::expm1(-loss) * scale()[t];
    }
  }

  // Turns a block's logits into dlogits where they lie, and adds its rows of dweight.
  void gradient_of(int64_t block) {
    const int64_t num_rows = block_rows(block);
    [[maybe_unused]] const typename Kind::Session session;
    float* logits = logits_.data() + block * kVocabBlock * pitch_;
    Workspace<Word> row_words(kPairs && args_.dweight != nullptr ? num_rows * words(pitch_) : 0);
    if constexpr (kPairs) {
      dlogit_pairs(block, logits, row_words.data());
    } else {
      for (int64_t i = 0; i < num_rows; ++i)
        for (int64_t t = 0; t < pitch_; t += Vec::kLanes)
          (probabilities(logits + i * pitch_, t) * Vec::load(scale() + t)).store(logits + i * pitch_ + t);
      for_targets_in(block, [&](int64_t t, int64_t row) { logits[row * pitch_ + t] = target_dlogit()[t]; });
    }
    if (args_.dweight == nullptr) return;
    const Word* a;
    if constexpr (kPairs)
      a = row_words.data();
    else
      a = logits;
    const int64_t depth = words(count_), pitch = plan_.padded_dim;
    float* sum = dweight() + block * kVocabBlock * pitch;
    for (int64_t t = 0; t < depth; t += words(kTokenDepth))
      for (int64_t d = 0; d < pitch; d += kPanel)
        multiply_panel<Kind, true>(a + t, words(pitch_), num_rows, x_columns_.data() + d * depth + t * kPanel,
                                   std::min(words(kTokenDepth), depth - t), sum + d, pitch, first_ + t > 0);
    if constexpr (kPairs)
      for (const Correction& c : corrections_[block])
        add_scaled(c.lost, x_row(c.token), dweight() + c.vocab_row * pitch);
  }

  void add_scaled(float scale, const T* source, float* out) const {
    for (int64_t d = 0; d < args_.dim; ++d) out[d] += scale * to_float(source[d]);
  }

  HK_INLINE Vec probabilities(const float* logits, int64_t t) const {
    return exp(Vec::load(logits + t) - Vec::load(top() + t)) * Vec::load(inverse_total() + t);
  }

  // bf16 dlogits twice: pairs along the tokens in row_words (num_rows, pitch / 2), for dweight; pairs along the
  // vocabulary over every second row of logits, for dx. row_words may be null.
  void dlogit_pairs(int64_t block, float* logits, Word* row_words) {
    if constexpr (kPairs) {
      const int64_t num_rows = block_rows(block);
      bf16* rows = reinterpret_cast<bf16*>(row_words);
      corrections_[block].clear();
      Workspace<float> pair(2 * pitch_);
      for (int64_t i = 0; i < num_rows; i += 2) {
        const bool odd_end = i + 1 == num_rows;
        for (int r = 0; r < 2; ++r) dlogit_row(block, i + r, r == 1 && odd_end, logits, pair.data() + r * pitch_);
        for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
          bf16 both[2][Vec::kLanes];
          for (int r = 0; r < 2; ++r) Vec::load(pair.data() + r * pitch_ + t).store(both[r]);
          uint32_t pairs[Vec::kLanes];
          for (int j = 0; j < Vec::kLanes; ++j)
            pairs[j] = both[0][j].bits | static_cast<uint32_t>(both[1][j].bits) << 16;
          std::memcpy(logits + i * pitch_ + t, pairs, sizeof pairs);
          for (int r = 0; r < (odd_end ? 1 : 2) && rows != nullptr; ++r)
            std::memcpy(rows + (i + r) * pitch_ + t, both[r], sizeof both[r]);
        }
      }
      for_targets_in(block, [&](int64_t t, int64_t row) {
        const bf16 value = note_rounding(block, row, t, target_dlogit()[t]);
        std::memcpy(reinterpret_cast<char*>(logits + row / 2 * 2 * pitch_ + t) + row % 2 * 2, &value, sizeof value);
        if (rows != nullptr) rows[row * pitch_ + t] = value;
      });
    }
  }

  // One row of dlogits in fp32, its high probabilities noted for correction; the row past an odd end is zero.
  void dlogit_row(int64_t block, int64_t row, bool past_end, const float* logits, float* out) {
    if (past_end) {
      std::memset(out, 0, static_cast<size_t>(pitch_) * sizeof(float));
      return;
    }
    Vec highest(0.0f);
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      const Vec p = probabilities(logits + row * pitch_, t);
      highest = max(p, highest);
      (p * Vec::load(scale() + t)).store(out + t);
    }
    constexpr float kHigh = 1.0f / 16;  // at most 15 entries of a token
    if (max_lane(highest) <= kHigh) return;
    for (int64_t t = 0; t < count_; ++t)
      if (std::fabs(out[t]) > kHigh * std::fabs(scale()[t]) && args_.targets[first_ + t] != block * kVocabBlock + row)
        note_rounding(block, row, t, out[t]);
  }

  bf16 note_rounding(int64_t block, int64_t row, int64_t token, float value) {
    const bf16 rounded = from_float<bf16>(value);
    const float lost = value - to_float(rounded);
    if (lost != 0.0f) corrections_[block].push_back({token, block * kVocabBlock + row, lost});
    return rounded;
  }

  // dx of the chunk: a thread owns some columns and goes through the vocabulary in order.
  void finish_dx() {
    const int64_t num_panels = plan_.padded_dim / kPanel;
    parallel_ranges(num_panels, num_threads_, [&](int64_t panel_begin, int64_t panel_end) {
      [[maybe_unused]] const typename Kind::Session session;
      constexpr int64_t kGroup = 512 / kPanel;  // columns whose weights are packed together: 192 x 512 words in L2
      Workspace<Word> packed(words(kVocabDepth) * kPanel * kGroup),
          rows(Kind::kTiles ? count_ * words(kVocabDepth) : 0);
      for (int64_t group = panel_begin; group < panel_end; group += kGroup)
        for (int64_t v = 0; v < args_.vocab_size; v += kVocabDepth)
          add_dx(group, std::min(group + kGroup, panel_end), v, packed.data(), rows.data());
    });
    for (const auto& of_block : corrections_)
      for (const Correction& c : of_block)
        add_scaled(c.lost, weight_row(c.vocab_row), dx() + c.token * plan_.padded_dim);
    if (padded_) copy_rows(dx_sum_.data(), count_, args_.dx + first_ * args_.dim);
  }

  // Adds kVocabDepth rows of the vocabulary to panels of dx.
  void add_dx(int64_t panel_begin, int64_t panel_end, int64_t v, Word* packed, Word* rows) const {
    const int64_t depth = std::min(kVocabDepth, args_.vocab_size - v);
    const int64_t stride = pitch_ * Kind::kDepthPerWord;  // words from one step of depth to the next
    const Word* dlogits = reinterpret_cast<const Word*>(logits_.data()) + v / Kind::kDepthPerWord * stride;
#if defined(HK_ISA_AMX)
    if constexpr (Kind::kTiles) transpose_words(dlogits, stride, count_, words(depth), rows, words(kVocabDepth));
#endif
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      Word* weights = packed + (panel - panel_begin) * words(kVocabDepth) * kPanel;
      const int64_t d = panel * kPanel;
      pack_straight<Kind>(weight_row(v) + d, args_.weight_stride, std::min<int64_t>(kPanel, args_.dim - d), depth,
                          weights);
      if constexpr (Kind::kTiles)
        multiply_panel<Kind, true>(rows, words(kVocabDepth), count_, weights, words(depth), dx() + d, plan_.padded_dim,
                                   v > 0);
      else
        multiply_panel<Kind, false>(dlogits, stride, count_, weights, words(depth), dx() + d, plan_.padded_dim, v > 0);
    }
  }

  void finish_dweight() {
    if (args_.num_tokens == 0)
      std::memset(args_.dweight, 0, static_cast<size_t>(args_.vocab_size * args_.dim) * sizeof(float));
    else if (padded_)
      copy_rows(dweight_sum_.data(), args_.vocab_size, args_.dweight);
  }

  void copy_rows(const float* padded, int64_t num_rows, float* out) const {
    parallel_ranges(num_rows, num_threads_, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        std::memcpy(out + row * args_.dim, padded + row * plan_.padded_dim,
                    static_cast<size_t>(args_.dim) * sizeof(float));
    });
  }

  struct Correction {
    int64_t token, vocab_row;
    float lost;
  };

  const LinearCrossEntropy& args_;
  const Plan plan_;
  const int num_threads_;
  const bool wants_gradient_;
  const float token_scale_;
  const bool padded_;                                 // dim is not a whole number of panels
  int64_t first_ = 0, count_ = 0, pitch_ = 0;         // the chunk: its first token, its size, its size in whole panels
  const Workspace<Word> x_panels_;                    // x of the chunk, packed for the logits: columns are tokens
  const Workspace<Word> x_columns_;                   // x of the chunk, packed for dweight: columns are dimensions
  const Workspace<float> logits_;                     // (vocab_size, pitch): logits, then dlogits
  const Workspace<float> partials_;                   // (num_blocks, 2, chunk): maximum and sum of exponentials
  const Workspace<float> tokens_;                     // (5, chunk)
  const Workspace<float> dx_sum_;                     // (chunk, padded_dim), unless dx itself serves
  const Workspace<float> dweight_sum_;                // (vocab_size, padded_dim), unless dweight itself serves
  std::vector<std::vector<Correction>> corrections_;  // of the chunk, per block
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& args) {
#if defined(HK_VEC_AVX512)
  constexpr int64_t kWorthPairs = 64;  // below it dlogits are too few to be small each, and there is nothing to gain
  const bool pairs = args.dim % 2 == 0 && args.weight_stride % 2 == 0 && args.vocab_size >= kWorthPairs;
#if defined(HK_ISA_AMX)
  if (args.is_bf16 && pairs) return Chunks<Bf16Tiles, bf16>(args).run();
#endif
  if (args.is_bf16 && pairs && has_avx512_bf16()) return Chunks<Bf16Pair, bf16>(args).run();
#endif
  args.is_bf16 ? Chunks<Fp32, bf16>(args).run() : Chunks<Fp32, float>(args).run();
}

}  // namespace herdkern::cpu::HK_ISA
