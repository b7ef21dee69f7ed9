// Words as rows of tokens: see bpe_rows.h.
#include "text/bpe_rows.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace herdkern::text {

namespace {

constexpr int kBeginBits4 = 17, kBeginBits8 = 16;
constexpr int kBorderBits = 13;  // 64 KiB a thread
constexpr size_t kPadding = 16;

size_t begin_4(uint64_t bytes) { return (uint32_t(bytes) * 0x9E3779B1u) >> (32 - kBeginBits4); }
size_t begin_8(uint64_t bytes) { return size_t((bytes * 0x9E3779B97F4A7C15ull) >> (64 - kBeginBits8)); }

// Of a word of less than 64 bytes.
struct ShortDead {
  uint64_t bits = 0;
  bool holds(size_t at) const { return bits >> at & 1; }
  void add(size_t at) { bits |= uint64_t(1) << at; }
};

struct LongDead {
  std::vector<uint64_t>& bits;
  bool holds(size_t at) const { return bits[at / 64] >> (at % 64) & 1; }
  void add(size_t at) { bits[at / 64] |= uint64_t(1) << (at % 64); }
};

}  // namespace

TokenRows::TokenRows(const TokenList& tokens, const TokenTable& table, const ByteTokens& bytes_of_tokens)
    : table_(table),
      bytes_(bytes_of_tokens),
      parts_(table.num_ids()),
      shorter_(table.num_ids()),
      begin_of_4_(size_t(1) << kBeginBits4),
      begin_of_8_(size_t(1) << kBeginBits8) {
  std::vector<const std::pair<std::string_view, uint32_t>*> by_rank(table.num_ids());
  for (const auto& token : tokens) by_rank[token.second] = &token;
  std::vector<uint8_t> bytes(table.max_length() + kPadding);
  const auto padded = [&bytes](std::string_view text) {
    std::memcpy(bytes.data(), text.data(), text.size());
    return bytes.data();
  };
  for (const auto* token : by_rank) {
    if (token != nullptr) add(padded(token->first), {token->second, uint32_t(token->first.size())});
    if (!is_regular_) return;
  }
  for (const auto& [text, id] : tokens) {
    if (text.size() > kShortKey) shorter_[id] = longest_at(padded(text), text.size() - 1);
  }
}

// All tokens of lower rank must have been added.
void TokenRows::add(const uint8_t* bytes, Token token) {
  const auto [id, len] = token;
  bool has_higher_parts = false;
  // From the middle to both ends: a run is most often made of halves.
  for (uint32_t i = 0; i + 1 < len && !is_made(token); ++i) {
    const uint32_t cut = i % 2 == 0 ? len / 2 - i / 2 : len / 2 + i / 2 + 1;
    const Token left{find(bytes, cut), cut};
    if (left.id == kNoToken) continue;
    const Token right{find(bytes + cut, len - cut), len - cut};
    if (right.id == kNoToken) continue;
    if ((left.len > 1 && left.id > id) || (right.len > 1 && right.id > id)) {
      has_higher_parts = true;
    } else if (is_made(left) && is_made(right) && go_together(left, right, bytes + cut, id)) {
      parts_[id] = {left.id, right.id};
    }
  }
  if (!is_made(token)) {
    is_regular_ &= !has_higher_parts;
    return;
  }
  const uint64_t first = load_little_endian(bytes);
  if (len >= 4 && len < 8) begin_of_4_[begin_4(first)] |= uint8_t(1u << len);
  if (len >= 8) begin_of_8_[begin_8(first)] |= uint16_t(len <= kShortKey ? 1u << len : 1u);
}

