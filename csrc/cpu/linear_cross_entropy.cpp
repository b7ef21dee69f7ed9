#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/huge_pages.h"
#include "cpu/linear_cross_entropy_plan.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace herdkern::cpu::HK_ISA {
namespace {

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

// exp(z - top) for z <= top or little more, relative error 2^-24 |z - top|: half the time of exp.
HK_INLINE Vec exp_difference(Vec z, Vec top) { return exp2((z - top) * Vec(1.44269504088896341f)); }

// Rounds `count` floats; out may be the same memory.
HK_INLINE void round_to(const float* source, bf16* out, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(source + i).store(out + i);
  if (i < count) Vec::load_partial(source + i, count - i).store_partial(out + i, static_cast<int>(count - i));
}

// What the steps share for one chunk of tokens. Kind is how products are done, T and W how hidden and weight are
// stored. With pairs of bf16 the dlogits are rounded; the few that are not small against the gradient, at the target
// and where the probability is high, get back what the rounding took, in fp32 (Correction).
template <typename Kind, typename T, typename W>
class Chunks {
  using Word = typename Kind::Word;
  static constexpr bool kPairs = Kind::kDepthPerWord == 2;
  static constexpr bool kRoundsHidden = std::is_same_v<T, bf16>, kRoundsWeight = std::is_same_v<W, bf16>;
  static constexpr bool kConverts = !std::is_same_v<W, T> || (!kPairs && kRoundsWeight);  // rows of weight into words

 public:
  explicit Chunks(const LinearCrossEntropy& arguments)
      : args_(arguments),
        plan_(arguments),
        num_threads_(threads_for(args_.num_tokens * args_.vocab_size * args_.dim / 8, args_.num_threads)),
        wants_gradient_(args_.dhidden != nullptr || args_.dweight != nullptr),
        num_targets_(count_targets()),
        room_(std::max(plan_.chunk, plan_.late_chunk)),
        panels_(room_ * words(args_.dim)),
        columns_(args_.dweight != nullptr ? round_up(args_.dim, kPanel) * words(room_) : 0),
        logits_(wants_gradient_ ? std::max(held_logits(), plan_.slab_rows * args_.dim) : 0),
        partials_(args_.has_stats ? 0 : plan_.num_blocks * 3 * plan_.chunk),
        tokens_(5 * room_),
        dhidden_sum_(args_.dhidden != nullptr && args_.dhidden_is_bf16 ? plan_.chunk * args_.dim : 0),
        more_sums_(args_.dweight != nullptr && kRoundsWeight ? (plan_.held_rows - plan_.rows_in_place) * args_.dim : 0),
        corrections_(kPairs ? plan_.num_blocks : 0) {
    if (!wants_gradient_) return;
    prefer_huge_pages(logits_.data(), held_logits() * int64_t{sizeof(float)});
    if (args_.dweight != nullptr) prefer_huge_pages(args_.dweight, args_.vocab_size * args_.dim * int64_t{sizeof(W)});
  }

  void run() {
    for (int64_t first = 0; first < args_.num_tokens; first += plan_.chunk) {
      enter(first, plan_.chunk);
      if (!args_.has_stats) {
        std::fill_n(stat(kTargetLogit), count_, 0.0f);
        parallel_tasks(plan_.num_blocks, num_threads_, [&](int64_t block) { stats_of(block); });
        join_stats();
      }
      finish_losses();
      if (!wants_gradient_) continue;
      find_terms();
      const int64_t needed = args_.dhidden != nullptr ? plan_.num_blocks : held_blocks();
      for (pass_ = 0; pass_ < needed; pass_ += plan_.pass_blocks) {
        const int64_t count = std::min(plan_.pass_blocks, needed - pass_);
        if (args_.has_stats || !one_pass())
          parallel_tasks(count, num_threads_, [&](int64_t i) { multiply_logits(pass_ + i, logits_at(pass_ + i)); });
        parallel_tasks(count, num_threads_, [&](int64_t i) { gradient_of(pass_ + i); });
        if (args_.dhidden != nullptr) finish_dhidden(pass_ + count);
      }
    }
    if (args_.dweight != nullptr) finish_dweight();
    if (args_.loss != nullptr) *args_.loss = reduced_loss();
  }

