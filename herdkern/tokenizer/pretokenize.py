"""Cutting text into the words that BPE works on.

A split pattern is a regular expression, or a tuple of them of which each cuts the words of the one before (Hugging
Face's Sequence of Split with behaviour "isolated"). csrc/text/splitter.h finds what the `regex` package finds, with
the classes of Unicode 16.0, the version that tiktoken 0.14 and tokenizers 0.23 carry.
"""

import functools
import os
from collections.abc import Sequence
from itertools import pairwise

from herdkern import _text

SPLIT_PATTERNS: dict[str, str | tuple[str, ...]] = _text.split_patterns()  # by name
SPLIT_PATTERNS["cl100k"] = SPLIT_PATTERNS["llama3"]
LLAMA3_SPLIT_PATTERN = str(SPLIT_PATTERNS["llama3"])


def resolve_pattern(pattern: str | Sequence[str], where: str = "resolve_pattern") -> tuple[str | None, tuple[str, ...]]:
    """The name of a split pattern (None if it has none) and its regular expressions.

    pattern: a name of SPLIT_PATTERNS, a regular expression, or a sequence of them.
    Raises: ValueError naming `where` for a pattern that the splitter refuses, with the construct and its place.
    """
    splitter = make_splitter(pattern, where)
    return splitter.name or None, splitter.patterns


def make_splitter(pattern: str | Sequence[str], where: str = "make_splitter") -> _text.Splitter:
    """The native splitter of a pattern, made once; arguments and errors as in resolve_pattern."""
    try:
        return _make_splitter(pattern if isinstance(pattern, str) else tuple(pattern))
    except ValueError as error:
        raise ValueError(f"{where}: split_pattern {error}") from None


@functools.lru_cache(maxsize=64)
def _make_splitter(pattern: str | tuple[str, ...]) -> _text.Splitter:
    return _text.Splitter(pattern)


def split_words(text: str | bytes, pattern: str | Sequence[str] = "llama3") -> list[bytes]:
    """The words of one document as UTF-8; joined they are the document.

    text: a byte that is no part of well-formed UTF-8 counts as one symbol character.
    pattern: a name of SPLIT_PATTERNS, a regular expression, or a sequence of them. What it does not match is a word.
    Raises: ValueError if a str holds a lone surrogate or the pattern is refused; TypeError for another type of text.
    """
    ends = make_splitter(pattern, "split_words").word_ends(text).tolist()
    data = text if isinstance(text, bytes) else text.encode()
    return [data[begin:end] for begin, end in pairwise([0, *ends])]


def usable_threads(num_threads: int | None) -> int:
    """`num_threads`, or for None the number of cores this process may use. Raises: ValueError if it is below 1."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}; None takes every core")
    return num_threads
