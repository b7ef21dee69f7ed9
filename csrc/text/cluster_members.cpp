// Who of a component is kept: see cluster_members.h.
#include "text/cluster_members.h"

#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "text/bands.h"
#include "text/lsh.h"

namespace herdkern::text {

namespace {

constexpr size_t kBuffer = 1 << 20;
constexpr size_t kScanned = 48;      // so many kept documents of a component are compared one by one, more by a table
constexpr size_t kMostListed = 100;  // ids of dropped documents in a line of clusters.jsonl

size_t share(size_t max_bytes, size_t count) {
  return std::clamp<size_t>(max_bytes / std::max<size_t>(1, count), 4 << 10, kBuffer);
}

size_t padded(size_t bytes) { return (bytes + 7) / 8 * 8; }

void make_folder(const std::string& path) {
  if (::mkdir(path.c_str(), 0755) != 0) throw FileError(errno, path);
}

void put_json(std::string& out, std::string_view text) {
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (uint8_t(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", unsigned(uint8_t(c)));
      out += escape;
    } else {
      out += c;
    }
  }
  out += '"';
}

// A member as it lies in the file, with its parts.
struct Member {
  MemberHead head;
  std::string id, url;
  std::vector<uint64_t> words;  // signature (padded), shingles
  const uint64_t* shingles() const { return words.data() + padded(head.signature_bytes) / 8; }
};

struct Kept {
  MemberHead head;
  std::string id, url;
  std::vector<uint64_t> words;  // as in Member; without the shingles where memory is short
  bool has_shingles;
  MemberPlace place;
  std::vector<uint64_t> keys;  // of its bands; none without shingles
  uint64_t names_offset = 0, num_dropped = 0;
  std::vector<std::string> dropped;
};

class Resolver {
 public:
  Resolver(const std::vector<std::string>& pieces, const std::string& folder, const ResolveRules& rules)
      : rules_(rules),
        folder_(folder),
        leftover_(kBuffer / sizeof(MemberPlace)),
        following_(kBuffer / sizeof(MemberPlace)),
        names_(folder + "/names", kBuffer),
        clusters_(folder + "/clusters.jsonl", kBuffer) {
    const size_t per_kept = static_cast<size_t>(rules.num_bands * (rules.rows_per_band * rules.slot_bytes + 48) + 512);
    max_kept_ = std::max<size_t>(kScanned, rules.max_bytes / 4 / per_kept);
    max_cached_ = rules.max_bytes / 4;
    max_decisions_ = std::max<size_t>(1 << 12, rules.max_bytes / 4 / sizeof(Decision));
    for (const std::string& piece : pieces) member_files_.push_back(piece + "/members");
    counts_.sizes.assign(64, 0);
  }

  ResolveCounts run(Merge<MemberPlace>& merge) {
    bool open = false;
    for (; const MemberPlace* next = merge.peek(); merge.skip()) {
      MemberPlace place = *next;
      place.piece = static_cast<uint32_t>(merge.source());
      if (open && place.label != label_) finish_component();
      if (!open || place.label != label_) {
        open = true;
        label_ = place.label;
        ++counts_.components;
        component_size_ = 0;
      }
      counts_.largest_component = std::max(counts_.largest_component, ++component_size_);
      decide(place);
    }
    if (open) finish_component();
    names_.finish();
    clusters_.finish();
    write_decisions();
    return counts_;
  }

 private:
  int64_t num_slots() const { return rules_.num_bands * rules_.rows_per_band; }

  void read(const MemberPlace& place, Member& member) {
    if (piece_ != place.piece || !file_) {
      file_ = File::open(member_files_[place.piece]);
      piece_ = place.piece;
    }
    bytes_.resize(place.bytes);
    file_->read_at(place.offset, bytes_.data(), place.bytes);
    const auto refuse = [&] { throw std::invalid_argument(member_files_[place.piece] + " is damaged"); };
    if (place.bytes < sizeof(MemberHead)) refuse();
    std::memcpy(&member.head, bytes_.data(), sizeof(MemberHead));
    const MemberHead& head = member.head;
    const size_t names = size_t{head.id_bytes} + head.url_bytes;
    const size_t words = padded(head.signature_bytes) / 8 + head.num_shingles;
    if (head.label != place.label || head.doc != place.doc ||
        head.signature_bytes != static_cast<size_t>(num_slots() * rules_.slot_bytes) ||
        sizeof(MemberHead) + padded(names) + 8 * words != place.bytes)
      refuse();
    const char* p = bytes_.data() + sizeof(MemberHead);
    member.id.assign(p, head.id_bytes);
    member.url.assign(p + head.id_bytes, head.url_bytes);
    member.words.resize(words);
    if (words > 0) std::memcpy(member.words.data(), p + padded(names), 8 * words);
  }

