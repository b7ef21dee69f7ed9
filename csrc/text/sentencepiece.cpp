// SentencePiece BPE models: see sentencepiece.h.
#include "text/sentencepiece.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>

#include "text/utf8.h"

namespace herdkern::text {

namespace {

constexpr uint32_t kLeaf = 1u << 8, kValue = 1u << 31;
constexpr int kMaxMatches = 32;  // the library looks at no more keys that a text begins with
constexpr size_t kShort = 48;    // parts up to which a search beats a queue
constexpr const char* kReplacement = "\xEF\xBF\xBD";

size_t offset(uint32_t unit) { return size_t(unit >> 10) << ((unit & 1u << 9) >> 6); }

// The characters of a text as (begin, end); every byte that is no part of UTF-8 for itself.
template <typename Visit>
void for_each_character(std::string_view text, Visit&& visit) {
  const auto* begin = reinterpret_cast<const uint8_t*>(text.data());
  for (size_t at = 0; at < text.size();) {
    const DecodedCodePoint found = decode_utf8(begin + at, begin + text.size());
    visit(at, at + found.num_bytes, found.code_point);
    at += found.num_bytes;
  }
}

}  // namespace

CharsMap::CharsMap(std::string_view blob) {
  uint32_t size = 0;
  for (size_t i = 0; blob.size() >= 4 && i < 4; ++i) size |= uint32_t(uint8_t(blob[i])) << 8 * i;
  if (size == 0 || size % 4 != 0 || size > blob.size() - 4) {
    throw std::invalid_argument("must have a charsmap that holds its trie, got " + std::to_string(blob.size()) +
                                " bytes for a trie of " + std::to_string(size));
  }
  units_ = blob.substr(4, size);
  replacements_ = blob.substr(4 + size);
  num_units_ = size / 4;
}

uint32_t CharsMap::unit(size_t place) const {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value |= uint32_t(uint8_t(units_[4 * place + i])) << 8 * i;
  return value;
}

// The length of the longest key at text[at:], 0 if none is there; value: where its replacement begins.
size_t CharsMap::longest(std::string_view text, size_t at, uint32_t& value) const {
  size_t place = offset(unit(0)), found = 0;
  int num_matches = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const uint32_t byte = uint8_t(text[i]);
    place ^= byte;
    if (place >= num_units_) break;
    const uint32_t here = unit(place);
    if ((here & (kValue | 0xFF)) != byte) break;
    place ^= offset(here);
    if ((here & kLeaf) == 0) continue;
    if (place >= num_units_) {
      throw std::invalid_argument("encode: the model's charsmap is damaged, a value lies behind its end");
    }
    value = unit(place) & (kValue - 1);
    found = i + 1 - at;
    if (++num_matches == kMaxMatches) break;
  }
  return found;
}

std::string CharsMap::map(std::string_view text) const {
  std::string out;
  out.reserve(text.size());
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  for (size_t at = 0; at < text.size();) {
    uint32_t value = 0;
    if (const size_t length = longest(text, at, value)) {
      if (value < replacements_.size()) out.append(replacements_, value, replacements_.find('\0', value) - value);
      at += length;
      continue;
    }
    const DecodedCodePoint found = decode_utf8(bytes + at, bytes + text.size());
    if (found.code_point - 0xDC00u < 0x100u) {
      out += kReplacement;
    } else {
      out.append(text, at, found.num_bytes);
    }
    at += found.num_bytes;
  }
  return out;
}

// A run of characters that is or becomes one symbol.
struct SentencePieceCutter::Part {
  uint32_t symbol, begin, end;
  uint32_t made = kUnknown, rank = kUnknown;  // with the part behind it
};

// Where ids go. A run of unknown characters is one id, unless each becomes its bytes.
struct SentencePieceCutter::Output {
  const SentencePieceCutter& cutter;
  std::string_view text;
  std::vector<int32_t>& ids;
  bool was_unknown = false;

