"""A plan to look at: memory of every pipeline rank and time of the fastest layouts, as SVG."""

from collections.abc import Sequence

from herdkern.parallel.clusters import GIB
from herdkern.parallel.layout_search import Fit, Found
from herdkern.parallel.memory_estimate import PURPOSES, MemoryEstimate, estimate_memory
from herdkern.parallel.projection import PARTS

COLOURS = (
    "#2f6da8",
    "#5b9bd5",
    "#9fc5e8",
    "#1c4670",
    "#c9701f",
    "#ed9b54",
    "#5a9e6f",
    "#b04a5a",
    "#8a8a8a",
    "#cfcfcf",
    "#d9c35b",
)
WIDTH, LEFT, ROW, GAP = 960, 170, 20, 5


def as_svg(found: Found, *, top: int = 8) -> str:
    """Memory by purpose of each pipeline rank of the fastest layout, the limit as a line; below it the time of a step
    by part of the `top` fastest. Raises: ValueError if no layout fits."""
    if not found.fits:
        raise ValueError(f"plan: out must be left away where no layout fits, got none of {len(found.refusals)}")
    best = found.fits[0]
    estimates = estimate_memory(found.task.model, best.layout.shortened())
    limit = found.task.cluster.usable_bytes
    memory, below = _memory_part(best, estimates, limit)
    times, height = _time_part(found.fits[:top], below + 34)
    style = "<style>text{font:12px system-ui,sans-serif}</style>"
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{white}{memory}{times}</svg>\n'


def _memory_part(best: Fit, estimates: Sequence[MemoryEstimate], limit: int) -> tuple[str, int]:
    shown = [p for p in PURPOSES if any(e.terms[p] > 0.002 * limit for e in estimates)]
    scale = (WIDTH - LEFT - 70) / max(limit, *(e.total for e in estimates))
    parts = [f'<text x="8" y="20">GiB at the highest moment of each pipeline rank: {best.layout}</text>']
    y = _legend(parts, shown, PURPOSES, 38)
    top = y
    for estimate in estimates:
        terms = [(PURPOSES.index(p), estimate.terms[p]) for p in PURPOSES]
        _bar(parts, f"rank {estimate.pp_rank}", terms, y, scale, f"{estimate.total / GIB:.1f}")
        y += ROW + GAP
    x = LEFT + limit * scale
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{y}" stroke="#222" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{x:.1f}" y="{y + 14}" text-anchor="middle">{limit / GIB:.1f} usable</text>')
    return "".join(parts), y + 14


def _time_part(fits: Sequence[Fit], y: int) -> tuple[str, int]:
    parts = [f'<text x="8" y="{y}">seconds of a step, projected, of the layouts that fit</text>']
    shown = [p for p in PARTS if any(fit.projection.seconds[p] > 0.002 * fit.projection.step_s for fit in fits)]
    y = _legend(parts, shown, PARTS, y + 18)
    scale = (WIDTH - LEFT - 150) / max(fit.projection.step_s for fit in fits)
    for fit in fits:
        layout, projected = fit.layout, fit.projection
        terms = [(PARTS.index(p), projected.seconds[p]) for p in PARTS]
        name = f"tp {layout.tp} cp {layout.cp} pp {layout.pp} dp {layout.dp}"
        text = f"{projected.step_s:.2f} s, MFU {projected.mfu:.0%}"
        _bar(parts, name, terms, y, scale, text)
        y += ROW + GAP
    return "".join(parts), y + 10


def _legend(parts: list[str], shown: Sequence[str], names: Sequence[str], y: int) -> int:
    x = LEFT
    for name in shown:
        if x + 20 + 7 * len(name) > WIDTH:
            x, y = LEFT, y + 18
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[names.index(name)]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{name}</text>')
        x += 36 + 7 * len(name)
    return y + 14


def _bar(parts: list[str], name: str, terms: Sequence[tuple[int, float]], y: int, scale: float, text: str) -> None:
    parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>')
    x = float(LEFT)
    for colour, size in terms:
        if size > 0:
            wide = size * scale
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{ROW}" fill="{COLOURS[colour]}"/>')
            x += wide
    parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{text}</text>')
