"""Extending a vocabulary as Llama 3 did: new tokens for other languages, English untouched.

The first ranks of a vocabulary are kept. The words of the new text are encoded with them and BPE goes on from there,
so every new token is a merge of older ones and gets the next rank. A guard corpus (English) keeps its ids: a token that
could occur in it is never made. Source: Llama Team 2024 (arXiv:2407.21783), section 3.2.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from herdkern import _text
from herdkern.tokenizer.counts import WordCounts, warn_of_other_unicode
from herdkern.tokenizer.pretokenize import usable_threads
from herdkern.tokenizer.tokenizer import Tokenizer
from herdkern.tokenizer.train import as_share

if TYPE_CHECKING:
    from typing_extensions import Unpack

Source = Iterable[str | bytes] | WordCounts | Path | str  # documents, their counts, or a file of counts
SMOOTHING_UNIT = 64  # weights of languages are whole multiples of 1 / SMOOTHING_UNIT


@dataclass(frozen=True)
class Compression:
    """What a vocabulary makes of a text, before and after the extension."""

    num_chars: int
    num_tokens_before: int
    num_tokens_after: int

    @property
    def before(self) -> float:
        """Characters per token with the kept ranks."""
        return self.num_chars / max(1, self.num_tokens_before)

    @property
    def after(self) -> float:
        """Characters per token with the new ones as well."""
        return self.num_chars / max(1, self.num_tokens_after)

    @property
    def gain(self) -> float:
        """By what share characters per token grew."""
        return self.num_tokens_before / max(1, self.num_tokens_after) - 1


@dataclass(frozen=True)
class ExtensionReport:
    """What an extension did. guard_unchanged: share of the guard corpus' words, each as often as it occurs, whose ids
    are the same."""

    num_kept: int
    num_new: int
    num_vetoed: int  # byte strings that could not become tokens
    languages: dict[str, Compression]
    guard: Compression
    guard_unchanged: float

    def evener_weights(self, weights: Mapping[str, float] | None = None) -> dict[str, float]:
        """language_weights for another extension with the same text, in which languages that gained little gain more.

        weights: those of this one; None: every language had the same. Once or twice is enough, mostly.
        """
        wanted = {
            name: (weights[name] if weights else 1.0) * max(change.gain, 0.02) ** -0.7
            for name, change in self.languages.items()
        }
        unit = SMOOTHING_UNIT / max(wanted.values(), default=1.0)
        return {name: max(weight * unit, 1 / SMOOTHING_UNIT) for name, weight in wanted.items()}

    def __str__(self) -> str:
        lines = [
            f"{self.num_kept} ranks kept, {self.num_new} new, {self.num_vetoed} strings vetoed; "
            f"guard {100 * self.guard_unchanged:.2f} % unchanged at {self.guard.after:.3f} characters per token"
        ]
        for name, change in self.languages.items():
            lines.append(f"{name}: {change.before:.3f} -> {change.after:.3f} characters per token (+{change.gain:.1%})")
        return "\n".join(lines)


class ExtensionOptions(TypedDict, total=False):
    """Further keywords of `extend_vocabulary`, with the meaning and defaults that they have in `train_bpe`."""

    min_frequency: int
    max_token_length: int | None
    num_threads: int | None
    progress: Callable[[int, int], None] | None


def extend_vocabulary(
    tokenizer: Tokenizer,
    texts_or_counts: Source | Mapping[str, Source],
    num_new: int,
    *,
    guard: Source,
    keep_ranks: int = 100_000,
    language_weights: float | Mapping[str, float] | None = None,
    guard_tolerance: int = 0,
    **options: "Unpack[ExtensionOptions]",
) -> tuple[Tokenizer, ExtensionReport]:
    """A tokenizer with num_new more tokens, learnt on other languages, and a report.

    Rank keep_ranks + k is the k-th new token; the special tokens follow, in their order. There are fewer new tokens if
    no pair is left that may be merged.

    texts_or_counts: the text of each language by its name, or one text: documents, their counts, or the path of a file
        of counts, cut by the tokenizer's split pattern.
    guard: the text whose ids stay. A pair of adjacent tokens in its words never becomes a token, nor does a word of it
        that is more than one token; so no merge can begin in it, and its ids with the kept ranks are its ids for ever.
        Give all text that matters: words that are not in it are not guarded.
    keep_ranks: how many of the tokenizer's ranks stay; they must be 0, 1, 2 ... A smaller vocabulary stays whole.
    language_weights: None counts every word as often as it occurs; a number a gives a language of n words a share of
        n ** a (0.3 in multilingual models: small languages get more); a mapping gives the factor of each language.
    guard_tolerance: how often a pair or word may occur in the guard corpus and still become a token; 0 guards it whole.
    Raises: ValueError if the ranks are not as keep_ranks needs them, or the counts are of another split pattern.
    Warns: if counts were split by another Unicode version than text will be.
    """
    _check_not_negative(num_new=num_new, guard_tolerance=guard_tolerance)
    if unknown := set(options) - set(ExtensionOptions.__annotations__):
        raise TypeError(f"extend_vocabulary: got the unknown keywords {sorted(unknown)}")
    ranks = _kept_ranks(tokenizer, keep_ranks)
    threads = usable_threads(options.get("num_threads"))
    sources = texts_or_counts if isinstance(texts_or_counts, Mapping) else {"text": texts_or_counts}
    languages = {name: _counts_of(source, tokenizer, threads) for name, source in sources.items()}
    guarded = _counts_of(guard, tokenizer, threads)
    kept = Tokenizer(ranks, {}, tokenizer.split_pattern)
    vetoed = _vetoed(guarded, kept, guard_tolerance)
    weighted, unit = _weigh(languages, language_weights, tokenizer)
    tokens = list(ranks)
    progress = options.get("progress")
    limits = num_new, options.get("min_frequency", 1) * unit, options.get("max_token_length") or 0, 0
    merges = _text.train_merges(
        weighted._table, False, tokens, None, kept._encoder, vetoed, *limits, threads, as_share(progress, num_new)
    )
    for left, right, token in merges.tolist():
        if token == len(tokens):
            tokens.append(tokens[left] + tokens[right])
    if progress:
        progress(num_new, num_new)
    names = {name: len(tokens) + i for i, name in enumerate(tokenizer.special_tokens)}
    extended = Tokenizer({token: rank for rank, token in enumerate(tokens)}, names, tokenizer.split_pattern)
    report = _report(kept, extended, languages, guarded, len(vetoed))
    if guard_tolerance == 0 and report.guard_unchanged != 1:
        raise AssertionError(f"extend_vocabulary: the guard corpus changed: {report.guard_unchanged}")
    return extended, report


def _check_not_negative(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 0:
            raise ValueError(f"extend_vocabulary: {name} must not be negative, got {value}")


def _kept_ranks(tokenizer: Tokenizer, keep_ranks: int) -> dict[bytes, int]:
    ranks = {token: rank for token, rank in tokenizer.mergeable_ranks.items() if rank < keep_ranks}
    if len(ranks) != min(keep_ranks, len(tokenizer.mergeable_ranks)):
        raise ValueError(
            f"extend_vocabulary: tokenizer must have the ranks 0 to keep_ranks - 1 = {keep_ranks - 1}, "
            f"got {len(ranks)} of them"
        )
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            "extend_vocabulary: tokenizer must have ranks without gaps; give a keep_ranks before the first"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"extend_vocabulary: keep_ranks must keep every single byte, got {keep_ranks}")
    return ranks


def _counts_of(source: Source, tokenizer: Tokenizer, threads: int) -> WordCounts:
    if isinstance(source, Path | str):
        source = WordCounts.load(source)
    if not isinstance(source, WordCounts):
        return WordCounts(tokenizer.split_pattern).add(source, num_threads=threads)
    pattern = WordCounts(tokenizer.split_pattern).split_pattern
    if source.split_pattern != pattern:
        raise ValueError(
            f"extend_vocabulary: counts must be of the tokenizer's split pattern, {pattern}, got {source.split_pattern}"
        )
    warn_of_other_unicode(source, "extend_vocabulary")
    return source


def _encoded(counts: WordCounts, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, offsets, counts) of the words in byte order."""
    return _text.encode_words(counts._table, list(tokenizer.mergeable_ranks), tokenizer._encoder)


