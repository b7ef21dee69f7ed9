"""Who comes late to the collectives of its groups, time after time.

Of a collective the lateness of a rank is its arrival minus the earliest arrival, of a step the sum over the group's
collectives. A rank is named when, over a window of steps, its median lateness against the other ranks' median is
(1) more than 4 standard errors of a median above 0, by the robust scale of that window (1.4826 MAD), and (2) at least
5 % of a step: a steady difference of microseconds is certain and harmless. Source: Llama 3 section 3.3.4.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from herdkern.parallel.flight_ring import Ring

WINDOW = 50  # steps
Z_LIMIT = 4.0
LEAST_SHARE = 0.05
_MEDIAN_ERROR = 1.2533  # standard error of a median, in units of sigma / sqrt(n)


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that is late in a group: by how much (seconds a step, share of a step), and how sure that is (z)."""

    rank: int
    group: str
    lateness: float
    share: float
    z: float
    step: int

    def __str__(self) -> str:
        late = f"{1e3 * self.lateness:.3g} ms ({self.share:.0%} of a step)"
        return f"rank {self.rank} comes {late} late to group {self.group}, z = {self.z:.1f}, up to step {self.step}"


def late_rank(lateness: np.ndarray, seconds: float) -> tuple[int, float, float] | None:
    """(column, lateness against the others in seconds, z) of the rank that is late, if one is.

    lateness: (steps, ranks), seconds; of fewer than 8 steps or 2 ranks nobody is named. seconds: of a step.
    """
    rows, ranks = lateness.shape
    if rows < 8 or ranks < 2:
        return None
    found = []
    for rank in range(ranks):
        late = lateness[:, rank] - np.median(np.delete(lateness, rank, axis=1), axis=1)
        middle = float(np.median(late))
        error = 1.4826 * float(np.median(np.abs(late - middle))) * _MEDIAN_ERROR / math.sqrt(rows)
        z = middle / max(error, 1e-9)  # clocks have nanoseconds
        if z > Z_LIMIT and middle >= LEAST_SHARE * seconds:
            found.append((rank, middle, z))
    return max(found, key=lambda one: one[1], default=None)


class StragglerWatch:
    """Looks at the flight recorders of a run now and then and writes RUN/stragglers.jsonl."""

    def __init__(self, run_dir: Path | str, window: int = WINDOW) -> None:
        self.path = Path(run_dir) / "stragglers.jsonl"
        self.window = window
        self._seen: dict[str, int] = {}  # group -> last step that was judged

    def look(self, rings: Mapping[int, Ring]) -> list[Straggler]:
        """The stragglers of every group whose last `window` steps are new since the last look."""
        found = []
        for group, about, ranks in _groups(rings):
            steps, lateness, seconds = _lateness(group, ranks, rings)
            steps, lateness = steps[-self.window :], lateness[-self.window :]
            if len(steps) < self.window or steps[0] <= self._seen.get(group, -1):
                continue
            self._seen[group] = int(steps[-1])
            late = late_rank(lateness, seconds)
            if late is not None:
                rank, middle, z = ranks[late[0]], late[1], round(late[2], 2)
                share = middle / seconds if seconds > 0 else 0.0
                found.append(Straggler(rank=rank, group=about, lateness=middle, share=share, z=z, step=int(steps[-1])))
        if found:
            with open(self.path, "a") as f:
                f.writelines(json.dumps({"time": time.time(), **asdict(one)}) + "\n" for one in found)
        return found


def _groups(rings: Mapping[int, Ring]) -> list[tuple[str, str, list[int]]]:
    """(name, what readers see, ranks with a recorder) of every group of at least two."""
    groups: dict[str, tuple[str, list[int]]] = {}
    for ring in rings.values():
        for about in ring.names.values():
            if isinstance(about, dict):
                label = about["about"] if about["about"] not in ("", "undefined") else about["name"]
                groups[about["name"]] = (label, [rank for rank in about["ranks"] if rank in rings])
    return [(name, label, ranks) for name, (label, ranks) in groups.items() if len(ranks) > 1]


def _lateness(group: str, ranks: list[int], rings: Mapping[int, Ring]) -> tuple[np.ndarray, np.ndarray, float]:
    """(steps), (steps, ranks) seconds of lateness, and the median seconds of a step; whole steps only."""
    columns = []
    for rank in ranks:
        ring = rings[rank]
        numbers = [n for n, about in ring.names.items() if isinstance(about, dict) and about["name"] == group]
        records = ring.records
        columns.append(
            records[(records["group"] == (numbers or [0])[0]) & (records["peer"] < 0) & (records["step"] >= 0)]
        )
    shared = columns[0]["seq"]
    for column in columns[1:]:
        shared = np.intersect1d(shared, column["seq"])
    rows = [column[np.searchsorted(column["seq"], shared)] for column in columns]
    arrivals = np.stack([row["enqueued"] for row in rows], axis=1)
    steps, first, number = np.unique(rows[0]["step"], return_index=True, return_inverse=True)
    late = (arrivals - arrivals.min(axis=1, keepdims=True, initial=2**62)) / 1e9
    sums = np.stack([np.bincount(number, weights=late[:, i], minlength=len(steps)) for i in range(len(ranks))], axis=1)
    seconds = float(np.median(np.diff(arrivals.min(axis=1, initial=2**62)[first]))) / 1e9 if len(steps) > 1 else 0.0
    return steps[1:-1], sums[1:-1], seconds


def read_stragglers(run_dir: Path | str) -> list[Straggler]:
    """What RUN/stragglers.jsonl says, oldest first."""
    path = Path(run_dir) / "stragglers.jsonl"
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [Straggler(**{name: record[name] for name in record if name != "time"}) for record in records]
