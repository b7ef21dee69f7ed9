// Documents as lines of JSON without Python, as far as they are written the way herdkern.data.document.Document.to_json
// writes them: eight keys in their order, no spaces, no needless escapes, `meta` sorted by key. Such a line is "plain":
// what Python would read from it and write again is the line itself, so a stage may copy it. Any other line is left to
// Python, which may then hand in the plain line it stands for. A plain line may be taken for another kind, never the
// other way round.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace herdkern::text {

// What is known of a document besides its text; a row of documents.npy (herdkern/dedup/documents.py names the fields).
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

struct PlainLine {
  std::string_view id, text, url, lang;  // as they stand in the line, with escapes
  int64_t timestamp = 0;
  double score = 0;  // the number under score_key in meta; minus infinity if there is none
};

// line: without its line end. False if it is not plain.
bool read_plain_line(std::string_view line, std::string_view score_key, PlainLine& out);

// What a string of a plain line stands for, appended.
void append_unescaped(std::string_view raw, std::string& out);

struct Hash128 {
  uint64_t high, low;
};
Hash128 hash_text(std::string_view text);

// The row of a plain line; appends id and URL to `names` and the text to `texts`. use_groups: keep languages apart.
DocumentRow make_row(std::string_view line, const PlainLine& fields, bool use_groups, std::string& names,
                     std::string& texts);

}  // namespace herdkern::text