def _vetoed(guarded: WordCounts, kept: Tokenizer, tolerance: int) -> list[bytes]:
    """The byte strings that would change the ids of the guard corpus if they became tokens.

    Merges of lower rank come first, so an encoding ends as before unless two adjacent tokens spell a new one, or the
    whole word is one.
    """
    tokens = list(kept.mergeable_ranks)
    ids, offsets, counts = _encoded(guarded, kept)
    lengths = np.diff(offsets)
    has_next = np.ones(len(ids), bool)
    has_next[offsets[1:] - 1] = False
    left = np.flatnonzero(has_next)
    keys = ids[left].astype(np.uint64) << np.uint64(32) | ids[np.minimum(left + 1, len(ids) - 1)]
    pairs, of_pair = np.unique(keys, return_inverse=True)
    frequency = np.zeros(len(pairs), np.int64)
    np.add.at(frequency, of_pair, np.repeat(counts, lengths)[left])
    frequent = pairs[frequency > tolerance].tolist()
    vetoed = {tokens[pair >> 32] + tokens[pair & 0xFFFFFFFF] for pair in frequent}
    cut = (lengths > 1) & (counts > tolerance)
    vetoed.update(word for (word, _), is_cut in zip(guarded.items(), cut.tolist()) if is_cut)
    return sorted(vetoed)


