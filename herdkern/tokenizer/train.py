"""Counting words and training BPE merges. The kernels are csrc/text/word_counts.h and csrc/text/bpe_train.h."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from herdkern import _text
from herdkern.engine import atomic_file
from herdkern.tokenizer.export import byte_level_order
from herdkern.tokenizer.pretokenize import LLAMA3_SPLIT_PATTERN, split_words, usable_threads
from herdkern.tokenizer.special_tokens import llama3_special_tokens
from herdkern.tokenizer.tokenizer import Tokenizer

Ties = Literal["huggingface", "raw"]
BATCH_BYTES = 32 << 20  # texts of an iterator are counted in batches of about this size
_MAGIC = b"herdkern word counts 1\n"


class WordCounts:
    """How often each word of the split pattern occurs: what BPE training needs of a corpus.

    Counts are 64-bit and do not depend on the order of documents or on the number of threads.
    """

    def __init__(self) -> None:
        self._table = _text.WordTable()

    def add(self, texts: Iterable[str | bytes] | str | bytes, *, num_threads: int | None = None) -> "WordCounts":
        """Count the words of documents; each is split by itself. Returns self.

        texts: one document or any iterable of them, which is read in batches.
        Raises: ValueError if a str holds a lone surrogate; TypeError for other types. Earlier batches stay counted.
        """
        threads = usable_threads(num_threads)
        num_texts = 0
        for batch in _batches([texts] if isinstance(texts, str | bytes) else texts):
            self._table.add_texts(batch, num_texts, threads)
            num_texts += len(batch)
        return self

    def add_words(self, counts: Mapping[bytes, int] | Mapping[str, int]) -> "WordCounts":
        """Add words with their counts, taken as they are: the pattern does not split them again. Returns self.

        Raises: ValueError if a word is empty or a count is not in [1, 2**63).
        """
        words = [word.encode() if isinstance(word, str) else word for word in counts]
        for word, count in zip(words, counts.values()):
            if not word or not 0 < count < 1 << 63:
                raise ValueError(f"WordCounts.add_words: counts must be in [1, 2**63), got {count} for {word!r}")
        lengths = np.array([len(word) for word in words], np.int64)
        self._table.add_words(b"".join(words), lengths, np.array(list(counts.values()), np.int64))
        return self

    def merge(self, other: "WordCounts") -> "WordCounts":
        """Add the counts of another corpus. Returns self."""
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
        blob, lengths, counts = self._table.sorted()
        borders = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        for (begin, end), count in zip(pairwise(borders), counts.tolist()):
            yield blob[begin:end], count

    def save(self, path: Path | str) -> None:
        """Write the counts to a file, whole or not at all; equal counts give equal bytes. Raises: OSError."""
        blob, lengths, counts = self._table.sorted()
        body = lengths.astype("<i8").tobytes() + counts.astype("<i8").tobytes() + blob
        header = {
            "num_words": len(lengths),
            "num_bytes": len(blob),
            "split_pattern": LLAMA3_SPLIT_PATTERN,
            "unicode": _text.unicode_version,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        with atomic_file(path) as f:
            f.write(_MAGIC + json.dumps(header, sort_keys=True).encode() + b"\n" + body)

    @classmethod
    def load(cls, path: Path | str) -> "WordCounts":
        """The counts that `save` wrote. Raises: OSError; ValueError naming the file if it is damaged."""
        with open(path, "rb") as f:
            if f.readline(len(_MAGIC) + 1) != _MAGIC:
                raise ValueError(f"WordCounts.load: {path} must begin with {_MAGIC!r}")
            try:
                header = json.loads(f.readline(1 << 16))
                num_words, num_bytes = int(header["num_words"]), int(header["num_bytes"])
                pattern, sha256 = header["split_pattern"], header["sha256"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"WordCounts.load: {path}:2: must be a JSON header, got {e!r}") from e
            body = f.read()
        if len(body) != 16 * num_words + num_bytes or hashlib.sha256(body).hexdigest() != sha256:
            raise ValueError(f"WordCounts.load: {path} is damaged: {len(body)} bytes do not match its header")
        if pattern != LLAMA3_SPLIT_PATTERN:
            raise ValueError(f"WordCounts.load: {path} must be split by LLAMA3_SPLIT_PATTERN, got {pattern!r}")
        lengths = np.frombuffer(body, "<i8", num_words)
        counts = np.frombuffer(body, "<i8", num_words, 8 * num_words)
        loaded = cls()
        loaded._table.add_words(body[16 * num_words :], lengths, counts)
        return loaded


def train_bpe(
    texts_or_counts: Iterable[str | bytes] | WordCounts | Mapping[bytes, int] | Mapping[str, int],
    vocab_size: int,
    *,
    ties: Ties = "huggingface",
    special_tokens: Iterable[str] | None = None,
    min_frequency: int = 1,
    max_token_length: int | None = None,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """A tokenizer of vocab_size tokens: 256 bytes, merges by falling pair frequency, then the special tokens.

    texts_or_counts: documents, or counts of their words. The result depends on the word counts alone.
    ties: which of equally frequent pairs comes first. Both take the smallest (left id, right id); "huggingface" numbers
        the bytes as GPT-2's alphabet does, so merges equal those of Hugging Face tokenizers; "raw" numbers them 0 to
        255, so they equal those of rustbpe.
    special_tokens: get the highest ids, in this order. None: the first 16 of `llama3_special_tokens`.
    min_frequency: rarer pairs are not merged, so the vocabulary may stay smaller, as it does when no pair is left.
    max_token_length: longest token in bytes. (Hugging Face's trainer excludes its limit: give it one more.)
    progress: called with (merges so far, merges wanted) a few times a second; an exception from it ends the training.
    Raises: ValueError if vocab_size is below 257 + the special tokens, or a special token could be a word of text.
    """
    specials = llama3_special_tokens(16) if special_tokens is None else tuple(special_tokens)
    _check_training(vocab_size, ties, specials, min_frequency, max_token_length)
    counts = _as_counts(texts_or_counts, num_threads)
    order = byte_level_order() if ties == "huggingface" else list(range(256))
    merges = _text.train_merges(
        counts._table, order, vocab_size - 256 - len(specials), min_frequency, max_token_length or 0, progress
    )
    tokens = [bytes([byte]) for byte in order]
    for left, right in merges.tolist():
        tokens.append(tokens[left] + tokens[right])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens):
        raise AssertionError("train_bpe: two merges spell the same token")
    return Tokenizer(ranks, {name: len(tokens) + i for i, name in enumerate(specials)})


def _check_training(
    vocab_size: int, ties: str, specials: tuple[str, ...], min_frequency: int, max_token_length: int | None
) -> None:
    if ties not in ("huggingface", "raw"):
        raise ValueError(f"train_bpe: ties must be 'huggingface' or 'raw', got {ties!r}")
    if vocab_size < 256 + len(specials):
        raise ValueError(
            f"train_bpe: vocab_size must be at least {256 + len(specials)} (256 bytes and {len(specials)} special "
            f"tokens), got {vocab_size}"
        )
    if min_frequency < 0:
        raise ValueError(f"train_bpe: min_frequency must not be negative, got {min_frequency}")
    if max_token_length is not None and max_token_length < 1:
        raise ValueError(f"train_bpe: max_token_length must be at least 1, got {max_token_length}; None: no limit")
    if len(set(specials)) != len(specials):
        raise ValueError(f"train_bpe: special_tokens must differ, got {list(specials)}")
    for name in specials:
        if len(split_words(name)) < 2:
            raise ValueError(
                f"train_bpe: special token {name!r} must not be a single word, which text could hold as well; "
                f"use a name such as '<|{name}|>'"
            )


def _as_counts(
    source: Iterable[str | bytes] | WordCounts | Mapping[bytes, int] | Mapping[str, int], num_threads: int | None
) -> WordCounts:
    if isinstance(source, WordCounts):
        return source
    if isinstance(source, Mapping):
        return WordCounts().add_words(source)
    if isinstance(source, str | bytes):
        raise TypeError("train_bpe: texts must be an iterable of documents, got one string; pass [text]")
    return WordCounts().add(source, num_threads=num_threads)


def _batches(texts: Iterable[str | bytes]) -> Iterator[list[str | bytes]]:
    batch: list[str | bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) if isinstance(text, str | bytes) else 0  # the kernel refuses the others
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
