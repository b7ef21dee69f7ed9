// Linear-time encoding of long words: see bpe_long_words.h.
#include "text/bpe_long_words.h"

#include <algorithm>

namespace herdkern::text {

LongWords::LongWords(const WordEncoder& encoder)
    : encoder_(encoder),
      table_(encoder.table()),
      prefix_lengths_(1 << 16),
      parts_(new std::atomic<uint64_t>[table_.num_ids()]) {
  for (uint32_t id = 0; id < table_.num_ids(); ++id) parts_[id].store(kUnknown, std::memory_order_relaxed);
  table_.for_each([this](const uint8_t* bytes, size_t len, uint32_t id) {
    if (len >= 3) prefix_lengths_[prefix_slot(bytes)] |= uint16_t(len <= kShortKey ? 1u << len : 1u);
    if (has_higher_parts(bytes, len, id) && !is_made(id, bytes, len)) is_regular_ = false;
  });
}

bool LongWords::has_higher_parts(const uint8_t* bytes, size_t len, uint32_t id) const {
  for (size_t cut = 1; cut < len; ++cut) {
    const uint32_t left = table_.find(bytes, cut);
    if (left == kNoToken) continue;
    const uint32_t right = table_.find(bytes + cut, len - cut);
    if (right == kNoToken) continue;
    if ((cut > 1 && left > id) || (len - cut > 1 && right > id)) return true;
  }
  return false;
}

LongWords::Parts LongWords::parts_of(uint32_t id, const uint8_t* bytes, size_t len) const {
  uint64_t packed = parts_[id].load(std::memory_order_relaxed);
  if (packed == kUnknown) {
    const auto parts = encoder_.parts_of({reinterpret_cast<const char*>(bytes), len}, id);
    packed = parts.size() == 2 ? uint64_t(parts[0]) << 32 | parts[1] : uint64_t(kNoToken) << 32;
    parts_[id].store(packed, std::memory_order_relaxed);  // whoever comes first: all find the same
  }
  return {uint32_t(packed >> 32), uint32_t(packed)};
}

LongWords::Token LongWords::shorter_than(size_t below, const uint8_t* text, size_t left) const {
  const uint32_t lengths = prefix_lengths_[prefix_slot(text)];
  Token found{0, 0};
  if ((lengths & 1) != 0 && below > kShortKey + 1) {
    table_.any_long_prefix(text, left, [&](uint32_t len, uint32_t id) {
      if (len >= below || !is_made(id, text, len)) return false;
      found = {id, len};
      return true;
    });
    if (found.len != 0) return found;
  }
  const size_t most = std::min({below - 1, left, kShortKey});
  for (uint32_t rest = lengths & ((2u << most) - 1) & ~7u; rest != 0;) {
    const auto len = uint32_t(31 - __builtin_clz(rest));
    rest ^= 1u << len;
    const uint32_t id = table_.find(text, len);
    if (id != kNoToken && is_made(id, text, len)) return {id, len};
  }
  if (most >= 2) {
    const uint32_t id = encoder_.pair_id(text[0], text[1]);
    if (id != kNoToken) return {id, 2};
  }
  return most >= 1 ? Token{encoder_.byte_id(text[0]), 1} : Token{0, 0};
}

bool LongWords::go_together(Token first, Token second, const uint8_t* border) const {
  // A single byte is made before everything else: 0. The lowest rank that the parts beside the border must not have.
  uint64_t limit = kNoToken;
  for (;;) {
    const uint32_t joined = table_.find(border - first.len, first.len + second.len);
    if (joined < limit) return false;
    const uint64_t made_first = first.len == 1 ? 0 : uint64_t(first.id) + 1;
    const uint64_t made_second = second.len == 1 ? 0 : uint64_t(second.id) + 1;
    if (made_first == 0 && made_second == 0) return true;
    if (made_first > made_second) {
      limit = first.id;
      const uint32_t right = parts_of(first.id, border - first.len, first.len).right;
      first = {right, table_.length_of(right)};
    } else {
      limit = uint64_t(second.id) + 1;
      const uint32_t left = parts_of(second.id, border, second.len).left;
      second = {left, table_.length_of(left)};
    }
  }
}

bool LongWords::encode(const uint8_t* word, size_t len, WordEncoder::Scratch& scratch, IdBuffer& out) const {
  auto& laid = scratch.ids;
  auto& dead = scratch.dead;
  laid.clear();
  dead.assign(len / 64 + 1, 0);
  size_t at = 0;
  Token token = shorter_than(~size_t(0), word, len);
  while (at < len) {
    const size_t end = at + token.len;
    const bool is_border = (dead[end / 64] >> (end % 64) & 1) == 0;
    if (is_border && (at == 0 || go_together({laid.back(), table_.length_of(laid.back())}, token, word + at))) {
      laid.push_back(token.id);
      at = end;
      if (at < len) token = shorter_than(~size_t(0), word + at, len - at);
      continue;
    }
    token = shorter_than(token.len, word + at, len - at);
    if (token.len != 0) continue;
    if (laid.empty()) return false;
    dead[at / 64] |= uint64_t(1) << (at % 64);  // nothing follows here: take the token before it back
    token = {laid.back(), table_.length_of(laid.back())};
    laid.pop_back();
    at -= token.len;
  }
  std::copy(laid.begin(), laid.end(), out.room_for(laid.size()));
  out.grow_by(laid.size());
  return true;
}

}  // namespace herdkern::text
