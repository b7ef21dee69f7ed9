"""RUN/restarts.jsonl: when a run was started, what broke it, who was at fault; and the effective training time from it.

Effective training time is the time of the steps that count over the wall clock since the first start: restarts, steps
done again, saving, evaluation and waiting are what it leaves out. Source: Llama 3 section 3.3.4.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdkern.train.metrics import MetricsLog


class RestartLog:
    """The log of starts and failures. Every line: time (seconds since 1970), event, and what belongs to it.

    Events: start (ranks, step: the checkpoint that it goes on from), failure (kind, ranks, reason, exit_codes, step),
    stopped (a signal: the ranks ended by themselves), finished.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / "restarts.jsonl"
        self._lines = MetricsLog(self.path)

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Add one line, on disk when this returns; returns it."""
        record = {"time": time.time(), "event": event, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines.append(record)
        self._lines.sync()
        return record

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none where there is no log."""
        return self._lines.read()


@dataclass(frozen=True, kw_only=True)
class EffectiveTime:
    """Seconds of steps that count, of the wall clock, and what was in between."""

    useful: float
    wall: float
    steps: int
    lost_steps: int
    failures: int

    @property
    def share(self) -> float:
        """useful / wall, 0 before anything has run."""
        return min(1.0, self.useful / self.wall) if self.wall > 0 else 0.0

    def __str__(self) -> str:
        failures = "1 failure" if self.failures == 1 else f"{self.failures} failures"
        return (
            f"effective training time {self.share:.1%}: {self.steps} steps of {self.useful:.0f} s in "
            f"{self.wall:.0f} s, {failures}, {self.lost_steps} steps done again"
        )


def effective_time(run_dir: Path | str, *, now: float | None = None) -> EffectiveTime:
    """Of the run in `run_dir`, from its metrics.jsonl and restarts.jsonl (without supervisor there is no such file).

    now: the end of the wall clock of a run that goes on, seconds since 1970; by default the last line of either file.
    """
    run_dir = Path(run_dir)
    steps = [record for record in MetricsLog(run_dir / "metrics.jsonl").read() if "seconds" in record]
    events = RestartLog(run_dir).read()
    times = [record["time"] for record in (*steps, *events) if "time" in record]
    if not times:
        return EffectiveTime(useful=0.0, wall=0.0, steps=0, lost_steps=0, failures=0)
    starts = [record["time"] - record["seconds"] for record in steps[:1] if "time" in record]
    begin = min([*starts, *[event["time"] for event in events[:1]]], default=times[0])
    ended = bool(events) and events[-1]["event"] in ("finished", "stopped")
    end = max(times) if now is None or ended else now
    lost, reached = 0, None
    for event in events:
        if event["event"] in ("failure", "stopped"):
            reached = event.get("step")
        elif event["event"] == "start" and reached is not None:
            lost += max(0, reached - event["step"])
            reached = None
    return EffectiveTime(
        useful=sum(record["seconds"] for record in steps),
        wall=end - begin,
        steps=len(steps),
        lost_steps=lost,
        failures=sum(event["event"] == "failure" for event in events),
    )