 private:
  static int64_t words(int64_t depth) { return (depth + Kind::kDepthPerWord - 1) / Kind::kDepthPerWord; }
  const T* hidden_row(int64_t token) const {
    return static_cast<const T*>(args_.hidden) + (first_ + token) * args_.hidden_stride;
  }
  const W* weight_row(int64_t v) const { return static_cast<const W*>(args_.weight) + v * args_.weight_stride; }
  int64_t block_rows(int64_t block) const { return plan_.block_rows(block, args_.vocab_size); }
  int64_t held_blocks() const { return (plan_.held_rows + kVocabBlock - 1) / kVocabBlock; }
  bool one_pass() const { return plan_.pass_blocks >= plan_.num_blocks; }
  int64_t held_logits() const { return round_up(plan_.pass_rows(args_.vocab_size), 2) * plan_.chunk; }
  float* logits_at(int64_t block) const { return logits_.data() + (block - pass_) * kVocabBlock * pitch_; }
  float* stat(Stat which) const { return args_.stats + which * args_.num_tokens + first_; }
  // Arrays over the tokens of the chunk: the members of TokenTerms.
  float* top() const { return tokens_.data(); }
  float* factor() const { return tokens_.data() + room_; }
  float* constant() const { return tokens_.data() + 2 * room_; }
  float* at_target() const { return tokens_.data() + 3 * room_; }
  float* limit() const { return tokens_.data() + 4 * room_; }

  // Where the gradients are summed in fp32.
  float* dhidden() const {
    if (args_.dhidden_is_bf16) return dhidden_sum_.data();
    return static_cast<float*>(args_.dhidden) + first_ * args_.dim;
  }
  float* dweight(int64_t row) const {
    if constexpr (kRoundsWeight) {
      if (row >= plan_.held_rows) return logits_.data() + (row - slab_) * args_.dim;
      if (row >= plan_.rows_in_place) return more_sums_.data() + (row - plan_.rows_in_place) * args_.dim;
    }
    return static_cast<float*>(args_.dweight) + row * args_.dim;
  }

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
    return static_cast<float>(args_.reduction == Reduction::kMean ? total / static_cast<double>(num_targets_) : total);
  }

  // Makes tokens [first, first + size) the chunk: packs them for both products.
  void enter(int64_t first, int64_t size) {
    first_ = first;
    pass_ = 0;
    count_ = std::min(size, args_.num_tokens - first);
    pitch_ = round_up(count_, kPanel);
    const int64_t num_panels = pitch_ / kPanel;
    const int64_t num_columns = args_.dweight != nullptr ? (args_.dim + kPanel - 1) / kPanel : 0;
    parallel_tasks(num_panels + num_columns, num_threads_, [&](int64_t task) {
      if (task < num_panels) {
        const int64_t t = task * kPanel;
        pack_transposed<Kind>(hidden_row(t), args_.hidden_stride, std::min<int64_t>(kPanel, count_ - t), args_.dim,
                              panels_.data() + t * words(args_.dim));
      } else {
        const int64_t d = (task - num_panels) * kPanel;
        pack_straight<Kind>(hidden_row(0) + d, args_.hidden_stride, std::min<int64_t>(kPanel, args_.dim - d), count_,
                            columns_.data() + d * words(count_));
      }
    });
  }