TokenRows::Token TokenRows::longest_at(const uint8_t* text, size_t most) const {
  const uint64_t first = load_little_endian(text);
  uint32_t lengths = begin_of_8_[begin_8(first)];
  if (most > kShortKey) {
    Token found{0, 0};
    if (lengths & 1) {
      table_.any_long_prefix(text, most, [&](uint32_t len, uint32_t id) {
        if (!is_made({id, len})) return false;
        found = {id, len};
        return true;
      });
    }
    if (found.len != 0) return found;
    most = kShortKey;
  }
  lengths = (lengths | begin_of_4_[begin_4(first)] | 1u << 3) & ((2u << most) - 1) & ~7u;
  for (; lengths != 0;) {
    const auto len = uint32_t(31 - __builtin_clz(lengths));
    lengths ^= 1u << len;
    const ShortKey key = short_key(text, len);
    const uint64_t hash = hash_short(key);
    if (!table_.may_hold(hash)) continue;
    const uint32_t id = table_.find_short(key, hash);
    if (id != kNoToken && is_made({id, len})) return {id, len};
  }
  if (most >= 2) {
    const uint32_t id = bytes_.pair(text[0], text[1]);
    if (id != kNoToken) return {id, 2};
  }
  return most >= 1 ? Token{bytes_.one(text[0]), 1} : Token{0, 0};
}

bool TokenRows::go_together(Token first, Token second, const uint8_t* border, uint32_t limit) const {
  // A single byte is made before everything else: 0. The lowest rank that the parts beside the border must not have.
  for (;;) {
    const uint32_t joined = find(border - first.len, first.len + second.len);
    if (joined < limit) return false;
    const uint32_t made_first = first.len == 1 ? 0 : first.id + 1;
    const uint32_t made_second = second.len == 1 ? 0 : second.id + 1;
    if (made_first == 0 && made_second == 0) return true;
    if (made_first > made_second) {
      limit = first.id;
      const uint32_t right = parts_[first.id].right;
      first = {right, table_.length_of(right)};
    } else {
      limit = second.id + 1;
      const uint32_t left = parts_[second.id].left;
      second = {left, table_.length_of(left)};
    }
  }
}

bool TokenRows::remembered(uint64_t* borders, Token first, Token second, const uint8_t* border) const {
  const uint64_t pair = uint64_t(first.id) << 32 | second.id << 1 | 1u << 31;  // never 0
  uint64_t& place = borders[(pair * 0x9E3779B97F4A7C15ull) >> (64 - kBorderBits)];
  if ((place & ~uint64_t(1)) != pair) place = pair | uint64_t(go_together(first, second, border, kNoToken));
  return place & 1;
}

template <typename Dead>
bool TokenRows::lay(const uint8_t* word, size_t len, Dead&& dead, uint64_t* borders, IdBuffer& out) const {
  const size_t num_before = out.size();
  size_t at = 0;
  Token last{0, 0}, again{0, 0}, token = longest_at(word, len);
  for (;;) {
    const size_t end = at + token.len;
    if (!dead.holds(end) && (at == 0 || remembered(borders, last, token, word + at))) {
      out.push(token.id);
      if (end == len) return true;
      at = end;
      last = token;
      again = comes_again(last, word + at, len - at);
      token = again.len != 0 ? again : longest_at(word + at, len - at);
      continue;
    }
    token = again.len != 0 && token.id == again.id ? longest_at(word + at, len - at) : shorter_than(token, word + at);
    if (again.len != 0 && token.id == again.id) token = shorter_than(token, word + at);
    if (token.len != 0) continue;
    if (at == 0) return false;
    dead.add(at);  // nothing follows here: take the token before it back
    token = last;
    at -= token.len;
    out.pop();
    if (out.size() > num_before) last = {out.data()[out.size() - 1], table_.length_of(out.data()[out.size() - 1])};
    again = out.size() > num_before ? comes_again(last, word + at, len - at) : Token{0, 0};
  }
}

bool TokenRows::encode(const uint8_t* word, size_t len, Scratch& scratch, IdBuffer& out) const {
  if (scratch.borders.empty()) scratch.borders.resize(size_t(1) << kBorderBits);
  if (len < 64) return lay(word, len, ShortDead(), scratch.borders.data(), out);
  scratch.dead.assign(len / 64 + 1, 0);
  return lay(word, len, LongDead{scratch.dead}, scratch.borders.data(), out);
}

}  // namespace herdkern::text
