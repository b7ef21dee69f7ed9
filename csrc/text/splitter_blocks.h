// The fast scanners of the named split patterns: 64 code points at a time as bit masks, one mask for each kind of
// character, from which a few dozen operations on 64-bit words give the starts of all words at once.
//
// A block always begins where a word begins, so nothing is carried from block to block; what the end of a block leaves
// open is left to the next one, which begins at the last word found. Words that do not end within a block, and the rare
// shapes that take more than masks, are left to the caller, who asks the pattern's automaton for one word.
// The automaton alone gives 230 MB/s on English, the blocks 1,100: its branches cannot be foreseen, masks have few.
#pragma once
#include <cstddef>
#include <cstdint>

namespace herdkern::text {

enum class BlockPattern { kLlama3, kCl100k, kQwen2, kGpt2, kO200k, kTekken, kDeepseek3 };

struct BlockJob {
  const uint8_t* place;  // starts a word; moved to the end of the last word found
  const uint8_t* end;
  const uint8_t** ends;  // where the words found end
  size_t capacity;       // of ends; at least 65
  const uint8_t* kinds;  // (0x110000,) CharKind bits of each code point
  uint64_t num_blocks = 0;
};

// What a code point above U+007F is, in bits; none: anything else.
enum CharKind : uint8_t {
  kUpperBit = 1,        // Lu, Lt
  kLowerBit = 2,        // Ll
  kOtherLetterBit = 4,  // Lm, Lo
  kMarkBit = 8,
  kNumberBit = 16,
  kSpaceBit = 32,   // white space
  kSymbolBit = 64,  // P, S
  kCjkBit = 128,    // what DeepSeek V3 sets apart: U+4E00 to U+9FA5, U+3040 to U+30FF
};
const uint8_t* char_kinds();  // (0x110000,)

// Returns how many words it found: 0 if the next one is left to the caller.
using BlockScan = size_t (*)(BlockJob& job);

// The best scan that this processor runs; null if there is none. HERDKERN_ISA forces a lower level.
BlockScan find_block_scan(BlockPattern pattern);

#define HK_DECLARE_BLOCK_SCANS(level)         \
  namespace level {                           \
  BlockScan block_scan(BlockPattern pattern); \
  }
HK_DECLARE_BLOCK_SCANS(baseline)
#if defined(HK_X86)
HK_DECLARE_BLOCK_SCANS(avx2)
HK_DECLARE_BLOCK_SCANS(avx512)
HK_DECLARE_BLOCK_SCANS(vbmi2)
#endif
#undef HK_DECLARE_BLOCK_SCANS

}  // namespace herdkern::text
