#include "text/url_table.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace herdkern::text {

namespace {

constexpr int kAhead = 16;  // records whose slots are fetched while earlier ones are worked on

std::vector<std::string> paths_of(const std::vector<UrlPiece>& pieces) {
  std::vector<std::string> paths;
  for (const UrlPiece& piece : pieces) {
    paths.push_back(piece.records);
    paths.push_back(piece.names);
  }
  return paths;
}

}  // namespace

FileReader::~FileReader() {
  for (const Open& open : open_)
    if (open.descriptor >= 0) close(open.descriptor);
}

void FileReader::read(size_t file, void* to, size_t size, uint64_t offset) {
  if (read_some(file, to, size, offset) < size) fail(file, "it is too short");
}

size_t FileReader::read_some(size_t file, void* to, size_t size, uint64_t offset) {
  Open& open = open_[file % open_.size()];
  if (open.descriptor < 0 || open.file != file) {
    if (open.descriptor >= 0) close(open.descriptor);
    open.descriptor = ::open(paths_[file].c_str(), O_RDONLY | O_CLOEXEC);
    if (open.descriptor < 0) fail(file, std::strerror(errno));
    open.file = file;
  }
  size_t done = 0;
  while (done < size) {
    const ssize_t got =
        pread(open.descriptor, static_cast<char*>(to) + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(file, std::strerror(errno));
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

void FileReader::fail(size_t file, const char* why) const {
  throw std::runtime_error("dedup_urls: cannot read " + paths_[file] + ": " + why);
}

UrlTable::UrlTable(const std::vector<UrlPiece>& pieces, uint64_t num_records, int64_t first_part, int64_t last_part,
                   int64_t num_parts)
    : files_(paths_of(pieces)),
      slots_(num_records / 17 * 20 + 40),
      known_(kKnown),
      first_part_(first_part),
      last_part_(last_part),
      num_parts_(num_parts) {
  for (const UrlPiece& piece : pieces) numbers_.emplace_back(piece.first, piece.end);
}

void UrlTable::add(const UrlRecord* records, int64_t size, uint32_t first) {
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) __builtin_prefetch(&slots_[home_of(records[i + kAhead])], 1);
    const UrlRecord& record = records[i];
    if (!is_mine(record)) continue;
    const uint32_t number = first + static_cast<uint32_t>(i);
    for (uint64_t at = home_of(record);; at = at + 1 == slots_.size() ? 0 : at + 1) {
      Slot& slot = slots_[at];
      if (slot.number_plus_1 == 0) {
        if (static_cast<uint64_t>(++num_urls_) * 20 > slots_.size() * 17) throw std::runtime_error("too many URLs");
        slot = {number + 1,
                {static_cast<uint32_t>(record.low), static_cast<uint32_t>(record.high),
                 static_cast<uint32_t>(record.high >> 32)},
                time_code(record.timestamp)};
        break;
      }
      if (!has_key(slot, record)) continue;
      const uint32_t best = slot.number_plus_1 - 1, time = time_code(record.timestamp);
      if (time < slot.time || (time == slot.time && !is_better(record, number, read_record(best), best))) break;
      slot.number_plus_1 = number + 1;
      slot.time = time;
      break;
    }
  }
}

void UrlTable::find(const UrlRecord* records, int64_t size, uint32_t first, uint32_t* winners) const {
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) __builtin_prefetch(&slots_[home_of(records[i + kAhead])]);
    winners[i] = first + static_cast<uint32_t>(i);
    if (!is_mine(records[i])) continue;
    for (uint64_t at = home_of(records[i]); slots_[at].number_plus_1; at = at + 1 == slots_.size() ? 0 : at + 1) {
      if (!has_key(slots_[at], records[i])) continue;
      winners[i] = slots_[at].number_plus_1 - 1;
      break;
    }
  }
}

size_t UrlTable::piece_of(uint32_t number) const {
  const auto after = std::upper_bound(numbers_.begin(), numbers_.end(), number,
                                      [](uint32_t n, const auto& piece) { return n < piece.second; });
  if (after == numbers_.end() || number < after->first)
    throw std::out_of_range("UrlTable: number must be that of a record, got " + std::to_string(number));
  return static_cast<size_t>(after - numbers_.begin());
}

const UrlRecord& UrlTable::read_record(uint32_t number) {
  Known& known = known_[number % kKnown];
  if (known.number_plus_1 != number + 1) {
    const size_t piece = piece_of(number);
    known.number_plus_1 = 0;  // should reading fail
    files_.read(2 * piece, &known.record, sizeof(UrlRecord),
                uint64_t{number - numbers_[piece].first} * sizeof(UrlRecord));
    known.number_plus_1 = number + 1;
  }
  return known.record;
}

UrlTable::Names UrlTable::read_names(uint32_t number, uint64_t name, std::string& memory) {
  constexpr size_t kMostNames = 256;  // are shorter: one read
  const size_t file = 2 * piece_of(number) + 1;
  uint32_t sizes[2];
  memory.resize(kMostNames);
  const size_t got = files_.read_some(file, memory.data(), kMostNames, name);
  if (got < sizeof(sizes)) files_.read(file, sizes, sizeof(sizes), name);  // which says what is wrong
  std::memcpy(sizes, memory.data(), sizeof(sizes));
  const size_t wanted = sizeof(sizes) + sizes[0] + sizes[1];
  if (wanted > got) {
    memory.resize(wanted);
    files_.read(file, memory.data() + got, wanted - got, name + got);
  }
  const char* id = memory.data() + sizeof(sizes);
  return {{id, sizes[0]}, {id + sizes[0], sizes[1]}};
}

void UrlTable::decide(uint32_t row, uint32_t winner, std::string& out) {
  const UrlRecord& record = read_record(winner);
  const auto [id, url] = read_names(winner, record.name, names_);
  const UrlDecision decision{record.timestamp, row, static_cast<uint32_t>(id.size()), static_cast<uint32_t>(url.size()),
                             0};
  out.append(reinterpret_cast<const char*>(&decision), sizeof(decision));
  out += id;
  out += url;
}

// Newer, then longer, then of smaller id; the order of the shards decides between documents of one id alone.
bool UrlTable::is_better(const UrlRecord& a, uint32_t a_number, const UrlRecord& b, uint32_t b_number) {
  if (a.timestamp != b.timestamp) return a.timestamp > b.timestamp;
  if (a.length != b.length) return a.length > b.length;
  if (a.id_prefix != b.id_prefix) return a.id_prefix < b.id_prefix;
  const int order = read_names(a_number, a.name, names_).id.compare(read_names(b_number, b.name, other_names_).id);
  return order ? order < 0 : a_number < b_number;
}

}  // namespace herdkern::text
