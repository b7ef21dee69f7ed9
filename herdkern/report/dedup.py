"""The report of a dedup run: what each step left, the S-curve and the clusters, examples, removed lines, URLs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from herdkern.data.document import BadRecord, read_documents
from herdkern.engine import atomic_file
from herdkern.report import sections
from herdkern.report.figures import Series, bars, histogram, line_chart
from herdkern.report.html import cards, details, escape, grid, page, panel, side_by_side, table
from herdkern.report.record import SCAN_FILES, SCAN_PER_FILE, RunRecord, Stage, read_lines, read_run
from herdkern.report.sections import duration, size, words

MAX_ROWS = 20
OPEN_EXAMPLES = 2  # so many clusters are open when the page is
_SIMILARITY_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class DedupRecord:
    """A run's record with what only dedup leaves behind, of the dropped documents that were looked at."""

    run: RunRecord
    urls: list[tuple[str, int]] = field(default_factory=list)  # (kept URL, dropped for it)
    hosts: list[tuple[str, int]] = field(default_factory=list)
    similarities: dict[str, list[float]] = field(default_factory=dict)  # stage -> similarity to the kept document
    removed_lines: list[dict[str, Any]] = field(default_factory=list)


def read_dedup(run_dir: Path | str) -> DedupRecord:
    """The record of a run folder. Raises: FileNotFoundError if it holds no run."""
    run = read_run(run_dir)
    urls: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    similarities: dict[str, list[float]] = {}
    for stage in run.stages:
        if not stage.dropped:
            continue
        for meta in _dropped_meta(run.run_dir / "data" / stage.name):
            if "duplicate_url" in stage.dropped:
                urls[str(meta.get("kept_url", ""))] += 1
                hosts[_host(str(meta.get("kept_url", "")))] += 1
            similarity = meta.get("similarity")
            if isinstance(similarity, float) and math.isfinite(similarity):
                similarities.setdefault(stage.name, []).append(similarity)
    lines: dict[str, dict[str, Any]] = {}
    for entry in read_lines(run.run_dir, "removed_lines.jsonl"):
        text = str(entry.get("line", ""))
        if text not in lines or int(entry.get("count", 0)) > int(lines[text].get("count", 0)):
            lines[text] = entry
    top = sorted(lines.values(), key=lambda entry: (-int(entry.get("count", 0)), str(entry.get("line", ""))))
    return DedupRecord(
        run=run, urls=_top(urls), hosts=_top(hosts), similarities=similarities, removed_lines=top[: 2 * MAX_ROWS]
    )


def _dropped_meta(stage_dir: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(stage_dir.glob("task-*/dropped.jsonl.zst"))[:SCAN_FILES]:
        for number, document in enumerate(read_documents(path, on_bad=_ignore)):
            if number >= SCAN_PER_FILE:
                break
            found.append(document.meta)
    return found


def _ignore(bad: BadRecord) -> None:
    """A dropped document that cannot be read is left out of the report."""


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _top(counts: Counter[str]) -> list[tuple[str, int]]:
    rows = [(text, count) for text, count in counts.items() if text]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:MAX_ROWS]


def steps_of(record: DedupRecord) -> list[Stage]:
    """The stages that took documents in and let documents out, in their order."""
    return [stage for stage in record.run.stages if stage.docs_in or stage.docs_out]


def summary(record: DedupRecord) -> str:
    """The figures a reader looks for first."""
    steps = steps_of(record)
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    docs_in, bytes_in = first.docs_in or first.docs_out, first.bytes_in or first.bytes_out
    items = [(f"{docs_in:,}", "documents read"), (f"{last.docs_out:,}", "documents kept")]
    if docs_in:
        items.append((f"{1 - last.docs_out / docs_in:.1%}", "of the documents dropped"))
    if bytes_in:
        items.append((f"{1 - last.bytes_out / bytes_in:.1%}", "of the text removed"))
    clusters = sum(int(s.counters.get("clusters", 0)) for s in record.run.stages if "cluster_sizes" in s.counters)
    if clusters:
        items.append((f"{clusters:,}", "clusters of copies"))
    lines = sum(int(s.counters.get("lines_removed", 0)) for s in steps)
    if lines:
        items.append((f"{lines:,}", "lines removed"))
    seconds = sum(stage.seconds for stage in record.run.stages)
    items.append((duration(seconds), "time of all tasks"))
    return cards(items)


