"""Times our code against its peers in interleaved rounds, after proving that all compute the same.

    python benchmarks/bench_X.py [--quick] [--case PART] [--threads N] [--json FILE]
    pytest benchmarks                      ours alone, under pytest-benchmark

Each case is set up, checked (no time is printed if that fails) and run once to warm up; then every round times each
implementation once, in rotating order, so that a slow minute of the machine falls on all alike. The table shows
medians, the spread (half of the samples lie within it) and the memory that one call adds at its peak; "limit" is the
share of the machine that our median reaches: of the measured copy bandwidth for `bytes`, of torch's measured GEMM rate
for `flops`, whichever is the tighter. The last line is JSON.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Functions = dict[str, Callable[[], Any]]
OURS = "herdkern"
PACKAGES = (
    "torch numpy tiktoken tokenizers rustbpe sentencepiece datasketch rensa transformers selectolax resiliparse "
    "trafilatura fastwarc zstandard pyarrow"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `setup` builds it and returns the implementations, ours under "herdkern"."""

    name: str
    setup: Callable[[], Any]
    check: Callable[[Any], None] | None = None  # raises AssertionError if they do not agree
    bytes: float = 0  # read and written by one call, at least
    flops: float = 0
    flops_dtype: str = "float32"  # whose GEMM rate is the limit
    slow_peers: tuple[str, ...] = ()  # left out of --quick


@dataclasses.dataclass(frozen=True)
class Bench:
    """The cases of one script."""

    name: str
    cases: Sequence[Case]

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the script's command line and returns its exit status."""
        options = parse(self, arguments)
        limits = Limits(options.threads)
        machine = describe_machine(options.threads)
        print(f"{self.name} on {machine['cpu']}, {machine['cores']} cores, {options.threads} threads")
        cases = [case for case in self.cases if options.case in case.name]
        deadline = process_start() + 32 if options.quick else float("inf")
        results, failed = [], 0
        for i, case in enumerate(cases):
            share = (deadline - time.time()) / (len(cases) - i)
            try:
                result = run_case(case, seconds=max(0.2, min(share, 20)), quick=options.quick, limits=limits)
            except AssertionError as error:
                print(f"\n{case.name}: WRONG RESULT, no times: {error}")
                failed += 1
                continue
            print_case(case, result)
            results.append(result)
        machine["limits"] = limits.measured
        report = {"bench": self.name, "unit": "ms", "quick": options.quick, "cases": results, "machine": machine}
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        print("\n" + json.dumps(report))
        return 1 if failed else 0


def parse(bench: Bench, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Benchmark {bench.name}; cases: {', '.join(c.name for c in bench.cases)}"
    )
    parser.add_argument("--quick", action="store_true", help="end within 45 s, with fewer rounds")
    parser.add_argument("--case", default="", metavar="PART", help="only cases whose name contains PART")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch and ours")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    options = parser.parse_args(arguments)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(options.threads)
    return options


