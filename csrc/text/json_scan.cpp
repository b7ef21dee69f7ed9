// Values of JSON: see json_scan.h.
#include "text/json_scan.h"

#include <algorithm>
#include <vector>

namespace herdkern::text {

namespace {

// A string as json.dumps writes it again, appended. False if it holds half a surrogate pair.
bool append_plain(const JsonString& string, std::string& out) {
  out += '"';
  if (string.is_plain) {
    out += string.raw;
  } else {
    std::string text(string.raw.size(), '\0');
    bool is_good = false;
    text.resize(static_cast<size_t>(unescape(string.raw, text.data(), is_good) - text.data()));
    if (!is_good) return false;
    append_escaped(text, out);
  }
  out += '"';
  return true;
}

// At '{' or '['. The keys of an object must differ: of several, Python keeps the last value at the first place.
bool pass_container(JsonScanner& scan, int depth, std::string* out) {
  if (depth == 0) return false;
  const bool is_object = scan.next() == '{';
  const char close = is_object ? '}' : ']';
  scan.is(scan.next());
  if (out) *out += is_object ? '{' : '[';
  std::vector<std::string> keys;
  bool is_first = true;
  if (!scan.is_after_white(close)) {
    do {
      if (out && !is_first) *out += ',';
      is_first = false;
      scan.white();
      if (is_object) {
        JsonString key;
        if (!scan.string(key) || !scan.is_after_white(':')) return false;
        scan.white();
        if (out) {
          const size_t begin = out->size();
          if (!append_plain(key, *out)) return false;
          keys.emplace_back(*out, begin);
          *out += ':';
        }
      }
      if (!pass_json_value(scan, depth - 1, out)) return false;
    } while (scan.is_after_white(','));
    if (!scan.is(close)) return false;
  }
  if (out) *out += close;
  std::sort(keys.begin(), keys.end());
  return std::adjacent_find(keys.begin(), keys.end()) == keys.end();
}

}  // namespace

bool pass_json_value(JsonScanner& scan, int depth, std::string* out) {
  const auto word = [&](std::string_view text) {
    if (out) *out += text;
    return scan.literal(text);
  };
  JsonString string;
  std::string_view raw;
  bool is_whole = false;
  switch (scan.next()) {
    case '"':
      return scan.string(string) && (!out || append_plain(string, *out));
    case 't':
      return word("true");
    case 'f':
      return word("false");
    case 'n':
      return word("null");
    case '{':
    case '[':
      return pass_container(scan, depth, out);
    default:
      return scan.number(raw, is_whole) && (!out || append_number(raw, is_whole, *out));
  }
}

}  // namespace herdkern::text
