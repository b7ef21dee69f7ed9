// Locality-sensitive hashing: documents that agree in all rows of a band are candidates. P(candidate) of two documents
// of Jaccard similarity s is 1 - (1 - s^rows)^bands. Source: Leskovec, Rajaraman, Ullman, Mining of Massive
// Datasets, 3.4.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "text/minhash.h"
#include "text/parallel.h"

namespace herdkern::text {

struct Signatures {
  const uint32_t* data;  // (num_docs, num_bands * rows_per_band)
  int64_t num_docs, num_bands, rows_per_band;
  const uint64_t* groups;  // (num_docs,) or null: documents of different groups are never candidates

  int64_t num_slots() const { return num_bands * rows_per_band; }
  const uint32_t* row(int64_t doc) const { return data + doc * num_slots(); }
  bool is_empty(int64_t doc) const {  // a document without words has nothing to compare
    return std::all_of(row(doc), row(doc) + num_slots(), [](uint32_t slot) { return slot == 0xFFFFFFFFu; });
  }
};

// Of one band's slots (uint32 or uint64). group_mix: mix(group), or 0 where all documents may meet.
template <typename Slot>
uint64_t key_of_band(const Slot* rows, int64_t rows_per_band, int64_t band, uint64_t group_mix) {
  uint64_t key = mix(kGolden * (band + 1)) ^ group_mix;
  for (int64_t r = 0; r < rows_per_band; ++r) key = multiply_fold(key ^ rows[r], 0xD1B54A32D192ED03u) + kGolden;
  return mix(key);
}

inline uint64_t band_key(const Signatures& s, int64_t doc, int64_t band) {
  return key_of_band(s.row(doc) + band * s.rows_per_band, s.rows_per_band, band, s.groups ? mix(s.groups[doc]) : 0);
}

template <typename Slot>
int64_t num_matches(const Slot* a, const Slot* b, int64_t num_slots) {
  int64_t matches = 0;
  for (int64_t i = 0; i < num_slots; ++i) matches += a[i] == b[i];
  return matches;
}

using Pair = std::pair<int64_t, int64_t>;
constexpr size_t kMaxLeaders = 256;  // bounds the work on a band key that many unlike documents share

// Pairs (smaller, larger) that share a band key and agree in at least min_matches slots: within the documents of a key,
// each is compared with the leaders so far and leads itself if it is like none. The first document leads all when
// min_matches is 0. Sorted, without repeats; the same for every number of threads.
inline std::vector<Pair> candidate_pairs(const Signatures& s, int64_t min_matches, int num_threads) {
  std::vector<int64_t> docs;
  for (int64_t doc = 0; doc < s.num_docs; ++doc)
    if (!s.is_empty(doc)) docs.push_back(doc);
  std::vector<std::vector<Pair>> of_band(s.num_bands);
  parallel_for(s.num_bands, num_threads, [&](int64_t band) {
    std::vector<std::pair<uint64_t, int64_t>> keyed;
    keyed.reserve(docs.size());
    for (const int64_t doc : docs) keyed.emplace_back(band_key(s, doc, band), doc);
    std::sort(keyed.begin(), keyed.end());
    std::vector<int64_t> leaders;
    for (size_t begin = 0, end; begin < keyed.size(); begin = end) {
      end = begin + 1;
      while (end < keyed.size() && keyed[end].first == keyed[begin].first) ++end;
      leaders.assign(1, keyed[begin].second);
      for (size_t i = begin + 1; i < end; ++i) {
        const int64_t doc = keyed[i].second;
        bool follows = false;
        for (const int64_t leader : leaders) {
          if (min_matches > 0 && num_matches(s.row(leader), s.row(doc), s.num_slots()) < min_matches) continue;
          of_band[band].emplace_back(leader, doc);
          follows = true;
        }
        if (!follows && leaders.size() < kMaxLeaders) leaders.push_back(doc);
      }
    }
  });
  std::vector<Pair> pairs;
  for (const auto& some : of_band) pairs.insert(pairs.end(), some.begin(), some.end());
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  return pairs;
}

// |A and B| / |A or B| of two sorted lists without repeats; 0 if both are empty.
inline double jaccard(const uint64_t* a, size_t a_size, const uint64_t* b, size_t b_size) {
  int64_t both = 0;
  for (size_t i = 0, j = 0; i < a_size && j < b_size;) {
    const uint64_t x = a[i], y = b[j];
    both += x == y;
    i += x <= y;
    j += y <= x;
  }
  const int64_t either = static_cast<int64_t>(a_size + b_size) - both;
  return either ? static_cast<double>(both) / static_cast<double>(either) : 0.0;
}

inline double jaccard(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b) {
  return jaccard(a.data(), a.size(), b.data(), b.size());
}

}  // namespace herdkern::text
