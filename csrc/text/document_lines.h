// Documents as lines of JSON without Python: what herdkern.data.document reads from a line, and the line that its
// Document.to_json writes of it ("plain": eight keys in their order, no spaces, no needless escapes, `meta` sorted by
// key). Fields may come in any order, be missing or be of another type, there may be others; only what hardly any line
// holds is left to Python (read() says so), which then hands in the plain line.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/json_scan.h"
#include "text/minhash.h"

namespace herdkern::text {

// What is known of a document besides its text; a row of documents.npy (herdkern/dedup/sign_stage.py names the fields).
struct DocumentRow {
  uint64_t id_high, id_low;  // the first 16 bytes of the id, as numbers that order as the bytes do
  uint64_t id_hash, line_hash;
  uint64_t text_high, text_low;  // hash of the text
  int64_t timestamp, length;
  double score;
  uint64_t group;  // hash of the language
  uint64_t text_bytes;
  uint32_t id_bytes, url_bytes;
  uint32_t is_plain, is_old;  // the line is written as we write it; kept by an earlier run, whatever comes
};
static_assert(sizeof(DocumentRow) == 104);

struct Hash128 {
  uint64_t high, low;
};
Hash128 hash_text(std::string_view text);

class DocumentLine {
 public:
  enum Name { kId, kText, kUrl, kSource, kLang, kRecord, kTimestamp, kMeta, kNumNames };

  // kernels: for UTF-8.  file: the name of the file, for documents without an id or a record of their own; if it is
  // empty, they are left to Python.
  DocumentLine(const MinHashKernels& kernels, std::string file) : kernels_(kernels), file_(std::move(file)) {}

  // line: without its line end; it must stay where it is until the next call.  number: of the line, from 1.
  // is_ours: Document.to_json wrote it; then any depth and any number is taken.
  // False if it is left to Python, because Python refuses it or this does not know better.
  bool read(std::string_view line, uint64_t number, bool is_ours = false);

  // The text of a field, valid until the next read; kTimestamp and kMeta have none.
  std::string_view value(Name name);
  int64_t timestamp() const { return timestamp_; }
  double score(std::string_view key);  // the number under this key of meta, minus infinity if there is none
  // The row; id and URL are appended to `names`. use_groups: keep languages apart.
  DocumentRow row(std::string_view score_key, bool use_groups, std::string& names);

  bool is_plain() const { return is_plain_; }  // write() would write the line as it is
  void set_not_plain() { is_plain_ = false; }
  void set_meta(std::string_view key, std::string json);
  void set_text(std::string_view text);  // of a document whose text is not empty; an id made of the old one stays
  uint64_t num_characters(std::string_view text) const {
    return static_cast<uint64_t>(
        kernels_.count_code_points(reinterpret_cast<const uint8_t*>(text.data()), static_cast<int64_t>(text.size())));
  }
  // Appends the plain line without a line end. reason: if not empty, a last field of that name.
  void write(std::string& out, std::string_view reason = {});

 private:
  struct Entry {  // of meta
    std::string key, json;
    bool is_kept;  // false: a key outside of meta whose value is no scalar
    bool is_extra;
    bool operator<(const Entry& other) const { return key < other.key; }
  };
  struct Field {
    JsonString json;
    bool is_text = false;
  };
  struct Memory {  // reused; never cleared, which would cost a pass
    std::string bytes;
    size_t size = 0;
    bool is_made = false;
    std::string_view view() const { return {bytes.data(), size}; }
  };

  bool member(JsonScanner& scan, int max_depth);
  bool meta(JsonScanner& scan, int max_depth);
  Entry& new_entry(std::string_view key, bool is_extra);
  void resolve_meta();
  void append_meta(std::string& out);
  void append_field(Name name, std::string& out);
  uint64_t hash(const Hash128& text);  // of all that write() writes
  size_t plain_size();
  void make_id();

  const MinHashKernels& kernels_;
  std::string file_;
  std::string_view line_;
  uint64_t number_ = 0;
  Field fields_[kNumNames];
  Memory values_[kNumNames];
  int64_t timestamp_ = 0;
  size_t timestamp_size_ = 0, meta_size_ = 0, num_in_order_ = 0, num_members_ = 0;
  bool is_plain_ = false, is_resolved_ = false;
  std::vector<Entry> entries_;
  size_t num_entries_ = 0;
  std::string key_, written_;
};

// As json.dumps(round(value, 6)).
std::string json_rounded(double value);

// Cuts a file that comes in pieces into lines.
class LineFeed {
 public:
  // Calls use(line) for every line that is not blank, without its "\n"; the last may lack it. A byte order mark at the
  // start of the file is no part of its line.
  template <typename Use>
  void feed(std::string_view data, bool is_last, Use&& use) {
    size_t begin = 0;
    for (size_t end; (end = data.find('\n', begin)) != std::string_view::npos; begin = end + 1) {
      if (pending_.empty()) {
        take(data.substr(begin, end - begin), use);
      } else {
        pending_.append(data, begin, end - begin);
        take(pending_, use);
        pending_.clear();
      }
    }
    pending_.append(data, begin);
    if (is_last && !pending_.empty()) {
      take(pending_, use);
      std::string().swap(pending_);
    }
  }
  uint64_t number() const { return number_; }  // of the line in use, then of lines
  uint64_t num_pending_bytes() const { return pending_.size(); }

 private:
  template <typename Use>
  void take(std::string_view line, Use& use) {
    constexpr std::string_view kMark = "\xEF\xBB\xBF";
    if (++number_ == 1 && line.substr(0, kMark.size()) == kMark) line.remove_prefix(kMark.size());
    if (line.find_first_not_of(" \t\r\v\f") != std::string_view::npos) use(line);
  }
  std::string pending_;
  uint64_t number_ = 0;
};

}  // namespace herdkern::text
