"""Training BPE merges from word counts. The kernel is csrc/text/bpe_train.h."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from herdkern import _text
from herdkern.tokenizer.counts import WordCounts, warn_of_other_unicode
from herdkern.tokenizer.counts_file import CountsHeader, bytes_left, read_header
from herdkern.tokenizer.export import byte_level_order, from_byte_level, merge_list
from herdkern.tokenizer.pretokenize import resolve_pattern, split_words, usable_threads
from herdkern.tokenizer.special_tokens import llama3_special_tokens
from herdkern.tokenizer.tokenizer import MAX_TOKENS, Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

Ties = Literal["huggingface", "tiktoken", "raw"]  # "raw" is an old name of "tiktoken"
CountSource = Iterable[str | bytes] | WordCounts | Mapping[bytes, int] | Mapping[str, int] | Path | str
FIXED_MEMORY = 56 << 20  # pairs, heap and buckets: what a training needs beside words and occurrences


class TrainingOptions(TypedDict, total=False):
    """The keywords of `train_bpe`, with its defaults where one is left out."""

    ties: Ties
    special_tokens: Iterable[str] | None
    initial_tokens: Iterable[str | bytes]
    resume: Tokenizer | Iterable[tuple[bytes, bytes]] | None
    min_frequency: int
    max_token_length: int | None
    split_pattern: str | Sequence[str] | None
    max_memory: int | None
    num_threads: int | None
    progress: Callable[[int, int], None] | None


def train_bpe(texts_or_counts: CountSource, vocab_size: int, **options: "Unpack[TrainingOptions]") -> Tokenizer:
    """A tokenizer of vocab_size tokens: 256 bytes, merges by falling pair frequency, then the special tokens.

    texts_or_counts: documents, the counts of their words, or the path of a file of counts, which is streamed. The
        result depends on the word counts alone: not on the order of documents or shards, nor on the number of threads.
    ties: which of equally frequent pairs comes first. Both take the smallest (left id, right id); "huggingface" (the
        default) numbers the bytes as GPT-2's alphabet does, so merges equal those of Hugging Face tokenizers;
        "tiktoken" numbers them 0 to 255, so they equal those of rustbpe.
    special_tokens: get the highest ids, in this order. None: those of the tokenizer in `resume`, else the first 16 of
        `llama3_special_tokens`.
    initial_tokens: tokens that the vocabulary must hold, whatever the counts say. In this order and before all trained
        merges, a token whose bytes are not yet one token gets the merges that make them one, from left to right: first
        its two leftmost parts, then the next part to these. What is merged on the way becomes a token as well.
    resume: the merges to start with, as pairs of bytes in order, or a tokenizer that has them. Training goes on from
        there: k merges of a run, resumed with the counts of that run, become the same run. A merge that spells a token
        that is there gets its id and no new one, as in Hugging Face's trainer; so does one made here. vocab_size counts
        these tokens in.
    min_frequency: rarer pairs are not merged, so the vocabulary may stay smaller, as it does when no pair is left.
    max_token_length: longest token in bytes that is trained. (Hugging Face's trainer excludes its limit: give it one
        more.)
    split_pattern: a name of `SPLIT_PATTERNS`, a regular expression or a sequence of them. None: that of the counts,
        for texts "llama3".
    max_memory: bytes that this process may hold. More words than fit are refused before the training begins; with
        less room it takes longer and gives the same merges. Give the counts as a file: others stay in memory beside.
    progress: called with (done, wanted) a few times a second; an exception from it ends the training. wanted is the
        number of merges, done the same number times the share of the work that is done, estimated by the symbols still
        to be merged: the first merges are the long ones.
    Raises: ValueError if vocab_size has no room for the given tokens, a special token could be a word of text, or the
        words do not fit max_memory.
    Warns: if the counts were split by another Unicode version than text will be.
    """
    plan = _Plan(**options)
    counts = _settle_pattern(texts_or_counts, plan)
    start = _start(plan)
    specials = plan.specials
    plan.check_specials(start.ids)
    wanted = _num_wanted(vocab_size, len(start.tokens), len(specials))
    words, keep_words = _words_of(texts_or_counts, counts, plan)
    merges = _text.train_merges(
        words,
        keep_words,
        start.tokens,
        np.array(start.merges, np.uint32).reshape(-1, 3) if start.merges else None,
        None,
        [],
        wanted,
        plan.min_frequency,
        plan.max_token_length or 0,
        0 if plan.max_memory is None else bytes_left(plan.max_memory, "train_bpe", least=FIXED_MEMORY),
        usable_threads(plan.num_threads),
        as_share(plan.progress, wanted),
    )
    for begin in range(0, len(merges), 4096):  # as lists of Python they take ten times the memory
        for left, right, _ in merges[begin : begin + 4096].tolist():
            start.learn(left, right)
    if plan.progress:
        plan.progress(wanted, wanted)
    names = {name: len(start.tokens) + i for i, name in enumerate(specials)}
    return Tokenizer(start.ids, names, plan.pattern[0] if len(plan.pattern) == 1 else plan.pattern)


def _num_wanted(vocab_size: int, num_given: int, num_specials: int) -> int:
    if vocab_size < num_given + num_specials:
        raise ValueError(
            f"train_bpe: vocab_size must be at least {num_given + num_specials} ({num_given} bytes and given tokens "
            f"and {num_specials} special tokens), got {vocab_size}"
        )
    if vocab_size > MAX_TOKENS:
        raise ValueError(f"train_bpe: vocab_size must be at most {MAX_TOKENS}, got {vocab_size}")
    return vocab_size - num_given - num_specials


def as_share(progress: Callable[[int, int], None] | None, wanted: int) -> Callable[[float], None] | None:
    """The kernel's progress callback, which gets the share of the work, for a public one."""
    return (lambda share: progress(int(share * wanted), wanted)) if progress else None


