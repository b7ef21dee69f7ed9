// MinHash signatures straight from UTF-8 text. Definition, version 1 (herdkern/dedup/minhash.py states it in words):
//   word      maximal run of letters, marks, numbers and '_' (Unicode 16), case-folded by the rules of minhash.cpp; cut
//             after every 256 bytes. In scripts written without spaces every code point starts a word of its own that
//             reaches over up to 6 code points of its run. A byte that is not UTF-8 counts as a letter.
//   w         hash_bytes(word)
//   shingle   unit word: ngram_size neighbouring words, mix(sum_j C[j] * w[i + j]); fewer words are one shingle.
//             unit char: ngram_size neighbouring code points of the normalised text (maximal runs of anything but
//             separators, folded, joined by one space each), mix(sum_j (c[i + j] + 1) * B^(n - 1 - j) mod 2^61 - 1)
//   slot k    fast32: min over shingles of (A[k] * x + B[k]) mod 2^32, x = upper half of the shingle hash, A odd
//             m61:    min of (A[k] * s + B[k] mod 2^64) mod (2^61 - 1) mod 2^32, s = first 32 bits of SHA-1 of the
//                     shingle's bytes (words joined by one space each): datasketch's scheme "legacy"
//             oph:    min of the lower half of mix(hash ^ salt) over the shingles of bin k (by the upper half); an
//                     empty bin takes the value of the first bin that is not in a random order of its own
// Single-threaded and without Python: bind_signatures.cpp splits the documents over threads.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace herdkern::text {

constexpr int64_t kMaxWordBytes = 256;
constexpr int kUnspacedReach = 6;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr uint64_t kMersenne61 = (uint64_t{1} << 61) - 1;
constexpr uint32_t kNoShingle = 0xFFFFFFFFu;  // in every slot of a text without shingles

enum WordClass : uint8_t { kSeparator = 0, kWordPart = 1, kUnspaced = 2 };

// Class of every code point, and the folded form of those below U+0800 (two UTF-8 bytes) that have one of two bytes.
struct WordTable {
  uint8_t word_class[0x110000];
  uint16_t folded[0x800];
  uint32_t two_bytes[0x800];  // the UTF-8 of the folded form, its first byte lowest; above it 3 for a part of a word
};
const WordTable& word_table();  // built at the first call

inline uint64_t multiply_fold(uint64_t x, uint64_t y) {
  const unsigned __int128 product = static_cast<unsigned __int128>(x) * y;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93u;
  return x ^ (x >> 29);
}

// x mod 2^61 - 1 up to some multiples of it, for x < 2^124: below 2^64.
inline uint64_t fold61(unsigned __int128 x) {
  return (static_cast<uint64_t>(x) & kMersenne61) + static_cast<uint64_t>(x >> 61);
}

inline uint64_t reduce61(uint64_t x) {
  x = (x & kMersenne61) + (x >> 61);
  return x >= kMersenne61 ? x - kMersenne61 : x;
}

constexpr uint64_t kCharBase = 0x0F6D2A91C3B7E485u;  // B, below 2^60

enum class Family { kFast32, kM61, kOph };
enum class Unit { kWord, kChar };

// What is the same for all documents. Lists by slot are padded to whole vectors.
struct SignPlan {
  Family family = Family::kFast32;
  Unit unit = Unit::kWord;
  int64_t ngram_size = 5;
  int64_t num_slots = 0;
  std::vector<uint64_t> word_factors;                    // C: (ngram_size,)
  std::vector<uint32_t> multipliers, offsets;            // A, B of fast32
  std::vector<uint64_t> wide_multipliers, wide_offsets;  // A, B of m61
  uint64_t char_power = 0;                               // B^ngram_size
  uint64_t salt = 0;                                     // of oph
  std::vector<uint16_t> bin_order, bin_rank;  // oph: (num_slots, num_slots); rank of bin j in the order of bin k
};

// Fills in char_power, and bin_order and bin_rank by salt: the order of bin k is that of mix(salt + golden * (k *
// num_slots + j + 1)) over j.
void finish_plan(SignPlan& plan);

// Memory of one thread, reused from document to document.
struct Scratch {
  std::vector<uint8_t> utf8, folded, joined;
  std::vector<uint32_t> borders, cut, places, code_points, reduced, minima;
  std::vector<uint64_t> words, hashes;
};

// The functions of one x86-64 level; all levels give the same results.
struct MinHashKernels {
  const char* level;
  // out: (num_slots,); all kNoShingle for a text without words.
  void (*sign)(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, uint32_t* out);
  // Appends the 64-bit hash of every shingle, in text order, with repeats, whatever the family.
  void (*shingle)(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch,
                  std::vector<uint64_t>& out);
  // Lowers the slots of out to those of `count` shingle hashes (m61: of any values below 2^64, as they are).
  void (*lower)(const uint64_t* hashes, int64_t count, const SignPlan& plan, Scratch& scratch, uint32_t* out);
  bool (*is_utf8)(const uint8_t* text, int64_t size);               // well-formed
  int64_t (*count_code_points)(const uint8_t* text, int64_t size);  // of UTF-8
};

// Levels that this build has and this processor runs, best first; "baseline" is always last.
const std::vector<MinHashKernels>& minhash_levels();

namespace baseline {
MinHashKernels minhash_kernels();
}
namespace avx2 {
MinHashKernels minhash_kernels();
}
namespace avx512 {
MinHashKernels minhash_kernels();
}

}  // namespace herdkern::text