  void piece(int32_t id) {
    const std::vector<int32_t>& written = cutter.pieces_[size_t(id)].ids;
    ids.insert(ids.end(), written.begin(), written.end());
    was_unknown = false;
  }
  void part(const Part& part) {
    const int32_t id = part.symbol == kUnknown ? -1 : cutter.symbols_[part.symbol].piece;
    if (id >= 0 && id != cutter.unk_id_) return piece(id);
    if (cutter.byte_ids_.empty()) {
      if (!was_unknown) ids.push_back(cutter.unk_id_);
      was_unknown = true;
      return;
    }
    for (uint32_t i = part.begin; i < part.end; ++i) ids.push_back(cutter.byte_ids_[uint8_t(text[i])]);
  }
};

SentencePieceCutter::SentencePieceCutter(std::vector<SentencePiece> pieces, int32_t unk_id,
                                         std::vector<int32_t> byte_ids)
    : pieces_(std::move(pieces)), unk_id_(unk_id), byte_ids_(std::move(byte_ids)), pages_(0x1100, kUnknown) {
  if (unk_id < 0 || size_t(unk_id) >= pieces_.size() || (!byte_ids_.empty() && byte_ids_.size() != 256)) {
    throw std::invalid_argument("SentencePieceCutter: unk_id must be a piece and byte_ids 256 or none");
  }
  std::map<double, uint32_t, std::greater<>> ranks;
  for (const SentencePiece& piece : pieces_) {
    if (piece.text.empty()) throw std::invalid_argument("SentencePieceCutter: pieces must not be empty");
    if (piece.is_merged) ranks.emplace(piece.score, 0);
  }
  uint32_t num_ranks = 0;
  for (auto& [score, rank] : ranks) rank = num_ranks++;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const SentencePiece& piece = pieces_[i];
    const bool is_character = decode_utf8(reinterpret_cast<const uint8_t*>(piece.text.data()),
                                          reinterpret_cast<const uint8_t*>(piece.text.data() + piece.text.size()))
                                  .num_bytes == piece.text.size();
    if (is_character) add_character(piece.text);
    if (piece.is_merged || is_character) symbols_[add_symbol(piece.text)].piece = int32_t(i);
    if (piece.is_merged) {
      for_each_character(piece.text, [&](size_t begin, size_t end, uint32_t) {
        add_character(piece.text.substr(begin, end - begin));
      });
    }
    if (piece.is_user_defined) {
      user_defined_.emplace(piece.text, int32_t(i));
      user_defined_lengths_[uint8_t(piece.text[0])].push_back(piece.text.size());
    }
  }
  for (auto& lengths : user_defined_lengths_) {
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }
  for (const SentencePiece& piece : pieces_) {
    if (piece.is_merged) add_merges(piece.text, ranks.at(piece.score));
  }
  symbol_of_ = {};
}

uint32_t SentencePieceCutter::add_symbol(const std::string& text) {
  const auto [found, is_new] = symbol_of_.emplace(text, uint32_t(symbols_.size()));
  if (is_new) symbols_.emplace_back();
  return found->second;
}

void SentencePieceCutter::add_character(const std::string& text) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  const uint32_t code_point = decode_utf8(bytes, bytes + text.size()).code_point;
  uint32_t& page = pages_[code_point >> 8];
  if (page == kUnknown) {
    page = uint32_t(characters_.size());
    characters_.resize(characters_.size() + 256, kUnknown);
  }
  characters_[page + (code_point & 255)] = add_symbol(text);
}

// All pairs of symbols that spell the piece.
void SentencePieceCutter::add_merges(const std::string& text, uint32_t rank) {
  const uint32_t made = symbol_of_.at(text);
  symbols_[made].rank = rank;
  uint32_t before = kUnknown;
  for_each_character(text, [&](size_t begin, size_t end, uint32_t code_point) {
    const uint32_t here = character(code_point);
    if (begin > 0) {
      neighbours_.at_or_new(pair_key(before, here)) = 1;
      const auto left = symbol_of_.find(text.substr(0, begin)), right = symbol_of_.find(text.substr(begin));
      if (left != symbol_of_.end() && right != symbol_of_.end()) {
        merges_.at_or_new(pair_key(left->second, right->second)) = made;
      }
    }
    before = here;
    (void)end;
  });
}

// The length of the longest user-defined piece at text[at:], or 0.
size_t SentencePieceCutter::user_defined_at(std::string_view text, size_t at) const {
  for (const size_t length : user_defined_lengths_[uint8_t(text[at])]) {
    if (length <= text.size() - at && user_defined_.count(text.substr(at, length)) != 0) return length;
  }
  return 0;
}