def funnel(record: DedupRecord) -> str:
    """Documents and bytes of text after each step."""
    steps = steps_of(record)
    if not steps:
        return ""
    first = steps[0]
    panels = []
    for heading, before, after, show in (
        ("Documents", first.docs_in, [s.docs_out for s in steps], lambda n: f"{n:,}"),
        ("Text", first.bytes_in, [s.bytes_out for s in steps], size),
    ):
        begin = before or after[0]
        if not begin:
            continue
        rows = [_funnel_row("read", begin, 0, begin, show)]
        previous = begin
        for step, kept in zip(steps, after, strict=True):
            rows.append(_funnel_row(words(step.name), kept, max(previous - kept, 0), begin, show))
            previous = kept
        panels.append(panel(heading, f'<div class="bars funnel">{"".join(rows)}</div>'))
    legend = '<div class="legend"><span class="key"><i class="keep"></i>kept</span>'
    legend += '<span class="key"><i class="drop"></i>dropped in this step</span></div>'
    cells = [
        [
            words(s.name),
            f"{s.docs_in:,}",
            f"{s.docs_out:,}",
            f"{s.docs_in - s.docs_out:,}" if s.docs_in else "",
            size(s.bytes_in) if s.bytes_in else "",
            size(s.bytes_out) if s.bytes_out else "",
            ", ".join(f"{words(reason)} {count:,}" for reason, count in sorted(s.dropped.items())),
        ]
        for s in steps
    ]
    head = ["step", "documents in", "out", "dropped", "bytes in", "out", "reasons"]
    return grid(panels) + legend + panel("", table(head, cells, numeric=(1, 2, 3, 4, 5)))


def _funnel_row(name: str, kept: int, lost: int, most: int, show: Any) -> str:
    label = f"{show(kept)} · {kept / most:.1%}"
    return (
        f'<div class="row"><span class="name">{escape(name)}</span><span class="track">'
        f'<i class="keep" style="width:{kept / most * 100:.2f}%"></i>'
        f'<i class="drop" style="width:{lost / most * 100:.2f}%"></i></span>'
        f'<span class="value">{escape(label)}</span></div>'
    )


def clusters(record: DedupRecord) -> str:
    """The S-curve of the setting, how large clusters are, how similar what was dropped is to what was kept."""
    panels = []
    for name, settings in (record.run.config.get("steps") or {}).items():
        if isinstance(settings, dict) and {"num_bands", "rows_per_band"} <= settings.keys():
            panels.append(_s_curve(name, settings))
    for stage in record.run.stages:
        sizes = stage.counters.get("cluster_sizes")
        if isinstance(sizes, dict) and sizes:
            panels.append(_sizes(stage, sizes))
    for name, values in record.similarities.items():
        if values and min(values) < 1.0:
            panels.append(_similarities(name, values))
    return grid(panels) if panels else ""


def s_curve(settings: dict[str, Any]) -> str:
    """The probability that two documents are compared over their similarity, for the bands of a MinHash step."""
    bands, rows = int(settings["num_bands"]), int(settings["rows_per_band"])
    threshold = float(settings.get("min_similarity") or 0.0)
    x = [i / 200 for i in range(201)]
    y = [1.0 - (1.0 - s**rows) ** bands for s in x]
    shade = [(threshold, 1.0, "near-duplicates")] if 0.0 < threshold < 1.0 else []
    series = [Series(label="compared", x=x, y=y)]
    return line_chart(
        "Probability of being compared", series, x_title="Jaccard similarity", from_zero=True, bands=shade
    )


def _s_curve(name: str, settings: dict[str, Any]) -> str:
    bands, rows = int(settings["num_bands"]), int(settings["rows_per_band"])
    threshold = float(settings.get("min_similarity") or 0.0)
    chart = s_curve(settings)
    found = 1.0 - (1.0 - threshold**rows) ** bands if threshold else 0.0
    note = f"{words(name)}: {bands} bands of {rows} rows: 1 − (1 − s^{rows})^{bands}."
    note += f" At the threshold {threshold:g} a pair is compared with probability {found:.3f}." if threshold else ""
    verify = settings.get("verify")
    if verify:
        told = {"exact": "exact shingle sets", "signature": "signatures", "none": "nothing: what shares a band is one"}
        note += f" Verified by {told.get(verify, verify)}."
    return panel("Which pairs are compared", chart, note)


