"""Checks and times the ops on a GPU against their peers, beside the device's own limits, within a time that is given.

    python benchmarks/gpu_ops.py [--json FILE] [--seconds 400]      needs a CUDA device; benchmarks/gpu.sh calls it
    python benchmarks/gpu_ops.py --rehearse                         the same on tiny sizes, on a CPU

Order: what runs and holds, the device's limits, attention, the other ops; FILE is written anew after each row, and what
the time does not suffice for is named under "skipped". A check that fails, a peer that raises: named, and not timed.

Times are the medians of CUDA events, implementations in turn, with the L2 cache overwritten before each sample.
"share" is that of the measured copy bandwidth for the bytes that must move (rms_norm, swiglu, rope, adamw) or of the
measured rate of a bf16 product (attention: pairs that see each other; linear_cross_entropy). A rehearsal's numbers mean
nothing: Triton's kernels are interpreted, where the peers have no CPU path they fail.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import gpu_attention  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from herdkern.ops import (  # noqa: E402
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
DEVICE = "cpu" if REHEARSAL else "cuda"
Functions = dict[str, Callable[[], Any]]
compiled: Callable[..., Any] = functools.partial(torch.compile, backend="eager") if REHEARSAL else torch.compile


class Report:
    """What was found so far, in a file that is whole at any time; and the time that is left."""

    def __init__(self, path: str | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.found: dict[str, Any] = {
            "bench": "gpu_ops",
            "rehearsal": REHEARSAL,
            "device": "cpu" if REHEARSAL else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "checks": {},
            "limits": {},
            "rows": [],
            "skipped": [],
        }

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - BEGAN)

    def affords(self, name: str, seconds: float) -> bool:
        """Return whether `seconds` are left; if not, what they were for is named."""
        enough = self.left() >= (0 if REHEARSAL else seconds)
        if not enough:
            self.found["skipped"].append(name)
            print(f"{name}: skipped, {self.left():.0f} s left", flush=True)
        return enough

    def write(self) -> None:
        """Write the file: under another name first, so that who stops us leaves it whole."""
        self.found["seconds"] = round(time.monotonic() - BEGAN, 1)
        if self.path:
            temporary = Path(f"{self.path}.part")
            temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)


def milliseconds(functions: Functions, rounds: int) -> dict[str, float]:
    """Median time of each function, called in turn."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(1 if REHEARSAL else 256 << 20, dtype=torch.int8)
    for _ in range(1 if REHEARSAL else rounds):
        for name, function in functions.items():
            flush.zero_()
            if REHEARSAL:
                began = time.perf_counter()
                function()
                samples[name].append((time.perf_counter() - began) * 1e3)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in samples.items()}


def working(functions: Functions) -> tuple[Functions, dict[str, str]]:
    """Those that run, warmed up, and why the others do not."""
    runs: Functions = {}
    failed = {}
    for name, function in functions.items():
        try:
            for _ in range(1 if REHEARSAL else 3):
                function()
            runs[name] = function
        except Exception as error:  # whatever a peer raises is its result
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return runs, failed


