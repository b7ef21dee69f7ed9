"""Times the Triton kernels on a GPU against eager torch, torch.compile and F.*, beside the device's own limits.

    python benchmarks/gpu_ops.py [--json FILE]      needs a CUDA device; benchmarks/gpu.sh tests first

Times are the medians of CUDA events around one forward and backward pass each, implementations in turn, with the L2
cache overwritten before each sample. "share" is that of the measured copy bandwidth for the bytes that must move
(rms_norm, swiglu, rope, adamw) or of the measured rate of a bf16 product (linear_cross_entropy).
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from herdkern.ops import (
    linear_cross_entropy,
    rms_norm,
    rms_norm_reference,
    rope_qk,
    rope_qk_reference,
    rope_table,
    swiglu,
    swiglu_reference,
)

BF16 = torch.bfloat16
Functions = dict[str, Callable[[], Any]]


def milliseconds(functions: Functions, rounds: int = 20) -> dict[str, float]:
    """Median time of each function, called in turn."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in samples.items()}


def limits() -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written) and the rate of a bf16 product in TFLOP/s."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=BF16)
    times = milliseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a})
    return {
        "copy_gb_per_s": 2 * source.numel() / times["copy"] / 1e6,
        "bf16_tflop_per_s": 2 * 8192**3 / times["product"] / 1e9,
    }


def step(function: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """One forward and backward pass on leaves of its own."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    douts = [torch.randn_like(x) for x in (out if isinstance(out, tuple) else (out,))]
    return lambda: torch.autograd.grad(function(*leaves), leaves, douts)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def with_targets(function: Callable[..., Any], targets: Tensor, x: Tensor, w: Tensor) -> Any:
    return function(x, w, targets)


def peers(ours: Callable[..., Any], plain: Callable[..., Any], **others: Callable[..., Any]) -> dict[str, Any]:
    return {"herdkern": ours, "eager": plain, "torch.compile": torch.compile(plain), **others}


def cases() -> list[tuple[str, dict[str, Any], list[Tensor], float, float]]:
    """(name, functions, inputs, bytes, flops) of one forward and backward pass."""
    found: list[Any] = []
    for rows, dim in ((4096, 4096), (4096, 14336)):  # at 14336 rms_norm reads x and dout once more than counted
        size = 2 * rows * dim  # bytes of one tensor
        functions = peers(rms_norm, rms_norm_reference, **{"F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)})
        found.append((f"rms_norm {rows} x {dim}", functions, [randn(rows, dim), randn(dim)], 5 * size, 0))
        functions = peers(swiglu, swiglu_reference)
        found.append((f"swiglu {rows} x {dim}", functions, [randn(rows, dim), randn(rows, dim)], 8 * size, 0))
    table = [t.cuda() for t in rope_table(8192, 128)]
    functions = peers(lambda q, k: rope_qk(q, k, *table), lambda q, k: rope_qk_reference(q, k, *table))
    found.append(
        (
            "rope 8192 x (32 + 8) x 128",
            functions,
            [randn(8192, 32, 128), randn(8192, 8, 128)],
            4 * 2 * 8192 * 40 * 128,
            0,
        )
    )
    for vocab_size in (32000, 128256):
        n, dim = 8192, 4096
        targets = torch.randint(0, vocab_size, (n,), device="cuda")

        def ours(x: Tensor, w: Tensor, targets: Tensor = targets) -> Any:
            return linear_cross_entropy(x, w, targets)

        def plain(x: Tensor, w: Tensor, targets: Tensor = targets) -> Any:
            return F.cross_entropy((x @ w.T).float(), targets)  # logits rounded to bf16, as models have them

        functions = {"herdkern": ours, "eager": plain, "torch.compile": torch.compile(plain)}
        fused = getattr(F, "linear_cross_entropy", None)
        if fused is not None:
            functions["F.linear_cross_entropy"] = functools.partial(with_targets, fused, targets)
        inputs = [randn(n, dim), randn(vocab_size, dim) * dim**-0.5]
        found.append(
            (f"linear_cross_entropy {n} x {dim} x {vocab_size}", functions, inputs, 0, 6 * n * dim * vocab_size)
        )
    return found


def adamw() -> tuple[str, Functions, float]:
    """A step over 64 matrices of 2048 x 4096 in fp32, and its bytes."""
    from herdkern.optim import AdamW

    functions: Functions = {}
    for name, make in {
        "herdkern": lambda params: AdamW(params),
        "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    }.items():
        params = [torch.nn.Parameter(torch.randn(2048, 4096, device="cuda")) for _ in range(64)]
        for p in params:
            p.grad = torch.randn_like(p)
        functions[name] = make(params).step
    return "adamw fp32 64 x 2048 x 4096", functions, 28.0 * 64 * 2048 * 4096


def measured(
    name: str, functions: Functions, num_bytes: float, flops: float, found: dict[str, float]
) -> dict[str, Any]:
    """Prints and returns one row."""
    times = milliseconds(functions)
    best = num_bytes / found["copy_gb_per_s"] / 1e6 if num_bytes else flops / found["bf16_tflop_per_s"] / 1e9
    row = {"case": name, "ms": times, "share": best / times["herdkern"]}
    print(f"{name}: share {row['share']:.2f}; " + ", ".join(f"{n} {t:.3f} ms" for n, t in times.items()), flush=True)
    return row


def main() -> int:
    """Measures everything; a case that raises is named and left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_ops: torch must see a CUDA device, got none")
        return 2
    found, rows, failed = limits(), [], 0
    print(torch.cuda.get_device_name(), {name: round(value) for name, value in found.items()})
    for name, functions, inputs, num_bytes, flops in cases():
        try:
            steps = {peer: step(function, inputs) for peer, function in functions.items()}
            rows.append(measured(name, steps, num_bytes, flops, found))
        except Exception as error:  # the others are measured all the same
            print(f"{name}: {type(error).__name__}: {error}")
            failed += 1
        torch.cuda.empty_cache()
    name, functions, num_bytes = adamw()
    rows.append(measured(name, functions, num_bytes, 0, found))
    report = {
        "bench": "gpu_ops",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **found,
        "rows": rows,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