def size_bars(sizes: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(label, length of the bar, count) of each class of cluster sizes; the bars are logarithmic."""
    bins = sorted((int(low), int(count)) for low, count in sizes.items())
    return [(f"{low} to {2 * low - 1} documents", math.log10(count + 1), f"{count:,}") for low, count in bins]


def _sizes(stage: Stage, sizes: dict[str, Any]) -> str:
    rows = size_bars(sizes)
    most = max(length for _, length, _ in rows)
    largest = int(stage.counters.get("largest_cluster", 0))
    note = f"{words(stage.name.partition('.')[0])}. The bars are logarithmic."
    note += f" The largest cluster has {largest:,} documents." if largest else ""
    return panel("How many clusters are how large", bars(rows, most=most), note)


def similarity_histogram(values: Sequence[float]) -> str:
    """How often which similarity of a dropped document to the kept one was met."""
    low = math.floor(min(values) * _SIMILARITY_STEPS) / _SIMILARITY_STEPS
    num_bins = max(1, round((1.0 - low) * 2 * _SIMILARITY_STEPS))
    edges = [low + (1.0 - low) * i / num_bins for i in range(num_bins + 1)]
    counts = [0] * num_bins
    for value in values:
        counts[min(num_bins - 1, max(0, int((value - low) / (1.0 - low) * num_bins)))] += 1
    return histogram("Similarity to the kept document", edges, counts, x_title="similarity to the kept document")


def _similarities(name: str, values: Sequence[float]) -> str:
    chart = similarity_histogram(values)
    return panel("How similar the dropped are to the kept", chart, f"{words(name)}: {len(values):,} dropped documents.")


def examples(record: DedupRecord) -> str:
    """Members of clusters side by side with what differs marked, those of one kept document together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for pair in record.run.pairs:
        groups.setdefault(str(pair.get("kept_id", "")), []).append(pair)
    parts = []
    for number, pairs in enumerate(groups.values()):
        first = pairs[0]
        title = str(first.get("kept_url") or first.get("kept_id") or "cluster")[-100:]
        values = [p["similarity"] for p in pairs if isinstance(p.get("similarity"), float)]
        note = f"similarity {', '.join(f'{value:.2f}' for value in values)}" if values else ""
        body = "".join(map(_pair, pairs))
        parts.append(details(title, note, body, is_open=number < OPEN_EXAMPLES))
    if not parts:
        return ""
    note = "From the least to the most similar, cut to where the texts begin to differ. Red is in the kept document "
    note += "alone, green in the dropped one."
    return panel("", "".join(parts), note)


def _pair(pair: dict[str, Any]) -> str:
    left, right = side_by_side(str(pair.get("kept", "")), str(pair.get("dropped", "")))
    columns = []
    for which, text in (("kept", left), ("dropped", right)):
        about = " · ".join(
            str(pair.get(f"{which}_{name}", "")) for name in ("id", "url") if pair.get(f"{which}_{name}")
        )
        columns.append(f'<div><div class="url">{which}: {escape(about[:300])}</div><pre>{text}</pre></div>')
    return f'<div class="pair">{"".join(columns)}</div>'


def removed_lines(record: DedupRecord) -> str:
    """The most frequent removed lines with how often they occurred in their bucket."""
    rows = [(str(e.get("line", ""))[:110], int(e.get("count", 0))) for e in record.removed_lines]
    if not rows:
        return ""
    return panel("", bars([(text or " ", count, f"{count:,}") for text, count in rows], colour="drop"))


def urls(record: DedupRecord) -> str:
    """URLs and hosts of which most documents were dropped."""
    panels = []
    for heading, rows in (("URLs", record.urls), ("Hosts", record.hosts)):
        if rows:
            panels.append(
                panel(heading, bars([(text[-90:], count, f"{count:,}") for text, count in rows], colour="c2"))
            )
    note = '<p class="note">Dropped because a newer document of the same URL is kept, '
    note += f"counted in the first {SCAN_PER_FILE:,} dropped documents of each shard.</p>"
    return note + grid(panels) if panels else ""


SECTIONS = (
    ("summary", "Summary", summary),
    ("funnel", "What each step left", funnel),
    ("clusters", "Clusters", clusters),
    ("examples", "Clusters side by side", examples),
    ("lines", "Removed lines", removed_lines),
    ("urls", "URLs", urls),
    ("dropped", "Dropped text", lambda record: sections.dropped(record.run)),
    ("time", "Time", lambda record: sections.timings(record.run)),
    ("settings", "Settings", lambda record: sections.settings(record.run)),
)


def render_dedup(record: DedupRecord) -> str:
    """The HTML page of a dedup run; a section that has nothing to show is left out."""
    shown = [(anchor, heading, body) for anchor, heading, make in SECTIONS if (body := make(record))]
    name = str(record.run.config.get("name") or record.run.run_dir.name)
    lead = "Which documents and lines were copies, by what rule, and what is left."
    return page(f"herdkern · {name}", lead, shown, "Written by herdkern. No script, no request: one file.")


def write_dedup_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a dedup run to `out` (RUN/report.html by default), atomically; returns where it is.

    Raises: FileNotFoundError if run_dir is not a run folder.
    """
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    text = render_dedup(read_dedup(run_dir))
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))
    return path
