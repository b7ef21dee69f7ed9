"""SentencePiece's precompiled map of characters: a double-array trie of byte strings and what each becomes.

The blob is the trie's size (uint32), the trie (uint32 units, little-endian, as darts-clone lays them out), then the
replacements, each ended by a zero byte. Of the keys that a text begins with the longest is replaced.
"""

import struct
from collections.abc import Mapping

LEAF = 1 << 8  # the unit has a value
VALUE = 1 << 31  # the unit is a value
MAX_MATCHES = 32  # their library looks at no more keys that a text begins with


class CharsMap:
    """A map that was read. Raises: ValueError if the blob is cut short."""

    def __init__(self, blob: bytes) -> None:
        size = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else 0
        if size == 0 or size % 4 or 4 + size > len(blob):
            raise ValueError(f"must have a charsmap that holds its trie, got {len(blob)} bytes for a trie of {size}")
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._replacements = blob[4 + size :]

    def longest(self, data: bytes, at: int) -> tuple[int, bytes] | None:
        """(length of the longest key at data[at:], its replacement), None if no key is there."""
        units, num_units = self._units, len(self._units)
        place, found, matches = _offset(units[0]), None, 0
        for i in range(at, len(data)):
            place ^= data[i]
            if place >= num_units or units[place] & (VALUE | 0xFF) != data[i]:
                break
            unit = units[place]
            place ^= _offset(unit)
            if unit & LEAF:
                if place >= num_units:
                    raise ValueError("encode: the model's charsmap is damaged, a value lies behind its end")
                found = (i + 1 - at, units[place] & (VALUE - 1))
                matches += 1
                if matches == MAX_MATCHES:
                    break
        if found is None:
            return None
        length, start = found
        end = self._replacements.find(b"\0", start)
        return length, self._replacements[start : end if end >= 0 else None]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


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
