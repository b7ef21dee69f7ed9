// 128-bit keys of URLs. What makes two URLs one is decided by canonical_url of herdkern/dedup/urls.py, which is built
// on w3lib; the rules here are those of it for the URLs that need only simple ones, and everything else is handed back.
// Equal to it on every URL that is not handed back: tests/dedup/test_urls.py.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace herdkern::text {

struct UrlKey {
  uint64_t low, high;
};

// Not cryptographic: two multiply-fold chains with different salts.
UrlKey hash_url(std::string_view canonical);

class UrlRules {
 public:
  // names: query parameters that do not count, in lower case, ASCII; what starts with one of the prefixes neither.
  UrlRules(bool merge_schemes, bool merge_trailing_slash, const std::vector<std::string>& names,
           const std::vector<std::string>& prefixes);
  enum Verdict { kCounts, kIgnored, kUnclear };
  Verdict judge(std::string_view name) const;

  const bool merge_schemes, merge_trailing_slash;

 private:
  struct Pattern {
    std::string start;
    bool is_prefix;
  };
  std::vector<Pattern> by_first_[128];  // by the first letter
  bool has_any_ = false, ignores_all_ = false, ignores_empty_ = false;
};

// Memory of one thread, reused from URL to URL.
struct UrlScratch {
  struct Field {
    std::string_view name, value;  // decoded
    bool is_plain = false;         // they are written as they stand in the URL
  };
  std::vector<char> url, canonical, decoded;  // url: with zeros behind it; decoded: names and values of the query
  std::vector<Field> fields;
};

// Writes the canonical form of `url` (UTF-8) to scratch.canonical and views it. An empty view if other rules are
// needed, or if it is none.
std::string_view canonicalise_url(std::string_view url, const UrlRules& rules, UrlScratch& scratch);

}  // namespace herdkern::text
