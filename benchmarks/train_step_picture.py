"""Where the time of a training step goes: parts from torch's profiler, and a stacked bar for each implementation.

python benchmarks/train_step_picture.py benchmarks/results/train_step.json     draws train_step.svg beside it
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from herdkern.report.html import escape

PARTS = {  # in the order of the bar
    "attention": "#1b6ca8",
    "products": "#9aa5b1",
    "norm, act, rope": "#edae49",
    "loss": "#d1495b",
    "optimizer": "#6a994e",
    "other": "#8d6cab",
}
NAMES = [  # the first that fits, of an operator's own time
    ("attention", re.compile(r"attention|scaled_dot_product|flex", re.I)),
    ("loss", re.compile(r"cross_entropy|log_softmax|nll_loss", re.I)),
    (
        "norm, act, rope",
        re.compile(r"rms_norm|swiglu|rope|silu|rsqrt|aten::(pow|mean|neg|cat|sigmoid)|graph_\d+_cpp|cpp_fused"),
    ),
    ("optimizer", re.compile(r"adamw|clip_grad|vector_norm|optimizer|foreach", re.I)),
    ("products", re.compile(r"aten::(mm|addmm|bmm|matmul|linear)$|mkldnn_linear|_mkl_linear|onednn", re.I)),
]


def part_of(name: str, shapes: Any, vocab_size: int) -> str:
    """The part an operator belongs to: by its name, and a product or cast with the vocabulary by its shapes."""
    flat = [size for shape in shapes or [] if isinstance(shape, list) for size in shape if isinstance(size, int)]
    if vocab_size in flat and re.search(r"aten::(mm|addmm|_to_copy|copy_|mul|div|_log_softmax)", name):
        tokens = [size for shape in shapes if isinstance(shape, list) and len(shape) == 2 for size in shape]
        return "loss" if len(tokens) > 1 else "other"
    return next((part for part, pattern in NAMES if pattern.search(name)), "other")


def parts_of_step(step: Callable[[], Any], vocab_size: int) -> dict[str, float]:
    """Shares of one call by part, from each operator's own time on the calling thread; they sum to 1."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    times = dict.fromkeys(PARTS, 0.0)
    for event in found.key_averages(group_by_input_shape=True):
        times[part_of(event.key, event.input_shapes, vocab_size)] += event.self_cpu_time_total
    whole = sum(times.values()) or 1.0
    return {part: time / whole for part, time in times.items()}


def picture(report: dict[str, Any]) -> str:
    """An SVG: one bar for each implementation of each case that has parts, as long as its step took."""
    bars = [
        (f"{name}{', memory reused' * case['case'].endswith('reused')}", case[name], shares)
        for case in report["cases"]
        for name, shares in case.get("parts", {}).items()
    ]
    left, width, height, gap = 230, 560, 24, 12
    longest = max(time for _, time, _ in bars)
    parts = []
    for i, (part, colour) in enumerate(PARTS.items()):
        x = left + i * 118
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="20">{escape(part)}</text>')
    for row, (name, time, shares) in enumerate(bars):
        x, y = float(left), 40 + row * (height + gap)
        parts.append(f'<text text-anchor="end" x="{left - 8}" y="{y + 16}">{escape(name)}</text>')
        for part, colour in PARTS.items():
            long = width * time / longest * shares.get(part, 0.0)
            what = f"{part}: {shares.get(part, 0.0) * time:.0f} ms"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{height}" fill="{colour}">'
                f"<title>{escape(what)}</title></rect>"
            )
            x += long
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{time / 1e3:.2f} s</text>')
    bottom = 40 + len(bars) * (height + gap) + 8
    style = "<style>text{font:12px system-ui,sans-serif;fill:#333}</style>"
    size = f'width="{left + width + 170}" height="{bottom}"'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{white}{"".join(parts)}</svg>\n'


def draw(path: Path) -> None:
    """Draws the report's picture beside it, if a case has parts."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if any(case.get("parts") for case in report["cases"]):
        path.with_suffix(".svg").write_text(picture(report), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