  int64_t matches(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b) const {
    if (rules_.slot_bytes == 8) return num_matches(a.data(), b.data(), num_slots());
    return num_matches(reinterpret_cast<const uint32_t*>(a.data()), reinterpret_cast<const uint32_t*>(b.data()),
                       num_slots());
  }

  double estimate(const Member& member, const Kept& kept) const {
    return static_cast<double>(matches(member.words, kept.words)) / static_cast<double>(num_slots());
  }

  template <typename Slot>
  void keys_of(const Slot* signature, uint64_t group, std::vector<uint64_t>& keys) const {
    keys.clear();
    if (!has_shingles(signature, num_slots())) return;
    for (int64_t band = 0; band < rules_.num_bands; ++band)
      keys.push_back(key_of_band(signature + band * rules_.rows_per_band, rules_.rows_per_band, band, mix(group)));
  }

  double exact(const Member& member, const Kept& kept) {
    if (kept.has_shingles) {
      const size_t begin = padded(kept.head.signature_bytes) / 8;
      return jaccard(member.shingles(), member.head.num_shingles, kept.words.data() + begin, kept.head.num_shingles);
    }
    read(kept.place, again_);
    return jaccard(member.shingles(), member.head.num_shingles, again_.shingles(), again_.head.num_shingles);
  }

  // The kept documents that share a band with this one, in order.
  void find_candidates() {
    candidates_.clear();
    if (by_key_.empty()) {
      for (size_t i = 0; i < kept_.size(); ++i) {
        bool shares = false;
        for (size_t band = 0; band < keys_.size() && !kept_[i].keys.empty(); ++band)
          shares |= keys_[band] == kept_[i].keys[band];
        if (shares) candidates_.push_back(static_cast<uint32_t>(i));
      }
      return;
    }
    for (const uint64_t key : keys_) {
      const auto found = by_key_.find(key);
      if (found != by_key_.end()) candidates_.insert(candidates_.end(), found->second.begin(), found->second.end());
    }
    std::sort(candidates_.begin(), candidates_.end());
    candidates_.erase(std::unique(candidates_.begin(), candidates_.end()), candidates_.end());
  }

  // Whom this document is dropped for, and how similar it is; null if it is kept.
  Kept* keeper_of(const Member& member, double& similarity) {
    if (member.head.is_old) return nullptr;
    if (by_text_.empty()) {
      for (Kept& kept : kept_)
        if (kept.head.text_low == member.head.text_low && kept.head.text_high == member.head.text_high)
          return similarity = 1.0, &kept;
    } else if (const auto found = by_text_.find(member.head.text_low); found != by_text_.end()) {
      Kept& kept = kept_[found->second];
      if (kept.head.text_high == member.head.text_high) return similarity = 1.0, &kept;
    }
    if (rules_.verify == Verify::kNone) {
      if (kept_.empty()) return nullptr;
      similarity = estimate(member, kept_[0]);
      return &kept_[0];
    }
    find_candidates();
    for (const uint32_t candidate : candidates_) {
      Kept& kept = kept_[candidate];
      const int64_t equal = matches(member.words, kept.words);
      if (equal < rules_.min_matches) continue;
      ++counts_.compared;
      similarity = rules_.verify == Verify::kExact ? exact(member, kept)
                                                   : static_cast<double>(equal) / static_cast<double>(num_slots());
      if (rules_.verify == Verify::kExact && similarity < rules_.min_similarity) continue;
      ++counts_.similar;
      return &kept;
    }
    return nullptr;
  }

