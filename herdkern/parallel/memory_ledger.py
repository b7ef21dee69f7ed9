"""A ledger of live bytes by purpose, which remembers its highest total and what was live then."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """What a stretch of work does to a ledger: `net` stays behind; `extra` is added on top at its highest moment."""

    net: Mapping[str, int]
    extra: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the highest moment beyond those at the beginning."""
        return sum(self.extra.values())


class Ledger:
    """Live bytes by purpose; `peak` is the highest total so far and `at_peak` what it was made of."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.total = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    def add(self, purpose: str, size: int) -> None:
        """`size` bytes more (fewer, if negative)."""
        self.live[purpose] = self.live.get(purpose, 0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def free(self, purpose: str, size: int) -> None:
        """`size` bytes fewer."""
        self.add(purpose, -size)

    def move(self, source: str, target: str, size: int) -> None:
        """`size` bytes serve another purpose from now on."""
        self.live[source] = self.live.get(source, 0) - size
        self.live[target] = self.live.get(target, 0) + size

    def passage(self) -> Passage:
        """All that happened so far, for a ledger that began empty."""
        return Passage(dict(self.live), dict(self.at_peak))

    def run(self, passage: Passage) -> None:
        """Let a stretch of work happen."""
        if self.total + passage.peak > self.peak:
            self.peak = self.total + passage.peak
            self.at_peak = dict(self.live)
            for purpose, size in passage.extra.items():
                self.at_peak[purpose] = self.at_peak.get(purpose, 0) + size
        for purpose, size in passage.net.items():
            self.live[purpose] = self.live.get(purpose, 0) + size
            self.total += size
