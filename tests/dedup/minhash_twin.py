"""The word and signature definition of herdkern.dedup.minhash once more, in plain Python, for the tests."""

import hashlib
import unicodedata
from itertools import islice

import numpy as np

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


def words(data):
    """The words of UTF-8 bytes as bytes, in order."""
    text = data.decode("utf-8", "surrogateescape")
    kinds = [kind_of(c) for c in text]
    folded = [fold(c) for c in text]
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


def characters(data):
    """The code points of the normalised text: (number that stands for it, its bytes)."""
    text = data.decode("utf-8", "surrogateescape")
    runs = "".join(fold(c) if kind_of(c) else "\0" for c in text).split("\0")
    normalised = " ".join(run for run in runs if run)
    return [(0x110000 + ord(c) - 0xDC00 if 0xDC80 <= ord(c) <= 0xDCFF else ord(c), encode(c)) for c in normalised]


def windows(items, size):
    """Windows of neighbouring items; a shorter list is one window, an empty one has none."""
    if not items:
        return []
    return [items[i : i + size] for i in range(max(1, len(items) - size + 1))]


def shingle_bytes(data, ngram_size, unit="word"):
    """The shingles as bytes, in order, with repeats."""
    if unit == "word":
        return [b" ".join(window) for window in windows(words(data), ngram_size)]
    return [b"".join(c for _, c in window) for window in windows(characters(data), ngram_size)]


def hash_characters(window, ngram_size):
    value = 0 if len(window) == ngram_size else 1  # a shorter text has one window, with a 1 in front
    for number, _ in window:
        value = (value * 0x0F6D2A91C3B7E485 + number + 1) % ((1 << 61) - 1)
    return mix(value)


def shingles(data, ngram_size, unit="word"):
    """The 64-bit shingle hashes in order, with repeats."""
    if unit == "char":
        return [hash_characters(window, ngram_size) for window in windows(characters(data), ngram_size)]
    factors = [f | 1 for f in islice(splitmix(0x6E6772616D73), ngram_size)]
    found = []
    for window in windows([hash_bytes(word) for word in words(data)], ngram_size):
        start = 0 if len(window) == ngram_size else GOLDEN * len(window)
        found.append(mix((start + sum(f * w for f, w in zip(factors, window, strict=False))) & MASK))
    return found


def signature(data, num_slots, ngram_size, seed, unit="word", family="fast32"):
    """The slots of one text."""
    if family == "m61":
        return signature_m61(shingle_bytes(data, ngram_size, unit), num_slots, seed)
    hashes = set(shingles(data, ngram_size, unit))
    if family == "oph":
        return signature_oph(hashes, num_slots, seed)
    values = [v >> 32 for v in islice(splitmix(seed & MASK), 2 * num_slots)]
    return [
        min((((a | 1) * (h >> 32) + b) & 0xFFFFFFFF for h in hashes), default=0xFFFFFFFF)
        for a, b in zip(values[0::2], values[1::2], strict=True)
    ]


def signature_m61(shingle_list, num_slots, seed):
    prime, generator, slots = (1 << 61) - 1, np.random.RandomState(seed), []
    hashes = {int.from_bytes(hashlib.sha1(s).digest()[:4], "little") for s in shingle_list}
    for _ in range(num_slots):
        a, b = (int(generator.randint(low, prime, dtype=np.uint64)) for low in (1, 0))
        slots.append(min((((a * h + b) & MASK) % prime & 0xFFFFFFFF for h in hashes), default=0xFFFFFFFF))
    return slots


def signature_oph(hashes, num_slots, seed):
    salt = next(splitmix(seed & MASK))
    bins = [0xFFFFFFFF] * num_slots
    for value in hashes:
        value = mix(value ^ salt)
        place = (value >> 32) * num_slots >> 32
        bins[place] = min(bins[place], value & 0xFFFFFFFF, 0xFFFFFFFE)
    if not hashes:
        return bins
    filled = list(bins)
    for i in range(num_slots):
        if bins[i] == 0xFFFFFFFF:
            full = [j for j in range(num_slots) if bins[j] != 0xFFFFFFFF]
            filled[i] = bins[min(full, key=lambda j: mix((salt + GOLDEN * (i * num_slots + j + 1)) & MASK))]
    return filled
