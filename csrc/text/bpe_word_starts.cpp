// What merging starts from: see bpe_word_starts.h.
#include "text/bpe_word_starts.h"

#include <algorithm>

#include "text/bpe_word_merge.h"

namespace herdkern::text {

namespace {

constexpr size_t kClasses = 15;     // of bytes, on either side
constexpr size_t kLongestPart = 3;  // bytes of what lies at a border before all merges inside are done

// Bytes of one class are treated alike. Scripts have code points with few first bytes and many last ones.
size_t class_before(uint32_t byte) {
  if (byte == ' ') return 0;
  if (byte < 0x80) return 1;
  return byte >= 0xC0 ? 2 : 3 + byte % 12;
}

size_t class_behind(uint32_t byte) {
  if (byte == ' ') return 0;
  if (byte < 0x80) return 1;
  return byte < 0xC0 ? 2 : 3 + byte % 12;
}

// The lowest rank of a token that has a part at one end and a byte of a class beside it, over all tokens.
class LowestRanks {
 public:
  explicit LowestRanks(size_t num_ids) : row_of_(num_ids, kNoToken) {}
  void add(uint32_t part, size_t byte_class, uint32_t rank) {
    if (row_of_[part] == kNoToken) {
      row_of_[part] = uint32_t(rows_.size());
      rows_.emplace_back().fill(kNoToken);
    }
    uint32_t& lowest = rows_[row_of_[part]][byte_class];
    lowest = std::min(lowest, rank);
  }
  // One bit for each class whose lowest rank is no higher than `rank`.
  uint32_t up_to(uint32_t part, uint32_t rank) const {
    if (row_of_[part] == kNoToken) return 0;
    uint32_t found = 0;
    for (size_t i = 0; i < kClasses; ++i) found |= uint32_t(rows_[row_of_[part]][i] <= rank) << i;
    return found;
  }

 private:
  std::vector<uint32_t> row_of_;
  std::vector<std::array<uint32_t, kClasses>> rows_;
};

struct Bytes {
  uint8_t at[4];
  size_t size;
};

// A code point below 0x10000 as UTF-8.
Bytes utf8_of(uint32_t c) {
  const auto last = uint8_t(0x80 | (c & 63));
  if (c < 0x80) return {{uint8_t(c)}, 1};
  if (c < 0x800) return {{uint8_t(0xC0 | c >> 6), last}, 2};
  return {{uint8_t(0xE0 | c >> 12), uint8_t(0x80 | (c >> 6 & 63)), last}, 3};
}

}  // namespace

WordStarts::WordStarts(const TokenList& tokens, const std::vector<TokenParts>& parts, const TokenTable& table,
                       const MergeTable& merges)
    : starts_(2 * kPlaces) {
  for (uint32_t byte = 0; byte < kNoByte; ++byte) {
    before_[byte] = 4u << class_before(byte);
    behind_[byte] = 4u << (kClasses + class_behind(byte));
  }
  LowestRanks over_begin(parts.size()), over_end(parts.size());
  for (const auto& [text, id] : tokens) {
    const auto [left, right] = parts[id];
    if (left == kNoToken) continue;
    const size_t border = table.length_of(left);
    if (text.size() - border <= kLongestPart) over_begin.add(right, class_before(uint8_t(text[border - 1])), id);
    if (border <= kLongestPart) over_end.add(left, class_behind(uint8_t(text[border])), id);
  }
  add_ascii_pairs(tokens, parts, table);
  const auto start_of = [&](const Bytes& bytes) {
    uint32_t ids[4], notes = 0;
    size_t n = bytes.size;
    for (size_t i = 0; i < n; ++i) ids[i] = merges.bytes().one(bytes.at[i]);
    for (;;) {
      uint32_t lowest = kNoToken;
      size_t at = 0;
      for (size_t i = 0; i + 1 < n; ++i) {
        const uint32_t rank = merges.find(MergeTable::key_of(ids[i], ids[i + 1]));
        if (rank < lowest) lowest = rank, at = i;
      }
      if (lowest == kNoToken) break;
      notes |= over_begin.up_to(ids[0], lowest) << 2 | over_end.up_to(ids[n - 1], lowest) << (2 + kClasses);
      ids[at] = lowest;
      std::copy(ids + at + 2, ids + n, ids + at + 1);
      --n;
    }
    return n > 3 ? Start{} : Start{{ids[0], n > 1 ? ids[1] : 0, n > 2 ? ids[2] : 0}, notes | uint32_t(n)};
  };
  for (uint32_t c = 0; c < kPlaces; ++c) {
    const bool is_byte = c < 0x80 || (c >= 0xD880 && c < 0xD900);
    const Bytes bytes = is_byte ? Bytes{{uint8_t(c)}, 1} : utf8_of(c);
    starts_[c] = start_of(bytes);
    if (is_byte) continue;
    Bytes with_space{{' '}, bytes.size + 1};
    std::copy(bytes.at, bytes.at + bytes.size, with_space.at + 1);
    starts_[kPlaces + c] = start_of(with_space);
  }
}

void WordStarts::add_ascii_pairs(const TokenList& tokens, const std::vector<TokenParts>& parts,
                                 const TokenTable& table) {
  struct Ranks {
    uint64_t whole = kNoRank, ends = kNoRank, begins = kNoRank;
  };
  std::vector<Ranks> pairs(128 * 128);
  for (const auto& [text, id] : tokens) {
    if (parts[id].left == kNoToken) continue;
    const size_t border = table.length_of(parts[id].left);
    const auto first = uint8_t(text[border - 1]), second = uint8_t(text[border]);
    if ((first | second) >= 0x80) continue;
    Ranks& pair = pairs[first << 7 | second];
    if (text.size() == 2) pair.whole = id;
    if (border + 1 == text.size()) pair.ends = std::min<uint64_t>(pair.ends, id);
    if (border == 1) pair.begins = std::min<uint64_t>(pair.begins, id);
  }
  for (const Ranks& pair : pairs) {
    ascii_pairs_.push_back(pair.whole << 2 * kRankBits | pair.ends << kRankBits | pair.begins);
  }
}

}  // namespace herdkern::text