def _weigh(
    languages: dict[str, WordCounts], weights: float | Mapping[str, float] | None, tokenizer: Tokenizer
) -> tuple[WordCounts, int]:
    """All counts, each language's times its weight, and the number that stands for a weight of 1."""
    if isinstance(weights, Mapping) and set(weights) != set(languages):
        raise ValueError(
            f"extend_vocabulary: language_weights must be of the languages {sorted(languages)}, got {sorted(weights)}"
        )
    total = WordCounts(tokenizer.split_pattern)
    if weights is None:
        for counts in languages.values():
            total._table.merge(counts._table)
        return total, 1
    if isinstance(weights, Mapping):
        factors = dict(weights)
    else:
        sizes = {name: max(1, counts.num_occurrences) for name, counts in languages.items()}
        factors = {name: (size / max(sizes.values())) ** (weights - 1) for name, size in sizes.items()}
    for name, counts in languages.items():
        factor = round(factors[name] * SMOOTHING_UNIT)
        blob, lengths, word_counts = counts._table.sorted()
        if factor < 0 or factor * int(word_counts.max(initial=0)) >= 1 << 63:
            raise ValueError(
                f"extend_vocabulary: language_weights must keep counts in [0, 2**63), got {factors[name]} for {name!r}"
            )
        if factor:
            total._table.add_words(blob, lengths, word_counts * factor)
    return total, SMOOTHING_UNIT


def _report(
    kept: Tokenizer, extended: Tokenizer, languages: dict[str, WordCounts], guarded: WordCounts, num_vetoed: int
) -> ExtensionReport:
    changes = {name: _compare(counts, kept, extended)[0] for name, counts in languages.items()}
    guard, same = _compare(guarded, kept, extended)
    occurrences = guarded._table.sorted()[2]
    unchanged = 1.0 if same.all() else float((same * occurrences).sum() / occurrences.sum())
    num_kept = len(kept.mergeable_ranks)
    return ExtensionReport(num_kept, len(extended.mergeable_ranks) - num_kept, num_vetoed, changes, guard, unchanged)


def _compare(counts: WordCounts, kept: Tokenizer, extended: Tokenizer) -> tuple[Compression, np.ndarray]:
    """The compression of the words, and of each word in byte order whether its ids are equal."""
    blob, lengths, occurrences = counts._table.sorted()
    is_first = (np.frombuffer(blob, np.uint8) & 0xC0) != 0x80  # byte of a character
    num_chars = int(np.repeat(occurrences, lengths)[is_first].sum())
    before, after = (_encoded(counts, tokenizer) for tokenizer in (kept, extended))
    num_before, num_after = (int((np.diff(offsets) * occurrences).sum()) for _, offsets, _ in (before, after))
    return Compression(num_chars, num_before, num_after), _same_words(before, after)


def _same_words(
    before: tuple[np.ndarray, np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Of each word, whether its ids are equal."""
    ids, offsets, _ = before
    other_ids, other_offsets, _ = after
    same = np.diff(offsets) == np.diff(other_offsets)
    equal_length = np.repeat(same, np.diff(offsets))
    differs = ids[equal_length] != other_ids[np.repeat(same, np.diff(other_offsets))]
    words = np.repeat(np.arange(len(same)), np.diff(offsets))[equal_length]
    same[words[differs]] = False
    return same
