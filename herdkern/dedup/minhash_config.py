"""The settings of document dedup, and how its memory is shared out."""

import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from herdkern import _text
from herdkern.dedup.clusters import KEEP_POLICIES, KeepPolicy
from herdkern.dedup.minhash import Family, NgramUnit, check_settings, sign_plan, signature_spec
from herdkern.dedup.presets import preset
from herdkern.engine import task_memory

MIB = 1 << 20
RESERVE_BYTES = 96 * MIB  # of a task: the interpreter, NumPy and what reading a file takes
LEAST_MEMORY = 128 * MIB
_NO_RULES = ("write_dropped", "compression_level", "max_memory")
_STANDARD_DEVIATIONS = 4  # of an estimate below the threshold: what is similar gets lost once in 30,000 pairs


@dataclass(frozen=True, kw_only=True)
class MinHashConfig:
    """When two documents are near-duplicates, and which of them stays.

    num_bands, rows_per_band: two documents of Jaccard similarity s are compared with probability
    1 - (1 - s^rows_per_band)^num_bands; the defaults find s = 0.75 with 0.98 and s = 0.85 with 0.9999.
    ngram_size, ngram_unit, family, seed: of the signatures, herdkern.dedup.minhash.
    min_similarity: what counts as a near-duplicate, by `verify`: of the shingle sets themselves ("exact"), of the
    signatures ("signature"); with "none" everything that is connected by shared bands is one cluster.
    keep: who of a cluster stays. newest: by timestamp, then length; longest: by length, then timestamp; best_score: by
    the number `score_key` of the document's meta (documents without one come last), then timestamp, then length; at
    last the smallest id decides, which is all that counts for smallest_id (`documents.sort_keys` has every tie).
    max_memory: bytes that one task may use at most (N workers take N times as much), at least 128 MiB; None: what the
    run gives a task, `Run(max_memory=)` shared by its workers.
    """

    num_bands: int = 20
    rows_per_band: int = 6
    ngram_size: int = 5
    ngram_unit: NgramUnit = "word"
    family: Family = "fast32"
    seed: int = 1
    min_similarity: float = 0.75
    verify: Literal["exact", "signature", "none"] = "exact"
    keep: KeepPolicy = "newest"
    score_key: str = "score"
    within_language: bool = True  # documents of different `lang` are never near-duplicates
    write_dropped: bool = True  # the dropped documents aside, in dropped.jsonl.zst
    compression_level: int = 1  # of zstd, for both files; 0 stores them as they are, without a checksum
    max_memory: int | None = None

    def __post_init__(self) -> None:
        check_settings("MinHashConfig", **self.signature_settings)
        if not 0.0 < self.min_similarity <= 1.0:
            raise ValueError(f"MinHashConfig: min_similarity must lie in (0, 1], got {self.min_similarity}")
        if self.verify not in ("exact", "signature", "none"):
            raise ValueError(f"MinHashConfig: verify must be exact, signature or none, got {self.verify!r}")
        if self.keep not in KEEP_POLICIES:
            raise ValueError(f"MinHashConfig: keep must be one of {', '.join(KEEP_POLICIES)}, got {self.keep!r}")
        if not 0 <= self.compression_level <= 22:
            raise ValueError(f"MinHashConfig: compression_level must lie in [0, 22], got {self.compression_level}")
        if self.max_memory is not None and self.max_memory < LEAST_MEMORY:
            raise ValueError(f"MinHashConfig: max_memory must be at least {LEAST_MEMORY} bytes, got {self.max_memory}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MinHashConfig":
        """The settings of herdkern.dedup.presets by name ("fineweb", "curator", "llama3"), with changes.

        Raises: ValueError for another name.
        """
        return cls(**{**preset(name), **changes})

    @property
    def signature_settings(self) -> dict[str, Any]:
        """Keywords of herdkern.dedup.minhash.signatures."""
        names = ("num_bands", "rows_per_band", "ngram_size", "ngram_unit", "family", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def sign_plan(self) -> _text.SignPlan:
        """What the kernel signs by."""
        slots = self.num_bands * self.rows_per_band
        return sign_plan(slots, self.ngram_size, self.ngram_unit, self.family, self.seed)

    @property
    def shingle_plan(self) -> _text.SignPlan:
        """What the kernel makes shingles by, the same for all families."""
        return sign_plan(1, self.ngram_size, self.ngram_unit, "fast32", 1)

    @property
    def spec(self) -> str:
        """What makes signatures of this configuration comparable."""
        return signature_spec(**self.signature_settings)

    @property
    def rules(self) -> dict[str, Any]:
        """All that decides who is kept: two runs of equal rules treat a document alike."""
        return {name: value for name, value in asdict(self).items() if name not in _NO_RULES}

    def within(self, max_memory: int) -> "MinHashConfig":
        """The configuration for work outside of a task, which may use max_memory."""
        return replace(self, max_memory=self.max_memory or max(LEAST_MEMORY, max_memory))

    @property
    def native_bytes(self) -> int:
        """What is left for the buffers and tables of a task."""
        memory = min(self.max_memory or sys.maxsize, task_memory())
        return max(memory - RESERVE_BYTES, memory // 8)

    @property
    def min_bits(self) -> int:
        """In how many of 64 sketched bits two documents of a band must agree to be linked; 0: all are linked."""
        if self.verify == "none":
            return 0
        share = (1 + self.min_similarity) / 2
        slots = min(64, self.num_bands * self.rows_per_band)
        if self.family == "oph":  # bins that borrow from each other are worth less
            slots = min(slots, 32)
        return max(0, math.floor(64 * (share - _STANDARD_DEVIATIONS * math.sqrt(share * (1 - share) / slots))))

    @property
    def min_matches(self) -> int:
        """In how many slots two signatures must agree before their shingle sets are compared, or to be similar."""
        num_slots, floor = self.num_bands * self.rows_per_band, self.min_similarity
        if self.verify == "signature":
            return math.ceil(floor * num_slots - 1e-9)
        slots = num_slots if self.family != "oph" else num_slots // 2
        floor -= _STANDARD_DEVIATIONS * math.sqrt(floor * (1 - floor) / max(1, slots))
        return max(0, math.ceil(floor * num_slots - 1e-9))
