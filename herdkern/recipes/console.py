"""What a run says on the terminal: a line for each stage, what changed since the last run, the summary at its end."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herdkern.engine import StageResult, read_json, write_json_atomic


class Console:
    """Prints a line for every stage as it ends and keeps the wall seconds of each in RUN/timings.json."""

    def __init__(self, run_dir: Path, num_stages: int) -> None:
        self.path = run_dir / "timings.json"
        self.num_stages = num_stages
        self.number = 0
        self.did_something = False
        self.timings: dict[str, float] = read_json(self.path) if self.path.is_file() else {}

    def stage(self, name: str) -> "StageLine":
        """A context for one stage; tell it what came out."""
        self.number += 1
        return StageLine(self, name)

    def note(self, text: str) -> None:
        """A line that belongs to no stage."""
        print(text, flush=True)


class StageLine:
    """One stage while it runs: `with console.stage("extract") as line: line.done(result)`."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.text, self.skipped = "", False

    def __enter__(self) -> "StageLine":
        self.started = time.perf_counter()
        return self

    def done(self, result: StageResult | None = None, text: str = "", *, skipped: bool = False) -> None:
        """What the stage did; without text, the counters of its result."""
        self.skipped = skipped or (result is not None and result.skipped)
        self.text = text or (counters_line(result.counters) if result is not None else "")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        console, seconds = self.console, time.perf_counter() - self.started
        if not self.skipped:
            console.did_something = True
            console.timings[self.name] = round(seconds, 3)
            write_json_atomic(console.path, console.timings)
        when = "done before" if self.skipped else f"{seconds:.1f} s"
        place = f"[{console.number:2}/{console.num_stages}]"
        console.note(f"{place} {self.name.replace('_', ' '):20} {self.text:64} {when:>11}")


def counters_line(counters: dict[str, Any]) -> str:
    """ "470 of 500 documents, 6.1 MB; dropped: no text 30" from a stage's counters."""
    docs_in, docs_out = counters.get("docs_in"), counters.get("docs_out")
    if docs_out is None:
        return ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in counters.items() if isinstance(v, int))
    size = counters.get("bytes_out") or counters.get("text_bytes") or 0
    line = f"{docs_out:,} of {docs_in:,} documents" if docs_in else f"{docs_out:,} records"
    line += f", {size / 1e6:.1f} MB" if size else ""
    dropped = sorted((counters.get("dropped") or {}).items(), key=lambda item: -item[1])
    if dropped:
        line += "; " + ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in dropped[:2])
        line += f", {len(dropped) - 2} more" if len(dropped) > 2 else ""
    return line


def changes(before: Any, after: Any, name: str = "") -> list[str]:
    """What differs between two nested configurations: "train.steps: 200 -> 2000" for each leaf."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        parts = [changes(before.get(key), after.get(key), f"{name}.{key}" if name else str(key)) for key in keys]
        return [text for part in parts for text in part]
    old, new = json.dumps(before, sort_keys=True), json.dumps(after, sort_keys=True)
    return [] if old == new else [f"{name}: {shortened(old)} -> {shortened(new)}"]


def shortened(text: str, limit: int = 60) -> str:
    """`text`, or its beginning if it is long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def summary(rows: Sequence[tuple[str, str]]) -> str:
    """A frame around (name, value) lines."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, *lines, rule])
