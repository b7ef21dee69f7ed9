// Documents as lines of JSON: see document_lines.h.
#include "text/document_lines.h"

#include <algorithm>
#include <limits>

#include "text/blake2b.h"

namespace herdkern::text {

namespace {

constexpr int kMaxDepth = 64, kMaxOwnDepth = 4096;
constexpr int64_t kMaxTimestamp = int64_t{1} << 53;
using Name = DocumentLine::Name;
constexpr Name kOrder[] = {Name::kId,   Name::kText,      Name::kUrl,    Name::kSource,
                           Name::kLang, Name::kTimestamp, Name::kRecord, Name::kMeta};
constexpr std::string_view kKeys[] = {"id", "text", "url", "source", "lang", "record", "timestamp", "meta"};
constexpr Name kTexts[] = {Name::kId, Name::kText, Name::kUrl, Name::kSource, Name::kLang, Name::kRecord};
constexpr size_t kPlainBytes =  // of a plain line besides its values
    std::string_view(R"({"id":"","text":"","url":"","source":"","lang":"","timestamp":,"record":"","meta":})").size();

uint64_t load(const char* p, size_t size) {
  uint64_t value = 0;
  std::memcpy(&value, p, size);
  return value;
}

}  // namespace

// Two chains of folded products over 16 bytes at a time, each with constants of its own.
Hash128 hash_text(std::string_view text) {
  const char* p = text.data();
  size_t left = text.size();
  uint64_t a = mix(kGolden ^ left), b = mix(a + 0x8EBC6AF09C88C6E3u);
  for (; left > 16; p += 16, left -= 16) {
    const uint64_t x = load(p, 8), y = load(p + 8, 8);
    a = multiply_fold(x ^ a, y ^ 0xE7037ED1A0B428DBu) + y;
    b = multiply_fold(y ^ b, x ^ 0xA0761D6478BD642Fu) + x;
  }
  const uint64_t x = load(p, left < 8 ? left : 8), y = left > 8 ? load(p + 8, left - 8) : 0;
  a = multiply_fold(x ^ a, y ^ 0xE7037ED1A0B428DBu) + y;
  b = multiply_fold(y ^ b, x ^ 0xA0761D6478BD642Fu) + x;
  return {mix(multiply_fold(a ^ 0x589965CC75374CC3u, b ^ kGolden) + a),
          mix(multiply_fold(b, a ^ 0x1D8E4E27C47D124Fu) ^ b)};
}

bool DocumentLine::read(std::string_view line, uint64_t number, bool is_ours) {
  line_ = line;
  number_ = number;
  for (Field& field : fields_) field = {};
  for (Memory& memory : values_) memory.is_made = false;
  timestamp_ = 0;
  timestamp_size_ = meta_size_ = num_in_order_ = num_members_ = num_entries_ = 0;
  is_plain_ = false;
  is_resolved_ = false;
  if (!is_ours && !kernels_.is_utf8(reinterpret_cast<const uint8_t*>(line.data()), static_cast<int64_t>(line.size())))
    return false;
  JsonScanner scan(line, is_ours ? std::numeric_limits<int>::max() : JsonScanner::kMaxDigits);
  if (!scan.is_after_white('{')) return false;
  do {
    scan.white();
    if (!member(scan, is_ours ? kMaxOwnDepth : kMaxDepth)) return false;
  } while (scan.is_after_white(','));
  if (!scan.is('}')) return false;
  scan.white();
  if (!scan.at_end() || !fields_[kText].is_text) return false;
  const bool is_nameless = fields_[kId].json.raw.empty() || fields_[kRecord].json.raw.empty();
  if (is_nameless && file_.empty()) return false;
  is_plain_ = !is_nameless && line.size() == plain_size();
  return true;
}

bool DocumentLine::member(JsonScanner& scan, int max_depth) {
  JsonString written;
  if (!scan.string(written) || !scan.is_after_white(':')) return false;
  scan.white();
  std::string_view key = written.raw;
  if (written.has_escapes) {
    bool is_good = false;
    key_.resize(key.size());
    key_.resize(static_cast<size_t>(unescape(key, key_.data(), is_good) - key_.data()));
    if (!is_good) return false;
    key = key_;
  }
  const size_t place = num_members_++;
  if (place < kNumNames && key == kKeys[kOrder[place]]) ++num_in_order_;
  const auto found = std::find(std::begin(kKeys), std::end(kKeys), key);
  if (found == std::end(kKeys)) {
    const char kind = scan.next();
    Entry& entry = new_entry(key, true);
    entry.is_kept = kind != '{' && kind != '[' && kind != 'n';
    return pass_json_value(scan, max_depth, entry.is_kept ? &entry.json : nullptr);
  }
  const Name name = static_cast<Name>(found - std::begin(kKeys));
  if (name == kMeta) return meta(scan, max_depth);
  if (name == kTimestamp) {
    const char kind = scan.next();
    timestamp_ = 0;
    timestamp_size_ = 0;
    if (kind != '-' && (kind < '0' || kind > '9')) return pass_json_value(scan, max_depth, nullptr);
    std::string_view raw;
    bool is_whole = false;
    if (!scan.number(raw, is_whole)) return false;
    int64_t seconds = 0;
    const auto got = std::from_chars(raw.data(), raw.data() + raw.size(), seconds);
    if (!is_whole || got.ec != std::errc() || seconds < -kMaxTimestamp || seconds > kMaxTimestamp) return true;
    timestamp_ = seconds;
    timestamp_size_ = raw == "-0" ? 0 : raw.size();
    return true;
  }
  Field& field = fields_[name];
  field.is_text = scan.next() == '"';
  if (field.is_text) return scan.string(field.json);
  field.json = {};
  return pass_json_value(scan, max_depth, nullptr);
}

bool DocumentLine::meta(JsonScanner& scan, int max_depth) {
  if (fields_[kMeta].is_text) return false;  // a second one
  if (scan.next() != '{') return pass_json_value(scan, max_depth, nullptr);
  fields_[kMeta].is_text = true;
  const char* begin = scan.place();
  scan.is('{');
  if (!scan.is_after_white('}')) {
    do {
      scan.white();
      JsonString key;
      if (!scan.string(key) || !scan.is_after_white(':')) return false;
      scan.white();
      bool is_good = true;
      if (key.has_escapes) {
        key_.resize(key.raw.size());
        key_.resize(static_cast<size_t>(unescape(key.raw, key_.data(), is_good) - key_.data()));
      }
      Entry& entry = new_entry(key.has_escapes ? std::string_view(key_) : key.raw, false);
      if (!is_good || !pass_json_value(scan, max_depth - 1, &entry.json)) return false;
    } while (scan.is_after_white(','));
    if (!scan.is('}')) return false;
  }
  fields_[kMeta].json.raw = {begin, static_cast<size_t>(scan.place() - begin)};
  return true;
}

DocumentLine::Entry& DocumentLine::new_entry(std::string_view key, bool is_extra) {
  if (num_entries_ == entries_.size()) entries_.emplace_back();
  Entry& entry = entries_[num_entries_++];
  entry.key = key;
  entry.json.clear();
  entry.is_kept = true;
  entry.is_extra = is_extra;
  return entry;
}

void DocumentLine::set_meta(std::string_view key, std::string json) {
  new_entry(key, true).json = std::move(json);
  is_plain_ = false;
  is_resolved_ = false;
}

void DocumentLine::set_text(std::string_view text) {
  value(kId);
  Memory& memory = values_[kText];
  memory.bytes = text;
  memory.size = text.size();
  memory.is_made = true;
  fields_[kText].json.has_escapes = true;  // so that `memory` counts, not the line
  fields_[kText].json.is_plain = false;
  is_plain_ = false;
}

// One entry for each key, in order: the last from outside of meta if that is a scalar, else the last within.
void DocumentLine::resolve_meta() {
  if (is_resolved_) return;
  is_resolved_ = true;
  const auto begin = entries_.begin(), end = begin + static_cast<ptrdiff_t>(num_entries_);
  if (!std::is_sorted(begin, end)) std::stable_sort(begin, end);
  size_t num_kept = 0;
  for (size_t i = 0, next; i < num_entries_; i = next) {
    Entry* extra = nullptr;
    Entry* inner = nullptr;
    for (next = i; next < num_entries_ && entries_[next].key == entries_[i].key; ++next)
      (entries_[next].is_extra ? extra : inner) = &entries_[next];
    Entry* chosen = extra && extra->is_kept ? extra : inner;
    if (!chosen) continue;
    if (chosen != &entries_[num_kept]) std::swap(*chosen, entries_[num_kept]);
    ++num_kept;
  }
  num_entries_ = num_kept;
}

void DocumentLine::append_meta(std::string& out) {
  resolve_meta();
  out += '{';
  for (size_t i = 0; i < num_entries_; ++i) {
    out += i == 0 ? "\"" : ",\"";
    append_escaped(entries_[i].key, out);
    out += "\":";
    out += entries_[i].json;
  }
  out += '}';
}

// The size of the plain line if every part of the line is plain, else 0. What is not seen here (spaces, escapes in
// keys) makes the line longer than that.
size_t DocumentLine::plain_size() {
  if (num_in_order_ != kNumNames || num_members_ != kNumNames || timestamp_size_ == 0 || !fields_[kMeta].is_text)
    return 0;
  size_t size = kPlainBytes + timestamp_size_ + fields_[kMeta].json.raw.size();
  for (const Name name : kTexts) {
    if (!fields_[name].is_text || !fields_[name].json.is_plain) return 0;
    size += fields_[name].json.raw.size();
  }
  if (fields_[kMeta].json.raw == "{}") return size;
  std::string meta;
  append_meta(meta);
  return meta == fields_[kMeta].json.raw ? size : 0;
}

void DocumentLine::make_id() {
  Blake2b64 hash;
  hash.add(file_);
  hash.add("#");
  hash.add(std::to_string(number_));
  hash.add(std::string_view("\0", 1));
  hash.add(value(kText));
  hash.add(std::string_view("\0", 1));
  const uint64_t digest = hash.finish();
  Memory& memory = values_[kId];
  memory.bytes.assign(16, '0');
  memory.size = 16;
  for (int i = 0; i < 16; ++i) memory.bytes[static_cast<size_t>(i)] = "0123456789abcdef"[digest >> (4 * (i ^ 1)) & 15];
}

std::string_view DocumentLine::value(Name name) {
  const Field& field = fields_[name];
  const JsonString& json = field.json;
  if (!json.raw.empty() && !json.has_escapes) return json.raw;
  if (json.raw.empty() && name != kId && name != kRecord) return {};
  Memory& memory = values_[name];
  if (memory.is_made) return memory.view();
  memory.is_made = true;
  if (!json.raw.empty()) {
    bool is_good = false;
    if (memory.bytes.size() < json.raw.size()) memory.bytes.resize(json.raw.size());
    memory.size = static_cast<size_t>(unescape(json.raw, memory.bytes.data(), is_good) - memory.bytes.data());
  } else if (name == kId) {
    make_id();
  } else {
    memory.bytes = file_ + "#" + std::to_string(number_);
    memory.size = memory.bytes.size();
  }
  return memory.view();
}

double DocumentLine::score(std::string_view key) {
  resolve_meta();
  for (size_t i = 0; i < num_entries_; ++i) {
    const std::string& json = entries_[i].json;
    if (entries_[i].key != key || !(json[0] == '-' || (json[0] >= '0' && json[0] <= '9'))) continue;
    double found = 0;
    const auto got = std::from_chars(json.data(), json.data() + json.size(), found);
    if (got.ec == std::errc()) return found;
  }
  return -std::numeric_limits<double>::infinity();
}

uint64_t DocumentLine::hash(const Hash128& text) {
  uint64_t all = kGolden;
  const auto add = [&](uint64_t part) { all = multiply_fold(all ^ part, 0xE7037ED1A0B428DBu) + part; };
  for (const Name name : kTexts) {
    const Hash128 part = name == kText ? text : hash_text(value(name));
    add(part.high);
    add(part.low);
  }
  add(static_cast<uint64_t>(timestamp_));
  written_.clear();
  append_meta(written_);
  add(hash_text(written_).high);
  return mix(all);
}

DocumentRow DocumentLine::row(std::string_view score_key, bool use_groups, std::string& names) {
  DocumentRow row{};
  const std::string_view id = value(kId), url = value(kUrl), text = value(kText);
  names += id;
  names += url;
  char first[16] = {};
  std::memcpy(first, id.data(), std::min<size_t>(16, id.size()));
  row.id_high = __builtin_bswap64(load(first, 8));
  row.id_low = __builtin_bswap64(load(first + 8, 8));
  row.id_hash = hash_text(id).high;
  const Hash128 hashed = hash_text(text);
  row.line_hash = hash(hashed);
  row.text_high = hashed.high;
  row.text_low = hashed.low;
  row.timestamp = timestamp_;
  row.length = static_cast<int64_t>(num_characters(text));
  row.score = score(score_key);
  row.group = use_groups ? hash_text(value(kLang)).high | 1 : 0;  // never 0
  row.text_bytes = text.size();
  row.id_bytes = static_cast<uint32_t>(id.size());
  row.url_bytes = static_cast<uint32_t>(url.size());
  row.is_plain = is_plain_;
  return row;
}

void DocumentLine::append_field(Name name, std::string& out) {
  const JsonString& json = fields_[name].json;
  if (!json.raw.empty() && json.is_plain) {
    out += json.raw;
  } else {
    append_escaped(value(name), out);
  }
}

void DocumentLine::write(std::string& out, std::string_view reason) {
  constexpr std::string_view kBefore[] = {"{\"id\":\"", "\",\"text\":\"", "\",\"url\":\"", "\",\"source\":\"",
                                          "\",\"lang\":\""};
  for (size_t i = 0; i < 5; ++i) {
    out += kBefore[i];
    append_field(kTexts[i], out);
  }
  out += "\",\"timestamp\":";
  out += std::to_string(timestamp_);
  out += ",\"record\":\"";
  append_field(kRecord, out);
  out += "\",\"meta\":";
  append_meta(out);
  if (!reason.empty()) {
    out += ",\"reason\":\"";
    append_escaped(reason, out);
    out += '"';
  }
  out += '}';
}

std::string json_rounded(double value) {
  char text[400];
  const auto end = std::to_chars(text, text + sizeof(text), value, std::chars_format::fixed, 6).ptr;
  std::from_chars(text, end, value);
  std::string out;
  append_float(value, out);
  return out;
}

}  // namespace herdkern::text