@dataclass
class _Plan:
    """The options of one training, checked."""

    ties: str = "huggingface"
    special_tokens: Iterable[str] | None = None
    initial_tokens: Iterable[str | bytes] = ()
    resume: Tokenizer | Iterable[tuple[bytes, bytes]] | None = None
    min_frequency: int = 1
    max_token_length: int | None = None
    split_pattern: str | Sequence[str] | None = None
    max_memory: int | None = None
    num_threads: int | None = None
    progress: Callable[[int, int], None] | None = None
    pattern: tuple[str, ...] = field(default=(), init=False)  # of the words

    def __post_init__(self) -> None:
        if self.ties not in ("huggingface", "tiktoken", "raw"):
            raise ValueError(f"train_bpe: ties must be 'huggingface' or 'tiktoken', got {self.ties!r}")
        if self.min_frequency < 0:
            raise ValueError(f"train_bpe: min_frequency must not be negative, got {self.min_frequency}")
        if self.max_token_length is not None and self.max_token_length < 1:
            raise ValueError(
                f"train_bpe: max_token_length must be at least 1, got {self.max_token_length}; None: no limit"
            )
        if self.max_memory is not None and self.max_memory < 1:
            raise ValueError(f"train_bpe: max_memory must be at least 1, got {self.max_memory}; None: no limit")

    @property
    def order(self) -> list[int]:
        """The bytes in the order of their ids."""
        return byte_level_order() if self.ties == "huggingface" else list(range(256))

    @cached_property
    def specials(self) -> tuple[str, ...]:
        if self.special_tokens is not None:
            names = tuple(self.special_tokens)
        elif isinstance(self.resume, Tokenizer):
            names = tuple(self.resume.special_tokens)
        else:
            names = llama3_special_tokens(16)
        if len(set(names)) != len(names):
            raise ValueError(f"train_bpe: special_tokens must differ, got {list(names)}")
        for name in names:
            # In tokenizer.json "Ġ!" is both this name and the word " !".
            if min(len(split_words(as_text, self.pattern)) for as_text in (name, from_byte_level(name) or name)) < 2:
                raise ValueError(
                    f"train_bpe: special token {name!r} must not be a single word, which text could hold as well; "
                    f"use a name such as '<|{name}|>'"
                )
        return names

    def check_specials(self, given: Mapping[bytes, int]) -> None:
        """Refuse special tokens that are given tokens as well, before the training. Raises: ValueError."""
        for name in self.specials:
            if from_byte_level(name) in given:
                raise ValueError(
                    f"train_bpe: special token {name!r} must not be one of the tokens of initial_tokens or resume as "
                    f"well; use another name"
                )


