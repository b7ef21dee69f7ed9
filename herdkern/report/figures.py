"""Charts as inline SVG text that takes its colours from the page's CSS variables (light and dark).

No chart library: a chart is a few hundred bytes of markup that scales with its column and stays legible on a phone.
Everything that comes from data passes through `escape`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from herdkern.report.html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 38


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: its name in the legend, x and y values, and the CSS class that colours it (c1 to c5)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "c1"
    is_faint: bool = False


def compact(value: float) -> str:
    """`value` in at most five characters or so: 1.2k, 34M, 0.0031, 2e-05."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high] in about `count` steps."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(series: Series, limit: int = 600) -> Series:
    """`series` with at most `limit` points, each the mean of its neighbours, so that a long run stays a small page."""
    if len(series.x) <= limit:
        return series
    edges = [round(i * len(series.x) / limit) for i in range(limit + 1)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    x = [sum(series.x[a:b]) / (b - a) for a, b in spans]
    y = [sum(series.y[a:b]) / (b - a) for a, b in spans]
    return Series(label=series.label, x=x, y=y, colour=series.colour, is_faint=series.is_faint)


class Axes:
    """Maps data to the drawing area and writes grid, tick labels and axis titles."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], is_log_y: bool = False) -> None:
        self.x_low, self.x_high = x_range if x_range[1] > x_range[0] else (x_range[0], x_range[0] + 1)
        self.is_log_y = is_log_y
        low, high = (math.log10(y_range[0]), math.log10(y_range[1])) if is_log_y else y_range
        self.y_low, self.y_high = (low, high) if high > low else (low, low + (abs(low) or 1.0))

    def x(self, value: float) -> float:
        """Horizontal position of `value`."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical position of `value`."""
        value = math.log10(value) if self.is_log_y else value
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_title: str, y_ticks: Sequence[float], x_ticks: Sequence[float]) -> str:
        """Grid lines, tick labels and the title of the x axis."""
        parts = []
        for value in y_ticks:
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(
                f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{at + 4:.1f}">{compact(value)}</text>'
            )
        for value in x_ticks:
            anchor = "end" if self.x(value) > WIDTH - RIGHT - 8 else "middle"
            parts.append(
                f'<text class="tick" text-anchor="{anchor}" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}">'
                f"{compact(value)}</text>"
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" x="{middle:.0f}" y="{HEIGHT - 4}">{escape(x_title)}</text>'
        )
        return "".join(parts)


def svg(title: str, body: str) -> str:
    """An SVG element with an accessible title."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_title: str = "step",
    is_log_y: bool = False,
    from_zero: bool = False,
    bands: Sequence[tuple[float, float, str]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """An SVG of one or more lines.

    bands: (x_begin, x_end, label) stretches to shade.  level: (y, label) of a dashed horizontal line.
    Points whose value is not finite (or not positive with is_log_y) are left out.
    """
    lines = [thin(s) for s in series]
    points = [[(x, y) for x, y in zip(s.x, s.y) if math.isfinite(y) and (y > 0 or not is_log_y)] for s in lines]
    flat = [point for line in points for point in line]
    if not flat:
        return f'<p class="note">No values for {escape(title)}.</p>'
    values = [y for _, y in flat] + ([level[0]] if level else [])
    low, high = (0.0 if from_zero else min(values)), max(values)
    if is_log_y:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
        y_ticks = [10.0**k for k in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    else:
        pad = (high - low) * 0.06 or abs(high) * 0.1
        low, high = (0.0 if from_zero else low - pad), high + pad
        y_ticks = ticks(low, high)
    axes = Axes((min(x for x, _ in flat), max(x for x, _ in flat)), (low, high), is_log_y)
    body = [_band(axes, band) for band in bands]
    body.append(axes.frame(x_title, y_ticks, ticks(axes.x_low, axes.x_high)))
    if level:
        at = axes.y(level[0])
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(
            f'<text class="tick" text-anchor="end" x="{WIDTH - RIGHT}" y="{at - 5:.1f}">{escape(level[1])}</text>'
        )
    for line, data in zip(lines, points):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in data)
        faint = " faint" if line.is_faint else ""
        body.append(f'<polyline class="line {line.colour}{faint}" points="{path}"/>')
        if len(data) == 1:
            body.append(
                f'<circle class="dot {line.colour}" cx="{axes.x(data[0][0]):.1f}" cy="{axes.y(data[0][1]):.1f}" r="3"/>'
            )
    return svg(title, "".join(body)) + legend(lines)


def _band(axes: Axes, band: tuple[float, float, str]) -> str:
    begin, end, label = max(band[0], axes.x_low), min(band[1], axes.x_high), escape(band[2])
    if end <= begin:
        return ""
    left, width = axes.x(begin), axes.x(end) - axes.x(begin)
    return (
        f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        f'<text class="tick" text-anchor="middle" x="{left + width / 2:.1f}" y="{TOP - 4}">{label}</text>'
    )


def legend(series: Sequence[Series]) -> str:
    """The names of several series beside a sample of their colour; nothing for a single one."""
    if len(series) < 2:
        return ""
    keys = "".join(
        f'<span class="key"><i class="{s.colour}{" faint" if s.is_faint else ""}"></i>{escape(s.label)}</span>'
        for s in series
    )
    return f'<div class="legend">{keys}</div>'


def histogram(title: str, edges: Sequence[float], counts: Sequence[float], *, x_title: str) -> str:
    """An SVG of bars between `edges` (one more than `counts`), evenly wide whatever the edges are."""
    if len(edges) != len(counts) + 1:
        raise ValueError(f"histogram: edges must have {len(counts) + 1} values, got {len(edges)}")
    if not counts or not max(counts) > 0:
        return f'<p class="note">No values for {escape(title)}.</p>'
    axes = Axes((0, len(counts)), (0, max(counts) * 1.06))
    stride = max(1, math.ceil(len(counts) / 8))
    body = [axes.frame(x_title, ticks(0, axes.y_high), [])]
    for i, count in enumerate(counts):
        left, right, top = axes.x(i), axes.x(i + 1), axes.y(count)
        tip = f"{compact(edges[i])} to {compact(edges[i + 1])}: {compact(count)}"
        body.append(
            f'<rect class="fill c1" x="{left + 0.6:.1f}" y="{top:.1f}" width="{max(right - left - 1.2, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{tip}</title></rect>'
        )
    for i in range(0, len(edges), stride):
        anchor = "end" if i == len(edges) - 1 else "middle"
        body.append(
            f'<text class="tick" text-anchor="{anchor}" x="{axes.x(i):.1f}" y="{HEIGHT - BOTTOM + 16}">'
            f"{compact(edges[i])}</text>"
        )
    return svg(title, "".join(body))


def bars(rows: Sequence[tuple[str, float, str]], *, colour: str = "c1", most: float = 0.0) -> str:
    """Horizontal bars as HTML: (label, value, text shown beside the bar); `most`, or the longest, fills its track."""
    if not rows:
        return '<p class="note">None.</p>'
    longest = most or max(value for _, value, _ in rows) or 1.0
    lines = (
        f'<div class="row"><span class="name">{escape(label)}</span><span class="track">'
        f'<i class="{colour}" style="width:{max(value / longest * 100, 0.4):.1f}%"></i></span>'
        f'<span class="value">{escape(text)}</span></div>'
        for label, value, text in rows
    )
    return f'<div class="bars">{"".join(lines)}</div>'
