// Ids back to bytes: the tokens end to end. A token of up to 15 bytes is copied as 16 at once, its length in the last.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "text/bpe_tables.h"

namespace herdkern::text {

class Decoder {
 public:
  // tokens: each id once. Ids may leave gaps; those decode to an error.
  explicit Decoder(const TokenList& tokens) {
    size_t num_ids = 0;
    for (const auto& [token, id] : tokens) num_ids = std::max<size_t>(num_ids, size_t(id) + 1);
    records_.resize(num_ids);
    lengths_.assign(num_ids, kUnknown);
    for (const auto& [token, id] : tokens) {
      lengths_[id] = uint32_t(token.size());
      if (token.size() <= kInline) {
        std::memcpy(records_[id].bytes, token.data(), token.size());
        records_[id].bytes[kInline] = uint8_t(token.size());
      } else {
        const uint64_t begin = long_bytes_.size();
        std::memcpy(records_[id].bytes, &begin, sizeof(begin));
        records_[id].bytes[kInline] = kLong;
        long_bytes_.insert(long_bytes_.end(), token.begin(), token.end());
      }
    }
  }

  // Bytes of all ids together. Throws std::invalid_argument for an id without a token.
  template <typename Id>
  size_t num_bytes(const Id* ids, size_t num_ids) const {
    size_t total = 0;
    for (size_t i = 0; i < num_ids; ++i) {
      const auto id = int64_t(ids[i]);
      if (id < 0 || uint64_t(id) >= lengths_.size() || lengths_[id] == kUnknown) refuse(id, i);
      total += lengths_[id];
    }
    return total;
  }

  // Writes the bytes of the ids; `size` is what num_bytes said of them. Writes no further when another thread has
  // changed the ids since: throws std::runtime_error then.
  template <typename Id>
  void decode(const Id* ids, size_t num_ids, char* out, size_t size) const {
    char* const end = out + size;
    size_t i = 0;
    for (; i < num_ids && end - out >= 16; ++i) {
      const auto id = uint64_t(ids[i]);
      if (id >= records_.size()) refuse_change();
      const Record& record = records_[id];
      const uint8_t len = record.bytes[kInline];
      if (len == kLong) {
        if (lengths_[id] > size_t(end - out)) refuse_change();
        out = copy_long(id, out);
      } else {
        std::memcpy(out, record.bytes, 16);
        out += len;
      }
    }
    for (; i < num_ids; ++i) {
      const auto id = uint64_t(ids[i]);
      if (id >= records_.size() || lengths_[id] > size_t(end - out)) refuse_change();
      const uint32_t len = lengths_[id];
      if (len > kInline) {
        out = copy_long(id, out);
      } else {
        std::memcpy(out, records_[id].bytes, len);
        out += len;
      }
    }
    if (out != end) refuse_change();
  }

  uint32_t length_of(uint32_t id) const { return lengths_[id]; }

 private:
  static constexpr size_t kInline = 15;
  static constexpr uint8_t kLong = 0xFF;
  static constexpr uint32_t kUnknown = 0xFFFFFFFF;
  struct alignas(16) Record {
    uint8_t bytes[16] = {};  // a longer token: its place in long_bytes_
  };

  char* copy_long(uint64_t id, char* out) const {
    uint64_t begin;
    std::memcpy(&begin, records_[id].bytes, sizeof(begin));
    std::memcpy(out, &long_bytes_[begin], lengths_[id]);
    return out + lengths_[id];
  }

  [[noreturn]] static void refuse_change() {
    throw std::runtime_error("decode: ids must not change while they are decoded, they did; pass a copy");
  }

  [[noreturn]] void refuse(int64_t id, size_t place) const {
    const bool in_range = id >= 0 && uint64_t(id) < lengths_.size();
    throw std::invalid_argument("decode: ids[" + std::to_string(place) + "] must be a token id in [0, " +
                                std::to_string(lengths_.size()) + "), got " + std::to_string(id) +
                                (in_range ? ", which no token has" : ""));
  }

  std::vector<Record> records_;  // by id
  std::vector<uint32_t> lengths_;
  std::vector<char> long_bytes_;
};

}  // namespace herdkern::text
