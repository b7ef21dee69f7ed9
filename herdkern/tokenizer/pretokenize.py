"""Cutting text into the words that BPE works on.

The one split pattern is Llama 3's (cl100k's original form), scanned by csrc/text/unicode_split.h with Unicode 16.0
classes, the version that tiktoken 0.14 and tokenizers 0.23 carry.
"""

import os
from itertools import pairwise

from herdkern import _text

LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_split_pattern(where: str, split_pattern: str) -> None:
    """Refuse a pattern that the scanner does not speak. Raises: ValueError naming `where`."""
    if split_pattern != LLAMA3_SPLIT_PATTERN:
        raise ValueError(f"{where}: split_pattern must be LLAMA3_SPLIT_PATTERN, got {split_pattern!r}")


def split_words(text: str | bytes) -> list[bytes]:
    """The words of one document as UTF-8; joined they are the document.

    text: a byte that is no part of well-formed UTF-8 counts as one symbol character.
    Raises: ValueError if a str holds a lone surrogate; TypeError for another type.
    """
    ends = _text.split_ends(text).tolist()
    data = text if isinstance(text, bytes) else text.encode()
    return [data[begin:end] for begin, end in pairwise([0, *ends])]


def usable_threads(num_threads: int | None) -> int:
    """`num_threads`, or for None the number of cores this process may use. Raises: ValueError if it is below 1."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}; None takes every core")
    return num_threads
