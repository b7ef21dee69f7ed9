"""The word and signature definition of herdkern.dedup.minhash once more, in plain Python, for the tests."""

import unicodedata
from itertools import islice

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
UNSPACED = [
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF), (0xAA60, 0xAADF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFD),
]  # fmt: skip
FOLDED_BLOCKS = [(0x41, 0x5A), (0xC0, 0xDE), (0x100, 0x17F), (0x386, 0x3C2), (0x400, 0x52F), (0x531, 0x556)]
NOT_FOLDED = {0x130, 0x17F}  # their lower case has another length in UTF-8


def splitmix(state):
    while True:
        state = (state + GOLDEN) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def multiply_fold(x, y):
    product = x * y
    return (product & MASK) ^ (product >> 64)


def mix(x):
    x = ((x ^ (x >> 32)) * 0xD6E8FEB86659FD93) & MASK
    return x ^ (x >> 29)


def hash_bytes(data):
    salt = (GOLDEN * len(data)) & MASK
    h, last = salt, data
    if len(data) > 16:
        for begin in range(0, len(data) - 16, 16):
            x, y = (int.from_bytes(data[i : i + 8], "little") for i in (begin, begin + 8))
            h = multiply_fold(x ^ h, y ^ 0xE7037ED1A0B428DB)
        last = data[-16:]
    x, y = int.from_bytes(last[:8], "little"), int.from_bytes(last[8:16], "little")
    return multiply_fold(x ^ h ^ 0xA0761D6478BD642F, y ^ salt ^ 0x8EBC6AF09C88C6E3)


def kind_of(c):
    """ "word", "unspaced" or "" (a separator) for a character; an undecodable byte is a surrogate."""
    code, category = ord(c), unicodedata.category(c)
    if 0xDC80 <= code <= 0xDCFF:
        return "word"
    if category[0] not in "LMN" and c != "_":
        return ""
    return "unspaced" if any(first <= code <= last for first, last in UNSPACED) else "word"


def fold(c):
    if c == "ς":
        return "σ"
    if any(first <= ord(c) <= last for first, last in FOLDED_BLOCKS) and ord(c) not in NOT_FOLDED:
        return c.lower()
    return c


def encode(text):
    return text.encode("utf-8", "surrogateescape")


def words(data, zero_digits=False):
    """The words of UTF-8 bytes as bytes, in order."""
    text = data.decode("utf-8", "surrogateescape")
    kinds = [kind_of(c) for c in text]
    folded = ["0" if zero_digits and c in "0123456789" else fold(c) for c in text]
    found, begin = [], 0
    while begin < len(text):
        end = begin + 1
        while end < len(text) and kinds[end] == kinds[begin]:
            end += 1
        if kinds[begin] == "word":
            word = encode("".join(folded[begin:end]))
            found += [word[i : i + 256] for i in range(0, len(word), 256)]
        elif kinds[begin] == "unspaced":
            found += [encode(text[i : min(i + 6, end)]) for i in range(begin, end)]
        begin = end
    return found


def shingles(data, ngram_size):
    """The 64-bit shingle hashes in order, with repeats."""
    factors = [f | 1 for f in islice(splitmix(0x6E6772616D73), ngram_size)]
    hashes = [hash_bytes(word) for word in words(data)]
    if not hashes:
        return []
    if len(hashes) < ngram_size:
        return [mix((GOLDEN * len(hashes) + sum(f * w for f, w in zip(factors, hashes, strict=False))) & MASK)]
    windows = (hashes[i : i + ngram_size] for i in range(len(hashes) - ngram_size + 1))
    return [mix(sum(f * w for f, w in zip(factors, window, strict=True)) & MASK) for window in windows]


def signature(data, num_slots, ngram_size, seed):
    """The slots of one text."""
    values = [v >> 32 for v in islice(splitmix(seed & MASK), 2 * num_slots)]
    reduced = {h >> 32 for h in shingles(data, ngram_size)}
    return [
        min(((a | 1) * x + b) & 0xFFFFFFFF for x in reduced) if reduced else 0xFFFFFFFF
        for a, b in zip(values[0::2], values[1::2], strict=True)
    ]