void SentencePieceCutter::encode(std::string_view text, std::vector<int32_t>& ids) const {
  if (text.size() > UINT32_MAX) throw std::length_error("encode: text must be shorter than 2**32 bytes");
  Output output{*this, text, ids};
  std::vector<Part> parts;
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  for (size_t at = 0; at < text.size();) {
    if (const size_t length = user_defined_at(text, at)) {
      cut(parts, output);
      output.piece(user_defined_.at(text.substr(at, length)));
      at += length;
      continue;
    }
    const DecodedCodePoint found = decode_utf8(bytes + at, bytes + text.size());
    const uint32_t symbol = character(found.code_point);
    if (!parts.empty()) {
      const uint32_t before = parts.back().symbol;
      const bool may_merge = symbol != kUnknown && before != kUnknown && neighbours_.find(pair_key(before, symbol));
      if (!may_merge) cut(parts, output);
    }
    parts.push_back({symbol, uint32_t(at), uint32_t(at + found.num_bytes)});
    at += found.num_bytes;
  }
  cut(parts, output);
}

// Merges the parts, writes them and leaves none.
void SentencePieceCutter::cut(std::vector<Part>& parts, Output& output) const {
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    parts[i].made = merge_of(parts[i].symbol, parts[i + 1].symbol);
    parts[i].rank = parts[i].made == kUnknown ? kUnknown : symbols_[parts[i].made].rank;
  }
  if (parts.size() > 1) parts.size() <= kShort ? merge_short(parts) : merge_long(parts);
  for (const Part& part : parts) output.part(part);
  parts.clear();
}

void SentencePieceCutter::merge_short(std::vector<Part>& parts) const {
  const auto offer = [&](size_t i) {
    Part& part = parts[i];
    part.made = i + 1 < parts.size() ? merge_of(part.symbol, parts[i + 1].symbol) : kUnknown;
    part.rank = part.made == kUnknown ? kUnknown : symbols_[part.made].rank;
  };
  for (;;) {
    size_t best = 0;
    for (size_t i = 1; i < parts.size(); ++i) {
      if (parts[i].rank < parts[best].rank) best = i;
    }
    if (parts[best].rank == kUnknown) return;
    parts[best].symbol = parts[best].made;
    parts[best].end = parts[best + 1].end;
    parts.erase(parts.begin() + ptrdiff_t(best) + 1);
    offer(best);
    if (best > 0) offer(best - 1);
  }
}

// The same with a queue and links, O(n log n).
void SentencePieceCutter::merge_long(std::vector<Part>& parts) const {
  const auto n = uint32_t(parts.size());
  std::vector<uint32_t> next(n), before(n);
  std::vector<uint64_t> queue;  // rank << 32 | place; stale when the part says otherwise
  for (uint32_t i = 0; i < n; ++i) {
    next[i] = i + 1;
    before[i] = i - 1;
    if (parts[i].rank != kUnknown) queue.push_back(uint64_t(parts[i].rank) << 32 | i);
  }
  const auto later = std::greater<uint64_t>();
  std::make_heap(queue.begin(), queue.end(), later);
  const auto offer = [&](uint32_t i) {
    Part& part = parts[i];
    part.made = next[i] < n ? merge_of(part.symbol, parts[next[i]].symbol) : kUnknown;
    part.rank = part.made == kUnknown ? kUnknown : symbols_[part.made].rank;
    if (part.rank == kUnknown) return;
    queue.push_back(uint64_t(part.rank) << 32 | i);
    std::push_heap(queue.begin(), queue.end(), later);
  };
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), later);
    const auto rank = uint32_t(queue.back() >> 32), at = uint32_t(queue.back());
    queue.pop_back();
    Part& part = parts[at];
    if (part.rank != rank) continue;
    Part& gone = parts[next[at]];
    part.symbol = part.made;
    part.end = gone.end;
    gone.rank = kUnknown;
    gone.begin = gone.end;
    next[at] = next[next[at]];
    if (next[at] < n) before[next[at]] = at;
    offer(at);
    if (at > 0) offer(before[at]);
  }
  parts.erase(std::remove_if(parts.begin(), parts.end(), [](const Part& part) { return part.begin == part.end; }),
              parts.end());
}

}  // namespace herdkern::text
