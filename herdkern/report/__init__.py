"""Self-contained HTML reports of run folders: the data funnel, tokens, curves, samples, configuration."""

from pathlib import Path

from herdkern.engine import atomic_file
from herdkern.report import sections
from herdkern.report.html import page
from herdkern.report.record import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render", "write_report"]

SECTIONS = (
    ("summary", "Summary", sections.summary),
    ("evaluation", "Held-out text", sections.evaluation),
    ("samples", "Samples", sections.samples),
    ("training", "Training", sections.training),
    ("funnel", "Data funnel", sections.funnel),
    ("composition", "Composition", sections.composition),
    ("dropped", "Dropped text", sections.dropped),
    ("duplicates", "Duplicates", sections.duplicates),
    ("tokens", "Tokens", sections.tokens),
    ("timings", "Time", sections.timings),
    ("settings", "Settings", sections.settings),
)


def render(record: RunRecord) -> str:
    """The HTML page of a run's record; a section that has nothing to show is left out."""
    bodies = [(anchor, heading, section(record)) for anchor, heading, section in SECTIONS]
    name = str(record.config.get("name") or record.run_dir.name)
    lead = "From raw records to a trained model: what was kept, what was dropped and why, and what the model learned."
    shown = [(anchor, heading, body) for anchor, heading, body in bodies if body]
    version = str(record.environment.get("herdkern", ""))
    return page(
        f"herdkern · {name}",
        lead,
        shown,
        f"Written by herdkern {version}. No script, no request: one file.".replace("  ", " "),
    )


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of `run_dir` to `out` (RUN/report.html by default), atomically; returns where it is.

    Raises: FileNotFoundError if run_dir is not a run folder.
    """
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    text = render(read_run(run_dir))
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a lone surrogate in a metrics file is no reason to fail
    return path
