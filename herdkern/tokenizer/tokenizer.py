"""Tokenizer: text to ids and back.

The rules are tiktoken's: a word of the split pattern that is a token becomes that token; else the adjacent pair of
lowest rank is merged until none is left. The kernel is csrc/text/bpe_encode.h; encoding releases the GIL.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from herdkern import _text
from herdkern.tokenizer import export
from herdkern.tokenizer.pretokenize import LLAMA3_SPLIT_PATTERN, check_split_pattern, usable_threads
from herdkern.tokenizer.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT

SpecialTokenSet = Literal["all"] | Collection[str]
MAX_TOKENS = 1 << 21  # the kernel packs two ids and a rank into 64 bits


class Tokenizer:
    """A byte-level BPE tokenizer, immutable and picklable.

    mergeable_ranks: bytes -> id, with all 256 single bytes; a lower id is merged first.
    special_tokens: text -> id, never the result of a merge.
    Raises: ValueError naming the token that is missing, double or out of range.
    """

    def __init__(
        self,
        mergeable_ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        split_pattern: str = LLAMA3_SPLIT_PATTERN,
    ) -> None:
        check_split_pattern("Tokenizer", split_pattern)
        check_tokens(mergeable_ranks, special_tokens)
        self.mergeable_ranks = dict(sorted(mergeable_ranks.items(), key=lambda item: item[1]))
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self.split_pattern = split_pattern

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
        special = self._policy("encode", [text], allowed_special, disallowed_special)
        return self._encoder.encode(text, special)

    def encode_ordinary(self, text: str | bytes) -> list[int]:
        """The ids of one text in which special tokens are text like any other."""
        return self._encoder.encode(text, False)

    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        *,
        allowed_special: SpecialTokenSet = (),
        disallowed_special: SpecialTokenSet = "all",
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on num_threads threads (None: every core)."""
        special = self._policy("encode_batch", texts, allowed_special, disallowed_special)
        return self._encoder.encode_lists(texts, special, usable_threads(num_threads))

    def encode_ordinary_batch(self, texts: Sequence[str | bytes], *, num_threads: int | None = None) -> list[list[int]]:
        """The ids of each text, as `encode_ordinary` gives them."""
        return self._encoder.encode_lists(texts, False, usable_threads(num_threads))

    def encode_to_numpy(
        self, texts: Sequence[str | bytes], *, num_threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ids end to end, the fastest way: special tokens are text like any other.

        Returns: ids (total_tokens,) uint32, offsets (len(texts) + 1,) int64; text i has ids[offsets[i]:offsets[i + 1]].
        """
        return self._encoder.encode_arrays(texts, False, usable_threads(num_threads))

    def count_tokens(self, text: str | bytes) -> int:
        """How many ids `encode_ordinary` gives, without making a list of them."""
        return int(self.count_tokens_batch([text], num_threads=1)[0])

    def count_tokens_batch(self, texts: Sequence[str | bytes], *, num_threads: int | None = None) -> np.ndarray:
        """(len(texts),) int64: the number of ids of each text."""
        _, offsets = self._encoder.encode_arrays(texts, False, usable_threads(num_threads))
        return np.diff(offsets)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that the ids stand for, special tokens as their names.

        Raises: ValueError naming the first id that is no token's; TypeError if ids are not integers.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"decode: ids must be a flat list of integers, got {array.dtype} of shape {array.shape}")
        return self._decoder.decode(array.astype(np.int64, copy=False))

    def decode(self, ids: Sequence[int] | np.ndarray, *, errors: str = "replace") -> str:
        """The text that the ids stand for.

        errors: what to do where the bytes are no UTF-8, for instance inside a character; as in `bytes.decode`.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(self, batch: Sequence[Sequence[int] | np.ndarray], *, errors: str = "replace") -> list[str]:
        """The text of each sequence of ids."""
        return [self.decode(ids, errors=errors) for ids in batch]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises: ValueError if no token has that id."""
        return self.decode_bytes([token_id])

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.model (tiktoken), tokenizer.json (Hugging Face) and herdkern_tokenizer.json into a folder.

        The manifest is written last and holds the hashes of the others; every file appears whole or not at all.
        Raises: OSError if it cannot be written.
        """
        export.save(Path(directory), self.mergeable_ranks, self.special_tokens, self.split_pattern, self._encoder)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """The tokenizer of a folder that `save` wrote, or of a Hugging Face folder or tokenizer.json.

        A tokenizer.model alone does not name its special tokens: see `from_tiktoken`.
        Raises: OSError if it cannot be read; ValueError naming file and line if it is damaged or not this kind.
        """
        return cls(*export.load(Path(path)))

    @classmethod
    def from_tiktoken(cls, path: Path | str, special_tokens: Sequence[str] = ()) -> "Tokenizer":
        """The tokenizer of a file of tiktoken ranks, such as Llama 3's tokenizer.model with `llama3_special_tokens()`.

        special_tokens: get the ids after the highest rank, in this order.
        Raises: OSError if it cannot be read; ValueError naming file and line if it is damaged.
        """
        ranks = export.read_tiktoken(path)
        first = 1 + max(ranks.values(), default=-1)
        return cls(ranks, {name: first + i for i, name in enumerate(special_tokens)})

    @cached_property
    def _encoder(self) -> "_text.Encoder":
        special = [(name.encode(), token_id) for name, token_id in self.special_tokens.items()]
        return _text.Encoder(list(self.mergeable_ranks.items()), special)

    @cached_property
    def _decoder(self) -> "_text.Decoder":
        special = [(name.encode(), token_id) for name, token_id in self.special_tokens.items()]
        return _text.Decoder([*self.mergeable_ranks.items(), *special])

    def _special_id(self, where: str, name: str) -> int:
        if name not in self.special_tokens:
            raise ValueError(f"{where}: the tokenizer must have {name}, got only {list(self.special_tokens)}")
        return self.special_tokens[name]

    def _policy(
        self, where: str, texts: Sequence[str | bytes], allowed: SpecialTokenSet, disallowed: SpecialTokenSet
    ) -> bool | list[int]:
        """What the kernel takes as `special`, after the search for disallowed tokens."""
        if not self.special_tokens:
            return False
        allowed_names = set(self.special_tokens) if allowed == "all" else set(allowed)
        disallowed_names = set(self.special_tokens) - allowed_names if disallowed == "all" else set(disallowed)
        for argument, names in (("allowed_special", allowed_names), ("disallowed_special", disallowed_names)):
            if unknown := names - set(self.special_tokens):
                raise ValueError(f"{where}: {argument} must be special tokens of this tokenizer, got {sorted(unknown)}")
        if disallowed_names:
            ids = [self.special_tokens[name] for name in disallowed_names]
            search = True if len(ids) == len(self.special_tokens) else ids
            for text in texts:
                if found := self._encoder.find_special(text, search):
                    self._refuse_special(where, found[2])
        if len(allowed_names) == len(self.special_tokens):
            return True
        return [self.special_tokens[name] for name in allowed_names]

    def _refuse_special(self, where: str, token_id: int) -> None:
        name = next(name for name, special_id in self.special_tokens.items() if special_id == token_id)
        raise ValueError(
            f"{where}: text must not hold a disallowed special token, got {name!r}; pass allowed_special={{{name!r}}} "
            f"to encode it as one token, or disallowed_special=() or encode_ordinary to encode it as text"
        )

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.mergeable_ranks, self.special_tokens, self.split_pattern)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Tokenizer(n_vocab={self.n_vocab}, num_special={len(self.special_tokens)})"


def check_tokens(mergeable_ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> None:
    """Refuse tokens that cannot work together. Raises: ValueError naming the first."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in mergeable_ranks]:
        raise ValueError(f"Tokenizer: mergeable_ranks must hold every single byte, lacks {bytes(missing[:1])!r}")
    if b"" in mergeable_ranks or "" in special_tokens:
        raise ValueError("Tokenizer: tokens must not be empty")
    tokens: list[tuple[bytes | str, int]] = [*mergeable_ranks.items(), *special_tokens.items()]
    owner: dict[int, bytes | str] = {}
    for token, token_id in tokens:
        if not 0 <= token_id < MAX_TOKENS:
            raise ValueError(f"Tokenizer: the id of {token!r} must be in [0, {MAX_TOKENS}), got {token_id}")
        if token_id in owner:
            raise ValueError(f"Tokenizer: ids must differ, got {token_id} for {owner[token_id]!r} and {token!r}")
        owner[token_id] = token
    for name in special_tokens:
        if export.from_byte_level(name) in mergeable_ranks:
            raise ValueError(
                f"Tokenizer: special token {name!r} must not be an ordinary token as well, tokenizer.json could not "
                f"tell them apart; use a name such as '<|{name}|>'"
            )
