// Cuts a line of documents so that every rank of context parallelism gets the mean number of tokens and the mean
// attention work. Method and reasons: herdkern/parallel/context_balance.py, which is the same in NumPy and plain
// Python: while the work of a batch fits into 2^53, every number here is the number there, in the same order of
// floating-point operations (the build forbids contraction into fma).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace herdkern::context_plan {

constexpr double kSlack = 0.01;  // of a rank's tokens and work: a cut moves this far to spare a document

// Pairs of a query and a key that it sees. reach: keys that it sees at most, its own among them; 0 for no limit.
struct Work {
  bool causal;
  int64_t reach;

  // Of the first `position` queries of a document of `length`.
  int64_t before(int64_t position, int64_t length) const {
    if (!causal) return position * length;
    if (reach == 0) return position * (position + 1) / 2;
    const int64_t ramp = std::min(position, reach);
    return ramp * (ramp + 1) / 2 + (position - ramp) * reach;
  }
};

// Parts of documents side by side: document and offset of each, and one border more.
struct Segments {
  std::vector<int64_t> document, offset, borders;
};

// The order of `weights`, equal ones as they stand. Counting by 11 bits: three times as fast as std::stable_sort.
inline std::vector<int64_t> order_of(const std::vector<int64_t>& weights) {
  constexpr int kBits = 11;
  std::vector<int64_t> order(weights.size()), other(weights.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t most = weights.empty() ? 0 : *std::max_element(weights.begin(), weights.end());
  for (int shift = 0; shift < 63 && most >> shift != 0; shift += kBits) {
    int64_t starts[(1 << kBits) + 1] = {};
    const auto digit = [&](int64_t i) { return weights[i] >> shift & ((1 << kBits) - 1); };
    for (const int64_t i : order) ++starts[digit(i) + 1];
    for (int d = 0; d < 1 << kBits; ++d) starts[d + 1] += starts[d];
    for (const int64_t i : order) other[starts[digit(i)]++] = i;
    order.swap(other);
  }
  return order;
}

// Documents, and halves of long ones, light ones first. A half begins at a multiple of `align`.
inline Segments by_work_per_token(const int64_t* lengths, int64_t num_docs, int64_t num_ranks, int64_t align,
                                  bool causal) {
  const int64_t total = std::accumulate(lengths, lengths + num_docs, int64_t{0});
  const int64_t share = std::max(total / num_ranks, 2 * align);
  std::vector<int64_t> document, offset, length, weight, halved;
  const auto add = [&](int64_t d, int64_t begin, int64_t size, int64_t w) {
    document.push_back(d);
    offset.push_back(begin);
    length.push_back(size);
    weight.push_back(w);
  };
  for (int64_t d = 0; d < num_docs; ++d) {
    if (causal && num_ranks > 1 && lengths[d] >= share)
      halved.push_back(d);
    else
      add(d, 0, lengths[d], lengths[d]);
  }
  const auto half = [&](int64_t d) { return (lengths[d] + align) / (2 * align) * align; };
  for (const int64_t d : halved) add(d, 0, half(d), half(d));
  for (auto d = halved.rbegin(); d != halved.rend(); ++d)  // of equal ones, the first has the outermost halves
    add(*d, half(*d), lengths[*d] - half(*d), lengths[*d] + half(*d));
  Segments made;
  made.borders.push_back(0);
  for (const int64_t i : order_of(weight)) {
    made.document.push_back(document[i]);
    made.offset.push_back(offset[i]);
    made.borders.push_back(made.borders.back() + length[i]);
  }
  return made;
}

// Segments with the work before each border. Places may lie between tokens: double.
class Line {
 public:
  Line(const Segments& segments, const int64_t* lengths, Work work)
      : work_(work), borders_(segments.borders), offsets_(segments.offset), sums_{0}, skipped_(segments.offset.size()) {
    for (size_t i = 0; i < offsets_.size(); ++i) {
      const int64_t length = lengths[segments.document[i]];
      skipped_[i] = work.before(offsets_[i], length);
      sums_.push_back(sums_.back() + work.before(offsets_[i] + borders_[i + 1] - borders_[i], length) - skipped_[i]);
    }
  }

  int64_t tokens() const { return borders_.back(); }
  int64_t work() const { return sums_.back(); }

  // The work of all queries before token `at`.
  int64_t work_until(double at) const {
    if (at >= static_cast<double>(tokens())) return work();
    const size_t i = last_at_most(borders_, at);
    const int64_t count = static_cast<int64_t>(at) - borders_[i];
    if (!work_.causal)
      return sums_[i] + static_cast<int64_t>(static_cast<__int128>(count) * (sums_[i + 1] - sums_[i]) /
                                             (borders_[i + 1] - borders_[i]));
    return sums_[i] - skipped_[i] + work_.before(count + offsets_[i], 0);
  }

  // The token before which all queries together have this work.
  double token_after(double wanted) const {
    if (wanted >= static_cast<double>(work())) return static_cast<double>(tokens());
    const size_t i = last_at_most(sums_, wanted);
    double left = wanted - static_cast<double>(sums_[i]);
    const double begin = static_cast<double>(borders_[i]);
    if (!work_.causal)
      return begin +
             left * static_cast<double>(borders_[i + 1] - borders_[i]) / static_cast<double>(sums_[i + 1] - sums_[i]);
    left += static_cast<double>(skipped_[i]);
    const double reach = static_cast<double>(work_.reach), ramp = reach * (reach + 1) / 2;
    const bool is_behind = 0 < ramp && ramp < left;
    const double position = is_behind ? reach + (left - ramp) / reach : (std::sqrt(8 * left + 1) - 1) / 2;
    return begin + position - static_cast<double>(offsets_[i]);
  }

  // Where to cut near `at`, within [low, high]: between segments if that moves at most `slack_tokens` and `slack_work`,
  // else at a multiple of `align`.
  int64_t place_for_cut(double at, int64_t align, double slack_tokens, double slack_work, int64_t low,
                        int64_t high) const {
    const int64_t found = std::upper_bound(borders_.begin(), borders_.end(), at, less) - borders_.begin();
    const int64_t i = std::min(found, static_cast<int64_t>(borders_.size()) - 1) - 1;
    const int64_t here = work_until(at);
    int64_t near = borders_[i], far = borders_[i + 1];
    if (at - static_cast<double>(near) >= static_cast<double>(far) - at) std::swap(near, far);
    for (const int64_t border : {near, far}) {
      const double moved = std::abs(static_cast<double>(border) - at);
      const double work_moved = static_cast<double>(std::abs(work_until(static_cast<double>(border)) - here));
      if (low <= border && border <= high && moved <= slack_tokens && work_moved <= slack_work) return border;
    }
    const int64_t begin = borders_[i];
    const double steps = std::nearbyint((at - static_cast<double>(begin)) / static_cast<double>(align));
    const int64_t place = std::min(begin + static_cast<int64_t>(steps) * align, borders_[i + 1]);
    return std::min(std::max(place, low), high);
  }

 private:
  static bool less(double at, int64_t border) { return at < static_cast<double>(border); }

  static size_t last_at_most(const std::vector<int64_t>& sorted, double at) {
    return static_cast<size_t>(std::upper_bound(sorted.begin(), sorted.end(), at, less) - sorted.begin()) - 1;
  }

  Work work_;
  const std::vector<int64_t>&borders_, &offsets_;
  std::vector<int64_t> sums_, skipped_;
};

// An end of what is not cut yet, and the work before it.
struct End {
  int64_t at, work;
};

// How many tokens a rank takes from the left and from the right end, to get `tokens` and `work` together.
inline std::pair<double, double> shares(const Line& line, End left, End right, double tokens, double work) {
  const double begin = static_cast<double>(left.at), end = static_cast<double>(right.at);
  const auto surplus = [&](double taken) {
    const int64_t both =
        line.work_until(begin + taken) - left.work + right.work - line.work_until(end - (tokens - taken));
    return static_cast<double>(both) - work;
  };
  double low = 0, high = tokens, over = surplus(low), under = surplus(high);
  if (over <= 0) return {0, end - line.token_after(static_cast<double>(right.work) - work)};
  if (under >= 0) return {line.token_after(static_cast<double>(left.work) + work) - begin, 0};
  while (high - low > 1) {
    const double middle = std::min(std::max(low + (high - low) * over / (over - under), low + 0.5), high - 0.5);
    const double found = surplus(middle);
    if (std::abs(found) < kSlack / 2 * work) return {middle, tokens - middle};
    if (found > 0) {  // the end that stays counts half: it will not stay for long
      low = middle, over = found, under /= 2;
    } else {
      high = middle, under = found, over /= 2;
    }
  }
  return {low, tokens - low};
}

// 2 * num_ranks + 1 cuts of the line; rank i gets the i-th range from the left and from the right.
inline std::vector<int64_t> balanced_cuts(const Line& line, int64_t num_ranks, int64_t align) {
  End left{0, 0}, right{line.tokens(), line.work()};
  std::vector<int64_t> lefts{left.at}, rights{right.at};
  for (int64_t ranks = num_ranks; ranks > 1; --ranks) {
    const double tokens = static_cast<double>(right.at - left.at) / static_cast<double>(ranks);
    const double work = static_cast<double>(right.work - left.work) / static_cast<double>(ranks);
    const double slack_tokens = kSlack * tokens, slack_work = kSlack * work;
    const auto [from_left, from_right] = shares(line, left, right, tokens, work);
    const int64_t cut = line.place_for_cut(static_cast<double>(right.at) - from_right, align, slack_tokens, slack_work,
                                           left.at, right.at);
    const int64_t after = line.work_until(static_cast<double>(cut)), kept = right.work - after;
    double at = std::max(static_cast<double>(left.at),
                         static_cast<double>(left.at) + from_left + from_right - static_cast<double>(right.at - cut));
    const double taken = static_cast<double>(line.work_until(at) - left.work);
    const double wanted = std::min(std::max(taken, work - slack_work - static_cast<double>(kept)),
                                   work + slack_work - static_cast<double>(kept));
    if (wanted != taken) at = line.token_after(static_cast<double>(left.work) + std::max(wanted, 0.0));
    right = {cut, after};
    left.at = line.place_for_cut(std::min(at, static_cast<double>(cut)), align, slack_tokens, slack_work, left.at, cut);
    left.work = line.work_until(static_cast<double>(left.at));
    lefts.push_back(left.at);
    rights.push_back(right.at);
  }
  lefts.push_back(left.at);
  lefts.insert(lefts.end(), rights.rbegin(), rights.rend());
  return lefts;
}

}  // namespace herdkern::context_plan
