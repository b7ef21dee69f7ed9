"""Draws measured against projected step times of layouts, as SVG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"1 rank": "#8a8a8a", "2 ranks": "#2f6da8", "4 ranks": "#c9701f"}


def save_picture(path: Path, rows: Sequence[Mapping[str, Any]], agreement: Mapping[str, float]) -> None:
    """Writes a point for each row of bench_layouts.py, both axes logarithmic; on the line both times are equal."""
    times = [row[key] for row in rows for key in ("herdkern", "projected_ms")]
    low, high = math.log(min(times) / 1.1), math.log(max(times) * 1.1)
    left, top, size = 70, 30, 480

    def x_of(time: float) -> float:
        return left + size * (math.log(time) - low) / (high - low)

    def y_of(time: float) -> float:
        return top + size - size * (math.log(time) - low) / (high - low)

    parts = [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#888"/>']
    parts.append(
        f'<line x1="{left}" y1="{top + size}" x2="{left + size}" y2="{top}" stroke="#888" stroke-dasharray="4 3"/>'
    )
    for mark in (100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200):
        if low < math.log(mark) < high:
            parts.append(f'<text x="{x_of(mark):.1f}" y="{top + size + 16}" text-anchor="middle">{mark}</text>')
            parts.append(f'<text x="{left - 6}" y="{y_of(mark) + 4:.1f}" text-anchor="end">{mark}</text>')
    for row in rows:
        ranks = row["case"].partition(":")[0]
        parts.append(
            f'<circle cx="{x_of(row["herdkern"]):.1f}" cy="{y_of(row["projected_ms"]):.1f}" r="5" '
            f'fill="{COLOURS[ranks]}" fill-opacity="0.8"><title>{row["case"]}</title></circle>'
        )
    for line, (ranks, colour) in enumerate(COLOURS.items()):
        y = top + 18 + 20 * line
        parts.append(f'<circle cx="{left + 16}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 28}" y="{y + 4}">{ranks}</text>')
    parts.append(
        f'<text x="{left + size / 2}" y="{top + size + 36}" text-anchor="middle">measured, ms a step; '
        f"rank correlation with the projection {agreement['spearman']:.2f} over {agreement['layouts']} layouts</text>"
    )
    parts.append(f'<text x="{left}" y="{top - 10}">projected, ms a step</text>')
    width, height = left + size + 30, top + size + 50
    style = "<style>text{font:12px system-ui,sans-serif}</style>"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    body = "\n".join([style, *parts])
    path.write_text(f"{frame}\n{background}\n{body}\n</svg>\n", encoding="utf-8")
