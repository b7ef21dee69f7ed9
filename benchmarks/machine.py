"""What the machine is and what it can do: processor, versions, memory of a call, and the measured limits."""

import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch numpy tiktoken tokenizers rustbpe sentencepiece datasketch rensa transformers selectolax resiliparse "
    "trafilatura fastwarc zstandard pyarrow bpeasy gigatoken snaptokens fastokens tokie kitoken quicktok-v1 rs-bpe"
).split()
LSCPU = ("Model name", "Socket(s)", "Core(s) per socket", "Thread(s) per core", "L1d cache", "L2 cache", "L3 cache")


class Clock:
    """Seconds that passed (wall), or that this process computed on all of its threads (cpu)."""

    kind = "wall"

    def now(self) -> float:
        return time.process_time() if self.kind == "cpu" else time.perf_counter()


clock = Clock()  # the one that all timings of a run use


def timed(function: Callable[[], Any], repeats: int) -> float:
    start = clock.now()
    for _ in range(repeats):
        function()
    return (clock.now() - start) / repeats


class Limits:
    """What the machine can do, measured when first asked for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.measured: dict[str, float] = {}

    def copy_gb_per_s(self) -> float:
        """Bytes read and written per second by copies of 64 MiB per thread, far above the caches."""
        if "copy_gb_per_s" not in self.measured:
            import numpy as np

            size = 64 << 20
            pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(self.threads)]
            with ThreadPoolExecutor(self.threads) as pool:
                best = min(wall(lambda: list(pool.map(lambda p: np.copyto(*p), pairs))) for _ in range(5))
            self.measured["copy_gb_per_s"] = round(2 * size * self.threads / best / 1e9, 2)
        return self.measured["copy_gb_per_s"]

    def gemm_gflop_per_s(self, dtype: str, again: bool = False) -> float:
        """Rate of torch's product of square matrices, the best of its sizes and of all times it was measured.

        A product that takes 5 ms at 256 rows has no instructions to run on; larger ones would take minutes.
        """
        key = f"gemm_{dtype}_gflop_per_s"
        if key not in self.measured or again:
            import torch

            best = self.measured.get(key, 0.0)
            for n in (256, 1024, 2048):
                a = torch.ones(n, n, dtype=getattr(torch, dtype))
                out = torch.empty_like(a)
                least = min(wall(lambda: torch.mm(a, a, out=out)) for _ in range(4))  # noqa: B023
                best = max(best, 2 * n**3 / least / 1e9)
                if least > 0.005 and n == 256:
                    break
            self.measured[key] = round(best, 1)
        return self.measured[key]

    def peak_gflop_per_s(self, dtype: str) -> float:
        """Rate of chains of the best instruction that the kernel level has for the dtype, on registers alone."""
        key = f"peak_{dtype}_gflop_per_s"
        if key not in self.measured:
            from herdkern.ops.backend import native_module

            kinds = ("fma", "dot", "tile") if dtype == "bfloat16" else ("fma",)
            best = max(native_module().measure_peak(kind, self.threads) for kind in kinds)
            self.measured[key] = round(best, 1)
        return self.measured[key]


def wall(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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


def output_of(command: Sequence[str]) -> str:
    try:
        env = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def first_line(command: Sequence[str]) -> str:
    return output_of(command).partition("\n")[0].strip()


def cores_by_lscpu() -> dict[str, str]:
    """Model, sockets, cores, threads per core and caches as lscpu sees them; empty where it is missing."""
    lines = [line.partition(":") for line in output_of(["lscpu"]).splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines if name.strip() in LSCPU}


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
    torch = sys.modules.get("torch")
    return {
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "lscpu": cores_by_lscpu(),
        "threads": threads,
        "clock": clock.kind,
        "isa": backend.active_isa() if backend else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability() if torch else None,
        "compiler": first_line([os.environ.get("CXX", "g++"), "--version"]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
    }
