// Finds special tokens in text: the leftmost, and of those the longest, in one pass.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/bpe_tables.h"

namespace herdkern::text {

// Which special tokens are meant.
struct SpecialPolicy {
  bool all = false;
  std::vector<uint32_t> ids;  // sorted; used when not all
  bool none() const { return !all && ids.empty(); }
  bool holds(uint32_t id) const { return all || std::binary_search(ids.begin(), ids.end(), id); }
};

class SpecialTokens {
 public:
  struct Match {
    size_t begin, end;
    uint32_t id;
    bool found() const { return begin != std::string_view::npos; }
  };

  explicit SpecialTokens(const TokenList& tokens) {
    for (const auto& [token, id] : tokens) sorted_.emplace_back(std::string(token), id);
    std::sort(sorted_.begin(), sorted_.end());
    for (const auto& [token, id] : sorted_) starts_[uint8_t(token[0])] = true;
    if (!sorted_.empty() && sorted_.front().first[0] == sorted_.back().first[0]) first_ = sorted_[0].first[0];
  }

  // The first match at or after `from` among the wanted tokens.
  Match find(std::string_view text, size_t from, const SpecialPolicy& wanted) const {
    if (sorted_.empty() || wanted.none()) return kNoMatch;
    for (size_t at = from; (at = next_start(text, at)) < text.size(); ++at) {
      const Match match = longest_at(text, at, wanted);
      if (match.found()) return match;
    }
    return kNoMatch;
  }

  // The token with this id, which there must be.
  const std::string& name_of(uint32_t id) const {
    return std::find_if(sorted_.begin(), sorted_.end(), [id](const auto& token) { return token.second == id; })->first;
  }

 private:
  static constexpr Match kNoMatch{std::string_view::npos, std::string_view::npos, kNoToken};

  size_t next_start(std::string_view text, size_t at) const {
    if (first_ >= 0) {
      const void* found = at < text.size() ? std::memchr(text.data() + at, first_, text.size() - at) : nullptr;
      return found == nullptr ? text.size() : size_t(static_cast<const char*>(found) - text.data());
    }
    while (at < text.size() && !starts_[uint8_t(text[at])]) ++at;
    return at;
  }

  // Narrows the sorted tokens down to those that begin as the text does, byte by byte.
  Match longest_at(std::string_view text, size_t at, const SpecialPolicy& wanted) const {
    Match best = kNoMatch;
    auto begin = sorted_.begin(), end = sorted_.end();
    for (size_t i = 0; begin < end && at + i < text.size(); ++i) {
      const auto byte_at = [i](const auto& token) { return uint8_t(token.first[i]); };
      const auto byte = uint8_t(text[at + i]);
      begin = std::partition_point(begin, end, [&](const auto& token) { return byte_at(token) < byte; });
      end = std::partition_point(begin, end, [&](const auto& token) { return byte_at(token) == byte; });
      if (begin < end && begin->first.size() == i + 1) {
        if (wanted.holds(begin->second)) best = {at, at + i + 1, begin->second};
        ++begin;  // those left are longer
      }
    }
    return best;
  }

  std::vector<std::pair<std::string, uint32_t>> sorted_;
  bool starts_[256] = {};
  int first_ = -1;  // the first byte of all tokens, -1 if they differ
};

}  // namespace herdkern::text
