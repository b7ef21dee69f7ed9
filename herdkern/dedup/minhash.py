"""MinHash signatures of texts, of three families, over n-grams of words or characters.

The set behind a signature, version 1. Words are maximal runs of letters, marks, numbers and "_" by Unicode category;
what separates them (spaces of every kind, punctuation, symbols, controls) does not count. Latin letters up to U+017F,
Greek, Cyrillic and Armenian ones are compared without case. Words longer than 256 bytes are cut. In scripts that put no
spaces between words (Han, Kana, Thai, Lao, Khmer, Myanmar and their like) each character starts a word of up to 6
characters, so that 5 words span 10 characters. A byte that is not UTF-8 counts as a letter.
- ngram_unit "word": a shingle is `ngram_size` neighbouring words; a text with fewer words is one shingle.
- ngram_unit "char": a shingle is `ngram_size` neighbouring code points of the normalised text: its maximal runs of
  letters, marks, numbers and "_", folded as above, joined by one space each; a shorter text is one shingle.
A text without words has an empty set and is like nothing.

Slot k of a signature, by family; two signatures agree in a slot with probability equal to the similarity of the sets:
- "fast32": the minimum over the shingles of (A[k] x + B[k]) mod 2^32 with A odd and x 32 bits of a 64-bit hash of the
  shingle. Source: Broder 1997, On the resemblance and containment of documents; the multiplicative family: Thorup 2013
  (arXiv:1303.5479).
- "m61": the minimum of ((A[k] s + B[k]) mod 2^64 mod (2^61 - 1)) mod 2^32, s = the first 32 bits of SHA-1 of the
  shingle, its words joined by one space: bit for bit what datasketch gives with its scheme "legacy" (the only one
  before its version 2) and the same seed.
- "oph": one permutation, num_slots bins; bin k holds the least hash of the shingles that fall into it, an empty bin
  that of another one, found in a random order of its own. Source: Shrivastava 2017, Optimal Densification for Fast and
  Accurate Minwise Hashing (arXiv:1703.04664). Its cost does not grow with the number of slots; its variance is that of
  the others for sets of many more shingles than slots, and larger for small ones (`oph_variance`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern import _text

Family = Literal["fast32", "m61", "oph"]
NgramUnit = Literal["word", "char"]
FAMILIES: tuple[Family, ...] = ("fast32", "m61", "oph")
NGRAM_UNITS: tuple[NgramUnit, ...] = ("word", "char")
SPEC_VERSION = 1
MAX_OPH_SLOTS = 4096  # an order of all slots is kept for each
_MASK64 = (1 << 64) - 1
_MERSENNE61 = (1 << 61) - 1


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


@lru_cache(maxsize=16)
def datasketch_parameters(num_slots: int, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(multipliers, offsets) of the family m61, uint64 (num_slots,) each: those that datasketch draws from NumPy's
    MT19937 for its scheme "legacy".

    Raises: ValueError for a seed outside of [0, 2**32).
    """
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"datasketch_parameters: seed must lie in [0, 2**32), got {seed}")
    generator = np.random.RandomState(seed)
    drawn = [(generator.randint(1, _MERSENNE61, dtype=np.uint64), generator.randint(0, _MERSENNE61, dtype=np.uint64))
             for _ in range(num_slots)]  # fmt: skip
    parameters = np.array(drawn, dtype=np.uint64).reshape(-1, 2)
    return _constant(parameters[:, 0].copy()), _constant(parameters[:, 1].copy())


@lru_cache(maxsize=16)
def sign_plan(num_slots: int, ngram_size: int, ngram_unit: NgramUnit, family: Family, seed: int) -> _text.SignPlan:
    """What the kernel needs for these settings; `signatures` checks them."""
    if family == "oph":
        salt = np.array([next(_splitmix64(seed & _MASK64))], dtype=np.uint64)
        parameters = salt, salt
    elif family == "m61":
        parameters = datasketch_parameters(num_slots, seed)
    else:
        multipliers, offsets = slot_parameters(num_slots, seed)
        parameters = multipliers.astype(np.uint64), offsets.astype(np.uint64)
    return _text.SignPlan(family, ngram_unit, word_factors(ngram_size), num_slots, *parameters)


