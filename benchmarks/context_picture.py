"""Draws the attention work of each rank under two plans of each layout, as SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from herdkern.parallel import ContextPlan

COLOURS = ("#d98c5f", "#2f6da8")
NAMES = ("head/tail cut, everything gathered", "herdkern: balanced cuts, needed keys")


def save_picture(path: Path, layouts: Mapping[str, Sequence[ContextPlan]]) -> None:
    """Writes one row of bars a layout: for each rank its work over the mean, head/tail beside ours."""
    left, right, row, top, unit = 150, 170, 92, 40, 22.0  # unit: the height of the mean
    width = 960
    parts = [
        f'<rect x="{left + 330 * i}" y="10" width="12" height="12" fill="{colour}"/>'
        f'<text x="{left + 330 * i + 18}" y="20">{name}</text>'
        for i, (colour, name) in enumerate(zip(COLOURS, NAMES, strict=True))
    ]
    for line, (name, plans) in enumerate(layouts.items()):
        base = top + (line + 1) * row
        size = plans[0].cp_size
        step = (width - left - right) / size
        parts.append(f'<text x="{left - 10}" y="{base - 8}" text-anchor="end">{name}</text>')
        for i, plan in enumerate(plans):
            relative = plan.work / plan.work.mean()
            for rank, height in enumerate(relative.tolist()):
                x = left + rank * step + i * step * 0.42
                parts.append(
                    f'<rect x="{x:.1f}" y="{base - unit * height:.1f}" width="{step * 0.4:.1f}" '
                    f'height="{unit * height:.1f}" fill="{COLOURS[i]}"><title>rank {rank}: {height:.3f}</title></rect>'
                )
            rows = sum(map(plan.rows_received, range(size))) / ((size - 1) * plan.total)
            said = f"max {relative.max():.2f}, bytes {min(rows, 1.0):.3f}"
            parts.append(f'<text x="{width - right + 12}" y="{base - 26 + 18 * i}" fill="{COLOURS[i]}">{said}</text>')
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{base - unit}" y2="{base - unit}" stroke="#888" '
            'stroke-dasharray="3 3"/>'
        )
    height = top + len(layouts) * row + 30
    parts.append(
        f'<text x="{left}" y="{height - 8}">bars: attention work of each rank, dashed: the mean; '
        "bytes: share of an all-gather</text>"
    )
    style = "<style>text{font:12px system-ui,sans-serif}</style>"
    body = "\n".join([style, *parts])
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    background = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    path.write_text(f"{frame}\n{background}\n{body}\n</svg>\n", encoding="utf-8")
