"""Which tokens come next: sources in fixed shares, each in a random order that needs no memory.

Sequence t is a pure function of (seed, t), so the state of the loader is one number and resuming is exact. Shares
hold at every prefix to less than one sequence (quota schedule: earliest deadline first, Steiner & Yeomans 1993,
"Level schedules for mixed-model, just-in-time processes"); the order inside an epoch is a Feistel cipher with cycle
walking (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_CYCLE = 16_384  # sequences after which the order of sources repeats; finer shares are rounded to it
FEISTEL_ROUNDS = 6


class TokenSource(Protocol):
    """What a sampler needs of a token dataset (herdkern.data.pack.TokenDataset is one)."""

    @property
    def num_tokens(self) -> int:
        """All tokens, borders of shards ignored."""
        ...

    def window(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens [start, start + length) and the document borders among them, first 0, last `length`."""
        ...


@dataclass(frozen=True, kw_only=True)
class MixPhase:
    """From sequence `start` on, sources are drawn in proportion to `weights`."""

    start: int
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sequence comes from: `length` tokens of `source` from token `start`, in pass `epoch` over that source."""

    source: str
    epoch: int
    start: int
    length: int


class TokenSampler:
    """Sequences of seq_len + 1 tokens from weighted sources; the extra token is the last target.

    weights: relative, any scale; 0 leaves a source out.  later: phases that change the weights from a given sequence
    on, without disturbing what was drawn before.
    Raises: ValueError if a weight has no dataset, is negative, or a dataset is shorter than one sequence.
    """

    def __init__(
        self,
        datasets: Mapping[str, TokenSource],
        weights: Mapping[str, float],
        seq_len: int,
        seed: int,
        *,
        later: Sequence[MixPhase] = (),
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"TokenSampler: seq_len must be at least 1, got {seq_len}")
        phases = [MixPhase(start=0, weights=weights), *later]
        if any(a.start >= b.start for a, b in itertools.pairwise(phases)):
            raise ValueError(f"TokenSampler: phases must start one after another, got {[p.start for p in phases]}")
        self.names = sorted({name for phase in phases for name, weight in phase.weights.items() if weight > 0})
        for name in self.names:
            if name not in datasets:
                raise ValueError(
                    f"TokenSampler: weights must name datasets, got {name!r}; known are {sorted(datasets)}"
                )
            if datasets[name].num_tokens < seq_len + 1:
                raise ValueError(
                    f"TokenSampler: dataset {name!r} must have at least seq_len + 1 = {seq_len + 1} tokens, "
                    f"got {datasets[name].num_tokens}; lower seq_len"
                )
        self.datasets = {name: datasets[name] for name in self.names}
        self.seq_len = seq_len
        self.seed = seed
        self._phases: list[_Phase] = []
        drawn = [0] * len(self.names)
        for phase in phases:
            if self._phases:
                drawn = self._phases[-1].drawn(phase.start)
            self._phases.append(_Phase(phase.start, _counts(phase.weights, self.names), drawn))
        self._permutations: dict[tuple[str, int], FeistelPermutation] = {}

    def place(self, t: int) -> Place:
        """Where sequence t (from 0) comes from."""
        t = int(t)  # a numpy integer would overflow in the cipher
        phase = next(p for p in reversed(self._phases) if p.start <= t)
        k, index = phase.source_of(t)
        name = self.names[k]
        windows, spare = divmod(self.datasets[name].num_tokens - 1, self.seq_len)
        epoch, i = divmod(index, windows)
        if (name, epoch) not in self._permutations:
            self._permutations = {key: p for key, p in self._permutations.items() if key[0] != name}
            self._permutations[name, epoch] = FeistelPermutation(windows, f"{self.seed}/{name}/{epoch}")
        permutation = self._permutations[name, epoch]
        shift = permutation.key % (spare + 1)  # so that no tail of the source is left out in every epoch
        return Place(source=name, epoch=epoch, start=permutation(i) * self.seq_len + shift, length=self.seq_len + 1)

    def sequence(self, t: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sequence t: tokens (seq_len + 1,) int64 and its document borders, first 0, last seq_len + 1."""
        place = self.place(t)
        return self.datasets[place.source].window(place.start, place.length)

    def drawn(self, t: int) -> dict[str, int]:
        """How many of the first t sequences come from each source."""
        phase = next(p for p in reversed(self._phases) if p.start <= t)
        return dict(zip(self.names, phase.drawn(t)))

    def epochs(self, t: int) -> dict[str, float]:
        """How often each source has been passed after t sequences."""
        drawn = self.drawn(t)
        return {name: drawn[name] * self.seq_len / (self.datasets[name].num_tokens - 1) for name in self.names}

    def shares(self, t: int) -> dict[str, Fraction]:
        """The exact shares in force at sequence t."""
        phase = next(p for p in reversed(self._phases) if p.start <= t)
        return {name: Fraction(count, len(phase.order)) for name, count in zip(self.names, phase.counts)}

    def fingerprint(self) -> dict[str, Any]:
        """What the order of sequences depends on, as JSON values: kept in checkpoints and compared on resume."""
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "num_tokens": {name: self.datasets[name].num_tokens for name in self.names},
            "phases": [{"start": p.start, "counts": p.counts} for p in self._phases],
        }