def signature_spec(
    *,
    num_bands: int,
    rows_per_band: int,
    ngram_size: int = 5,
    ngram_unit: NgramUnit = "word",
    family: Family = "fast32",
    seed: int = 1,
) -> str:
    """What makes signatures comparable, as one line: only those of the same line may be compared or stored together."""
    unit = {"word": "words", "char": "chars-of-words-joined-by-space"}[ngram_unit]
    name = {"fast32": "fast32", "m61": "m61-sha1", "oph": "oph"}[family]
    return (
        f"herdkern-minhash/{SPEC_VERSION} words=unicode-{_text.unicode_version} ngrams={unit} ngram_size={ngram_size} "
        f"family={name} num_bands={num_bands} rows_per_band={rows_per_band} seed={seed}"
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


def check_settings(
    function: str, *, num_bands: int, rows_per_band: int, ngram_size: int, ngram_unit: str, family: str, seed: int
) -> None:
    """Raise ValueError in the name of `function` for settings that make no signature."""
    _check_sizes(function, num_bands=num_bands, rows_per_band=rows_per_band, ngram_size=ngram_size)
    if ngram_unit not in NGRAM_UNITS:
        raise ValueError(f"{function}: ngram_unit must be word or char, got {ngram_unit!r}")
    if family not in FAMILIES:
        raise ValueError(f"{function}: family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if family == "oph" and num_bands * rows_per_band > MAX_OPH_SLOTS:
        raise ValueError(
            f"{function}: num_bands * rows_per_band must be at most {MAX_OPH_SLOTS} for the family oph, got "
            f"{num_bands * rows_per_band}; take fast32"
        )
    if family == "m61" and not 0 <= seed < 1 << 32:
        raise ValueError(f"{function}: seed must lie in [0, 2**32) for the family m61, got {seed}")


def signatures(
    texts: Sequence[str | bytes],
    *,
    num_bands: int = 20,
    rows_per_band: int = 6,
    ngram_size: int = 5,
    ngram_unit: NgramUnit = "word",
    family: Family = "fast32",
    seed: int = 1,
    num_threads: int | None = None,
) -> NDArray[np.uint32]:
    """MinHash signatures, uint32 (num_docs, num_bands * rows_per_band); the same for every number of threads.

    texts: str, or bytes of UTF-8.  num_threads: None for all usable cores. The defaults are the preset "llama3".
    A text without words has 0xFFFFFFFF in every slot. HERDKERN_ISA=avx2 or baseline forces a slower code path, which
    gives the same signatures.
    Raises: ValueError for sizes below 1 or an unknown unit or family; TypeError for a text of another type.
    """
    check_settings("signatures", num_bands=num_bands, rows_per_band=rows_per_band, ngram_size=ngram_size,
                   ngram_unit=ngram_unit, family=family, seed=seed)  # fmt: skip
    plan = sign_plan(num_bands * rows_per_band, ngram_size, ngram_unit, family, seed)
    return on_texts("signatures", _text.minhash_sign, texts, plan, usable_threads(num_threads), "auto")


def signatures_of_hashes(
    hashes: NDArray[np.uint64],
    begins: NDArray[np.int64],
    *,
    num_bands: int,
    rows_per_band: int,
    family: Family = "fast32",
    seed: int = 1,
    num_threads: int | None = None,
) -> NDArray[np.uint32]:
    """Signatures of sets of hashes of the caller's, uint32 (num_docs, num_bands * rows_per_band).

    hashes: uint64 (num_hashes,).  begins: int64 (num_docs + 1,); the set of document i is hashes[begins[i] :
    begins[i + 1]], repeats do not matter.  fast32 takes the upper 32 bits of a hash, m61 hashes of 32 bits as they are
    (those of datasketch's hashfunc), oph all 64.
    Raises: ValueError for sizes below 1, an unknown family or begins that do not rise from 0 to num_hashes; TypeError
    for hashes of another type.
    """
    check_settings("signatures_of_hashes", num_bands=num_bands, rows_per_band=rows_per_band, ngram_size=1,
                   ngram_unit="word", family=family, seed=seed)  # fmt: skip
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise TypeError(f"signatures_of_hashes: hashes must be uint64 (num_hashes,), got {hashes.dtype} {hashes.shape}")
    plan = sign_plan(num_bands * rows_per_band, 1, "word", family, seed)
    return _text.minhash_sign_hashes(hashes, begins, plan, usable_threads(num_threads), "auto")


def _shingle_plan(function: str, ngram_size: int, ngram_unit: NgramUnit) -> _text.SignPlan:
    check_settings(function, num_bands=1, rows_per_band=1, ngram_size=ngram_size, ngram_unit=ngram_unit,
                   family="fast32", seed=1)  # fmt: skip
    return sign_plan(1, ngram_size, ngram_unit, "fast32", 1)


def shingle_hashes(
    texts: Sequence[str | bytes],
    *,
    ngram_size: int = 5,
    ngram_unit: NgramUnit = "word",
    num_threads: int | None = None,
) -> list[NDArray[np.uint64]]:
    """The 64-bit hashes of every text's shingles in text order, repeats included; the same for all families.

    Raises: ValueError for ngram_size below 1 or an unknown unit; TypeError for a text that is neither str nor bytes.
    """
    plan = _shingle_plan("shingle_hashes", ngram_size, ngram_unit)
    arguments = (plan, usable_threads(num_threads), "auto")
    values, begins = on_texts("shingle_hashes", _text.minhash_shingle, texts, *arguments)
    return [values[begin:end] for begin, end in pairwise(begins)]


def estimate_jaccard(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The share of equal slots along the last axis: an unbiased estimate, variance J (1 - J) / num_slots (oph: more).

    first, second: uint32 (..., num_slots), of one `signature_spec`.
    Raises: ValueError if they do not have the same number of slots.
    """
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"estimate_jaccard: first and second must have equally many slots, got {first.shape[-1]} and "
            f"{second.shape[-1]}; signatures of different settings cannot be compared"
        )
    return np.asarray((first == second).mean(axis=-1), dtype=np.float64)


def oph_variance(similarity: float, union_size: int, num_slots: int) -> float:
    """The variance of the family oph's estimate for two sets of this Jaccard similarity and size of their union.

    A slot of which neither set has a shingle takes the value of a full one, so two slots may hold the same: with E
    empty slots and F full ones, 2 E + E (E - 1) / F of the ordered pairs do. All others are drawn without replacement.
    """
    share = np.zeros(num_slots + 1)  # of F full slots, shingle by shingle
    share[0] = 1.0
    full = np.arange(num_slots + 1)
    for _ in range(union_size):
        share = share * full / num_slots + np.concatenate([[0.0], (share * (num_slots - full) / num_slots)[:-1]])
    share, full = share[1:], full[1:]
    empty = num_slots - full
    same = 2 * empty + empty * (empty - 1) / full
    other = num_slots * (num_slots - 1) - same
    both = (similarity * union_size - 1) / (union_size - 1) if union_size > 1 else 0.0
    pairs = (same + other * max(both, 0.0)) * similarity
    return float(share @ pairs / num_slots**2 + similarity / num_slots - similarity**2)


def exact_jaccard(
    texts: Sequence[str | bytes],
    pairs: NDArray[np.int64],
    *,
    ngram_size: int = 5,
    ngram_unit: NgramUnit = "word",
    num_threads: int | None = None,
) -> NDArray[np.float64]:
    """Jaccard similarity of the shingle sets of pairs of texts, float64 (num_pairs,); 0 where both sets are empty.

    pairs: int64 (num_pairs, 2), indices into texts.
    Raises: ValueError for ngram_size below 1, an unknown unit or pairs outside of texts.
    """
    plan = _shingle_plan("exact_jaccard", ngram_size, ngram_unit)
    pairs = check_pairs("exact_jaccard", pairs)
    return on_texts("exact_jaccard", _text.jaccard_of_pairs, texts, pairs, plan, usable_threads(num_threads))