  void decide(const MemberPlace& place) {
    read(place, member_);
    if (rules_.slot_bytes == 8) {
      keys_of(member_.words.data(), member_.head.group, keys_);
    } else {
      keys_of(reinterpret_cast<const uint32_t*>(member_.words.data()), member_.head.group, keys_);
    }
    double similarity = 0;
    Kept* kept = keeper_of(member_, similarity);
    if (!kept) {
      if (kept_.size() < max_kept_) {
        keep(place);
      } else {
        leftover_.add(place, folder_);  // for a pass of its own: those that are kept come after all in memory
      }
      return;
    }
    if (kept->num_dropped++ == 0) {
      kept->names_offset = names_.size();
      names_.add(kept->id.data(), kept->id.size());
      names_.add(kept->url.data(), kept->url.size());
    }
    if (kept->dropped.size() < kMostListed) kept->dropped.push_back(member_.id);
    const bool is_copy = kept->head.text_low == member_.head.text_low && kept->head.text_high == member_.head.text_high;
    add_decision(member_.head, *kept, similarity, is_copy ? kExactDuplicate : kNearDuplicate);
  }

  void keep(const MemberPlace& place) {
    Kept kept{member_.head, member_.id, member_.url, member_.words, true, place, keys_, 0, 0, {}};
    const size_t signature_words = padded(kept.head.signature_bytes) / 8;
    if (cached_ + 8 * kept.words.size() > max_cached_) {
      kept.words.resize(signature_words);
      kept.words.shrink_to_fit();
      kept.has_shingles = false;
    }
    cached_ += 8 * kept.words.size();
    kept_.push_back(std::move(kept));
    if (kept_.size() == kScanned + 1) {
      for (uint32_t i = 0; i < kept_.size(); ++i) enter(i);
    } else if (kept_.size() > kScanned) {
      enter(static_cast<uint32_t>(kept_.size() - 1));
    }
  }

  void enter(uint32_t number) {
    const Kept& kept = kept_[number];
    by_text_.emplace(kept.head.text_low, number);
    for (const uint64_t key : kept.keys) {
      std::vector<uint32_t>& numbers = by_key_[key];
      if (numbers.size() < kMaxLeaders) numbers.push_back(number);
    }
  }

  void add_decision(const MemberHead& head, const Kept& kept, double similarity, Reason reason) {
    if (decisions_.size() == max_decisions_) spill_decisions();
    decisions_.push_back({head.place, head.doc, kept.head.id_hash, kept.head.place, similarity, kept.names_offset,
                          kept.head.id_bytes, kept.head.url_bytes, reason, 0});
  }

  void finish_pass() {
    for (Kept& kept : kept_) {
      if (kept.num_dropped == 0) continue;
      add_decision(kept.head, kept, 1.0, kKept);
      ++counts_.clusters;
      const uint64_t size = kept.num_dropped + 1;
      counts_.largest_cluster = std::max(counts_.largest_cluster, size);
      ++counts_.sizes[63 - __builtin_clzll(size)];
      char id[24];
      std::snprintf(id, sizeof(id), "%016llx", static_cast<unsigned long long>(kept.head.id_hash));
      std::string line =
          std::string("{\"cluster\": \"") + id + "\", \"size\": " + std::to_string(size) + ", \"kept\": ";
      put_json(line, kept.id);
      line += ", \"dropped\": [";
      std::sort(kept.dropped.begin(), kept.dropped.end());
      for (const std::string& dropped : kept.dropped) {
        if (&dropped != &kept.dropped[0]) line += ", ";
        put_json(line, dropped);
      }
      line += "]}\n";
      clusters_.add(line.data(), line.size());
    }
    kept_.clear();
    by_key_.clear();
    by_text_.clear();
    cached_ = 0;
  }

  void finish_component() {
    finish_pass();
    while (!leftover_.is_empty()) {
      std::swap(leftover_, following_);
      following_.for_each([&](const MemberPlace& place) { decide(place); });
      following_.clear();
      finish_pass();
    }
  }

  void spill_decisions() {
    std::sort(decisions_.begin(), decisions_.end());
    char name[40];
    std::snprintf(name, sizeof(name), "/run-%05zu", runs_.size());
    AppendFile run(folder_ + name, kBuffer);
    run.add(decisions_.data(), decisions_.size() * sizeof(Decision));
    run.finish();
    runs_.push_back(run.path());
    decisions_.clear();
  }

