"""`herdkern top RUN`: what a run does now, drawn from its files; the run itself is not asked and not slowed.

Reads metrics.jsonl, training.json, heartbeat/, restarts.jsonl, stragglers.jsonl and checkpoints/.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from herdkern.parallel.heartbeat import Beat, read_beats
from herdkern.parallel.stragglers import read_stragglers
from herdkern.train.checkpoint import checkpoint_folders
from herdkern.train.metrics import MetricsLog
from herdkern.train.restarts import RestartLog, effective_time

_BARS = "▁▂▃▄▅▆▇█"
_SILENT = 20.0  # seconds after which a rank's beat is shown as late
_MAX_RANKS = 32


def sparkline(values: list[float], width: int) -> str:
    """`values` as a line of `width` block letters: means of equal shares, the lowest ▁ and the highest █."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[int((mean - low) * scale + 0.5)] for mean in means)


def facts(run_dir: Path | str, *, now: float | None = None) -> dict[str, str]:
    """The lines of the view by their labels; a run that has written little has few.

    Raises: FileNotFoundError if there is no run in the folder.
    """
    run_dir = Path(run_dir)
    now = time.time() if now is None else now
    if not any((run_dir / name).exists() for name in ("metrics.jsonl", "training.json", "restarts.jsonl")):
        raise FileNotFoundError(f"top: run must be a folder in which training has begun, got {run_dir}")
    records = [record for record in MetricsLog(run_dir / "metrics.jsonl").read() if "seconds" in record]
    lines: dict[str, str] = {}
    if records:
        lines |= _of_steps(records, _total_steps(run_dir), now)
    lines["effective"] = str(effective_time(run_dir, now=now if _is_running(run_dir, now) else None))
    events = RestartLog(run_dir).read()
    failures = [event for event in events if event["event"] == "failure"]
    if failures:
        last = failures[-1]
        lines["last failure"] = f"{_ago(now - last['time'])} ago: {last['reason']}"
    saved = checkpoint_folders(run_dir / "checkpoints")
    if saved:
        lines["checkpoint"] = f"{saved[-1].name}, {_ago(now - saved[-1].stat().st_mtime)} ago"
    late = read_stragglers(run_dir)
    if late:
        lines["straggler"] = str(late[-1])
    return lines


def _of_steps(records: list[dict[str, Any]], total: int, now: float) -> dict[str, str]:
    last, recent = records[-1], records[-50:]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    seconds = sum(record["seconds"] for record in recent) / len(recent)
    rate = sum(record.get("tokens_per_s", 0.0) * record["seconds"] for record in recent) / (seconds * len(recent))
    left = max(0, total - last["step"])
    lines = {"step": f"{last['step']}" + (f" of {total}, {_ago(left * seconds)} left" if total else "")}
    if losses:
        lines["loss"] = f"{losses[-1]:.4f}  {sparkline(losses, 48)}"
    if last.get("lr") is not None:
        norm = "" if last.get("grad_norm") is None else f", gradient norm {last['grad_norm']:.3g}"
        lines["rate"] = f"learning rate {last['lr']:.3g}{norm}"
    speed = f"{rate:,.0f} tokens/s, {1e3 * seconds:.0f} ms a step"
    if last.get("mfu") is not None:
        speed += f", MFU {sum(record.get('mfu', 0.0) for record in recent) / len(recent):.1%}"
    lines["speed"] = speed
    if "time" in last:
        lines["step"] += f", {_ago(now - last['time'])} ago"
    return lines


def _total_steps(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "training.json").read_text())["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _is_running(run_dir: Path, now: float) -> bool:
    beats = read_beats(run_dir).values()
    return any(now - beat.time < 60 for beat in beats)


def _ago(seconds: float) -> str:
    seconds = max(0, int(seconds))
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def frame(run_dir: Path | str, *, now: float | None = None) -> Any:
    """One picture of the run, for rich to print. Raises: FileNotFoundError; ImportError naming the extra."""
    try:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text
    except ImportError as e:
        raise ImportError("top: rich must be there: pip install herdkern[top]") from e
    now = time.time() if now is None else now
    body = Table.grid(padding=(0, 2))
    for label, line in facts(run_dir, now=now).items():
        body.add_row(Text(label, style="bold"), Text(line, overflow="fold"))
    parts: list[Any] = [body]
    beats = read_beats(run_dir)
    if beats:
        ranks = Table(box=None, padding=(0, 2), header_style="bold")
        for column in ("rank", "step", "phase", "beat", "host", "pid"):
            ranks.add_column(column)
        for beat in _worst(list(beats.values()), now):
            age = now - beat.time
            style = "red" if age > _SILENT else ""
            row = (beat.rank, beat.step, beat.phase, f"{_ago(age)} ago", beat.host, beat.pid)
            ranks.add_row(*map(str, row), style=style)
        parts.append(ranks)
        if len(beats) > _MAX_RANKS:
            parts.append(Text(f"the {_MAX_RANKS} of {len(beats)} ranks whose beats are oldest"))
    return Panel(Group(*parts), title=str(run_dir), title_align="left")


def _worst(beats: list[Beat], now: float) -> list[Beat]:
    """All by rank, or those whose beats are oldest if they are many."""
    if len(beats) > _MAX_RANKS:
        beats = sorted(beats, key=lambda beat: beat.time - now)[:_MAX_RANKS]
    return sorted(beats, key=lambda beat: beat.rank)


def watch(run_dir: Path | str, *, once: bool, every: float = 1.0) -> None:
    """Draw the run until Ctrl-C; one frame, without colours, if `once` or where there is no terminal."""
    picture = frame(run_dir)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once or not console.is_terminal:
        console.print(picture)
        return
    with Live(picture, console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(frame(run_dir), refresh=True)
