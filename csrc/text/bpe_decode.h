// Ids back to bytes: the tokens end to end in one array.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace herdkern::text {

class Decoder {
 public:
  // tokens: (bytes, id), each id once. Ids may leave gaps; those decode to an error.
  explicit Decoder(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
    for (const auto& [token, id] : tokens) {
      if (id >= spans_.size()) spans_.resize(id + 1, {0, kUnknown});
      spans_[id] = {bytes_.size(), token.size()};
      bytes_ += token;
    }
  }

  // Appends the bytes of the ids to out. Throws std::invalid_argument for an id without a token.
  void decode(const int64_t* ids, size_t num_ids, std::string& out) const {
    size_t num_bytes = 0;
    for (size_t i = 0; i < num_ids; ++i) {
      if (ids[i] < 0 || uint64_t(ids[i]) >= spans_.size() || spans_[ids[i]].second == kUnknown) refuse(ids[i], i);
      num_bytes += spans_[ids[i]].second;
    }
    out.reserve(out.size() + num_bytes);
    for (size_t i = 0; i < num_ids; ++i) out.append(bytes_, spans_[ids[i]].first, spans_[ids[i]].second);
  }

 private:
  static constexpr size_t kUnknown = ~size_t(0);

  [[noreturn]] void refuse(int64_t id, size_t place) const {
    const bool in_range = id >= 0 && uint64_t(id) < spans_.size();
    throw std::invalid_argument("decode: ids[" + std::to_string(place) + "] must be a token id in [0, " +
                                std::to_string(spans_.size()) + "), got " + std::to_string(id) +
                                (in_range ? ", which no token has" : ""));
  }

  std::string bytes_;
  std::vector<std::pair<size_t, size_t>> spans_;  // by id: begin in bytes_, length
};

}  // namespace herdkern::text
