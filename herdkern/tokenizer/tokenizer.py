"""Tokenizer: text to ids and back.

The rules are tiktoken's: a word of the split pattern that is a token becomes that token; else the adjacent pair of
lowest rank is merged until none is left. The kernel is csrc/text/bpe_encode.h; encoding releases the GIL.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from herdkern import _text
from herdkern.tokenizer import export
from herdkern.tokenizer.pretokenize import LLAMA3_SPLIT_PATTERN, make_splitter, resolve_pattern, usable_threads
from herdkern.tokenizer.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT
from herdkern.tokenizer.stream import StreamDecoder

SpecialTokenSet = Literal["all"] | Collection[str]
MAX_TOKENS = 1 << 21  # the kernel packs an id and a place into 32 bits
DEFAULT_CACHE_BYTES = 1 << 26


class Tokenizer:
    """A byte-level BPE tokenizer, immutable, picklable, safe to use from many threads and after a fork.

    mergeable_ranks: bytes -> id, with all 256 single bytes; a lower id is merged first.
    special_tokens: text -> id, never the result of a merge.
    split_pattern: a name of SPLIT_PATTERNS, a regular expression, or a sequence of them of which each cuts the words of
        the one before. The attribute is the expression, or the tuple of them.
    cache_bytes: memory that each thread may use to remember words; 0: none. It changes speed, never ids.
    Raises: ValueError naming the token that is missing, double or out of range, or what a pattern must not hold.
    """

    def __init__(
        self,
        mergeable_ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        split_pattern: str | Sequence[str] = LLAMA3_SPLIT_PATTERN,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        _, patterns = resolve_pattern(split_pattern, "Tokenizer")
        if not 0 <= cache_bytes <= 1 << 40:
            raise ValueError(f"Tokenizer: cache_bytes must be in [0, 2**40], got {cache_bytes}; 0 turns the cache off")
        self.mergeable_ranks = by_id(mergeable_ranks)
        self.special_tokens = by_id(special_tokens)
        check_tokens(self.mergeable_ranks, self.special_tokens)
        self.split_pattern: str | tuple[str, ...] = patterns[0] if len(patterns) == 1 else patterns
        self.cache_bytes = cache_bytes

    @cached_property
    def n_vocab(self) -> int:
        """One more than the highest id."""
        return 1 + max([*self.mergeable_ranks.values(), *self.special_tokens.values()])

    @property
    def bos_id(self) -> int:
        """Id of <|begin_of_text|>. Raises: ValueError if there is none."""
        return self._special_id("bos_id", BEGIN_OF_TEXT)

    @property
    def eos_id(self) -> int:
        """Id of <|end_of_text|>. Raises: ValueError if there is none."""
        return self._special_id("eos_id", END_OF_TEXT)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides the ids: pattern, ranks and special tokens."""
        digest = hashlib.sha256(f"{self.split_pattern}\n{len(self.mergeable_ranks)}\n".encode())
        for token, rank in self.mergeable_ranks.items():
            digest.update(b"%d %d %s\n" % (rank, len(token), token))
        for name, token_id in self.special_tokens.items():
            digest.update(b"%d %s\n" % (token_id, name.encode()))
        return digest.hexdigest()

    def encode(
        self,
        text: str | bytes,
        *,
        allowed_special: SpecialTokenSet = (),
        disallowed_special: SpecialTokenSet = "all",
    ) -> list[int]:
        """The ids of one text.

        allowed_special: special tokens that become their ids; "all" or their texts.
        disallowed_special: special tokens that the text must not hold; "all" means all that are not allowed. Those in
            neither set are text like any other.
        Raises: ValueError if a disallowed special token occurs, or if a str holds a lone surrogate.
        """
        return self._encoder.encode(text, *self._policy("encode", allowed_special, disallowed_special))

    def encode_ordinary(self, text: str | bytes) -> list[int]:
        """The ids of one text in which special tokens are text like any other."""
        return self._encoder.encode(text, False, False)

    def encode_with_offsets(
        self,
        text: str | bytes,
        *,
        allowed_special: SpecialTokenSet = (),
        disallowed_special: SpecialTokenSet = "all",
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of one text and where each begins and ends: in characters of a str, in bytes of a bytes.

        A token that holds a part of a character reaches from that character's begin or to its end, so neighbours may
        overlap by one. Arguments and errors as in `encode`.
        """
        ids, _, spans = self.encode_to_numpy(
            [text],
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            return_offsets=True,
            num_threads=1,
        )
        return ids.tolist(), [(begin, end) for begin, end in spans.tolist()]

    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        *,
        allowed_special: SpecialTokenSet = (),
        disallowed_special: SpecialTokenSet = "all",
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on num_threads threads (None: every core)."""
        policy = self._policy("encode_batch", allowed_special, disallowed_special)
        return self._encoder.encode_lists(texts, *policy, usable_threads(num_threads))

    def encode_ordinary_batch(self, texts: Sequence[str | bytes], *, num_threads: int | None = None) -> list[list[int]]:
        """The ids of each text, as `encode_ordinary` gives them."""
        return self._encoder.encode_lists(texts, False, False, usable_threads(num_threads))

    def encode_to_numpy(
        self,
        texts: Sequence[str | bytes],
        *,
        allowed_special: SpecialTokenSet = (),
        disallowed_special: SpecialTokenSet = (),
        return_offsets: bool = False,
        num_threads: int | None = None,
    ) -> tuple[np.ndarray, ...]:
        """All ids end to end, the fastest way: special tokens are text like any other unless an argument says so.

        Returns: ids (total_tokens,) uint32, offsets (len(texts) + 1,) int64; text i has ids[offsets[i]:offsets[i + 1]].
        With return_offsets also spans (total_tokens, 2) int64, see `encode_with_offsets`.
        """
        policy = self._policy("encode_to_numpy", allowed_special, disallowed_special)
        ids, offsets = self._encoder.encode_arrays(texts, *policy, usable_threads(num_threads))
        if not return_offsets:
            return ids, offsets
        return ids, offsets, self._decoder.spans(ids, offsets, list(texts))

    def count_tokens(self, text: str | bytes) -> int:
        """How many ids `encode_ordinary` gives; they are only counted, never kept."""
        return int(self._encoder.count([text], 1)[0])

    def count_tokens_batch(self, texts: Sequence[str | bytes], *, num_threads: int | None = None) -> np.ndarray:
        """(len(texts),) int64: the number of ids of each text; they are only counted, never kept."""
        return self._encoder.count(texts, usable_threads(num_threads))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that the ids stand for, special tokens as their names.

        Raises: ValueError naming the first id that is no token's; TypeError if ids are not integers.
        """
        return self._decoder.decode(_flat_ids(ids))

    def decode(self, ids: Sequence[int] | np.ndarray, *, errors: str = "replace") -> str:
        """The text that the ids stand for.

        errors: what to do where the bytes are no UTF-8, for instance inside a character; as in `bytes.decode`.
        """
        ids = _flat_ids(ids)
        return self._decoder.decode_texts(ids, np.array([0, len(ids)]), errors)[0]

    def decode_batch(
        self,
        batch: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        offsets: Sequence[int] | np.ndarray | None = None,
        *,
        errors: str = "replace",
    ) -> list[str]:
        """The text of each sequence of ids.

        offsets: (n + 1,) integers: `batch` is one array of ids, as `encode_to_numpy` gives it, and text i is that of
            batch[offsets[i]:offsets[i + 1]].
        Raises: as `decode` does; ValueError if offsets fall or leave the array.
        """
        if offsets is None:
            return [self.decode(ids, errors=errors) for ids in batch]
        return self._decoder.decode_texts(_flat_ids(batch), np.asarray(offsets, np.int64), errors)  # type: ignore[arg-type]

    def stream_decoder(self, *, errors: str = "replace") -> StreamDecoder:
        """A decoder for ids that arrive one by one: `push(id)` gives the text that is complete, `finish()` the rest."""
        return StreamDecoder(self.decode_bytes, errors)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises: ValueError if no token has that id."""
        return self.decode_bytes([token_id])

    def save(self, path: Path | str, *, format: str = "herdkern", verify: bool = True) -> None:
        """Write the tokenizer.

        format: "herdkern": a folder with tokenizer.model (tiktoken), tokenizer.json (Hugging Face) and a manifest with
            the hashes of both, written last; "tiktoken", "huggingface", "tekken", "sentencepiece": one file.
        verify: read every file again before it gets its name, with the library that it is for where that is installed,
            and compare ids on texts that are hard to cut.
        Raises: OSError if it cannot be written; ValueError if the format has no place for this tokenizer, or showing
        the text with other ids. Every file appears whole or not at all.
        """
        export.save(self, path, format=format, verify=verify)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        split_pattern: str | Sequence[str] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        ignore_normalizer: bool = False,
    ) -> "Tokenizer":
        """The tokenizer of a file or folder of any format that `save` writes; a Hugging Face folder too.

        split_pattern, special_tokens: for a file of tiktoken ranks, which names neither; those of published
            vocabularies are known. ignore_normalizer: read a tokenizer.json that changes texts before it encodes (NFC,
            NFKC); this one does not, so `encode` must be given the changed text.
        Raises: OSError if it cannot be read; ValueError naming file and line if it is damaged, or saying what a
        Tokenizer cannot express.
        """
        return cls(
            *export.load(
                path,
                split_pattern=split_pattern,
                special_tokens=special_tokens,
                ignore_normalizer=ignore_normalizer,
            )
        )

    @classmethod
    def from_tiktoken(
        cls,
        path: Path | str,
        special_tokens: Sequence[str] = (),
        split_pattern: str | Sequence[str] = LLAMA3_SPLIT_PATTERN,
    ) -> "Tokenizer":
        """The tokenizer of a file of tiktoken ranks, such as Llama 3's tokenizer.model with `llama3_special_tokens()`.

        special_tokens: get the ids after the highest rank, in this order; `load` takes ids of their own.
        Raises: OSError if it cannot be read; ValueError naming file and line if it is damaged.
        """
        ranks = export.read_tiktoken(path)
        first = 1 + max(ranks.values(), default=-1)
        return cls(ranks, {name: first + i for i, name in enumerate(special_tokens)}, split_pattern)

    @cached_property
    def _encoder(self) -> "_text.Encoder":
        splitter = make_splitter(self.split_pattern, "Tokenizer")
        return _text.Encoder(self.mergeable_ranks, self._special_bytes(), splitter, self.cache_bytes)

    @cached_property
    def _decoder(self) -> "_text.Decoder":
        return _text.Decoder(self.mergeable_ranks, self._special_bytes())

    def _special_bytes(self) -> dict[bytes, int]:
        return {name.encode(): token_id for name, token_id in self.special_tokens.items()}

    def _special_id(self, where: str, name: str) -> int:
        if name not in self.special_tokens:
            raise ValueError(f"{where}: the tokenizer must have {name}, got only {list(self.special_tokens)}")
        return self.special_tokens[name]

    def _policy(
        self, where: str, allowed: SpecialTokenSet, disallowed: SpecialTokenSet
    ) -> tuple[bool | list[int], bool | list[int]]:
        """What the kernel takes: the special tokens that become their ids and those that must not occur."""
        if not self.special_tokens or (not allowed and not disallowed):
            return False, False
        if not allowed and disallowed == "all":
            return False, True
        names = set(self.special_tokens)
        allowed_names = names if allowed == "all" else set(allowed)
        disallowed_names = names - allowed_names if disallowed == "all" else set(disallowed)
        for argument, given in (("allowed_special", allowed_names), ("disallowed_special", disallowed_names)):
            if unknown := given - names:
                raise ValueError(f"{where}: {argument} must be special tokens of this tokenizer, got {sorted(unknown)}")
        return self._ids_of(allowed_names), self._ids_of(disallowed_names)

    def _ids_of(self, names: set[str]) -> bool | list[int]:
        if len(names) in (0, len(self.special_tokens)):
            return bool(names)
        return [self.special_tokens[name] for name in names]

    def __reduce__(self) -> tuple:
        arguments = (self.mergeable_ranks, self.special_tokens, self.split_pattern)
        return partial(Tokenizer, cache_bytes=self.cache_bytes), arguments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Tokenizer(n_vocab={self.n_vocab}, num_special={len(self.special_tokens)})"


