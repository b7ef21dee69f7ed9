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

struct UrlRules {
  bool merge_schemes = true, merge_trailing_slash = true;
  std::vector<std::string> ignored_names;     // query parameters that do not count: in lower case, ASCII
  std::vector<std::string> ignored_prefixes;  // what starts so does not count either
};

// Memory of one thread, reused from URL to URL.
struct UrlScratch {
  std::string canonical;
  std::string decoded;  // names and values of the query
  struct Field {
    size_t name, value, end;  // begins in `decoded`
  };
  std::vector<Field> fields;
};

// Writes the canonical form of `url` (UTF-8) to scratch.canonical. False if other rules are needed, or if it is none.
bool canonicalise_url(std::string_view url, const UrlRules& rules, UrlScratch& scratch);

}  // namespace herdkern::text
