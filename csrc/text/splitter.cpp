// Splitters: see splitter.h.
#include "text/splitter.h"

#include <stdexcept>

#include "text/unicode_split.h"

namespace herdkern::text {

namespace {

class Llama3Splitter : public Splitter {
 protected:
  size_t fill(const uint8_t*& p, const uint8_t* end, std::unique_ptr<State>&, const uint8_t** ends) const override {
    size_t num_ends = 0;
    while (num_ends < kBatch && p < end) ends[num_ends++] = p = scanner_.next(p, end);
    return num_ends;
  }

 private:
  WordScanner scanner_;
};

}  // namespace

const std::vector<std::pair<std::string, std::vector<std::string>>>& Splitter::all_named() {
  static const std::vector<std::pair<std::string, std::vector<std::string>>> named = {
      {"llama3",
       {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+)"
        R"(|\s+(?!\S)|\s+)"}},
  };
  return named;
}

std::shared_ptr<const Splitter> Splitter::from_patterns(const std::vector<std::string>& patterns) {
  const auto& [name, known] = all_named()[0];
  if (patterns != known) throw std::invalid_argument("must be LLAMA3_SPLIT_PATTERN");
  auto splitter = std::make_shared<Llama3Splitter>();
  Splitter& base = *splitter;
  base.name_ = name;
  base.patterns_ = patterns;
  return splitter;
}

std::shared_ptr<const Splitter> Splitter::named(std::string_view name) {
  for (const auto& [known, patterns] : all_named()) {
    if (name == known || (name == "cl100k" && known == "llama3")) return from_patterns(patterns);
  }
  throw std::invalid_argument("must be a known name, got '" + std::string(name) + "'");
}

}  // namespace herdkern::text
