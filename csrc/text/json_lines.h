// The texts of JSON lines without Python: what herdkern.data.document.read_documents takes from the lines that nearly
// every file consists of. A line that is anything else (no JSON, no string under the key, a lone surrogate, NaN, an
// escaped key, deep nesting) is left to Python, which accepts or refuses it. So this must never accept what Python
// refuses, nor read another text; it may leave as much as it likes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace herdkern::text {

enum class JsonLine { kText, kBlank, kOther };

// line: without its line end.  scratch: room for line.size() bytes; moved behind what was written there. The text is a
// part of the line, or of the scratch if it holds escapes.
JsonLine text_of_json_line(std::string_view line, std::string_view key, char*& scratch, std::string_view& text);

}  // namespace herdkern::text
