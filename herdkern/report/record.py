"""What a run folder says about itself, read for the report. Every part is optional: a begun run has a report too."""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from herdkern.data.document import BadRecord, Document, read_documents
from herdkern.engine import read_json

EXAMPLES_PER_REASON = 3
SCAN_PER_FILE = 5000  # dropped documents looked at in each file when examples are chosen
SCAN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A data stage: what went in and came out (documents, bytes of text), what it dropped by reason, and its time."""

    name: str
    docs_in: int = 0
    docs_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    num_tasks: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Counts over the token shards of one split or source."""

    name: str
    num_tokens: int
    num_docs: int
    text_bytes: int
    lengths: np.ndarray  # (num_docs,) int64, tokens of each document
    counts: np.ndarray  # (n_vocab,) int64, occurrences of each token id


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that the report shows."""

    run_dir: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    examples: dict[str, dict[str, list[Document]]] = field(default_factory=dict)  # stage -> reason -> documents
    pairs: list[dict[str, Any]] = field(default_factory=list)
    removed_lines: list[tuple[str, int]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[TokenStats] = field(default_factory=list)
    vocabulary: list[bytes] = field(default_factory=list)


def read_run(run_dir: Path | str) -> RunRecord:
    """The record of a run folder.

    Raises: FileNotFoundError if there is no such folder or it holds no run (no config.json and no journal.jsonl).
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file() and not (run_dir / "journal.jsonl").is_file():
        raise FileNotFoundError(
            f"read_run: run_dir must be a run folder (with config.json or journal.jsonl), got {run_dir}"
        )
    stages = read_stages(run_dir / "journal.jsonl")
    return RunRecord(
        run_dir=run_dir,
        config=_json_or_empty(run_dir / "config.json"),
        environment=_json_or_empty(run_dir / "environment.json"),
        evaluation=_json_or_empty(run_dir / "evaluation.json"),
        timings=_json_or_empty(run_dir / "timings.json"),
        stages=stages,
        examples={stage.name: dropped_examples(run_dir / "data" / stage.name) for stage in stages},
        pairs=list(read_lines(run_dir, "pairs.jsonl", 20)),
        removed_lines=read_removed_lines(run_dir),
        metrics=list(read_lines(run_dir, "metrics.jsonl")),
        samples=list(read_lines(run_dir, "samples.jsonl")),
        tokens=read_tokens(run_dir),
        vocabulary=read_vocabulary(run_dir),
    )


