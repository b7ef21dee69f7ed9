// SentencePiece BPE models: the map of characters that a text goes through, and the cutting of what comes out.
//
// Cutting merges adjacent symbols, the highest score first and of equal ones the leftmost, until no two are a piece.
// No merge crosses a place whose two characters stand side by side in no piece, so the text is first cut there, as a
// rule into words, and each part is merged by itself: the result is the same and the queue stays short.
// Source: Sennrich et al. 2016 (arXiv:1508.07909); Kudo and Richardson 2018 (arXiv:1808.06226).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/bpe_train_index.h"

namespace herdkern::text {

// A double-array trie of byte strings and what each becomes; the blob is described in formats/charsmap.py.
class CharsMap {
 public:
  // Throws std::invalid_argument if the blob does not hold its trie.
  explicit CharsMap(std::string_view blob);
  // `text` with the longest key at each place replaced. A byte that is no part of UTF-8 becomes U+FFFD. Throws
  // std::invalid_argument if the trie is damaged.
  std::string map(std::string_view text) const;

 private:
  size_t longest(std::string_view text, size_t at, uint32_t& value) const;
  uint32_t unit(size_t place) const;

  std::string units_, replacements_;
  size_t num_units_ = 0;
};

struct SentencePiece {
  std::string text;
  double score = 0;
  bool is_merged = false, is_user_defined = false;
  std::vector<int32_t> ids;  // what it is written as: itself, or where it may not be used, the pieces it is made of
};

class SentencePieceCutter {
 public:
  // unk_id: of the piece for what is unknown. byte_ids: those of the 256 byte pieces, or empty: without byte fallback.
  SentencePieceCutter(std::vector<SentencePiece> pieces, int32_t unk_id, std::vector<int32_t> byte_ids);
  SentencePieceCutter(const SentencePieceCutter&) = delete;  // views of its own texts are in it
  // Appends the ids of a normalized text.
  void encode(std::string_view text, std::vector<int32_t>& ids) const;

 private:
  static constexpr uint32_t kUnknown = 0xFFFFFFFF;
  struct Symbol {
    uint32_t rank = kUnknown;  // of its score, 0 is the highest; equal scores share one
    int32_t piece = -1;        // -1: a character that is no piece
  };
  struct Part;
  struct Output;

  uint32_t add_symbol(const std::string& text);
  void add_character(const std::string& text);
  void add_merges(const std::string& text, uint32_t rank);
  size_t user_defined_at(std::string_view text, size_t at) const;
  uint32_t character(uint32_t code_point) const {
    const uint32_t page = pages_[code_point >> 8];
    return page == kUnknown ? kUnknown : characters_[page + (code_point & 255)];
  }
  uint32_t merge_of(uint32_t left, uint32_t right) const {
    if (left == kUnknown || right == kUnknown) return kUnknown;
    const uint32_t* made = merges_.find(pair_key(left, right));
    return made == nullptr ? kUnknown : *made;
  }
  void cut(std::vector<Part>& parts, Output& output) const;
  void merge_short(std::vector<Part>& parts) const;
  void merge_long(std::vector<Part>& parts) const;

  std::vector<SentencePiece> pieces_;
  int32_t unk_id_;
  std::vector<int32_t> byte_ids_;
  std::vector<Symbol> symbols_;
  std::unordered_map<std::string, uint32_t> symbol_of_;  // while it is built
  std::vector<uint32_t> pages_, characters_;             // symbol of a code point
  PairMap<uint32_t> merges_;                             // symbol that two make
  PairMap<uint32_t> neighbours_;                         // characters that stand side by side in a piece
  std::unordered_map<std::string_view, int32_t> user_defined_;
  std::vector<size_t> user_defined_lengths_[256];  // by the first byte, falling
};

}  // namespace herdkern::text