class FeistelPermutation:
    """A pseudo-random permutation of range(size), computed and not stored: calling it with i gives the i-th element."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        digest = hashlib.sha256(key.encode()).digest()
        self.key = int.from_bytes(digest[:8], "little")
        self._round_keys = [
            int.from_bytes(hashlib.sha256(digest + bytes([r])).digest()[:8], "little") for r in range(FEISTEL_ROUNDS)
        ]
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1

    def __call__(self, i: int) -> int:
        """The i-th element; i in range(size)."""
        # cycle walking: the cipher permutes at most 4 * size numbers, so a few rounds lead back below size
        while True:
            left, right = i >> self._half_bits, i & self._mask
            for key in self._round_keys:
                left, right = right, left ^ (_mix64(right ^ key) & self._mask)
            i = left << self._half_bits | right
            if i < self.size:
                return i


class _Phase:
    """One stretch of constant shares: the order of sources repeats every sum(counts) sequences."""

    def __init__(self, start: int, counts: list[int], drawn_before: list[int]) -> None:
        self.start = start
        self.counts = counts
        self._before = drawn_before
        self.order = _quota_order(counts)
        self._ranks = np.empty(len(self.order), np.int64)  # how many of its own source come before each entry
        for k in range(len(counts)):
            mine = self.order == k
            self._ranks[mine] = np.arange(int(mine.sum()))

    def source_of(self, t: int) -> tuple[int, int]:
        """The source of sequence t and how many were drawn from that source before."""
        cycle, rest = divmod(t - self.start, len(self.order))
        k = int(self.order[rest])
        return k, self._before[k] + cycle * self.counts[k] + int(self._ranks[rest])

    def drawn(self, t: int) -> list[int]:
        """Sequences drawn from each source before sequence t."""
        cycle, rest = divmod(t - self.start, len(self.order))
        in_rest = np.bincount(self.order[:rest], minlength=len(self.counts))
        return [b + cycle * c + int(r) for b, c, r in zip(self._before, self.counts, in_rest)]


def _counts(weights: Mapping[str, float], names: list[str]) -> list[int]:
    """Whole numbers in the proportion of the weights: exact if their cycle is at most MAX_CYCLE, else nearest."""
    negative = [name for name, weight in weights.items() if not 0 <= weight < math.inf]
    if negative:
        raise ValueError(
            f"TokenSampler: weights must be finite and not negative, got {weights[negative[0]]} for {negative[0]!r}"
        )
    exact = [Fraction(str(float(weights.get(name, 0)))) for name in names]  # as written: 0.1 is a tenth
    total = sum(exact)
    if total == 0:
        raise ValueError("TokenSampler: weights must have a positive one, got none")
    shares = [w / total for w in exact]
    cycle = math.lcm(*(s.denominator for s in shares))
    if cycle <= MAX_CYCLE:
        return [int(s * cycle) for s in shares]
    counts = [int(s * MAX_CYCLE) for s in shares]
    by_remainder = sorted(range(len(names)), key=lambda k: (counts[k] - shares[k] * MAX_CYCLE, k))
    for k in by_remainder[: MAX_CYCLE - sum(counts)]:
        counts[k] += 1
    return counts


def _quota_order(counts: list[int]) -> NDArray[np.int64]:
    """sum(counts) entries, counts[k] of them k; every prefix of length n has n counts[k] / total, +- 1, of k."""
    total = sum(counts)
    drawn = [0] * len(counts)
    order = np.empty(total, np.int64)
    for n in range(total):
        eligible = [
            k for k, c in enumerate(counts) if drawn[k] * total < c * (n + 1)
        ]  # one more stays below the share + 1
        k = min(eligible, key=lambda k: (-(-(drawn[k] + 1) * total // counts[k]), k))  # whose share is due first
        order[n] = k
        drawn[k] += 1
    return order


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
