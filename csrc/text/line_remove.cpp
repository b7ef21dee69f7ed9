#include "text/line_remove.h"

#include <algorithm>
#include <cstring>

#include "text/line_code.h"

namespace herdkern::text {

namespace {

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

std::string_view stripped(std::string_view line) {
  const uint8_t *p = bytes_of(line), *end = p + line.size();
  const uint8_t* first = skip_white_space(p, end);
  return line.substr(first - p, strip_white_space(first, end) - first);
}

}  // namespace

bool is_blank(std::string_view line) {
  const uint8_t* p = bytes_of(line);
  return skip_white_space(p, p + line.size()) == p + line.size();
}

void RemovedLines::note(uint64_t key, uint64_t count, std::string_view line) {
  if (is_full_ && (count < last_.first || (count == last_.first && line > last_.second))) return;
  const auto [at, is_new] = best_.try_emplace(key, count, line);
  if (!is_new && line < at->second.second) at->second.second = line;
  if (static_cast<int64_t>(best_.size()) > 2 * limit_) forget_the_rest();
}

void RemovedLines::forget_the_rest() {
  std::vector<Entry> order;
  for (const auto& [key, entry] : best_) order.push_back(entry);
  const auto nth = order.begin() + (limit_ - 1);
  std::nth_element(order.begin(), nth, order.end(), before);
  last_ = *nth;
  is_full_ = true;
  for (auto at = best_.begin(); at != best_.end();) at = before(last_, at->second) ? best_.erase(at) : std::next(at);
}

std::vector<std::pair<uint64_t, std::string>> RemovedLines::entries() const {
  std::vector<Entry> order;
  for (const auto& [key, entry] : best_) order.push_back(entry);
  std::sort(order.begin(), order.end(), before);
  if (static_cast<int64_t>(order.size()) > limit_) order.resize(static_cast<size_t>(limit_));
  return order;
}

LineRemoval remove_lines(std::string_view text, const uint64_t* counts, const uint64_t* keys, bool code_aware,
                         RemovedLines& removed) {
  LineRemoval out;
  std::vector<std::string_view> kept;
  bool gap = false;
  size_t begin = 0;
  for (int64_t number = 0; begin <= text.size(); ++number) {
    const size_t found = text.find('\n', begin);
    const size_t end = found == std::string_view::npos ? text.size() : found;
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (counts[number] && !(code_aware && is_code_or_formula(bytes_of(line), static_cast<int64_t>(line.size())))) {
      removed.note(keys[number], counts[number], stripped(line));
      ++out.num_removed;
      gap = true;
      continue;
    }
    if (gap && is_blank(line) && (kept.empty() || is_blank(kept.back()))) continue;
    gap = false;
    kept.push_back(line);
  }
  if (out.num_removed == 0) return out;
  while (gap && !kept.empty() && is_blank(kept.back())) kept.pop_back();
  out.text.reserve(text.size());
  for (size_t i = 0; i < kept.size(); ++i) {
    if (i) out.text += '\n';
    out.text += kept[i];
  }
  return out;
}

}  // namespace herdkern::text