def limits() -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written) and the rate of a bf16 product in TFLOP/s."""
    size, n = (1 << 16, 64) if REHEARSAL else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.int8)
    target, a = torch.empty_like(source), torch.randn(n, n, dtype=BF16)
    functions, _ = working({"copy": lambda: target.copy_(source), "product": lambda: a @ a})
    times = milliseconds(functions, 20)
    return {
        "copy_gb_per_s": 2 * source.numel() / times["copy"] / 1e6,
        "bf16_tflop_per_s": 2 * n**3 / times["product"] / 1e9,
    }


def add_row(report: Report, name: str, functions: Functions, num_bytes: float, flops: float, rounds: int = 20) -> None:
    """Times functions, adds a row with the share of the limit that ours reach, and writes the file."""
    runs, failed = working(functions)
    times = milliseconds(runs, rounds)
    found = report.found["limits"]
    best = num_bytes / found["copy_gb_per_s"] / 1e6 if num_bytes else flops / found["bf16_tflop_per_s"] / 1e9
    shares = {peer: round(best / ms, 4) for peer, ms in times.items()}
    report.found["rows"].append({"case": name, "ms": times, "share": shares, "failed": failed})
    cells = [f"{peer} {ms:.3f} ms ({shares[peer]:.2f})" for peer, ms in times.items()]
    print(f"{name}: " + ", ".join(cells + [f"{peer} FAILED ({why})" for peer, why in failed.items()]), flush=True)
    report.write()


def check_backends(report: Report) -> list[str]:
    """Runs the checks of attention for each backend; returns those that kept all."""
    kept = []
    for backend in ("reference", "triton") if REHEARSAL else ("native", "triton"):
        results = {}
        for name, check in gpu_attention.checks(backend, tiny=REHEARSAL).items():
            try:
                check()
                results[name] = "ok"
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"attention {backend}: {name}: {results[name]}", flush=True)
            if results[name].startswith("NotImplementedError: attention: no backend can run this call"):
                break  # not built for this machine
        report.found["checks"][f"attention {backend}"] = results
        report.write()
        if set(results.values()) == {"ok"}:
            kept.append(backend)
    return kept


def attention_rows(report: Report, backends: list[str], seconds: float) -> None:
    """Times attention forward and forward with backward, on every layout while `seconds` of the run are left over."""
    sizes, heads, head_dim = ((12,), (2, 1), 16) if REHEARSAL else ((8192, 32768), (32, 8), 128)
    for tokens in sizes:
        for layout, lengths in gpu_attention.layouts(tokens).items():
            name = f"attention {tokens} {layout}"
            if not report.affords(name, seconds + 20):
                continue
            dtype = torch.float16 if REHEARSAL else BF16
            batch = gpu_attention.batch_of(layout, lengths, heads, head_dim, dtype)
            peers = gpu_attention.implementations(batch, backends, compiles=not REHEARSAL)
            inputs = [batch.q, batch.k, batch.v]
            forward = {peer: functools.partial(function, *inputs) for peer, function in peers.items()}
            with torch.no_grad():
                add_row(report, f"{name} forward", forward, 0, batch.flops, 10)
            add_row(report, f"{name} both passes", all_steps(peers, inputs)[0], 0, 3.5 * batch.flops, 10)
            free()


def all_steps(functions: dict[str, Callable[..., Any]], inputs: list[Tensor]) -> tuple[Functions, dict[str, str]]:
    """One forward and backward pass of each function that has them, on leaves of its own."""

    def make(function: Callable[..., Any]) -> Callable[[], Any]:
        leaves = [x.clone().requires_grad_() for x in inputs]

        def step() -> Any:
            out = function(*leaves)
            outs = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

        return step

    return {name: make(function) for name, function in functions.items()}, {}


def free() -> None:
    if not REHEARSAL:
        torch.cuda.empty_cache()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16)


def liger(name: str) -> dict[str, Callable[..., Any]]:
    """A function of liger_kernel, where it can be imported."""
    with contextlib.suppress(Exception):  # a package of another torch may raise anything
        return {"Liger": getattr(importlib.import_module("liger_kernel.transformers.functional"), name)}
    return {}


def peers_of(ours: Callable[..., Any], plain: Callable[..., Any], **others: Callable[..., Any]) -> dict[str, Any]:
    return {"herdkern": ours, "eager": plain, "torch.compile": compiled(plain), **others}


def elementwise_rows(report: Report) -> None:
    """rms_norm, swiglu and rope: forward, and both passes."""
    rows = 4 if REHEARSAL else 4096
    for dim in (64,) if REHEARSAL else (4096, 14336):  # at 14336 rms_norm reads x and dout once more than counted
        size = 2 * rows * dim  # bytes of one tensor
        fused = {"F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)}
        fused |= {name: functools.partial(f, eps=1e-5) for name, f in liger("liger_rms_norm").items()}
        functions = peers_of(rms_norm, rms_norm_reference, **fused)
        both_passes(report, f"rms_norm {rows} x {dim}", functions, [randn(rows, dim), randn(dim)], (2 * size, 5 * size))
        functions = peers_of(swiglu, swiglu_reference, **liger("liger_swiglu"))
        inputs = [randn(rows, dim), randn(rows, dim)]
        both_passes(report, f"swiglu {rows} x {dim}", functions, inputs, (3 * size, 8 * size))
    tokens = 8 if REHEARSAL else 8192
    table = [t.to(DEVICE) for t in rope_table(tokens, 128)]
    functions = peers_of(lambda q, k: rope_qk(q, k, *table), lambda q, k: rope_qk_reference(q, k, *table))
    size = 2 * tokens * 40 * 128
    inputs = [randn(tokens, 32, 128), randn(tokens, 8, 128)]
    both_passes(report, f"rope {tokens} x (32 + 8) x 128", functions, inputs, (2 * size, 4 * size))


def both_passes(
    report: Report, name: str, functions: dict[str, Any], inputs: list[Tensor], num_bytes: tuple[float, float]
) -> None:
    if not report.affords(name, 15):
        return
    with torch.no_grad():
        forward = {peer: functools.partial(function, *inputs) for peer, function in functions.items()}
        add_row(report, f"{name} forward", forward, num_bytes[0], 0)
    add_row(report, f"{name} both passes", all_steps(functions, inputs)[0], num_bytes[1], 0)
    free()


def loss_rows(report: Report) -> None:
    """linear_cross_entropy: both passes, and the memory that each takes beyond its inputs and gradients."""
    n, dim = (8, 16) if REHEARSAL else (8192, 4096)
    for vocab_size in (32,) if REHEARSAL else (32000, 128256):
        name = f"linear_cross_entropy {n} x {dim} x {vocab_size}"
        if not report.affords(name, 20):
            continue
        targets = torch.randint(0, vocab_size, (n,))

        def plain(x: Tensor, w: Tensor, targets: Tensor = targets) -> Any:
            return F.cross_entropy((x @ w.T).float(), targets)  # logits rounded to bf16, as models have them

        functions = peers_of(lambda x, w, targets=targets: linear_cross_entropy(x, w, targets), plain)
        fused = {"F.linear_cross_entropy": getattr(F, "linear_cross_entropy", None)}
        for peer, function in {**fused, **liger("liger_fused_linear_cross_entropy")}.items():
            if function is not None:
                functions[peer] = lambda x, w, function=function, targets=targets: function(x, w, targets)
        inputs = [randn(n, dim), randn(vocab_size, dim) * dim**-0.5]
        steps = all_steps(functions, inputs)[0]
        add_row(report, name, steps, 0, 6.0 * n * dim * vocab_size, 10)
        if not REHEARSAL:
            held = 2 * sum(x.numel() for x in inputs)  # of the gradients
            row = report.found["rows"][-1]
            row["extra_mib"] = {peer: (peak_bytes(steps[peer]) - held) / 2**20 for peer in row["ms"]}
            print(f"{name}: extra MiB {row['extra_mib']}", flush=True)
            report.write()
        free()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Memory at the peak of a call beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def adamw_row(report: Report) -> None:
    """A step over matrices in fp32."""
    from herdkern.optim import AdamW

    count, shape = (2, (4, 8)) if REHEARSAL else (64, (2048, 4096))
    name = f"adamw fp32 {count} x {shape[0]} x {shape[1]}"
    if not report.affords(name, 10):
        return
    functions: Functions = {}
    for peer, make in {
        "herdkern": lambda params: AdamW(params),
        "torch.optim.AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    }.items():
        params = [torch.nn.Parameter(torch.randn(*shape)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        functions[peer] = make(params).step
    add_row(report, name, functions, 28.0 * count * shape[0] * shape[1], 0)


def main() -> int:
    """Checks, then measures while there is time; the status says whether every check held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=400, help="stop to begin cases after this time")
    parser.add_argument("--rehearse", action="store_true", help="the whole run on tiny sizes, on a CPU")
    options = parser.parse_args()
    if not REHEARSAL and not torch.cuda.is_available():
        print("gpu_ops: torch must see a CUDA device, got none; --rehearse runs on a CPU")
        return 2
    if REHEARSAL:
        warnings.simplefilter("ignore")  # numpy's, in Triton's interpreter
    torch.set_default_device(DEVICE)
    report = Report(options.json, options.seconds)
    print(report.found["device"], f"torch {torch.__version__}", flush=True)
    backends = check_backends(report) if report.affords("checks", 60) else []
    report.found["limits"] = limits()
    print({name: round(value) for name, value in report.found["limits"].items()}, flush=True)
    attention_rows(report, backends, seconds=120)  # which the rows below take
    elementwise_rows(report)
    loss_rows(report)
    adamw_row(report)
    report.write()
    broken = [name for name, results in report.found["checks"].items() if is_broken(results)]
    print(f"{len(report.found['rows'])} rows in {report.found['seconds']} s; checks that failed: {broken or 'none'}")
    return 1 if broken or (not backends and "checks" not in report.found["skipped"]) else 0


def is_broken(results: dict[str, str]) -> bool:
    """Whether a backend that is there failed a check."""
    return any(text != "ok" and "no backend can run this call" not in text for text in results.values())


if __name__ == "__main__":
    sys.exit(main())
