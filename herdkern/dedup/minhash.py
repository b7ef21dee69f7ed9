"""MinHash signatures of texts, and near-duplicate removal built on them.

The set behind a signature, version 1. Words are maximal runs of letters, marks, numbers and "_" by Unicode category;
what separates them (spaces of every kind, punctuation, symbols, controls) does not count. Latin letters up to U+017F,
Greek, Cyrillic and Armenian ones are compared without case. Words longer than 256 bytes are cut. In scripts that put no
spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar and their like) each character starts a word of up to 6
characters, so that 5 words span 10 characters. A byte that is not UTF-8 counts as a letter. A shingle is `ngram_size`
neighbouring words; a text with fewer words is one shingle; a text without any has an empty set and is like nothing.

Slot k of a signature is the minimum over the shingles of (A[k] x + B[k]) mod 2^32 with A odd and x 32 bits of a 64-bit
hash of the shingle; two signatures agree in a slot with probability equal to the Jaccard similarity of the sets.
Source: Broder 1997, On the resemblance and containment of documents; the multiplicative family: Thorup 2013
(arXiv:1303.5479).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text

SPEC_VERSION = 1
_MASK64 = (1 << 64) - 1


def _splitmix64(state: int) -> Iterator[int]:
    """The numbers of the generator SplitMix64."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        yield z ^ (z >> 31)


def _constant(array: NDArray[Any]) -> NDArray[Any]:
    """`array`, which the caches below hand to everyone, made read-only."""
    array.flags.writeable = False
    return array


@lru_cache(maxsize=64)
def slot_parameters(num_slots: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(multipliers, offsets) of the slots, uint32 (num_slots,) each; the multipliers are odd."""
    values = np.array(list(islice(_splitmix64(seed & _MASK64), 2 * num_slots)), dtype=np.uint64) >> np.uint64(32)
    parameters = values.astype(np.uint32)
    return _constant(parameters[0::2] | np.uint32(1)), _constant(parameters[1::2].copy())


@lru_cache(maxsize=64)
def word_factors(ngram_size: int) -> NDArray[np.uint64]:
    """The odd factors of the words of a shingle, uint64 (ngram_size,)."""
    return _constant(np.array(list(islice(_splitmix64(0x6E6772616D73), ngram_size)), dtype=np.uint64) | np.uint64(1))


def signature_spec(*, num_bands: int, rows_per_band: int, ngram_size: int = 5, seed: int = 1) -> str:
    """What makes signatures comparable, as one line: only those of the same line may be compared or stored together."""
    return (
        f"herdkern-minhash/{SPEC_VERSION} words=unicode-{_text.unicode_version} ngram_size={ngram_size} "
        f"family=fast32 num_bands={num_bands} rows_per_band={rows_per_band} seed={seed}"
    )


def usable_threads(num_threads: int | None) -> int:
    """`num_threads`, or the number of usable cores for None.

    Raises: ValueError if it is less than 1.
    """
    if num_threads is None:
        return len(os.sched_getaffinity(0))
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1 or None, got {num_threads}")
    return num_threads


def check_pairs(function: str, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """`pairs` as int64 (num_pairs, 2).

    Raises: ValueError in the name of `function` for another shape, TypeError for numbers that are not whole.
    """
    array = np.asarray(pairs)
    if array.ndim != 2 or array.shape[1] != 2:
        if array.size:
            raise ValueError(f"{function}: pairs must have shape (num_pairs, 2), got {array.shape}")
        return np.zeros((0, 2), np.int64)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{function}: pairs must be whole numbers, got dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def _check_sizes(function: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def on_texts(function: str, kernel: Callable[..., Any], texts: Sequence[str | bytes], *arguments: Any) -> Any:
    """`kernel(texts, *arguments)`; a str that UTF-8 cannot hold (lone surrogates) goes in as bytes standing for it.

    Raises: TypeError in the name of `function` for one text in place of a list, or what is no sequence.
    """
    if isinstance(texts, str | bytes | bytearray):
        raise TypeError(f"{function}: texts must be a list of texts, got one {type(texts).__name__}; pass [text]")
    if not (isinstance(texts, Sequence) or hasattr(texts, "__array__")):
        raise TypeError(f"{function}: texts must be a sequence, got {type(texts).__name__}; pass list(texts)")
    try:
        return kernel(texts, *arguments)
    except UnicodeEncodeError:
        encoded = [t.encode("utf-8", "surrogatepass") if isinstance(t, str) else t for t in texts]
        return kernel(encoded, *arguments)


def signatures(
    texts: Sequence[str | bytes],
    *,
    num_bands: int,
    rows_per_band: int,
    ngram_size: int = 5,
    seed: int = 1,
    num_threads: int | None = None,
    level: str = "auto",
) -> NDArray[np.uint32]:
    """MinHash signatures, uint32 (num_docs, num_bands * rows_per_band); the same for every number of threads.

    texts: str, or bytes of UTF-8.  num_threads: None for all usable cores.
    level: "baseline", "avx2" or "avx512" forces a code path; all give the same signatures.
    Raises: ValueError for sizes below 1; TypeError for a text of another type.
    """
    _check_sizes("signatures", num_bands=num_bands, rows_per_band=rows_per_band, ngram_size=ngram_size)
    multipliers, offsets = slot_parameters(num_bands * rows_per_band, seed)
    arguments = (word_factors(ngram_size), multipliers, offsets, usable_threads(num_threads), level)
    return on_texts("signatures", _text.minhash_sign, texts, *arguments)


def shingle_hashes(
    texts: Sequence[str | bytes], *, ngram_size: int = 5, num_threads: int | None = None, level: str = "auto"
) -> list[NDArray[np.uint64]]:
    """The 64-bit hashes of every text's shingles in text order, repeats included.

    Raises: ValueError for ngram_size below 1; TypeError for a text that is neither str nor bytes.
    """
    _check_sizes("shingle_hashes", ngram_size=ngram_size)
    arguments = (word_factors(ngram_size), usable_threads(num_threads), level)
    values, begins = on_texts("shingle_hashes", _text.minhash_shingle, texts, *arguments)
    return [values[begin:end] for begin, end in pairwise(begins)]


def estimate_jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The share of equal slots along the last axis: an unbiased estimate, variance J (1 - J) / num_slots.

    first, second: uint32 (..., num_slots), of one `signature_spec`.
    Raises: ValueError if they do not have the same number of slots.
    """
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"estimate_jaccard: first and second must have equally many slots, got {first.shape[-1]} and "
            f"{second.shape[-1]}; signatures of different settings cannot be compared"
        )
    return np.asarray((first == second).mean(axis=-1), dtype=np.float64)


def exact_jaccard(
    texts: Sequence[str | bytes], pairs: NDArray[np.int64], *, ngram_size: int = 5, num_threads: int | None = None
) -> NDArray[np.float64]:
    """Jaccard similarity of the shingle sets of pairs of texts, float64 (num_pairs,); 0 where both sets are empty.

    pairs: int64 (num_pairs, 2), indices into texts.
    Raises: ValueError for ngram_size below 1 or pairs outside of texts.
    """
    _check_sizes("exact_jaccard", ngram_size=ngram_size)
    pairs = check_pairs("exact_jaccard", pairs)
    arguments = (pairs, word_factors(ngram_size), usable_threads(num_threads))
    return on_texts("exact_jaccard", _text.jaccard_of_pairs, texts, *arguments)
