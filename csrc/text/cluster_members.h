// Who of a component is kept. The documents of every component are brought together with what is needed to compare them
// (signature, shingles), and gone through in the order in which they are to be kept: a document is dropped for the
// first kept one that shares a band with it and is similar, or has the same text; otherwise it is kept. So no document
// is dropped for one it is not similar to, however long the chain between them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/document_lines.h"
#include "text/record_file.h"

namespace herdkern::text {

struct MemberHead {
  uint64_t label, doc, place;  // place: shard << 32 | row
  uint64_t id_hash, text_high, text_low, group;
  uint32_t id_bytes, url_bytes, signature_bytes, num_shingles, is_old, zero;
};

struct MemberPlace {
  uint64_t label, doc, offset;
  uint32_t bytes, piece;
  bool operator<(const MemberPlace& o) const { return label != o.label ? label < o.label : doc < o.doc; }
};

// The documents of one shard that are in components, dealt by component to folder/part-00000/{places,members}, ….
class MemberWriter {
 public:
  MemberWriter(const std::string& folder, uint64_t num_partitions, size_t max_bytes);
  // names: id and URL, one behind the other. shingles: sorted, without repeats.
  void add(const DocumentRow& row, uint64_t label, uint64_t doc, uint64_t place, const char* names,
           std::string_view signature, const uint64_t* shingles, size_t num_shingles);
  void finish();

 private:
  std::vector<std::vector<MemberPlace>> places_;
  std::vector<AppendFile> members_;
  std::vector<std::string> folders_;
};

enum Reason : uint32_t { kKept = 0, kExactDuplicate = 1, kNearDuplicate = 2 };

struct Decision {
  uint64_t place, doc;
  uint64_t cluster;     // id_hash of the kept document
  uint64_t kept_place;  // and where it is
  double similarity;
  uint64_t names_offset;  // of the kept document's id and URL in the file of names
  uint32_t id_bytes, url_bytes;
  uint32_t reason, zero;
  bool operator<(const Decision& other) const { return place < other.place; }
};
static_assert(sizeof(Decision) == 64);

enum class Verify { kExact, kSignature, kNone };

struct ResolveRules {
  Verify verify;
  int64_t num_bands, rows_per_band, slot_bytes;
  int64_t min_matches;    // slots in which the signatures must agree
  double min_similarity;  // of the shingle sets
  size_t max_bytes;
};

struct ResolveCounts {
  uint64_t components = 0, clusters = 0, largest_cluster = 0, compared = 0, similar = 0, largest_component = 0;
  std::vector<uint64_t> sizes;  // sizes[i]: clusters of 2**i to 2**(i + 1) - 1 documents
};

// Decides about the members of one partition (a piece of each shard) and writes folder/decisions (by place),
// folder/names and folder/clusters.jsonl.
ResolveCounts resolve_members(const std::vector<std::string>& pieces, const std::string& folder,
                              const ResolveRules& rules);

}  // namespace herdkern::text
