"""The native text kernels (csrc/text); use herdkern.tokenizer and herdkern.dedup."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

unicode_version: str

def __getattr__(name: str) -> Any: ...

# csrc/text/bind_splitter.cpp
def split_patterns() -> dict[str, str | tuple[str, ...]]: ...

class Splitter:
    name: str  # empty for a pattern that has none
    patterns: tuple[str, ...]
    def __init__(self, pattern: str | Sequence[str]) -> None: ...  # a name, a pattern, or a sequence of patterns
    def word_ends(self, text: str | bytes) -> np.ndarray: ...  # (num_words,) int64

# csrc/text/bind_bpe_train.cpp
def train_merges(
    table: WordTable,
    byte_order: Sequence[int],
    max_merges: int,
    min_frequency: int,
    max_token_length: int,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray: ...

# csrc/text/bind_word_counts.cpp
class WordTable:
    def add_texts(self, texts: Sequence[str | bytes], first_index: int, num_threads: int) -> None: ...
    def add_words(self, blob: bytes, lengths: np.ndarray, counts: np.ndarray) -> None: ...
    def merge(self, other: WordTable) -> None: ...
    def prune(self, min_count: int) -> None: ...
    def num_words(self) -> int: ...
    def num_occurrences(self) -> int: ...
    def sorted(self) -> tuple[bytes, np.ndarray, np.ndarray]: ...

# csrc/text/bind_bpe_encode.cpp. tokens: a dict from bytes to id, or pairs. special: tokens that become their ids (True:
# every one, False: none, or their ids); forbidden: those that must not occur. Ids: uint32; offsets: (n + 1,) int64.
class Encoder:
    def __init__(
        self,
        tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        special_tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        splitter: Splitter,
        cache_bytes: int = ...,
    ) -> None: ...
    def encode(
        self, text: str | bytes, special: bool | Sequence[int], forbidden: bool | Sequence[int]
    ) -> list[int]: ...
    def encode_arrays(
        self,
        texts: Sequence[str | bytes],
        special: bool | Sequence[int],
        forbidden: bool | Sequence[int],
        num_threads: int,
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_lists(
        self,
        texts: Sequence[str | bytes],
        special: bool | Sequence[int],
        forbidden: bool | Sequence[int],
        num_threads: int,
    ) -> list[list[int]]: ...
    def count(self, texts: Sequence[str | bytes], num_threads: int) -> np.ndarray: ...
    def merges_of(self, tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]]) -> np.ndarray: ...

class Decoder:
    def __init__(
        self,
        tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
        special_tokens: Mapping[bytes, int] | Sequence[tuple[bytes, int]],
    ) -> None: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes: ...
    def decode_texts(self, ids: Sequence[int] | np.ndarray, offsets: np.ndarray, errors: str) -> list[str]: ...
    def spans(self, ids: np.ndarray, offsets: np.ndarray, texts: list[str | bytes]) -> np.ndarray: ...