class _Start:
    """The tokens that a training starts with, by id, and the merges that made them."""

    def __init__(self, order: Sequence[int]) -> None:
        self.tokens = [bytes([byte]) for byte in order]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.merges: list[tuple[int, int, int]] = []
        self._places: dict[tuple[int, int], list[int]] = {}  # of a pair in merges

    def learn(self, left: int, right: int) -> int:
        """The token that two make, by its id; new if no token has its bytes."""
        joined = self.tokens[left] + self.tokens[right]
        token = self.ids.setdefault(joined, len(self.tokens))
        if token == len(self.tokens):
            self.tokens.append(joined)
        return token

    def merge(self, left: int, right: int) -> None:
        """Append a merge; if it spells a token that is there, it gets its id."""
        token = self.learn(left, right)
        self._places.setdefault((left, right), []).append(len(self.merges))
        self.merges.append((left, right, token))

    def require(self, token: bytes) -> None:
        """Make the token's bytes one token."""
        while len(parts := self._encode(token)) > 1:
            self.merge(parts[0], parts[1])

    def _encode(self, word: bytes) -> list[int]:
        """The word after every merge was applied once, in order."""
        symbols = [self.ids[word[i : i + 1]] for i in range(len(word))]
        last = -1
        while True:
            coming = [self._next(pair, last) for pair in pairwise(symbols)]
            last = min(coming, default=len(self.merges))
            if last == len(self.merges):
                return symbols
            left, right, token = self.merges[last]
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == (left, right):
                    symbols[i : i + 2] = [token]
                i += 1

    def _next(self, pair: tuple[int, int], last: int) -> int:
        places = self._places.get(pair, [])
        i = bisect_right(places, last)
        return places[i] if i < len(places) else len(self.merges)


def _start(plan: _Plan) -> _Start:
    start = _Start(plan.order)
    if isinstance(plan.resume, Tokenizer):
        for left, right in _merges_of(plan.resume, start, plan):
            start.merge(left, right)
    elif plan.resume is not None:
        for number, (left_bytes, right_bytes) in enumerate(plan.resume):
            if left_bytes not in start.ids or right_bytes not in start.ids:
                raise ValueError(
                    f"train_bpe: resume[{number}] must be of two tokens that are bytes or made before, "
                    f"got {(left_bytes, right_bytes)!r}"
                )
            start.merge(start.ids[left_bytes], start.ids[right_bytes])
    for token in plan.initial_tokens:
        start.require(token.encode() if isinstance(token, str) else token)
    return start


def _merges_of(tokenizer: Tokenizer, start: _Start, plan: _Plan) -> list[tuple[int, int]]:
    """The merges of a tokenizer to resume. Raises: ValueError if it is not one that train_bpe could have made."""
    if resolve_pattern(tokenizer.split_pattern)[1] != plan.pattern:
        raise ValueError(
            f"train_bpe: resume must have the split pattern of the counts, {plan.pattern!r}, "
            f"got {tokenizer.split_pattern!r}"
        )
    ranks = tokenizer.mergeable_ranks
    if any(ranks[token] != i for i, token in enumerate(start.tokens)):
        raise ValueError(
            f"train_bpe: resume must number the bytes as ties={plan.ties!r} does; try the other value of ties, "
            f"or extend_vocabulary"
        )
    merges, has_others = merge_list(ranks, tokenizer._encoder)
    if has_others or max(ranks.values()) != len(ranks) - 1:
        raise ValueError(
            "train_bpe: resume must be a tokenizer whose tokens are all made by merges and have the ids from 0 on; "
            "extend_vocabulary takes others"
        )
    return merges


def _settle_pattern(source: CountSource, plan: _Plan) -> WordCounts | CountsHeader:
    """The counts as far as they are there, and the split pattern of the training into the plan."""
    wanted = None if plan.split_pattern is None else resolve_pattern(plan.split_pattern, "train_bpe")[1]
    counts: WordCounts | CountsHeader
    if isinstance(source, bytes) or (isinstance(source, str) and not os.path.exists(source)):
        raise TypeError("train_bpe: texts must be an iterable of documents, got one string; pass [text]")
    if isinstance(source, str | Path):
        counts = read_header(source, "train_bpe")
    else:
        counts = source if isinstance(source, WordCounts) else WordCounts(wanted or "llama3")
    if wanted not in (None, counts.split_pattern):
        raise ValueError(f"train_bpe: split_pattern must be that of the counts, {counts.split_pattern}, got {wanted}")
    plan.pattern = counts.split_pattern
    warn_of_other_unicode(counts, "train_bpe")
    return counts


def _words_of(
    source: CountSource, counts: WordCounts | CountsHeader, plan: _Plan
) -> tuple["_text.WordTable | _text.WordRun", bool]:
    """What the kernel reads, and whether it must outlive the training."""
    if isinstance(counts, CountsHeader):
        if counts.version == 1:
            return WordCounts.load(counts.path)._table, False
        end = counts.begin + counts.num_bytes
        return _text.WordRun(os.fspath(counts.path), counts.begin, end, counts.num_blocks, counts.check), True
    if isinstance(source, Mapping):
        counts.add_words(source)
    elif not isinstance(source, WordCounts):
        counts.add(source, num_threads=plan.num_threads)  # type: ignore[arg-type]
    return counts._table, counts is source