Token = TypeVar("Token", str, bytes)


def by_id(tokens: Mapping[Token, int]) -> dict[Token, int]:
    """A copy in the order of ids; quick when they are in order already."""
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    if (ids[1:] >= ids[:-1]).all():
        return dict(tokens)
    return dict(sorted(tokens.items(), key=lambda item: item[1]))


def check_tokens(mergeable_ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> None:
    """Refuse tokens that cannot work together. Raises: ValueError naming the first."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
        raise ValueError(f"Tokenizer: mergeable_ranks must hold every single byte, lacks {bytes(missing[:1])!r}")
    if b"" in mergeable_ranks or "" in special_tokens:
        raise ValueError("Tokenizer: tokens must not be empty")
    ids = np.array([*mergeable_ranks.values(), *special_tokens.values()])
    if ids.min() < 0 or ids.max() >= MAX_TOKENS or len(np.unique(ids)) < len(ids):
        _refuse_ids([*mergeable_ranks.items(), *special_tokens.items()])
    for name in special_tokens:
        if export.from_byte_level(name) in mergeable_ranks:
            raise ValueError(
                f"Tokenizer: special token {name!r} must not be an ordinary token as well, tokenizer.json could not "
                f"tell them apart; use a name such as '<|{name}|>'"
            )


def _refuse_ids(tokens: Iterable[tuple[bytes | str, int]]) -> None:
    owner: dict[int, bytes | str] = {}
    for token, token_id in tokens:
        if not 0 <= token_id < MAX_TOKENS:
            raise ValueError(f"Tokenizer: the id of {token!r} must be in [0, {MAX_TOKENS}), got {token_id}")
        if token_id in owner:
            raise ValueError(f"Tokenizer: ids must differ, got {token_id} for {owner[token_id]!r} and {token!r}")
        owner[token_id] = token


def _flat_ids(ids: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """What the kernel takes: a list or tuple as it is, else an array of uint32 or int64."""
    if isinstance(ids, list | tuple):
        return ids
    array = np.asarray(ids)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise TypeError(f"decode: ids must be a flat list of integers, got {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array, None if array.dtype == np.uint32 else np.int64)
