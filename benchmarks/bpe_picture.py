"""Pictures of the tokenizer's benchmarks: a dot for each candidate on a logarithmic axis, ours the large one.

python benchmarks/bpe_picture.py benchmarks/results/bpe_encode.json     draws bpe_encode.svg beside it; also bpe_train
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from herdkern.report.html import escape

OURS = "herdkern"
COLOURS = {
    OURS: "#d1495b",
    "tiktoken": "#1b6ca8",
    "tokenizers": "#9aa5b1",
    "gigatoken": "#6a994e",
    "snaptokens": "#00798c",
    "fastokens": "#edae49",
    "tokie": "#8d6cab",
    "kitoken": "#a0522d",
    "quicktok-v1": "#3d5a80",
    "rs-bpe": "#bc8f8f",
    "rustbpe": "#1b6ca8",
    "bpeasy": "#8d6cab",
    "sentencepiece": "#c9b79c",
}
LEFT, WIDTH, LINE, TOP, GAP = 150, 330, 26, 64, 40


class Panel(NamedTuple):
    """One axis. rows: label and the value of each candidate."""

    title: str
    rows: list[tuple[str, dict[str, float]]]


def picture(panels: list[Panel]) -> str:
    """An SVG with the panels side by side; they share the labels of the first."""
    labels = [label for label, _ in panels[0].rows]
    names = [n for n in COLOURS if any(n in values for panel in panels for _, values in panel.rows)]
    width = LEFT + len(panels) * (WIDTH + GAP)
    parts = []
    for i, name in enumerate(names):
        x = 14 + i * (width - 20) / len(names)
        parts.append(f'<circle cx="{x:.0f}" cy="16" r="{6 if name == OURS else 4}" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 10:.0f}" y="20">{escape(name)}</text>')
    for row, label in enumerate(labels):
        parts.append(f'<text text-anchor="end" x="{LEFT - 12}" y="{TOP + row * LINE + 5}">{escape(label)}</text>')
    for number, panel in enumerate(panels):
        parts += axis(panel, labels, LEFT + number * (WIDTH + GAP))
    style = "<style>text{font:12px system-ui,sans-serif;fill:#333}line{stroke:#dde2e8}</style>"
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    size = f'width="{width}" height="{TOP + len(labels) * LINE + 24}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{white}{"".join(parts)}</svg>\n'


def axis(panel: Panel, labels: list[str], left: int) -> list[str]:
    """Title, lines of the powers of ten and of 3, and the dots of one panel."""
    all_values = [value for _, values in panel.rows for value in values.values()] or [1.0]
    low, high = math.log10(min(all_values) * 0.8), math.log10(max(all_values) * 1.25)
    bottom = TOP + len(labels) * LINE
    parts = [f'<text x="{left}" y="{TOP - 22}" font-weight="bold">{escape(panel.title)}</text>']

    def place(value: float) -> float:
        return left + WIDTH * (math.log10(value) - low) / (high - low)

    for power in range(math.floor(low), math.ceil(high) + 1):
        for value in (10.0**power, 3 * 10.0**power):
            if low <= math.log10(value) <= high:
                x = f"{place(value):.1f}"
                parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP - 12}" y2="{bottom - 8}"/>')
                parts.append(f'<text text-anchor="middle" x="{x}" y="{bottom + 10}">{value:g}</text>')
    for label, values in panel.rows:
        y = TOP + labels.index(label) * LINE
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}"/>')
        for name in sorted(values, key=lambda n: n == OURS):  # ours on top
            radius = 6 if name == OURS else 4
            what = escape(f"{name}: {values[name]:.3g}")
            parts.append(
                f'<circle cx="{place(values[name]):.1f}" cy="{y}" r="{radius}" fill="{COLOURS.get(name, "#333")}">'
                f"<title>{what}</title></circle>"
            )
    return parts


def encode_panels(report: dict[str, Any]) -> list[Panel]:
    """Megabytes per second on batches of documents, by phase."""
    panels = []
    for phase in ("cold", "warm", "steady", "decode"):
        rows = [case for case in report["cases"] if case["phase"] == phase and " large " in case["case"]]
        named = [(case["case"].replace(" large " + phase, ""), case["mb_per_s"]) for case in rows]
        panels += [Panel(f"{phase}, MB per CPU second", named)] if named else []
    return panels


def train_panels(report: dict[str, Any]) -> list[Panel]:
    """CPU seconds and the memory beyond the input."""
    cases = [case for case in report["cases"] if not case["case"].startswith("count")]
    names = [[n for n in case["spread"] if n != "herdkern-tiktoken-ties"] for case in cases]
    seconds = [(case["case"], {n: case[n] / 1e3 for n in some}) for case, some in zip(cases, names)]
    memory = [(case["case"], {n: max(1, case["peak_mib"][n]) for n in some}) for case, some in zip(cases, names)]
    return [Panel("CPU seconds", seconds), Panel("MiB beyond the input", memory)] if cases else []


def draw(path: Path) -> None:
    """Draws the report's picture beside it, if it has rows to draw."""
    report = json.loads(path.read_text(encoding="utf-8"))
    panels = (encode_panels if report["bench"] == "bpe_encode" else train_panels)(report)
    if panels:
        path.with_suffix(".svg").write_text(picture(panels), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