  // The logits of one block of the vocabulary, (rows of the block, pitch).
  void multiply_logits(int64_t block, float* logits) const {
    const int64_t num_rows = block_rows(block), depth = words(args_.dim);
    [[maybe_unused]] const typename Kind::Session session;
    const int64_t converted_row = round_up(args_.dim, Kind::kDepthPerWord) / Kind::kDepthPerWord;
    Workspace<Word> converted(kConverts ? num_rows * converted_row : 0);
    const Word* rows;
    int64_t row_words;
    if constexpr (kConverts) {
      for (int64_t i = 0; i < num_rows; ++i)
        convert(weight_row(block * kVocabBlock + i), converted.data() + i * converted_row);
      rows = converted.data();
      row_words = converted_row;
    } else {
      rows = reinterpret_cast<const Word*>(weight_row(block * kVocabBlock));
      row_words = args_.weight_stride / Kind::kDepthPerWord;
    }
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t run = std::min(kDepthBlock, depth - k);
      Ahead ahead = weights_after(block, k);
      for (int64_t t = 0; t < pitch_; t += kPanel)
        multiply_panel<Kind, true>(rows + k, row_words, num_rows, panels_.data() + t * depth + k * kPanel, run,
                                   logits + t, pitch_, k > 0, &ahead);
    }
    if (args_.softcap <= 0.0f) return;
    const Vec cap(args_.softcap), inverse(1.0f / args_.softcap);
    for (int64_t i = 0; i < num_rows * pitch_; i += Vec::kLanes)
      (cap * tanh(Vec::load(logits + i) * inverse)).store(logits + i);
  }

  // What multiply_logits reads of weight after words k ... of this block; of its next block, where they are the last.
  Ahead weights_after(int64_t block, int64_t k) const {
    const int64_t num_tiles = kVocabBlock / kTileRows * (pitch_ / kPanel), depth = words(args_.dim);
    int64_t next = k + kDepthBlock;
    if (next >= depth || kConverts) {
      block += num_threads_;
      next = 0;
      if (k > 0 && kConverts) return {};
    }
    if (block >= plan_.num_blocks) return {};
    const int64_t elements = kConverts ? args_.dim : std::min(kDepthBlock, depth - next) * Kind::kDepthPerWord;
    const auto* row = reinterpret_cast<const char*>(weight_row(block * kVocabBlock) + next * Kind::kDepthPerWord);
    Ahead ahead{row, args_.weight_stride * int64_t{sizeof(W)}, (elements * int64_t{sizeof(W)} + 63) / 64,
                block_rows(block)};
    ahead.per_tile = (ahead.lines * ahead.rows_left + num_tiles - 1) / num_tiles;
    return ahead;
  }

  // A row of weight as the words of a product.
  void convert(const W* source, Word* out) const {
    if constexpr (kPairs && !kRoundsWeight) {
      round_to(source, reinterpret_cast<bf16*>(out), args_.dim);
    } else if constexpr (!kPairs) {
      for (int64_t k = 0; k < args_.dim; ++k) out[k] = as_hidden(source[k]);
    }
  }

  // A weight in the precision of hidden.
  static HK_INLINE float as_hidden(W value) {
    if constexpr (kRoundsHidden && !kRoundsWeight) return to_float(from_float<bf16>(value));
    return to_float(value);
  }

  // Logits of one block, their maximum, the sum of exponentials and of themselves for every token.
  void stats_of(int64_t block) {
    const int64_t num_rows = block_rows(block);
    const bool held = wants_gradient_ && one_pass();
    Workspace<float> own_logits(held ? 0 : num_rows * pitch_);
    float* logits = held ? logits_at(block) : own_logits.data();
    multiply_logits(block, logits);
    float* maxima = partials_.data() + block * 3 * plan_.chunk;
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      Vec highest = Vec::load(logits + t);
      for (int64_t i = 1; i < num_rows; ++i) highest = max(Vec::load(logits + i * pitch_ + t), highest);
      highest.store(maxima + t);
      grouped_sum(num_rows, 8, [&](int64_t i) {
        return exp_difference(Vec::load(logits + i * pitch_ + t), highest);
      }).store(maxima + plan_.chunk + t);
      if (args_.label_smoothing > 0.0f)
        grouped_sum(num_rows, 8, [&](int64_t i) {
          return Vec::load(logits + i * pitch_ + t);
        }).store(maxima + 2 * plan_.chunk + t);
    }
    for_targets_in(block, [&](int64_t t, int64_t row) { stat(kTargetLogit)[t] = logits[row * pitch_ + t]; });
  }

  // Joins what the blocks found, in their order.
  void join_stats() {
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      const float* maxima = partials_.data() + t;
      Vec highest = Vec::load(maxima);
      for (int64_t block = 1; block < plan_.num_blocks; ++block)
        highest = max(Vec::load(maxima + block * 3 * plan_.chunk), highest);
      const Vec total = grouped_sum(plan_.num_blocks, 32, [&](int64_t block) {
        const float* partial = maxima + block * 3 * plan_.chunk;
        return Vec::load(partial + plan_.chunk) * exp(Vec::load(partial) - highest);
      });
      Vec sum(0.0f);
      if (args_.label_smoothing > 0.0f)
        sum = grouped_sum(plan_.num_blocks, 32,
                          [&](int64_t block) { return Vec::load(maxima + (block * 3 + 2) * plan_.chunk); });
      const int valid = static_cast<int>(std::min<int64_t>(Vec::kLanes, count_ - t));
      if (valid <= 0) break;
      highest.store_partial(stat(kTop) + t, valid);
      total.store_partial(stat(kTotal) + t, valid);
      sum.store_partial(stat(kLogitSum) + t, valid);
    }
  }

  void finish_losses() {
    for (int64_t t = first_; t < first_ + count_ && args_.losses != nullptr; ++t) {
      const TokenLoss found = loss_of_token(args_, t);
      args_.losses[t] = found.loss;
      if (args_.logps != nullptr) args_.logps[t] = found.logp;
    }
  }

  void find_terms() {
    const bool given = args_.dlosses != nullptr || args_.dlogps != nullptr;
    const float scale = args_.reduction == Reduction::kMean ? 1.0f / static_cast<float>(num_targets_) : 1.0f;
    for (int64_t t = 0; t < pitch_; ++t) {
      TokenTerms terms{};
      if (t < count_) {
        const float dloss = args_.dlosses != nullptr ? args_.dlosses[first_ + t] : given ? 0.0f : scale;
        terms = terms_of_token(args_, first_ + t, dloss, args_.dlogps != nullptr ? args_.dlogps[first_ + t] : 0.0f);
      }
      top()[t] = terms.top;
      factor()[t] = terms.factor;
      constant()[t] = terms.constant;
      at_target()[t] = terms.at_target;
      limit()[t] = terms.limit;
    }
  }

  HK_INLINE Vec dlogits(const float* logits, int64_t t) const {
    const Vec z = Vec::load(logits + t), p = exp_difference(z, Vec::load(top() + t));
    Vec result = fma(p, Vec::load(factor() + t), Vec::load(constant() + t));
    if (args_.softcap > 0.0f) {
      const Vec ratio = z * Vec(1.0f / args_.softcap);
      result = result * (Vec(1.0f) - ratio * ratio);
    }
    return result;
  }

  // Turns a block's logits into dlogits where they lie, and adds its rows of dweight if they are held.
  void gradient_of(int64_t block) {
    const bool held = args_.dweight != nullptr && block < held_blocks();
    if (held || args_.dhidden != nullptr) add_gradient(block, logits_at(block), args_.dhidden != nullptr, held);
  }

  void add_gradient(int64_t block, float* logits, bool for_dhidden, bool for_dweight) {
    const int64_t num_rows = block_rows(block), dim = args_.dim;
    [[maybe_unused]] const typename Kind::Session session;
    Workspace<Word> row_words(kPairs && for_dweight ? num_rows * words(pitch_) : 0);
    if constexpr (kPairs) {
      dlogit_pairs(block, logits, for_dhidden, row_words.data());
    } else {
      for (int64_t i = 0; i < num_rows; ++i)
        for (int64_t t = 0; t < pitch_; t += Vec::kLanes)
          dlogits(logits + i * pitch_, t).store(logits + i * pitch_ + t);
      for_targets_in(block, [&](int64_t t, int64_t row) { logits[row * pitch_ + t] = at_target()[t]; });
    }
    if (!for_dweight) return;
    const Word* a;
    if constexpr (kPairs)
      a = row_words.data();
    else
      a = logits;
    const int64_t depth = words(count_);
    float* sum = dweight(block * kVocabBlock);
    for (int64_t t = 0; t < depth; t += words(kTokenDepth))
      for (int64_t d = 0; d < dim; d += kPanel)
        multiply_columns<Kind, true>(a + t, words(pitch_), num_rows, columns_.data() + d * depth + t * kPanel,
                                     std::min(words(kTokenDepth), depth - t), sum + d, dim, dim - d, first_ + t > 0);
    if constexpr (kPairs)
      for (const Correction& c : corrections_[block]) {
        const T* row = hidden_row(c.token);
        float* out = dweight(c.vocab_row);
        for (int64_t d = 0; d < dim; ++d) out[d] += c.lost * to_float(row[d]);
      }
  }

  // bf16 dlogits twice: pairs along the tokens in row_words (num_rows, pitch / 2), for dweight; pairs along the
  // vocabulary over every second row of logits, for dhidden. row_words may be null.
  void dlogit_pairs(int64_t block, float* logits, bool for_dhidden, Word* row_words) {
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
          if (for_dhidden) {
            uint32_t pairs[Vec::kLanes];
            for (int j = 0; j < Vec::kLanes; ++j)
              pairs[j] = both[0][j].bits | static_cast<uint32_t>(both[1][j].bits) << 16;
            std::memcpy(logits + i * pitch_ + t, pairs, sizeof pairs);
          }
          for (int r = 0; r < (odd_end ? 1 : 2) && rows != nullptr; ++r)
            std::memcpy(rows + (i + r) * pitch_ + t, both[r], sizeof both[r]);
        }
      }
      for_targets_in(block, [&](int64_t t, int64_t row) {
        const bf16 value = note_rounding(block, row, t, at_target()[t]);
        if (for_dhidden)
          std::memcpy(reinterpret_cast<char*>(logits + row / 2 * 2 * pitch_ + t) + row % 2 * 2, &value, sizeof value);
        if (rows != nullptr) rows[row * pitch_ + t] = value;
      });
    }
  }

  // One row of dlogits in fp32, its large entries noted for correction; the row past an odd end is zero.
  void dlogit_row(int64_t block, int64_t row, bool past_end, const float* logits, float* out) {
    if (past_end) {
      std::memset(out, 0, static_cast<size_t>(pitch_) * sizeof(float));
      return;
    }
    Vec beyond(0.0f);
    for (int64_t t = 0; t < pitch_; t += Vec::kLanes) {
      const Vec value = dlogits(logits + row * pitch_, t);
      beyond = max(max(value, Vec(0.0f) - value) - Vec::load(limit() + t), beyond);
      value.store(out + t);
    }
    if (max_lane(beyond) <= 0.0f) return;
    for (int64_t t = 0; t < count_; ++t)
      if (std::fabs(out[t]) > limit()[t] && args_.targets[first_ + t] != block * kVocabBlock + row)
        note_rounding(block, row, t, out[t]);
  }

  bf16 note_rounding(int64_t block, int64_t row, int64_t token, float value) {
    const bf16 rounded = from_float<bf16>(value);
    const float lost = value - to_float(rounded);
    if (lost != 0.0f) corrections_[block].push_back({token, block * kVocabBlock + row, lost});
    return rounded;
  }

  // dhidden of the chunk, as far as this pass has it: a thread owns some columns and goes through the vocabulary in
  // order.
  void finish_dhidden(int64_t end_of_pass) {
    const int64_t end_row = std::min(end_of_pass * kVocabBlock, args_.vocab_size);
    const int64_t num_panels = (args_.dim + kPanel - 1) / kPanel;
    parallel_ranges(num_panels, num_threads_, [&](int64_t panel_begin, int64_t panel_end) {
      [[maybe_unused]] const typename Kind::Session session;
      constexpr int64_t kGroup = 512 / kPanel;  // columns whose weights are packed together: 192 x 512 words in L2
      Workspace<Word> packed(words(kVocabDepth) * kPanel * kGroup),
          rows(Kind::kTiles ? count_ * words(kVocabDepth) : 0);
      for (int64_t group = panel_begin; group < panel_end; group += kGroup)
        for (int64_t v = pass_ * kVocabBlock; v < end_row; v += kVocabDepth)
          add_dhidden(group, std::min(group + kGroup, panel_end), v, end_row, packed.data(), rows.data());
      const int64_t begin = panel_begin * kPanel, end = std::min(panel_end * kPanel, args_.dim);
      for (int64_t block = pass_; block < end_of_pass && kPairs; ++block)
        for (const Correction& c : corrections_[block]) {
          const W* row = weight_row(c.vocab_row);
          float* out = dhidden() + c.token * args_.dim;
          for (int64_t d = begin; d < end; ++d) out[d] += c.lost * as_hidden(row[d]);
        }
      if (args_.dhidden_is_bf16 && end_of_pass == plan_.num_blocks)
        for (int64_t t = 0; t < count_; ++t)
          round_to(dhidden() + t * args_.dim + begin,
                   static_cast<bf16*>(args_.dhidden) + (first_ + t) * args_.dim + begin, end - begin);
    });
  }

  // Adds kVocabDepth rows of the vocabulary, or those up to end_row, to panels of dhidden.
  void add_dhidden(int64_t panel_begin, int64_t panel_end, int64_t v, int64_t end_row, Word* packed, Word* rows) const {
    const int64_t depth = std::min(kVocabDepth, end_row - v);
    const int64_t stride = pitch_ * Kind::kDepthPerWord;  // words from one step of depth to the next
    const Word* a =
        reinterpret_cast<const Word*>(logits_.data()) + (v - pass_ * kVocabBlock) / Kind::kDepthPerWord * stride;
#if defined(HK_ISA_AMX)
    if constexpr (Kind::kTiles) transpose_words(a, stride, count_, words(depth), rows, words(kVocabDepth));
#endif
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      Word* weights = packed + (panel - panel_begin) * words(kVocabDepth) * kPanel;
      const int64_t d = panel * kPanel, columns = args_.dim - d;
      pack_straight<Kind, W, T>(weight_row(v) + d, args_.weight_stride, std::min<int64_t>(kPanel, columns), depth,
                                weights);
      Ahead ahead;  // the same columns of the next rows
      if (const int64_t next = v + kVocabDepth; next < args_.vocab_size) {
        const int64_t num_rows = std::min(kVocabDepth, args_.vocab_size - next);
        ahead = {reinterpret_cast<const char*>(weight_row(next) + d), args_.weight_stride * int64_t{sizeof(W)},
                 kPanel * int64_t{sizeof(W)} / 64, num_rows};
        ahead.per_tile = num_rows * ahead.lines * kTileRows / std::max<int64_t>(count_, 1) + 1;
      }
      if constexpr (Kind::kTiles)
        multiply_columns<Kind, true>(rows, words(kVocabDepth), count_, weights, words(depth), dhidden() + d, args_.dim,
                                     columns, v > 0);
      else
        multiply_columns<Kind, false>(a, stride, count_, weights, words(depth), dhidden() + d, args_.dim, columns,
                                      v > 0, &ahead);
    }
  }

  void finish_dweight() {
    if (args_.num_tokens == 0) {
      std::memset(args_.dweight, 0, static_cast<size_t>(args_.vocab_size * args_.dim) * sizeof(W));
      return;
    }
    if constexpr (kRoundsWeight) {
      // Row by row to the front of their own memory: rows [r, 2 r) go to where rows [r / 2, r) were, which are gone.
      const int64_t in_place = plan_.rows_in_place;
      if (in_place > 0) round_rows(0, 1);
      for (int64_t row = 1; row < in_place; row *= 2) round_rows(row, std::min(2 * row, in_place));
      round_rows(in_place, plan_.held_rows);
      finish_late_rows();
    }
  }

  // Sums of rows [begin, end) into bf16.
  void round_rows(int64_t begin, int64_t end) const {
    if constexpr (kRoundsWeight)
      parallel_ranges(end - begin, num_threads_, [&](int64_t first, int64_t last) {
        for (int64_t row = begin + first; row < begin + last; ++row)
          round_to(dweight(row), static_cast<bf16*>(args_.dweight) + row * args_.dim, args_.dim);
      });
  }

  // dweight of the rows that were not held, for all tokens, from logits that are computed again.
  void finish_late_rows() {
    for (slab_ = plan_.held_rows; slab_ < args_.vocab_size; slab_ += plan_.slab_rows) {
      const int64_t end = std::min(slab_ + plan_.slab_rows, args_.vocab_size), block = slab_ / kVocabBlock;
      for (int64_t first = 0; first < args_.num_tokens; first += plan_.late_chunk) {
        enter(first, plan_.late_chunk);
        find_terms();
        parallel_tasks((end - slab_ + kVocabBlock - 1) / kVocabBlock, num_threads_, [&](int64_t i) {
          Workspace<float> logits(kVocabBlock * pitch_);
          multiply_logits(block + i, logits.data());
          add_gradient(block + i, logits.data(), false, true);
        });
      }
      round_rows(slab_, end);
    }
  }

  struct Correction {
    int64_t token, vocab_row;
    float lost;
  };

  const LinearCrossEntropy& args_;
  const Plan plan_;
  const int num_threads_;
  const bool wants_gradient_;
  const int64_t num_targets_;                         // tokens that are not ignored
  const int64_t room_;                                // tokens of the largest chunk
  int64_t first_ = 0, count_ = 0, pitch_ = 0;         // the chunk: its first token, its size, its size in whole panels
  int64_t pass_ = 0;                                  // first block whose logits are held
  int64_t slab_ = 0;                                  // first of the late rows whose sums lie in logits_
  const Workspace<Word> panels_;                      // hidden of the chunk, packed for the logits: columns are tokens
  const Workspace<Word> columns_;                     // hidden of the chunk, packed for dweight: columns are dimensions
  const Workspace<float> logits_;                     // (rows of a pass, pitch): logits, then dlogits
  const Workspace<float> partials_;                   // (num_blocks, 3, chunk): maximum, sum of exponentials, sum
  const Workspace<float> tokens_;                     // (5, room)
  const Workspace<float> dhidden_sum_;                // (chunk, dim), unless dhidden itself serves
  const Workspace<float> more_sums_;                  // sums of dweight that its own memory does not hold
  std::vector<std::vector<Correction>> corrections_;  // of the chunk, per block
};

template <typename Kind>
void run_16bit(const LinearCrossEntropy& args) {
  args.weight_is_bf16 ? Chunks<Kind, bf16, bf16>(args).run() : Chunks<Kind, bf16, float>(args).run();
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& args) {
  if (!args.hidden_is_bf16) return Chunks<Fp32, float, float>(args).run();
#if defined(HK_VEC_AVX512)
  constexpr int64_t kWorthPairs = 64;  // below it dlogits are too few to be small each, and there is nothing to gain
  const bool even = args.dim % 2 == 0 && (!args.weight_is_bf16 || args.weight_stride % 2 == 0);
  const bool pairs = even && args.vocab_size >= kWorthPairs;
#if defined(HK_ISA_AMX)
  if (pairs) return run_16bit<Bf16Tiles>(args);
#endif
  if (pairs && has_avx512_bf16()) return run_16bit<Bf16Pair>(args);
#endif
  run_16bit<Fp32>(args);
}

}  // namespace herdkern::cpu::HK_ISA
