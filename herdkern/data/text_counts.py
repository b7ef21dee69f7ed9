"""What the filters measure of a document: words, lines, repetitions. One pass each; every number can be stored.

Source: Rae et al. 2021, "Scaling language models" (Gopher), table A1; Raffel et al. 2020 (C4), section 2.2.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Scripts written without spaces: one character, with the marks and the punctuation behind it, counts as a word.
_NO_SPACES = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003fffd"
)
_WORD = re.compile(rf"[{_NO_SPACES}][^\w\s]*|[^\s{_NO_SPACES}]+")
_UNSPACED = re.compile(rf"[{_NO_SPACES}]")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH = re.compile(r"\n{2,}")
_BULLET = re.compile(r"^\s*(?:[-*+•‣▪◦●○]|\d{1,3}[.)])\s")
_SENTENCE = re.compile(r"[.!?](?=[\s\"'”’)\]]|$)|[。！？｡؟۔।॥။።។։།]")
TERMINAL = (
    ".",
    "!",
    "?",
    '"',
    "'",
    "”",
    "’",
    "»",
    "。",
    "！",
    "？",
    "」",
    "』",
    "…",
    "؟",
    "۔",
    "।",
    "॥",
    "။",
    "។",
    "։",
    "።",
    "།",
    "｡",
)
NO_FULL_STOP = frozenset(("th", "lo"))  # languages whose sentences end in a space
# Frequent words of a language; a text that holds none of them is a list, a table or another language.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das mit sich ist nicht ein",
    "fr": "le la les de et des un une est que en pour dans",
    "es": "de la que el en y los se del las un por con",
    "pt": "de a o que e do da em um para com uma os",
    "it": "di e il la che in un per del una non sono con",
    "nl": "de van een het en in is dat op te zijn met voor",
    "sv": "och i att det som en på är av för med till den",
    "da": "og i at det er en til af på som med for den",
    "nb": "og i det er på en til som av for med at den",
    "no": "og i det er på en til som av for med at den",
    "fi": "ja on ei se että oli hän mutta kun myös ovat",
    "pl": "i w na z do się nie że to jest o jak po",
    "cs": "a v na se že je z do to s o i pro",
    "sk": "a v na sa je že z do to s o i pre",
    "ru": "и в не на что с по как это он к но из",
    "uk": "і в на що не з та до як за це у для",
    "bg": "и на в за да от се с не че е по са",
    "ro": "de și în a la cu care pe o din un nu este",
    "hu": "a az és hogy nem is egy ez meg de volt",
    "tr": "ve bir bu da de için ile çok daha olarak",
    "el": "και το του η να της με που για την τα στο",
    "ar": "في من على إلى أن التي عن هذا كان الذي",
    "he": "של את על לא זה עם הוא כי גם או",
    "fa": "و در به از که این را با است برای آن",
    "hi": "के में की है और से का को पर यह",
    "id": "yang dan di dari untuk dengan ini pada itu dalam",
    "ms": "yang dan di dari untuk dengan ini pada itu dalam",
    "vi": "và của là có cho được trong không với một các",
    "ca": "de la i el que a en les per un del amb",
    "hr": "i u je na se da su za od s a kao",
    "sr": "и у је на се да су за од с а као",
    "sl": "in je v na se da so za z ki ne pa",
    "lt": "ir į kad su yra iš bet tai kaip",
    "lv": "un ir no ar par kas lai bet kā",
    "et": "ja on ei et see ka kui oli oma mis",
    "ko": "이 그 수 있는 것 등 및 있다",
}
_STOP_SETS = {lang: frozenset(words.split()) for lang, words in STOP_WORDS.items()}
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words of `text`: between spaces, single characters in scripts that write none."""
    return _WORD.findall(text) if _UNSPACED.search(text) else text.split()


