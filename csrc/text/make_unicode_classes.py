"""Writes unicode_classes.h: the split pattern's class of every code point, as run lengths.

Run: python csrc/text/make_unicode_classes.py. Needs Unicode 16.0: Python 3.14, or `pip install unicodedata2==16.0.0`.
16.0 is the version that tiktoken 0.14 and tokenizers 0.23 carry; the three must agree on every code point.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

UNICODE_VERSION = "16.0.0"
CLASSES = ["kOther", "kLetter", "kUpper", "kLower", "kMark", "kNumber", "kSpace", "kNewline"]
# Property White_Space: what \s means in Unicode regular expressions. Unlike str.isspace it leaves out U+001C..U+001F.
WHITE_SPACE = {*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
CLASS_OF_CATEGORY = {"Lu": 2, "Lt": 2, "Ll": 3, "Lm": 1, "Lo": 1, "Mn": 4, "Mc": 4, "Me": 4, "Nd": 5, "Nl": 5, "No": 5}
MAX_RUN = (1 << 13) - 1  # a run and its 3-bit class share 16 bits


def load_unicodedata() -> ModuleType:
    """The module that carries UNICODE_VERSION."""
    import unicodedata

    if unicodedata.unidata_version == UNICODE_VERSION:
        return unicodedata
    try:
        import unicodedata2
    except ImportError:
        sys.exit(f"make_unicode_classes: needs `pip install unicodedata2=={UNICODE_VERSION}`")
    if unicodedata2.unidata_version != UNICODE_VERSION:
        sys.exit(f"make_unicode_classes: unicodedata2 must be {UNICODE_VERSION}, got {unicodedata2.unidata_version}")
    return unicodedata2


def class_runs(category: Callable[[str], str]) -> Iterator[int]:
    """Yields length << 3 | class for maximal runs of equal class, cut at MAX_RUN, over all 0x110000 code points."""
    current, length = -1, 0
    for code_point in range(0x110001):
        if code_point == 0x110000:
            cls = -1
        elif code_point in (0xA, 0xD):
            cls = 7
        elif code_point in WHITE_SPACE:
            cls = 6
        else:
            cls = CLASS_OF_CATEGORY.get(category(chr(code_point)), 0)
        if cls == current and length < MAX_RUN:
            length += 1
        else:
            if length:
                yield length << 3 | current
            current, length = cls, 1


def main() -> None:
    """Write the header."""
    runs = list(class_runs(load_unicodedata().category))
    lines, line = [], " "
    for run in runs:
        item = f" {run},"
        if len(line) + len(item) > 120:
            lines.append(line)
            line = " "
        line += item
    lines.append(line)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))
    header = f"""// The class of every code point for the split patterns, as run lengths.
// Written by make_unicode_classes.py: do not edit. Unicode {UNICODE_VERSION}.
// {names}
// (kUpper is Lu and Lt, kLetter is Lm and Lo, kSpace is White_Space without the two newlines).
#pragma once
#include <cstdint>

namespace herdkern::text {{

// clang-format off
inline constexpr char kUnicodeVersion[] = "{UNICODE_VERSION}";
inline constexpr uint16_t kClassRuns[{len(runs)}] = {{  // length << 3 | class, from U+0000 on
"""
    text = header + "\n".join(lines) + "\n};\n// clang-format on\n\n}  // namespace herdkern::text\n"
    Path(__file__).with_name("unicode_classes.h").write_text(text)


if __name__ == "__main__":
    main()
