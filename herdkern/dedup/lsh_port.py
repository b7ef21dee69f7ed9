"""MinHash and MinHashLSH with the names of datasketch, for code that is being ported.

`MinHash` gives datasketch's hash values bit for bit, in its schemes "affine32" (the default since its version 2) and
"legacy" (the only one before). For whole texts `herdkern.dedup.signatures` is far faster, since no shingle becomes a
Python object; for a whole data set there is `dedup_minhash`.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.minhash import datasketch_parameters

Scheme = Literal["affine32", "legacy"]
_MAX_HASH = (1 << 32) - 1
_NO_FACTORS = np.ones(1, dtype=np.uint64)


def sha1_hash32(data: bytes) -> int:
    """The first four bytes of SHA-1 as a little-endian number."""
    return int.from_bytes(hashlib.sha1(data).digest()[:4], "little")


def _fmix32(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finalizer of MurmurHash3, of every value."""
    values = values ^ (values >> np.uint32(16))
    values = values * np.uint32(0x85EBCA6B)
    values = values ^ (values >> np.uint32(13))
    values = values * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


@lru_cache(maxsize=16)
def _plan(num_perm: int, seed: int, scheme: Scheme) -> _text.SignPlan:
    if scheme == "legacy":
        return _text.SignPlan("m61", "word", _NO_FACTORS, num_perm, *datasketch_parameters(num_perm, seed))
    generator = np.random.RandomState(seed)
    multipliers = generator.randint(0, 1 << 31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = generator.randint(0, 1 << 32, num_perm, dtype=np.uint32)
    wide = multipliers.astype(np.uint64), offsets.astype(np.uint64)
    return _text.SignPlan("fast32", "word", _NO_FACTORS, num_perm, *wide)


class MinHash:
    """The MinHash of a set that grows value by value. Unlike datasketch's it has no GPU mode and no scheme "affine64".

    num_perm: number of slots.  seed: in [0, 2**32).  hashfunc: from a value to a whole number, below 2**32 for affine32
    and 2**64 for legacy; SHA-1 of bytes if None.  hashvalues: the state to begin with, (num_perm,), whose scheme must
    then be told.
    Raises: ValueError for a size, seed or scheme that it cannot have.
    """

    def __init__(
        self,
        num_perm: int = 128,
        seed: int = 1,
        *,
        hashfunc: Callable[[Any], int] | None = None,
        hashvalues: Iterable[int] | NDArray[Any] | None = None,
        scheme: Scheme | None = None,
    ):
        if hashvalues is not None and scheme is None:
            raise ValueError("MinHash: scheme must be told with hashvalues, got None; it cannot be seen in them")
        if scheme not in (None, "affine32", "legacy"):
            raise ValueError(f"MinHash: scheme must be affine32 or legacy, got {scheme!r}")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"MinHash: seed must lie in [0, 2**32), got {seed}")
        self.scheme: Scheme = scheme or "affine32"
        self.seed = seed
        self.hashfunc = hashfunc or sha1_hash32
        if hashvalues is None:
            if num_perm < 1:
                raise ValueError(f"MinHash: num_perm must be at least 1, got {num_perm}")
            self._row = np.full(num_perm, _MAX_HASH, dtype=np.uint32)
        else:
            values = np.array(hashvalues if isinstance(hashvalues, np.ndarray) else list(hashvalues))
            is_whole = values.dtype.kind in "iu" and values.ndim == 1 and len(values) > 0
            if not is_whole or int(values.min()) < 0 or int(values.max()) > _MAX_HASH:
                raise ValueError("MinHash: hashvalues must be (num_perm,) whole numbers below 2**32")
            self._row = values.astype(np.uint32)
        self.num_perm = len(self._row)

    @property
    def hashvalues(self) -> NDArray[Any]:
        """The slots, (num_perm,) uint32, or uint64 in the scheme legacy; a copy."""
        return self._row.astype(np.uint64 if self.scheme == "legacy" else np.uint32)

    def update(self, value: Any) -> None:
        """Add one value to the set. Raises: ValueError if hashfunc gives a number that is too large."""
        self.update_batch([value])

    def update_batch(self, values: Iterable[Any]) -> None:
        """Add values to the set. Raises: ValueError if hashfunc gives a number that is too large."""
        hashes = [self.hashfunc(value) for value in values]
        if not hashes:
            return
        limit = 64 if self.scheme == "legacy" else 32
        if min(hashes) < 0 or max(hashes) >> limit:
            raise ValueError(f"MinHash: hashfunc must give numbers in [0, 2**{limit}) for the scheme {self.scheme}")
        array = np.array(hashes, dtype=np.uint64)
        if self.scheme == "affine32":
            array = _fmix32(array.astype(np.uint32)).astype(np.uint64) << np.uint64(32)
        self._row = _text.minhash_lower(array, self._row, _plan(self.num_perm, self.seed, self.scheme))

    def _check_like(self, other: "MinHash", function: str) -> None:
        mine = (self.num_perm, self.seed, self.scheme)
        its = (other.num_perm, other.seed, other.scheme)
        if mine != its:
            raise ValueError(f"MinHash.{function}: other must have num_perm, seed and scheme {mine}, got {its}")

    def jaccard(self, other: "MinHash") -> float:
        """The estimated Jaccard similarity. Raises: ValueError for other settings."""
        self._check_like(other, "jaccard")
        return float(np.count_nonzero(self._row == other._row)) / self.num_perm

    def count(self) -> float:
        """The estimated number of distinct values. Source: Cohen 1997, Size-Estimation Framework, section 3."""
        return float(self.num_perm / np.sum(self._row.astype(np.float64) / _MAX_HASH) - 1.0)

    def merge(self, other: "MinHash") -> None:
        """Make this the MinHash of the union. Raises: ValueError for other settings."""
        self._check_like(other, "merge")
        self._row = np.minimum(self._row, other._row)

    def digest(self) -> NDArray[Any]:
        """A copy of `hashvalues`."""
        return self.hashvalues

    def is_empty(self) -> bool:
        """True if nothing was added."""
        return bool((self._row == _MAX_HASH).all())

    def clear(self) -> None:
        """Forget all values."""
        self._row = np.full(self.num_perm, _MAX_HASH, dtype=np.uint32)

    def copy(self) -> "MinHash":
        """Another MinHash in the same state."""
        return MinHash(seed=self.seed, hashfunc=self.hashfunc, hashvalues=self._row, scheme=self.scheme)

    @classmethod
    def union(cls, *mhs: "MinHash") -> "MinHash":
        """The MinHash of the union of two sets or more. Raises: ValueError for fewer or other settings."""
        if len(mhs) < 2:
            raise ValueError(f"MinHash.union: mhs must be at least 2, got {len(mhs)}")
        result = mhs[0].copy()
        for other in mhs[1:]:
            result.merge(other)
        return result

    @classmethod
    def bulk(cls, b: Iterable[Iterable[Any]], **settings: Any) -> list["MinHash"]:
        """One MinHash per list of values. settings: those of the constructor."""
        return list(cls.generator(b, **settings))

    @classmethod
    def generator(cls, b: Iterable[Iterable[Any]], **settings: Any) -> Iterator["MinHash"]:
        """The same one by one."""
        first = cls(**settings)
        for values in b:
            minhash = first.copy()
            minhash.update_batch(values)
            yield minhash

    def __len__(self) -> int:
        return self.num_perm

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MinHash):
            return NotImplemented
        same = (self.scheme, self.seed) == (other.scheme, other.seed)
        return same and bool(np.array_equal(self._row, other._row))

    __hash__ = None  # type: ignore[assignment]  # it changes


