"""Line dedup once more in plain Python, for the tests: keys, counts, what looks like code, removal."""

import re
from collections import Counter, defaultdict

from minhash_twin import fold, kind_of

MASK = (1 << 64) - 1
CODE = re.compile(
    r"^    |\t"  # indented, as prose that was taken from a page is not; or the row of a table
    r"|[;{}]\s*$|^\s*[\])}]+[,;:]?\s*$"
    r"|^\s*(?:import [\w.]+(?: as \w+)?(?:,|\s*$)|from [\w.]+ import |def \w+\(|class \w+[(:]|@\w)"
    r"|^\s*(?:#include|#!|//|/\*|\*/|<\?|<!--)"
    r"|^\s*(?:>>>|\.\.\.|\$) \w"
    r"|^\s*(?:return|elif|except|raise|assert|yield|print)\b.*[():=]|^\s*(?:if|for|while|with|try|else)\b.*:\s*$"
    r"|==|!=|->|=>|::|\+=|-=|&&|\|\||\w\(\)|\w\[\w*\]|\w = \w"
)
FORMULA = re.compile(r"\$[^$\\^_={}+<>]*[\\^_={}+<>][^$]*\$|\\[a-zA-Z]{2,}|\\[(\[]")


def is_code_or_formula(line):
    return CODE.search(line) is not None or FORMULA.search(line) is not None


def mix(x, y):
    return (x * y & MASK) ^ (x * y >> 64)


def hash_line(data):
    salt = (0x9E3779B97F4A7C15 * len(data)) & MASK
    h, last = salt, data
    if len(data) > 16:
        for begin in range(0, len(data) - 16, 16):
            x, y = (int.from_bytes(data[i : i + 8], "little") for i in (begin, begin + 8))
            h = mix(x ^ h, y ^ 0xE7037ED1A0B428DB)
        last = data[-16:]
    x, y = int.from_bytes(last[:8], "little"), int.from_bytes(last[8:16], "little")
    return mix(x ^ h ^ 0xA0761D6478BD642F, y ^ salt ^ 0x8EBC6AF09C88C6E3) or 1


def normal_form(line):
    """The pieces of a line (bytes) joined by one space."""
    text = line.decode("utf-8", "surrogateescape")
    pieces, last = [], ""
    for c in text:
        kind = kind_of(c)
        if kind:
            c = "0" if c in "0123456789" else fold(c)
            if kind == last:
                pieces[-1] += c
            else:
                pieces.append(c)
        last = kind
    return b" ".join(piece.encode("utf-8", "surrogateescape") for piece in pieces)


def line_keys(data):
    return [hash_line(form) if (form := normal_form(line)) else 0 for line in data.split(b"\n")]


def without_lines(text, marked, code_aware):
    """(text, lines that went); blank lines close up over a gap."""
    kept, removed, gap = [], [], False
    for number, line in enumerate(text.split("\n")):
        if marked[number] and not (code_aware and is_code_or_formula(line)):
            removed.append(line)
            gap = True
            continue
        if gap and not line.strip() and (not kept or not kept[-1].strip()):
            continue
        gap = False
        kept.append(line)
    while gap and kept and not kept[-1].strip():
        kept.pop()
    return ("\n".join(kept) if removed else text), removed


def dedup(documents, bucket_of, config):
    """({id: text}, Counter of removed lines) of one language; `bucket_of` maps a document to its bucket.

    The first of the lines that stay are those of the smallest (hash of the id, place).
    """
    places = defaultdict(list)  # (bucket, form) -> [(hash of the id, line)]
    for document in documents:
        for number, line in enumerate(document.text.split("\n")):
            if form := normal_form(line.encode()):
                places[bucket_of(document)[0], form].append((bucket_of(document)[1], number))
    marked = set()
    for (bucket, form), found in places.items():
        units = sorted({h for h, _ in found}) if config.count == "document" else sorted(found)
        if len(units) <= config.max_count:
            continue
        first = set(units[: config.keep_first])
        for place in found:
            if (place[0] if config.count == "document" else place) not in first:
                marked.add((bucket, form, *place))
    texts, went = {}, Counter()
    for document in documents:
        bucket, id_hash = bucket_of(document)
        lines = document.text.split("\n")
        flags = [(bucket, normal_form(line.encode()), id_hash, number) in marked for number, line in enumerate(lines)]
        texts[document.id], removed = without_lines(document.text, flags, config.code_aware)
        went.update(removed)
    return texts, went