def run_case(case: Case, *, seconds: float, quick: bool, limits: "Limits") -> dict[str, Any]:
    """Times one case for about `seconds`, setup and check included."""
    start = time.time()
    functions = case.setup()
    for name in case.slow_peers if quick else ():
        functions.pop(name, None)
    if case.check is not None:
        case.check(functions)
    first = {name: timed(function, 1) for name, function in functions.items()}  # warm-up, and how long a call takes
    memory = {name: peak_growth(function) for name, function in functions.items() if first[name] < seconds / 4}
    first.update({name: timed(functions[name], 1) for name in memory})
    repeats = {name: max(1, min(1000, round(0.003 / max(took, 1e-7)))) for name, took in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    while time.time() - start < seconds or len(samples[OURS]) < (1 if quick else 5):
        if quick and not samples[OURS] and time.time() - start > seconds:  # no time left: the first calls have to do
            samples = {name: [took] for name, took in first.items()}
            break
        for name in order:
            samples[name].append(timed(functions[name], repeats[name]))
        order = order[1:] + order[:1]
        if len(samples[OURS]) >= 200:
            break
    return summary(case, samples, memory, limits)


def summary(case: Case, samples: dict[str, list[float]], memory: dict[str, int], limits: "Limits") -> dict[str, Any]:
    """The entry of one case in the report, times in milliseconds."""
    medians = {name: statistics.median(some) for name, some in samples.items()}
    ours, peers = medians[OURS], {name: t for name, t in medians.items() if name != OURS}
    best = min(peers, key=peers.__getitem__, default=None)
    result: dict[str, Any] = {"case": case.name, **{name: round(1e3 * t, 5) for name, t in medians.items()}}
    result["ratio"] = None if best is None else round(peers[best] / ours, 3)
    result["best_peer"] = best
    result["limit_share"] = limits.share(case, ours)
    result["spread"] = {name: round(1e3 * spread(some), 5) for name, some in samples.items()}
    result["rounds"] = len(samples[OURS])
    result["peak_mib"] = {name: round(grown / 2**20, 1) for name, grown in memory.items()}
    if case.flops:
        result["gflop_per_s"] = round(case.flops / ours / 1e9, 2)
    if case.bytes:
        result["gb_per_s"] = round(case.bytes / ours / 1e9, 4)
    return result


def spread(samples: Sequence[float]) -> float:
    """Interquartile range."""
    if len(samples) < 2:
        return 0.0
    quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return quarters[2] - quarters[0]


def print_case(case: Case, result: dict[str, Any]) -> None:
    names = list(result["spread"])
    width = max(map(len, names))
    rates = [
        f"{result[key]:g} {unit}" for key, unit in (("gflop_per_s", "GFLOP/s"), ("gb_per_s", "GB/s")) if key in result
    ]
    if result["limit_share"] is not None:
        rates.append(f"{100 * result['limit_share']:.0f} % of the limit")
    few = ", too few to trust" if result["rounds"] < 3 else ""
    print(f"\n{case.name}  ({result['rounds']} rounds{few}{', ours ' if rates else ''}{', '.join(rates)})")
    for name in sorted(names, key=lambda n: (n != OURS, result[n])):
        against = "" if name == OURS else f"  {result[name] / result[OURS]:6.2f} x ours"
        peak = result["peak_mib"].get(name)
        added = "" if peak is None else f"  +{peak:.1f} MiB"
        print(
            f"  {name:{width}s}  {result[name]:11.4f} ms  +- {result['spread'][name]:.4f}{added}{against}", flush=True
        )


def timed(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes by which one call raises the resident memory at its highest (0 where Linux does not tell)."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
        before = status_bytes("VmHWM")
        function()
        return max(0, status_bytes("VmHWM") - before)
    except OSError:
        return 0


def process_start() -> float:
    """When this process began (imports included), in seconds since the epoch."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except OSError:
        return time.time()


class Limits:
    """What the machine can do, measured when first asked for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.measured: dict[str, float] = {}

    def share(self, case: Case, seconds: float) -> float | None:
        """The limit's time over `seconds`; None if the case names neither bytes nor flops."""
        least = 0.0
        if case.bytes:
            least = max(least, case.bytes / 1e9 / self.copy_gb_per_s())
        if case.flops:
            least = max(least, case.flops / 1e9 / self.gemm_gflop_per_s(case.flops_dtype))
        return round(least / seconds, 4) if least else None

    def copy_gb_per_s(self) -> float:
        """Bytes read and written per second by copies of 64 MiB per thread, far above the caches."""
        if "copy_gb_per_s" not in self.measured:
            import numpy as np

            size = 64 << 20
            pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(self.threads)]
            with ThreadPoolExecutor(self.threads) as pool:
                best = min(timed(lambda: list(pool.map(lambda p: np.copyto(*p), pairs)), 1) for _ in range(5))
            self.measured["copy_gb_per_s"] = round(2 * size * self.threads / best / 1e9, 2)
        return self.measured["copy_gb_per_s"]

    def gemm_gflop_per_s(self, dtype: str) -> float:
        """Rate of torch's product of square matrices, the best of two sizes."""
        key = f"gemm_{dtype}_gflop_per_s"
        if key not in self.measured:
            import torch

            best = 0.0
            for n in (1024, 2048):
                a = torch.ones(n, n, dtype=getattr(torch, dtype))
                out = torch.empty_like(a)
                best = max(best, 2 * n**3 / min(timed(lambda: torch.mm(a, a, out=out), 1) for _ in range(4)) / 1e9)  # noqa: B023
            self.measured[key] = round(best, 1)
        return self.measured[key]


def first_line(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, compiler and versions; nothing that names the computer, a person or a folder."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        cpu = None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    backend = sys.modules.get("herdkern.ops.backend")
    return {
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "isa": backend.active_isa() if backend else None,
        "compiler": first_line([os.environ.get("CXX", "g++"), "--version"]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
    }


def pytest_cases(bench: Bench) -> Callable[..., None] | None:
    """A test for pytest-benchmark: every case, checked, then ours alone. None where pytest is not installed."""
    try:
        import pytest
    except ImportError:
        return None

    @pytest.mark.parametrize("case", bench.cases, ids=lambda case: case.name)
    def test(case: Case, benchmark: Any) -> None:
        functions = case.setup()
        if case.check is not None:
            case.check(functions)
        benchmark.group = bench.name
        benchmark(functions[OURS])

    return test
