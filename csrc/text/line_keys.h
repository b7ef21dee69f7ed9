// Keys of lines: 64 bits that are equal for lines that count as equal in line dedup. Definition, version 2
// (herdkern/dedup/lines.py says it in words; tests/dedup/line_twin.py is the same in Python):
//   normal form  the pieces of the line joined by one space. A piece is a maximal run of word characters (letters,
//                marks, numbers, '_' and bytes that are not UTF-8) or of characters of a script that puts no spaces
//                between words, with the case folding and classes of word_table() and every ASCII digit as '0'
//   key          hash_line(normal form), at least 1; 0 for a line without a piece
// Lines are cut at '\n'. Single-threaded and without Python: bind_lines.cpp splits the documents over threads.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "text/word_key.h"

namespace herdkern::text {

// Memory of one thread, reused from document to document.
struct LineScratch {
  std::vector<uint8_t> normal;
};

// The functions of one x86-64 level; all levels give the same keys.
struct LineKernels {
  const char* level;
  // Appends one key per line.
  void (*keys)(const uint8_t* text, int64_t size, LineScratch& scratch, std::vector<uint64_t>& out);
};

// Levels that this build has and this processor runs, best first; "baseline" is always last.
const std::vector<LineKernels>& line_levels();

namespace baseline {
LineKernels line_kernels();
}
namespace avx2 {
LineKernels line_kernels();
}
namespace avx512 {
LineKernels line_kernels();
}

}  // namespace herdkern::text