@lru_cache(maxsize=64)
def best_banding(threshold: float, num_perm: int, weights: tuple[float, float]) -> tuple[int, int]:
    """(num_bands, rows_per_band) with the least weighted area of false positives and false negatives around threshold.

    The areas are integrals of polynomials of degree num_perm at most, which Gauss's rule gives exactly.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(num_perm // 2 + 1)
    unit = (nodes + 1) / 2
    below, above = threshold * unit, threshold + (1 - threshold) * unit
    best, least = (0, 0), float("inf")
    for num_bands in range(1, num_perm + 1):
        for rows in range(1, num_perm // num_bands + 1):
            positive = float(node_weights @ (1 - (1 - below**rows) ** num_bands)) * threshold / 2
            negative = float(node_weights @ ((1 - above**rows) ** num_bands)) * (1 - threshold) / 2
            error = weights[0] * positive + weights[1] * negative
            if error < least:
                best, least = (num_bands, rows), error
    return best


class MinHashLSH:
    """An index of MinHashes in memory that finds those which share a band with a query.

    threshold: the similarity from which on sets are to be found; the banding follows from it and `weights` (of false
    positives and false negatives, together 1), or is `params` = (num_bands, rows_per_band), with num_bands >= 2.
    Raises: ValueError for settings outside of their ranges.
    """

    def __init__(
        self,
        threshold: float = 0.9,
        num_perm: int = 128,
        weights: tuple[float, float] = (0.5, 0.5),
        params: tuple[int, int] | None = None,
    ):
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"MinHashLSH: threshold must lie in [0, 1], got {threshold}")
        if num_perm < 2:
            raise ValueError(f"MinHashLSH: num_perm must be at least 2, got {num_perm}")
        if any(not 0.0 <= w <= 1.0 for w in weights) or abs(sum(weights) - 1.0) > 1e-9:
            raise ValueError(f"MinHashLSH: weights must lie in [0, 1] and sum to 1, got {weights}")
        self.h = num_perm
        self.b, self.r = params if params is not None else best_banding(threshold, num_perm, tuple(weights))
        if self.b < 2 or self.r < 1 or self.b * self.r > num_perm:
            raise ValueError(
                f"MinHashLSH: params must be at least (2, 1) with a product of at most num_perm={num_perm}, got "
                f"({self.b}, {self.r})"
            )
        self._settings: tuple[int, str] | None = None  # seed and scheme, of the first that is inserted
        self._keys: dict[Hashable, list[bytes]] = {}
        self._tables: list[dict[bytes, dict[Hashable, None]]] = [{} for _ in range(self.b)]

    def _bands(self, minhash: MinHash, function: str) -> list[bytes]:
        if len(minhash) != self.h:
            raise ValueError(f"MinHashLSH.{function}: minhash must have {self.h} slots, got {len(minhash)}")
        if self._settings not in (None, (minhash.seed, minhash.scheme)):
            raise ValueError(
                f"MinHashLSH.{function}: minhash must have seed and scheme {self._settings}, got "
                f"{(minhash.seed, minhash.scheme)}"
            )
        row = minhash._row
        return [row[i * self.r : (i + 1) * self.r].tobytes() for i in range(self.b)]

    def insert(self, key: Hashable, minhash: MinHash, check_duplication: bool = True) -> None:
        """Add a set under `key`. Raises: ValueError if the key is known, or for a MinHash of other settings."""
        bands = self._bands(minhash, "insert")
        if key in self._keys:
            if check_duplication:
                raise ValueError(f"MinHashLSH.insert: key must be new, got {key!r}; remove it first")
            self.remove(key)
        self._settings = minhash.seed, minhash.scheme
        self._keys[key] = bands
        for table, band in zip(self._tables, bands):
            table.setdefault(band, {})[key] = None

    def query(self, minhash: MinHash) -> list[Hashable]:
        """The keys that share a band with it, each once, band by band in the order of their insertion.

        Raises: ValueError for a MinHash of other settings.
        """
        found: dict[Hashable, None] = {}
        for table, band in zip(self._tables, self._bands(minhash, "query")):
            found.update(table.get(band, {}))
        return list(found)

    def remove(self, key: Hashable) -> None:
        """Forget a key. Raises: ValueError if it is not known."""
        if key not in self._keys:
            raise ValueError(f"MinHashLSH.remove: key must be in the index, got {key!r}")
        for table, band in zip(self._tables, self._keys.pop(key)):
            del table[band][key]
            if not table[band]:
                del table[band]

    def is_empty(self) -> bool:
        """True if nothing is in the index."""
        return not self._keys

    def get_counts(self) -> list[dict[bytes, int]]:
        """For each band the number of keys in each of its buckets."""
        return [{band: len(keys) for band, keys in table.items()} for table in self._tables]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)