def _json_or_empty(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def _find(run_dir: Path, name: str) -> list[Path]:
    """`name` in the run folder itself, or else in the task folders of its stages, in order."""
    if (run_dir / name).exists():
        return [run_dir / name]
    return [path for path in sorted(run_dir.glob(f"data/*/task-*/{name}")) if path.parent.suffix != ".tmp"]


def read_lines(run_dir: Path, name: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of every JSON-lines file called `name` in the run, at most `limit`; a torn line ends its file."""
    given = 0
    for path in _find(run_dir, name):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if limit is not None and given >= limit:
                    return
                try:
                    value = json.loads(line)
                except ValueError:
                    break
                if isinstance(value, dict):
                    given += 1
                    yield value


def read_stages(journal: Path) -> list[Stage]:
    """The stages of a journal in the order of their first task; a task that ran again counts once, as it ran last."""
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    if journal.is_file():
        for entry in read_lines(journal.parent, journal.name):
            tasks[str(entry.get("stage", "")), str(entry.get("task", ""))] = entry
    stages: dict[str, Stage] = {}
    for (name, _), entry in tasks.items():
        stages[name] = _add_task(stages.get(name, Stage(name=name)), entry)
    return [stage for stage in stages.values() if (journal.parent / "data" / stage.name).is_dir()]


def _add_task(stage: Stage, entry: dict[str, Any]) -> Stage:
    counters = entry.get("counters") or {}
    dropped = dict(stage.dropped)
    for reason, count in (counters.get("dropped") or {}).items():
        dropped[reason] = dropped.get(reason, 0) + int(count)
    totals = dict(stage.counters)
    for key, value in counters.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            totals[key] = totals.get(key, 0) + value
        elif isinstance(value, dict):
            totals[key] = _summed(totals.get(key, {}), value)
    number = {key: int(totals.get(key, 0)) for key in ("docs_in", "docs_out", "bytes_in", "bytes_out")}
    number["bytes_out"] = number["bytes_out"] or int(totals.get("text_bytes", 0))
    return Stage(
        name=stage.name,
        **number,
        dropped=dropped,
        counters=totals,
        seconds=stage.seconds + float(entry.get("seconds", 0.0)),
        num_tasks=stage.num_tasks + 1,
    )


def _summed(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    result = dict(total)
    for key, value in more.items():
        if isinstance(value, (int, float)):
            result[key] = result.get(key, 0) + value
    return result


def dropped_examples(stage_dir: Path) -> dict[str, list[Document]]:
    """A few dropped documents for each reason, spread over the stage's files; text longer than 40 bytes preferred."""
    found: dict[str, list[Document]] = {}
    for path in sorted(stage_dir.glob("task-*/dropped.jsonl.zst"))[:SCAN_FILES]:
        for number, document in enumerate(read_documents(path, on_bad=_ignore)):
            reason = str(document.meta.get("reason", "unknown"))
            kept = found.setdefault(reason, [])
            if len(kept) < EXAMPLES_PER_REASON:
                kept.append(document)
            elif len(kept[-1].text) < 40 <= len(document.text):
                kept[-1] = document
            if number >= SCAN_PER_FILE:
                break
    return found


def _ignore(bad: BadRecord) -> None:
    """A record of the report's examples that cannot be read is left out."""


def read_removed_lines(run_dir: Path, limit: int = 40) -> list[tuple[str, int]]:
    """The most frequent lines that line dedup removed, with how often: (text, count)."""
    totals: dict[str, int] = {}
    for entry in read_lines(run_dir, "removed_lines.jsonl"):
        text, count = str(entry.get("line", entry.get("text", ""))), int(entry.get("count", 1))
        totals[text] = max(totals.get(text, 0), count)
    return sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:limit]


def read_tokens(run_dir: Path) -> list[TokenStats]:
    """Statistics of every folder of token shards below RUN/tokens, named by their path there."""
    groups: dict[str, list[Path]] = {}
    for manifest in sorted((run_dir / "tokens").rglob("manifest.json")):
        groups.setdefault(str(manifest.parent.parent.relative_to(run_dir / "tokens")), []).append(manifest.parent)
    return [_token_stats(name, shards) for name, shards in groups.items()]


def _token_stats(name: str, shards: Sequence[Path]) -> TokenStats:
    manifests = [read_json(shard / "manifest.json") for shard in shards]
    n_vocab = max(int(manifest.get("n_vocab", 0)) for manifest in manifests)
    counts = np.zeros(n_vocab, np.int64)
    lengths = []
    for shard in shards:
        tokens = np.load(shard / "tokens.npy", mmap_mode="r")
        for begin in range(0, len(tokens), 1 << 22):
            counts += np.bincount(tokens[begin : begin + (1 << 22)], minlength=n_vocab)[:n_vocab]
        lengths.append(np.diff(np.load(shard / "cu_seqlens.npy")))
    return TokenStats(
        name=name,
        num_tokens=sum(int(m.get("num_tokens", 0)) for m in manifests),
        num_docs=sum(int(m.get("num_docs", 0)) for m in manifests),
        text_bytes=sum(int(m.get("text_bytes", 0)) for m in manifests),
        lengths=np.concatenate(lengths) if lengths else np.zeros(0, np.int64),
        counts=counts,
    )


def read_vocabulary(run_dir: Path) -> list[bytes]:
    """The byte string of each mergeable rank, from tokenizer.model (base64, rank); empty if there is none."""
    for path in _find(run_dir, "tokenizer/tokenizer.model"):
        ranks = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        if all(len(pair) == 2 for pair in ranks):
            return [base64.b64decode(token) for token, _ in sorted(ranks, key=lambda pair: int(pair[1]))]
    return []


def finite(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the metrics rows that hold a finite number under `key`."""
    pairs = [
        (float(row["step"]), float(row[key]))
        for row in rows
        if _is_number(row.get("step")) and _is_number(row.get(key))
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