  void write_decisions() {
    AppendFile out(folder_ + "/decisions", kBuffer);
    if (runs_.empty()) {
      std::sort(decisions_.begin(), decisions_.end());
      out.add(decisions_.data(), decisions_.size() * sizeof(Decision));
    } else {
      spill_decisions();
      std::vector<Decision>().swap(decisions_);
      std::vector<RecordReader<Decision>> readers;
      for (const std::string& run : runs_)
        readers.emplace_back(run, share(rules_.max_bytes / 4, runs_.size()) / sizeof(Decision));
      Merge<Decision> merge(std::move(readers));
      for (; const Decision* decision = merge.peek(); merge.skip()) out.add_record(*decision);
      for (const std::string& run : runs_)
        if (::unlink(run.c_str()) != 0) throw FileError(errno, run);
    }
    out.finish();
  }

  const ResolveRules& rules_;
  std::string folder_;
  std::vector<std::string> member_files_, runs_;
  Spool<MemberPlace> leftover_, following_;
  AppendFile names_, clusters_;
  size_t max_kept_, max_cached_, max_decisions_, cached_ = 0;
  ResolveCounts counts_;
  uint64_t label_ = 0, component_size_ = 0;
  uint32_t piece_ = 0;
  std::shared_ptr<const File> file_;
  std::vector<char> bytes_;
  Member member_, again_;
  std::vector<uint64_t> keys_;
  std::vector<uint32_t> candidates_;
  std::vector<Kept> kept_;
  std::unordered_map<uint64_t, std::vector<uint32_t>> by_key_;
  std::unordered_map<uint64_t, uint32_t> by_text_;
  std::vector<Decision> decisions_;
};

}  // namespace

MemberWriter::MemberWriter(const std::string& folder, uint64_t num_partitions, size_t max_bytes)
    : places_(num_partitions) {
  for (uint64_t p = 0; p < num_partitions; ++p) {
    char name[32];
    std::snprintf(name, sizeof(name), "/part-%05llu", static_cast<unsigned long long>(p));
    folders_.push_back(folder + name);
    make_folder(folders_.back());
    members_.emplace_back(folders_.back() + "/members", share(max_bytes / 2, num_partitions));
  }
}

void MemberWriter::add(const DocumentRow& row, uint64_t label, uint64_t doc, uint64_t place, const char* names,
                       std::string_view signature, const uint64_t* shingles, size_t num_shingles) {
  const uint64_t part = partition_of(multiply_fold(label + 1, kGolden), places_.size());
  AppendFile& out = members_[part];
  MemberHead head{label,
                  doc,
                  place,
                  row.id_hash,
                  row.text_high,
                  row.text_low,
                  row.group,
                  row.id_bytes,
                  row.url_bytes,
                  static_cast<uint32_t>(signature.size()),
                  static_cast<uint32_t>(num_shingles),
                  row.is_old,
                  0};
  static constexpr char kZeros[8] = {};
  const uint64_t offset = out.size();
  const size_t name_bytes = size_t{row.id_bytes} + row.url_bytes;
  out.add_record(head);
  out.add(names, name_bytes);
  out.add(kZeros, padded(name_bytes) - name_bytes);
  out.add(signature.data(), signature.size());
  out.add(kZeros, padded(signature.size()) - signature.size());
  out.add(shingles, 8 * num_shingles);
  places_[part].push_back({label, doc, offset, static_cast<uint32_t>(out.size() - offset), 0});
}

void MemberWriter::finish() {
  for (size_t p = 0; p < places_.size(); ++p) {
    members_[p].finish();
    std::sort(places_[p].begin(), places_[p].end());
    AppendFile out(folders_[p] + "/places", kBuffer);
    out.add(places_[p].data(), places_[p].size() * sizeof(MemberPlace));
    out.finish();
  }
}

ResolveCounts resolve_members(const std::vector<std::string>& pieces, const std::string& folder,
                              const ResolveRules& rules) {
  std::vector<RecordReader<MemberPlace>> readers;
  const size_t buffer = share(rules.max_bytes / 8, pieces.size()) / sizeof(MemberPlace);
  for (const std::string& piece : pieces) readers.emplace_back(piece + "/places", buffer);
  Merge<MemberPlace> merge(std::move(readers));
  return Resolver(pieces, folder, rules).run(merge);
}

}  // namespace herdkern::text
