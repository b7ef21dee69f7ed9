"""The picture and the table of docs/attention.md, made from the report of bench_attention.py.

python benchmarks/attention_picture.py benchmarks/results/attention.json     draws attention.svg beside it
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herdkern.report.figures import compact, ticks
from herdkern.report.html import escape

COLOURS = {
    "herdkern": "#1b6ca8",
    "SDPA per document": "#d1495b",
    "SDPA per document, k and v expanded": "#edae49",
    "SDPA, dense mask": "#6a994e",
    "FlexAttention, forward only": "#8d6cab",
}
LAYOUTS = {"zipf": "16 Zipf documents", "short": "128 short documents", "one": "one document"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PANEL_WIDTH, PANEL_HEIGHT, GAP, LEFT, TOP = 270, 200, 26, 46, 34
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}.tick{font-size:11px;fill:#666}"
    ".grid{stroke:#ddd}.ceiling{stroke:#888;stroke-dasharray:2 3}.line{fill:none;stroke-width:2}"
    ".thin{stroke-dasharray:5 3}"
)


def split_name(case: str) -> tuple[str, str, int, int]:
    """("bf16", "zipf", 2048, 128) of bf16-zipf-T2048-D128."""
    dtype, layout, tokens, head_dim = case.split("-")
    return dtype, layout, int(tokens[1:]), int(head_dim[1:])


def rates(report: dict[str, Any]) -> dict[tuple[str, str, int, str], list[tuple[int, float]]]:
    """(dtype, layout, head_dim, implementation) -> [(tokens, GFLOP/s)], by tokens; of the forward where it is all."""
    found: dict[tuple[str, str, int, str], list[tuple[int, float]]] = {}
    for case in report["cases"]:
        if case["case"].count("-") != 3:
            continue
        dtype, layout, tokens, head_dim = split_name(case["case"])
        flops = case["gflop_per_s"] * case["herdkern"]
        for name in COLOURS:
            if name in case:
                share = 2 / 7 if "forward only" in name else 1
                found.setdefault((dtype, layout, head_dim, name), []).append((tokens, share * flops / case[name]))
    return {key: sorted(points) for key, points in found.items()}


class Panel:
    """One drawing area: tokens in powers of two to the right, GFLOP/s from zero upwards."""

    def __init__(self, column: int, row: int, tokens: Sequence[int], most: float) -> None:
        self.x0 = LEFT + column * (PANEL_WIDTH + GAP + LEFT)
        self.y0 = TOP + 10 + row * (PANEL_HEIGHT + 2 * GAP + TOP)
        self.tokens, self.most = sorted(set(tokens)), most

    def x(self, tokens: int) -> float:
        first, last = math.log2(self.tokens[0]) - 0.2, math.log2(self.tokens[-1]) + 0.2
        return self.x0 + (math.log2(tokens) - first) / (last - first) * PANEL_WIDTH

    def y(self, rate: float) -> float:
        return self.y0 + PANEL_HEIGHT * (1 - rate / self.most)

    def frame(self, title: str, ceilings: Sequence[tuple[str, float]]) -> list[str]:
        right = self.x0 + PANEL_WIDTH
        parts = [f'<text class="title" x="{self.x0}" y="{self.y0 - 12}">{escape(title)}</text>']
        for value in ticks(0, self.most):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.x0}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" text-anchor="end" x="{self.x0 - 6}" y="{y + 4:.1f}">{compact(value)}</text>'
            )
        for tokens in self.tokens:
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{self.x(tokens):.1f}" y="{self.y0 + PANEL_HEIGHT + 16}">'
                f"{tokens}</text>"
            )
        for label, value in ceilings:
            y = self.y(value)
            parts.append(f'<line class="ceiling" x1="{self.x0}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" text-anchor="end" x="{right}" y="{y - 4:.1f}">{escape(label)}</text>')
        return parts

    def line(self, points: Sequence[tuple[int, float]], colour: str, thin: bool) -> list[str]:
        path = " ".join(f"{self.x(tokens):.1f},{self.y(rate):.1f}" for tokens, rate in points)
        dots = [f'<circle cx="{self.x(t):.1f}" cy="{self.y(r):.1f}" r="2.6" fill="{colour}"/>' for t, r in points]
        return [f'<polyline class="line{" thin" if thin else ""}" stroke="{colour}" points="{path}"/>', *dots]


def picture(report: dict[str, Any]) -> str:
    """An SVG: a row of panels for each dtype, a column for each layout, a line for each implementation."""
    lines, limits = rates(report), report["machine"]["limits"]
    columns = [layout for layout in LAYOUTS if any(key[1] == layout for key in lines)]
    rows = [dtype for dtype in DTYPES if any(key[0] == dtype for key in lines)]
    parts: list[str] = []
    for row, dtype in enumerate(rows):
        ceilings = [
            (name, limits[key])
            for name, key in (
                ("instruction peak", f"peak_{DTYPES[dtype]}_gflop_per_s"),
                ("torch GEMM", f"gemm_{DTYPES[dtype]}_gflop_per_s"),
            )
            if key in limits
        ]
        most = 1.08 * max([rate for _, rate in ceilings] + [r for k, v in lines.items() if k[0] == dtype for _, r in v])
        for column, layout in enumerate(columns):
            some = {key: points for key, points in lines.items() if key[:2] == (dtype, layout)}
            if not some:
                continue
            panel = Panel(column, row, [tokens for points in some.values() for tokens, _ in points], most)
            parts += panel.frame(f"{dtype}, {LAYOUTS[layout]}", ceilings)
            for (_, _, head_dim, name), points in some.items():
                parts += panel.line(points, COLOURS[name], head_dim == 64)
    width = LEFT + len(columns) * (PANEL_WIDTH + GAP + LEFT)
    height = TOP + 10 + len(rows) * (PANEL_HEIGHT + 2 * GAP + TOP) + 44
    y = height - 40
    used = [name for name in COLOURS if any(key[3] == name for key in lines)]
    for i, name in enumerate(used):
        x = LEFT + i % 3 * 300
        at = y + i // 3 * 20
        parts.append(f'<rect x="{x}" y="{at - 9}" width="14" height="4" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 20}" y="{at - 3}">{escape(name)}</text>')
    parts.append(
        f'<text class="tick" x="{LEFT}" y="{y - 22}">GFLOP/s of the visible pairs over tokens; '
        "solid: head_dim 128, dashed: 64</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def table(report: dict[str, Any]) -> str:
    """Markdown: every case with the times of ours and of the best peer, and what the machine allows."""
    head = (
        "| case | ours, ms | best peer | its ms | times faster | CPU time, 1 thread | dense mask | of the peak | "
        "backward, of GEMM | more threads | memory |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for case in report["cases"]:
        shown = [
            f"`{case['case']}`",
            f"{case['herdkern']:.4g}",
            case["best_peer"] or "",
            f"{case[case['best_peer']]:.4g}" if case["best_peer"] else "",
            times(case.get("ratio")),
            times(case.get("ratio_1_thread")),
            times(case.get("dense_ratio")),
            percent(case.get("limit_share")),
            times(case.get("backward_per_gemm")),
            times(next((value for key, value in case.items() if key.startswith("scaling_")), None)),
            times(case.get("memory_ratio")),
        ]
        rows.append("| " + " | ".join(shown) + " |\n")
    return head + "".join(rows) + "\n" + about(report)


def about(report: dict[str, Any]) -> str:
    """The machine of a report in a few sentences."""
    machine, limits = report["machine"], report["machine"]["limits"]
    view = machine["lscpu"]
    ceilings = "; ".join(
        f"{short} instruction peak {limits[f'peak_{name}_gflop_per_s']:g}, "
        f"torch GEMM {limits[f'gemm_{name}_gflop_per_s']:g}"
        for short, name in DTYPES.items()
        if f"peak_{name}_gflop_per_s" in limits
    )
    first = ", ".join(f"{name} {took:g} ms" for name, took in report.get("first_call_ms", {}).items())
    kind = "A short run (`--quick`, few rounds). " if report["quick"] else ""
    cores = f"{view.get('Socket(s)', '?')} socket, {view.get('Core(s) per socket', '?')} cores of "
    cores += f"{view.get('Thread(s) per core', '?')} thread; {machine['threads']} threads"
    versions = f"level {machine['isa']}, torch {machine['versions'].get('torch')} at {machine['torch_isa']}"
    return (
        f"{kind}{view.get('Model name', machine['cpu'])}, {cores}; {versions}; {machine['date']}, "
        f"commit {machine['commit']}. GFLOP/s of {machine['threads']} threads: {ceilings}."
        + (f" First call of a process: {first}." if first else "")
        + "\n"
    )


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def draw(report: Path) -> None:
    """Writes the picture beside the report."""
    report.with_suffix(".svg").write_text(picture(json.loads(report.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
