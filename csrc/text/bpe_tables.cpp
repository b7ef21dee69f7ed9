// Tables of an encoder: see bpe_tables.h.
#include "text/bpe_tables.h"

#include <algorithm>
#include <functional>

namespace herdkern::text {

namespace {

const uint8_t* bytes_of(std::string_view text) { return reinterpret_cast<const uint8_t*>(text.data()); }

size_t table_size(size_t num_entries) {
  size_t size = 16;
  while (size < 2 * num_entries) size *= 2;
  return size;
}

}  // namespace

TokenTable::TokenTable(const TokenList& tokens) : entries_(table_size(tokens.size())) {
  for (const auto& [token, id] : tokens) {
    const uint8_t* bytes = bytes_of(token);
    Entry entry;
    entry.id = id;
    entry.len = uint32_t(token.size());
    uint64_t hash;
    if (token.size() <= kInline) {
      entry.key = load_key(bytes, token.size(), bytes + token.size());
      hash = hash_key(entry.key, token.size());
    } else {
      hash = hash_bytes(bytes, token.size());
      entry.key = {hash, long_tokens_.size()};
      long_tokens_ += token;
    }
    size_t slot = hash & (entries_.size() - 1);
    while (entries_[slot].id != kNoToken) slot = (slot + 1) & (entries_.size() - 1);
    entries_[slot] = entry;
    max_length_ = std::max(max_length_, token.size());
  }
}

uint32_t TokenTable::find(const uint8_t* bytes, size_t len, const uint8_t* readable_end) const {
  if (len == 0 || len > max_length_) return kNoToken;
  const bool is_inline = len <= kInline;
  const WordKey key = is_inline ? load_key(bytes, len, readable_end) : WordKey{hash_bytes(bytes, len), 0};
  const uint64_t hash = is_inline ? hash_key(key, len) : key.low;
  for (size_t slot = hash & (entries_.size() - 1);; slot = (slot + 1) & (entries_.size() - 1)) {
    const Entry& entry = entries_[slot];
    if (entry.id == kNoToken) return kNoToken;
    if (entry.len != len) continue;
    if (is_inline ? entry.key == key
                  : entry.key.low == hash && std::memcmp(&long_tokens_[entry.key.high], bytes, len) == 0) {
      return entry.id;
    }
  }
}

PairTable::PairTable(const TokenList& tokens, const TokenTable& table) {
  std::vector<uint64_t> packed;
  for (const auto& [token, id] : tokens) {
    const uint8_t* begin = bytes_of(token);
    const uint8_t* end = begin + token.size();
    for (size_t cut = 1; cut < token.size(); ++cut) {
      const uint32_t left = table.find(begin, cut, end);
      if (left == kNoToken) continue;
      const uint32_t right = table.find(begin + cut, token.size() - cut, end);
      if (right != kNoToken) packed.push_back(uint64_t(left) << 42 | uint64_t(right) << 21 | id);
    }
  }
  slots_.assign(table_size(packed.size()), kFree);
  mask_ = slots_.size() - 1;
  for (uint64_t slot : packed) {
    size_t i = home(slot >> 21);
    while (slots_[i] != kFree) i = (i + 1) & mask_;
    slots_[i] = slot;
  }
}

SpecialTokens::SpecialTokens(const TokenList& tokens) {
  for (const auto& [token, id] : tokens) {
    if (ids_.empty()) prefix_ = token;
    ids_.emplace(token, id);
    lengths_.push_back(token.size());
    starts_[uint8_t(token[0])] = true;
    const size_t common =
        std::mismatch(prefix_.begin(), prefix_.begin() + std::min(prefix_.size(), token.size()), token.begin()).first -
        prefix_.begin();
    prefix_.resize(common);
  }
  std::sort(lengths_.begin(), lengths_.end(), std::greater<size_t>());
  lengths_.erase(std::unique(lengths_.begin(), lengths_.end()), lengths_.end());
}

SpecialTokens::Match SpecialTokens::find(std::string_view text, size_t from,
                                         const std::vector<uint32_t>* wanted) const {
  if (ids_.empty()) return {text.npos, text.npos, kNoToken};
  for (size_t at = from; at < text.size(); ++at) {
    if (!prefix_.empty()) {
      at = text.find(prefix_, at);
      if (at == text.npos) break;
    } else if (!starts_[uint8_t(text[at])]) {
      continue;
    }
    for (size_t length : lengths_) {
      if (length > text.size() - at) continue;
      const auto found = ids_.find(std::string(text.substr(at, length)));
      if (found == ids_.end()) continue;
      if (wanted == nullptr || std::binary_search(wanted->begin(), wanted->end(), found->second)) {
        return {at, at + length, found->second};
      }
    }
  }
  return {text.npos, text.npos, kNoToken};
}

}  // namespace herdkern::text
