"""Word counts: what BPE training needs of a corpus, in memory (WordCounts) or from shards of any size (count_shards).

The kernels are csrc/text/word_counts.h and word_runs.h, the file format is counts_file.py.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from herdkern import _text
from herdkern.tokenizer.counts_file import (
    CountsHeader,
    iter_counts,
    load_into,
    merge_counts,
    read_header,
    words_of,
    write_counts_file,
)
from herdkern.tokenizer.pretokenize import make_splitter, usable_threads
from herdkern.tokenizer.shard_counts import count_shards

__all__ = ["CountsHeader", "WordCounts", "count_shards", "iter_counts", "merge_counts", "read_header"]

BATCH_BYTES = 32 << 20  # texts of an iterator are counted in batches of about this size


class WordCounts:
    """How often each word of a split pattern occurs, in memory.

    Counts are 64-bit and do not depend on the order of documents or on the number of threads.
    split_pattern: a name of SPLIT_PATTERNS, a regular expression or a sequence of them. Raises: ValueError.
    """

    def __init__(self, split_pattern: str | Sequence[str] = "llama3") -> None:
        splitter = make_splitter(split_pattern, "WordCounts")
        self.split_pattern: tuple[str, ...] = tuple(splitter.patterns)
        self.unicode = _text.unicode_version  # of the words in it
        self._table = _text.WordTable(splitter)

    def add(self, texts: Iterable[str | bytes] | str | bytes, *, num_threads: int | None = None) -> "WordCounts":
        """Count the words of documents; each is split by itself. Returns self.

        texts: one document or any iterable of them, which is read in batches.
        Raises: ValueError if a str holds a lone surrogate, or if the words in it were split by another Unicode version;
        TypeError for other types. Earlier batches stay counted.
        """
        if self.unicode != _text.unicode_version:
            raise ValueError(
                f"WordCounts.add: the words in it must be split by Unicode {_text.unicode_version} as new ones are, "
                f"got {self.unicode}; count the texts again"
            )
        threads = usable_threads(num_threads)
        num_texts = 0
        for batch in text_batches([texts] if isinstance(texts, str | bytes) else texts, BATCH_BYTES):
            self._table.add_texts(batch, num_texts, threads)
            num_texts += len(batch)
        return self

    def add_words(self, counts: Mapping[bytes, int] | Mapping[str, int]) -> "WordCounts":
        """Add words with their counts, taken as they are: the pattern does not split them again. Returns self.

        Raises: ValueError if a word is empty or a count is not in [1, 2**63); OverflowError if a sum reaches 2**63.
        """
        words = [word.encode() if isinstance(word, str) else word for word in counts]
        for word, count in zip(words, counts.values()):
            if not word or not isinstance(count, int | np.integer) or not 0 < count < 1 << 63:
                raise ValueError(
                    f"WordCounts.add_words: counts must be whole numbers in [1, 2**63), got {count} for {word!r}"
                )
        lengths = np.array([len(word) for word in words], np.int64)
        self._table.add_words(b"".join(words), lengths, np.array(list(counts.values()), np.int64))
        return self

    def merge(self, other: "WordCounts") -> "WordCounts":
        """Add the counts of another corpus. Returns self.

        Raises: ValueError if it was split by another pattern or Unicode version; OverflowError if a sum reaches 2**63.
        """
        mine, theirs = (self.split_pattern, self.unicode), (other.split_pattern, other.unicode)
        if mine != theirs:
            raise ValueError(f"WordCounts.merge: other must be split by {mine}, got {theirs}")
        self._table.merge(other._table)
        return self

    def prune(self, min_count: int) -> "WordCounts":
        """Drop the words that occur less than min_count times. Returns self."""
        self._table.prune(min_count)
        return self

    def __len__(self) -> int:
        return self._table.num_words()

    @property
    def num_occurrences(self) -> int:
        """The sum of all counts."""
        return self._table.num_occurrences()

    def items(self) -> Iterator[tuple[bytes, int]]:
        """(word, count) in byte order."""
        return words_of(*self._table.sorted())

    def save(self, path: Path | str) -> CountsHeader:
        """Write the counts to a file, whole or not at all; equal counts give equal bytes. Raises: OSError."""

        def write(descriptor: int, begin: int) -> tuple[int, ...]:
            return self._table.write_run(descriptor, str(path), begin)

        return write_counts_file(path, self.split_pattern, self.unicode, write)

    @classmethod
    def load(cls, path: Path | str) -> "WordCounts":
        """The counts in a file of `save`, count_shards or merge_counts.

        Raises: OSError; ValueError naming the file if it is damaged or its split pattern is not one we can use.
        """
        header = read_header(path, "WordCounts.load")
        counts = cls(header.split_pattern)
        counts.unicode = header.unicode
        load_into(counts._table, header, "WordCounts.load")
        return counts


def warn_of_other_unicode(counts: WordCounts | CountsHeader, where: str) -> None:
    """Say it when words were split by another Unicode version than a tokenizer of today splits text by."""
    if counts.unicode != _text.unicode_version:
        warnings.warn(
            f"{where}: counts should be of words split by Unicode {_text.unicode_version}, got {counts.unicode}: the "
            f"tokenizer will cut some rare characters in another way than they were counted; count the texts again "
            f"to be exact",
            stacklevel=3,
        )


def text_batches(texts: Iterable[str | bytes], batch_bytes: int) -> Iterator[list[str | bytes]]:
    """The texts in lists of about batch_bytes characters or bytes."""
    batch: list[str | bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) if isinstance(text, str | bytes) else 0  # the kernel refuses the others
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
