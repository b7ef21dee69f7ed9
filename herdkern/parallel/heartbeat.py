"""A sign of life of every rank: RUN/heartbeat/rank-N.json, read by the supervisor and by `herdkern top`.

Source: Llama 3 section 3.3.4 (a hung rank must be found before its collective's timeout).
"""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Phase = Literal["data", "step", "save", "evaluate"]
PHASES: tuple[Phase, ...] = ("data", "step", "save", "evaluate")
INTERVAL = 1.0  # seconds between two files of a rank
LONG_PHASES = ("save", "evaluate")  # their start and end are always told: the supervisor is more patient with them
_FORGET = 0.99  # of the longest pause, a beat


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The last sign of life of a rank.

    time: seconds since 1970. longest: the longest of the recent pauses between beats, in seconds, without saves and
    evaluations.
    """

    rank: int
    step: int
    phase: str
    time: float
    longest: float
    pid: int
    host: str


class Heartbeat:
    """The signs of life of this rank in `run_dir`. A beat costs a microsecond, and once a second one small file.

    Among several ranks it also starts this rank's flight recorder, which `herdkern flight` and the supervisor read.

    clock: seconds since 1970; for tests.
    """

    def __init__(self, run_dir: Path | str, rank: int, *, clock: Callable[[], float] = time.time) -> None:
        if rank < 0:
            raise ValueError(f"Heartbeat: rank must be at least 0, got {rank}")
        self.rank = rank
        self.path = _folder(run_dir) / f"rank-{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._about = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._written = self._last = 0.0
        self._longest = 0.0
        self._phase = ""
        self._recorder = _recorder(run_dir, rank)

    def beat(self, *, step: int, phase: Phase) -> None:
        """This rank works on `step` and is at `phase` of it. Written at most once a second, or as a long phase turns.

        Raises: ValueError for an unknown phase. A disk that is full or away is no reason to stop: nothing is raised.
        """
        if phase not in PHASES:
            raise ValueError(f"Heartbeat: phase must be one of {', '.join(PHASES)}, got {phase!r}")
        now = self._clock()
        if self._last:
            pause = 0.0 if self._phase in LONG_PHASES else now - self._last
            self._longest = max(pause, self._longest * _FORGET)
        if self._recorder is not None:
            self._recorder.ring.set_step(step)
        self._last = now
        turned = phase != self._phase and (phase in LONG_PHASES or self._phase in LONG_PHASES)
        self._phase = phase
        if turned or not 0 <= now - self._written < INTERVAL:
            self._written = now
            self._write(Beat(step=step, phase=phase, time=now, longest=self._longest, **self._about))  # type: ignore[arg-type]

    def close(self) -> None:
        """The run has ended well: nobody will ask for this rank's flight recorder. The last beat stays."""
        if self._recorder is not None:
            from herdkern.parallel.flight_recorder import disarm

            disarm()
            self._recorder = None

    def _write(self, beat: Beat) -> None:
        tmp = self.path.with_name(self.path.name + ".tmp")
        try:
            tmp.write_text(json.dumps(asdict(beat)))  # no sync: after a crash of the machine nobody asks for it
            os.replace(tmp, self.path)
        except OSError:
            pass


def _recorder(run_dir: Path | str, rank: int) -> Any:
    """The armed flight recorder, or None where there is one rank only (or no torch: then there are no collectives).

    Warns where there is no room for it: no reason to stop, either.
    """
    try:
        import torch.distributed as dist
    except ImportError:
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    from herdkern.parallel.flight_recorder import arm

    try:
        return arm(run_dir, rank, dist.get_world_size())
    except OSError as e:
        warnings.warn(f"Heartbeat: no flight recorder for rank {rank}: {e}", stacklevel=3)
        return None


def read_beats(run_dir: Path | str) -> dict[int, Beat]:
    """The last beat of every rank that has one, by rank. Files that are not whole are left out."""
    beats = {}
    for path in sorted(_folder(run_dir).glob("rank-*.json")):
        try:
            beat = Beat(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        beats[beat.rank] = beat
    return beats


def clear_beats(run_dir: Path | str) -> None:
    """Forget the ranks of an earlier start, so that none of them counts as hung."""
    for path in _folder(run_dir).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def _folder(run_dir: Path | str) -> Path:
    return Path(run_dir) / "heartbeat"
