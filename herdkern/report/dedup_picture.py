"""The figures of a dedup run's report as one SVG: what each step left, the S-curve, cluster sizes, similarities."""

from collections.abc import Iterator
from pathlib import Path

from herdkern.engine import atomic_file
from herdkern.report.dedup import DedupRecord, read_dedup, s_curve, similarity_histogram, size_bars, steps_of
from herdkern.report.figures import HEIGHT, WIDTH
from herdkern.report.html import escape
from herdkern.report.sections import words

_GAP, _TITLE, _ROW, _NAME, _VALUE = 24, 26, 30, 150, 110
_STYLE = """text{font:12px system-ui,sans-serif;fill:#5d646d}.title{font-weight:650;font-size:14px;fill:#1c1e21}
.grid{stroke:#ecece8}.line{fill:none;stroke:#2f6db5;stroke-width:2}.band{fill:#f1f1ed}.fill{fill:#2f6db5}
.track{fill:#f1f1ed}.keep{fill:#2e8b64}.drop{fill:#c4574f}"""

_Bar = tuple[str, str, list[tuple[str, float]]]  # name, value, (class, share of the track) from the left


def _funnel(record: DedupRecord) -> Iterator[_Bar]:
    steps = steps_of(record)
    begin = previous = (steps[0].docs_in or steps[0].docs_out) if steps else 0
    if not begin:
        return
    for name, kept in [("read", begin), *((words(step.name), step.docs_out) for step in steps)]:
        lost = max(previous - kept, 0)
        yield name, f"{kept:,} · {kept / begin:.1%}", [("keep", kept / begin), ("drop", lost / begin)]
        previous = kept


def _draw_bars(bars: list[_Bar]) -> str:
    parts = []
    track = WIDTH - _NAME - _VALUE
    for number, (name, value, shares) in enumerate(bars):
        y = 10 + number * _ROW
        parts.append(f'<text text-anchor="end" x="{_NAME - 10}" y="{y + 12}">{escape(name)}</text>')
        parts.append(f'<rect class="track" x="{_NAME}" y="{y}" width="{track}" height="15" rx="4"/>')
        left = float(_NAME)
        for kind, share in shares:
            parts.append(f'<rect class="{kind}" x="{left:.1f}" y="{y}" width="{share * track:.1f}" height="15"/>')
            left += share * track
        parts.append(f'<text x="{_NAME + track + 10}" y="{y + 12}">{escape(value)}</text>')
    return "".join(parts)


def _panels(record: DedupRecord) -> Iterator[tuple[str, str]]:
    if funnel := list(_funnel(record)):
        yield "What each step left", _draw_bars(funnel)
    for settings in (record.run.config.get("steps") or {}).values():
        if isinstance(settings, dict) and {"num_bands", "rows_per_band"} <= settings.keys():
            bands = f"{settings['num_bands']} bands of {settings['rows_per_band']} rows"
            yield f"Which pairs are compared: {bands}", s_curve(settings)
    for stage in record.run.stages:
        if sizes := stage.counters.get("cluster_sizes"):
            rows = size_bars(sizes)
            most = max(length for _, length, _ in rows)
            drawn = _draw_bars([(label, value, [("fill", length / most)]) for label, length, value in rows])
            yield "How many clusters are how large (logarithmic)", drawn
    for values in record.similarities.values():
        if values and min(values) < 1.0:
            yield "How similar the dropped are to the kept", similarity_histogram(values)


def dedup_picture(record: DedupRecord) -> str:
    """An SVG with the panels in two columns; nothing in it is from outside."""
    parts = []
    height = _TITLE + HEIGHT + _GAP
    for number, (title, body) in enumerate(_panels(record)):
        x, y = _GAP + number % 2 * (WIDTH + _GAP), _GAP + number // 2 * height
        parts.append(f'<text class="title" x="{x}" y="{y + 10}">{escape(title)}</text>')
        place = f'<svg x="{x}" y="{y + _TITLE}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(body.replace("<svg ", place, 1) if "<svg " in body else f"{place}>{body}</svg>")
    rows = (len(parts) // 2 + 1) // 2
    size = f'width="{2 * (WIDTH + _GAP) + _GAP}" height="{_GAP + rows * height}"'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{white}{"".join(parts)}</svg>\n'


def write_dedup_picture(run_dir: Path | str, out: Path | str) -> Path:
    """Write the picture of a dedup run to `out`, atomically. Raises: FileNotFoundError if run_dir is no run folder."""
    path = Path(out)
    text = dedup_picture(read_dedup(run_dir))
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "replace"))
    return path
