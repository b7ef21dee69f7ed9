// Token table of an encoder: see bpe_tables.h.
#include "text/bpe_tables.h"

#include <algorithm>
#include <stdexcept>

namespace herdkern::text {

namespace {

constexpr size_t kSlotsPerPrefix = 4;

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

size_t count_short(const TokenList& tokens) {
  return size_t(
      std::count_if(tokens.begin(), tokens.end(), [](const auto& token) { return token.first.size() <= kShortKey; }));
}

}  // namespace

// Lines are filled to about two of three: fewer would cost cache, more would spill.
TokenTable::TokenTable(const TokenList& tokens) : lines_(count_short(tokens) / 2 + 1) {
  int filter_bits = 10;
  while ((size_t(1) << filter_bits) < 8 * tokens.size()) ++filter_bits;
  filter_.resize(size_t(1) << (filter_bits - 3));
  filter_shift_ = 64 - filter_bits;
  uint32_t num_ids = 0;
  for (const auto& [token, id] : tokens) num_ids = std::max(num_ids, id + 1);
  lengths_.resize(num_ids);
  for (const auto& [token, id] : tokens) {
    const uint8_t* bytes = bytes_of(token);
    lengths_[id] = uint32_t(token.size());
    max_length_ = std::max(max_length_, token.size());
    if (token.size() > kShortKey) {
      long_.push_back({long_bytes_.size(), uint32_t(token.size()), id});
      long_bytes_.insert(long_bytes_.end(), bytes, bytes + token.size());
      continue;
    }
    const ShortKey key = short_key_before(bytes, token.size(), bytes + token.size());
    const uint64_t hash = hash_short(key);
    filter_[hash >> filter_shift_ >> 3] |= uint8_t(1 << (hash >> filter_shift_ & 7));
    size_t i = line_of(hash);
    for (; lines_[i].keys[2].high != 0; i = i + 1 == lines_.size() ? 0 : i + 1) lines_[i].spills = 1;
    Line& line = lines_[i];
    const size_t place = line.keys[0].high == 0 ? 0 : line.keys[1].high == 0 ? 1 : 2;
    line.keys[place] = key;
    line.ids[place] = id;
  }
  long_bytes_.resize(long_bytes_.size() + 32);  // readable behind the last token
  std::sort(long_.begin(), long_.end(), [this](const LongToken& a, const LongToken& b) {
    const int order = std::memcmp(&long_bytes_[a.begin], &long_bytes_[b.begin], 16);
    return order != 0 ? order < 0 : a.len != b.len ? a.len > b.len : a.id < b.id;
  });
  size_t num_slots = 16;
  while (num_slots < kSlotsPerPrefix * long_.size()) num_slots *= 2;
  long_slots_.resize(num_slots);
  for (size_t begin = 0, end; begin < long_.size(); begin = end) {
    const uint8_t* bytes = &long_bytes_[long_[begin].begin];
    for (end = begin + 1; end < long_.size() && std::memcmp(bytes, &long_bytes_[long_[end].begin], 16) == 0;) ++end;
    size_t slot = hash_long(bytes, 16) & (num_slots - 1);
    while (long_slots_[slot].second != 0) slot = (slot + 1) & (num_slots - 1);
    long_slots_[slot] = {uint32_t(begin), uint32_t(end)};
  }
}

std::pair<size_t, size_t> TokenTable::long_with_prefix(const uint8_t* text) const {
  const size_t mask = long_slots_.size() - 1;
  for (size_t slot = hash_long(text, 16) & mask; long_slots_[slot].second != 0; slot = (slot + 1) & mask) {
    if (std::memcmp(&long_bytes_[long_[long_slots_[slot].first].begin], text, 16) == 0) return long_slots_[slot];
  }
  return {0, 0};
}

uint32_t TokenTable::find_long(const uint8_t* bytes, size_t len) const {
  if (len > max_length_) return kNoToken;
  const auto [begin, end] = long_with_prefix(bytes);
  const auto longer = [](const LongToken& token, size_t wanted) { return token.len > wanted; };
  const auto last = long_.begin() + ptrdiff_t(end);
  for (auto at = std::lower_bound(long_.begin() + ptrdiff_t(begin), last, len, longer); at != last; ++at) {
    if (at->len != len) break;
    if (std::memcmp(&long_bytes_[at->begin], bytes, len) == 0) return at->id;
  }
  return kNoToken;
}

ByteTokens::ByteTokens(const TokenList& tokens) : ones_(256, kNoToken), pairs_(256 * 256, kNoToken) {
  for (const auto& [token, id] : tokens) {
    if (token.size() == 1) ones_[uint8_t(token[0])] = id;
    if (token.size() == 2) pairs_[uint8_t(token[0]) << 8 | uint8_t(token[1])] = id;
  }
  if (std::find(ones_.begin(), ones_.end(), kNoToken) != ones_.end()) {
    throw std::invalid_argument("Encoder: the single bytes must all be tokens");
  }
}

}  // namespace herdkern::text
