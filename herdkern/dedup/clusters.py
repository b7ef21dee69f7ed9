"""Candidate pairs by locality-sensitive hashing, clusters by connected components, and who of a cluster is kept."""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.minhash import check_pairs, usable_threads

KeepPolicy = Literal["newest", "longest", "best_score", "smallest_id"]
KEEP_POLICIES: tuple[KeepPolicy, ...] = ("newest", "longest", "best_score", "smallest_id")


def _groups(groups: NDArray[np.uint64] | None) -> NDArray[np.uint64]:
    return np.zeros(0, np.uint64) if groups is None else np.asarray(groups, dtype=np.uint64)


def _check_signatures(function: str, signatures: NDArray[np.uint32], num_bands: int, rows_per_band: int) -> None:
    if signatures.dtype != np.uint32:  # NumPy would cut wider hashes to 32 bits without a word
        raise TypeError(f"{function}: signatures must be uint32, got {signatures.dtype}; make them with signatures()")
    num_slots = num_bands * rows_per_band
    if num_bands < 1 or rows_per_band < 1 or signatures.ndim != 2 or signatures.shape[1] != num_slots:
        raise ValueError(
            f"{function}: signatures must have shape (num_docs, num_bands * rows_per_band = {num_slots}), "
            f"got {signatures.shape}"
        )


def band_keys(
    signatures: NDArray[np.uint32], *, num_bands: int, rows_per_band: int, groups: NDArray[np.uint64] | None = None
) -> NDArray[np.uint64]:
    """A key per document and band, uint64 (num_docs, num_bands): equal where all rows of the band are.

    signatures: uint32 (num_docs, num_bands * rows_per_band).  groups: uint64 (num_docs,); keys of other groups differ.
    Raises: ValueError for other shapes, TypeError for another dtype.
    """
    _check_signatures("band_keys", signatures, num_bands, rows_per_band)
    return _text.band_keys(signatures, num_bands, rows_per_band, _groups(groups))


def candidate_pairs(
    signatures: NDArray[np.uint32],
    *,
    num_bands: int,
    rows_per_band: int,
    min_similarity: float = 0.0,
    groups: NDArray[np.uint64] | None = None,
    num_threads: int | None = None,
) -> NDArray[np.int64]:
    """Pairs (smaller index, larger index) that agree in a band, int64 (num_pairs, 2), sorted, without repeats.

    min_similarity: with 0, each document is paired with the first of its key (a star: enough for the components). Above
    0, it is paired with those leaders of its key whose estimated similarity reaches it, or leads itself while the key
    has fewer than 256 leaders (of a key that more unlike documents share, the rest is left to the other bands).
    Texts without words are never candidates.
    Raises: ValueError for other shapes or a similarity outside [0, 1], TypeError for another dtype.
    """
    if not 0.0 <= min_similarity <= 1.0:
        raise ValueError(f"candidate_pairs: min_similarity must lie in [0, 1], got {min_similarity}")
    _check_signatures("candidate_pairs", signatures, num_bands, rows_per_band)
    min_matches = math.ceil(min_similarity * num_bands * rows_per_band - 1e-9)
    return _text.candidate_pairs(
        signatures, num_bands, rows_per_band, _groups(groups), min_matches, usable_threads(num_threads)
    )


def connected_components(pairs: NDArray[np.int64], num_docs: int) -> NDArray[np.int64]:
    """The smallest index of every document's component, int64 (num_docs,); the order of the pairs does not matter.

    pairs: int64 (num_pairs, 2).
    Raises: ValueError for another shape, num_docs < 0 or a pair outside of [0, num_docs); TypeError for another dtype.
    """
    if num_docs < 0:
        raise ValueError(f"connected_components: num_docs must be at least 0, got {num_docs}")
    return _text.connected_components(check_pairs("connected_components", pairs), num_docs)


def match_probability(similarity: float, *, num_bands: int, rows_per_band: int) -> float:
    """The probability 1 - (1 - s^rows)^bands that two documents of Jaccard similarity s become candidates."""
    return 1.0 - (1.0 - similarity**rows_per_band) ** num_bands


def keep_order(
    keep: KeepPolicy, ids: list[str], timestamps: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The rank of every document, int64 (num_docs,): of a cluster the smallest rank is kept.

    "newest": latest timestamp, then longest, then smallest id. "longest": longest, then latest, then smallest id.
    "smallest_id": by id alone. Raises: ValueError for another policy.
    """
    by_id = np.array(ids, dtype=object)
    keys = {
        "newest": (by_id, -lengths, -timestamps),  # np.lexsort: the last key counts most
        "longest": (by_id, -timestamps, -lengths),
        "smallest_id": (by_id,),
    }
    if keep not in keys:
        raise ValueError(f"keep_order: keep must be one of {', '.join(keys)}, got {keep!r}")
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[np.lexsort(keys[keep])] = np.arange(len(ids))
    return ranks
