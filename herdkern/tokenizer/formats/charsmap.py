"""SentencePiece's precompiled map of characters: a double-array trie of byte strings and what each becomes.

csrc/text/sentencepiece.h reads it; here one is built. The blob is the trie's size (uint32), the trie (uint32 units,
little-endian, as darts-clone lays them out), then the replacements, each ended by a zero byte. Of the keys that a text
begins with the longest is replaced.
"""

import struct
from collections.abc import Mapping

LEAF = 1 << 8  # the unit has a value
VALUE = 1 << 31  # the unit is a value


def build(replacements: Mapping[bytes, bytes]) -> bytes:
    """The blob of a map. keys: prefix-free, one or two bytes long. Replacements end at their first zero byte."""
    units = [0] * 256
    strings = bytearray()

    def block() -> int:
        units.extend([0] * 256)
        return len(units) - 256

    root = block()
    units[0] = root << 10
    leaves = block()
    inner: dict[int, tuple[int, int]] = {}  # first byte of a two-byte key -> (its children, their values)
    for key, replacement in sorted(replacements.items()):
        base, values = root, leaves
        if len(key) == 2:
            if key[0] not in inner:
                inner[key[0]] = (block(), block())
                place = root ^ key[0]
                units[place] = key[0] | (place ^ inner[key[0]][0]) << 10
            base, values = inner[key[0]]
        place, value = base ^ key[-1], values ^ key[-1]
        units[place] = key[-1] | LEAF | (place ^ value) << 10
        units[value] = VALUE | len(strings)
        strings += replacement + b"\0"
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + bytes(strings)
