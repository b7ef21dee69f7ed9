// MinHash signatures straight from UTF-8 text. Definition, version 1 (herdkern/dedup/minhash.py states it in words):
//   word      maximal run of letters, marks, numbers and '_' (Unicode 16), case-folded by the rules of minhash.cpp; cut
//             after every 256 bytes. In scripts written without spaces every code point starts a word of its own that
//             reaches over up to 6 code points of its run. A byte that is not UTF-8 counts as a letter.
//   w         hash_bytes(word)
//   shingle   mix(sum_j C[j] * w[i + j]) over ngram_size neighbouring words; a shorter document is one shingle
//   slot k    min over shingles of (A[k] * x + B[k]) mod 2^32, x = upper half of the shingle hash, A odd
// Single-threaded and without Python: bind_minhash.cpp splits the documents over threads.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace herdkern::text {

constexpr int64_t kMaxWordBytes = 256;
constexpr int kUnspacedReach = 6;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

enum WordClass : uint8_t { kSeparator = 0, kWordPart = 1, kUnspaced = 2 };

// Class of every code point, and the folded form of those below U+0800 (two UTF-8 bytes) that have one of two bytes.
struct WordTable {
  uint8_t word_class[0x110000];
  uint16_t folded[0x800];
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

// One document's numbers: num_slots multipliers and offsets padded with (1, 0xFFFFFFFF) to whole vectors of 16.
struct SignPlan {
  int64_t ngram_size = 5;
  int64_t num_slots = 0;
  std::vector<uint64_t> word_factors;          // C: (ngram_size,)
  std::vector<uint32_t> multipliers, offsets;  // A, B: (num_slots rounded up to 16,)
};

// Memory of one thread, reused from document to document.
struct Scratch {
  std::vector<uint8_t> lower;
  std::vector<uint64_t> words, shingles;
  std::vector<uint32_t> reduced, minima;
};

// The functions of one x86-64 level; all levels give the same results.
struct MinHashKernels {
  const char* level;
  // out: (num_slots,); all 0xFFFFFFFF for a text without words.
  void (*sign)(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch, uint32_t* out);
  // Appends the hash of every shingle, in text order, with repeats.
  void (*shingle)(const uint8_t* text, int64_t size, const SignPlan& plan, Scratch& scratch,
                  std::vector<uint64_t>& out);
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
