// Does a line look like code, a formula or the row of a table? The same answers as the regular expressions of
// tests/dedup/line_twin.py, in one pass without backtracking. \w is a letter or number (Unicode 16) or '_', \s the
// white space of Python's str.isspace.
#pragma once
#include <cstdint>

namespace herdkern::text {

bool is_code_or_formula(const uint8_t* line, int64_t size);

// Bytes of the white space that starts at p, 0 if none does.
int white_space_at(const uint8_t* p, const uint8_t* end);

// First byte that is no white space, and the end of the last one; equal for a blank line.
const uint8_t* skip_white_space(const uint8_t* p, const uint8_t* end);
const uint8_t* strip_white_space(const uint8_t* begin, const uint8_t* end);

}  // namespace herdkern::text
