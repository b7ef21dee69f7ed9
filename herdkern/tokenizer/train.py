"""Training BPE merges from texts or word counts. The kernel is csrc/text/bpe_train.h."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from herdkern import _text
from herdkern.tokenizer.counts import WordCounts
from herdkern.tokenizer.export import byte_level_order
from herdkern.tokenizer.pretokenize import split_words
from herdkern.tokenizer.special_tokens import llama3_special_tokens
from herdkern.tokenizer.tokenizer import Tokenizer

Ties = Literal["huggingface", "raw"]


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