def quality_counts(text: str, words: Sequence[str], lang: str) -> dict[str, Any]:
    """Gopher's counters: words, mean length, symbols, bullets, ellipses, letters, frequent words (-1: no list)."""
    num_words = max(1, len(words))
    lines = [line for line in text.split("\n") if line.strip()]
    num_lines = max(1, len(lines))
    stop_words = _STOP_SETS.get(lang)
    return {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / num_words,
        "unspaced": _UNSPACED.search(text) is not None,
        "symbol_ratio": max(text.count("#"), text.count("...") + text.count("…")) / num_words,
        "bullet_lines": sum(1 for line in lines if _BULLET.match(line)) / num_lines,
        "ellipsis_lines": sum(1 for line in lines if line.rstrip().endswith(("...", "…"))) / num_lines,
        "alpha_words": sum(1 for word in words if _LETTER.search(word)) / num_words,
        "stop_words": -1
        if stop_words is None
        else len(stop_words & {word.strip(".,;:!?\"'()").lower() for word in words}),
    }


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def repetition_counts(text: str, words: Sequence[str]) -> dict[str, float]:
    """Gopher's repetition counters: repeated lines and paragraphs, top and duplicated word n-grams, as shares.

    Shares of characters are of all characters in words (n-grams) or lines (lines); a position is counted once.
    """
    counts: dict[str, float] = {}
    for name, parts in (
        ("line", [line for line in text.split("\n") if line.strip()]),
        ("paragraph", [part for part in _PARAGRAPH.split(text) if part.strip()]),
    ):
        repeated = len(parts) - len(set(parts))
        counts[f"duplicate_{name}s"] = repeated / max(1, len(parts))
        characters = sum(map(len, parts)) - sum(map(len, set(parts)))
        counts[f"duplicate_{name}_characters"] = characters / max(1, sum(map(len, parts)))
    counts.update(_ngram_shares(words))
    return counts


def _ngram_shares(words: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), dtype=np.uint64, count=len(words))
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    total = int(lengths.sum())
    keys = _mixed(ids)
    borders = np.concatenate(([0], np.cumsum(lengths)))
    shares: dict[str, float] = {}
    for size in range(1, max(DUPLICATE_NGRAMS) + 1):
        if size > 1:
            keys = keys[:-1] * _MULTIPLIER + _mixed(ids)[size - 1 :] if len(keys) > 1 else keys[:0]
        if size in TOP_NGRAMS:
            shares[f"top_{size}gram"] = _top_share(keys, borders, size, total)
        elif size in DUPLICATE_NGRAMS:
            shares[f"duplicate_{size}gram"] = _covered_share(keys, lengths, size, total)
    return shares


def _mixed(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: numbers of words to 64-bit hashes."""
    mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _top_share(keys: NDArray[np.uint64], borders: NDArray[np.int64], size: int, total: int) -> float:
    """Share of characters of the n-gram that covers most, if it occurs at least twice."""
    if not len(keys) or not total:
        return 0.0
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    covered = (borders[first + size] - borders[first]) * counts
    covered = covered[counts > 1]
    return min(1.0, float(covered.max()) / total) if len(covered) else 0.0


def _covered_share(keys: NDArray[np.uint64], lengths: NDArray[np.int64], size: int, total: int) -> float:
    """Share of characters inside any n-gram that occurs at least twice, each character once."""
    if len(keys) < 2 or not total:
        return 0.0
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    starts = np.flatnonzero(counts[inverse] > 1)
    if not len(starts):
        return 0.0
    steps = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + size, -1)
    return float(lengths[np.cumsum(steps[:-1]) > 0].sum()) / total


def line_counts(text: str) -> dict[str, float]:
    """FineWeb's line counters: lines with terminal punctuation, short lines, characters in repeated lines, newlines."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    num_lines = max(1, len(lines))
    characters = max(1, sum(map(len, lines)))
    repeated: Counter[str] = Counter(lines)
    return {
        "terminal_lines": sum(1 for line in lines if line.endswith(TERMINAL)) / num_lines,
        "short_lines": sum(1 for line in lines if len(line) <= 30) / num_lines,
        "repeated_line_characters": sum(len(line) * (count - 1) for line, count in repeated.items()) / characters,
        "newline_ratio": text.count("\n") / max(1, len(text.split())),
    }


def num_sentences(text: str) -> int:
    """How many sentence ends `text` has."""
    return len(_SENTENCE.findall(text))
