"""Measures each candidate in a process of its own: CPU seconds, wall seconds, memory that the work adds at its peak.

A script hands its functions to `answer`, which runs the one that the command line names and prints its result as JSON;
the same script asks for it by `run_apart`. So caches are cold, memory is of the candidate alone, and one that takes too
long or dies is named in the table and does no more harm. Rows have the form of harness.py.
"""

import argparse
import contextlib
import gc
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import OURS, Case, print_case, spread
from machine import status_bytes

Task = dict[str, Any]


class Meter:
    """What a block took: cpu_s on all threads, wall_s, and peak_mib above what was resident before."""

    cpu_s = wall_s = peak_mib = 0.0

    def __enter__(self) -> "Meter":
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
        self.resident = status_bytes("VmHWM")
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cpu_s, self.wall_s = time.process_time() - self.cpu_s, time.perf_counter() - self.wall_s
        self.peak_mib = (status_bytes("VmHWM") - self.resident) / 2**20


def parse_options(
    cases: Iterable[str],
    *,
    limit: float,
    quick_limit: float,
    full: str = "",
    takes_peers: bool = False,
    keeps: str = "",
) -> argparse.Namespace:
    """The command line of a script of such cases: quick, case, json, rounds, limit, wrap.

    limit, quick_limit: seconds of a candidate if --limit is not given.  full: what --full adds, "" for no such option.
    takes_peers: also --peers, other interpreters.  keeps: what --folder keeps, "" for no such option.
    """
    parser = argparse.ArgumentParser(description=f"Cases: {', '.join(cases)}")
    parser.add_argument("--quick", action="store_true", help="end within 45 s, without the corpus")
    if full:
        parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--case", default="", metavar="PART", help="only cases whose name contains PART")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of those that take no time (default 3)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help=f"the end of a candidate (default {limit:g})")
    if takes_peers:
        parser.add_argument("--peers", nargs="*", default=[], metavar="PYTHON", help="interpreters that have others")
    if keeps:
        parser.add_argument("--folder", type=Path, metavar="DIR", help=f"keeps {keeps} between runs")
    parser.add_argument("--wrap", type=shlex.split, default=[], metavar="CMD", help="runs each process under CMD")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.limit = options.limit or (quick_limit if options.quick else limit)
    return options


def answer(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Runs the function that `--task` names and ends the process; returns if the command line has none."""
    if len(sys.argv) == 3 and sys.argv[1] == "--task":
        task = json.loads(sys.argv[2])
        print(json.dumps(functions[task.pop("function")](**task)))
        sys.stdout.flush()
        os._exit(0)  # some peers take long to tear down


def run_apart(task: Task, *, seconds: float, threads: int = 1, wrap: Sequence[str] = ()) -> Any:
    """What the task returns, or {"failed": reason}. wrap: a command to run under, as `taskset -c 1`."""
    command = [*wrap, sys.executable, sys.argv[0], "--task", json.dumps(task)]
    threads_of_peers = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads_of_peers},
        start_new_session=True,
    )
    return outcome_of(process, seconds)


def python_with(modules: Sequence[str], pythons: Iterable[str]) -> str | None:
    """The first interpreter that has all of the modules, this one before the others."""
    code = f"import importlib.util, sys; sys.exit(None in map(importlib.util.find_spec, {list(modules)!r}))"
    for python in (sys.executable, *pythons):
        if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
            return python
    return None


def run_script(
    command: Sequence[str], *, seconds: float, wrap: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON that the last line of a command's output holds, or {"failed": reason}; one thread for those that ask."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    variables = {**os.environ, **dict.fromkeys(names, "1"), **(environment or {})}
    process = subprocess.Popen(
        [*wrap, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
        start_new_session=True,
    )  # fmt: skip
    return outcome_of(process, seconds)


def outcome_of(process: "subprocess.Popen[str]", seconds: float) -> Any:
    """What a process prints last, or {"failed": reason}; after so many seconds it and its children are killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"failed": f"not finished in {seconds:.0f} s"}
    if process.returncode or not out:
        said = [line for line in err.splitlines() if line.strip()] or [f"ended with {process.returncode}"]
        return {"failed": said[-1][:300]}
    return json.loads(out.splitlines()[-1])


def make_row(name: str, seconds: Mapping[str, Sequence[float]], num_bytes: float = 0, **more: Any) -> dict[str, Any]:
    """A row of the report from the samples of each candidate; more["aside"] are shown but not compared."""
    medians = {candidate: statistics.median(samples) for candidate, samples in seconds.items() if samples}
    aside = more.get("aside", {})
    peers = {candidate: taken for candidate, taken in medians.items() if candidate != OURS and candidate not in aside}
    best = min(peers, key=peers.__getitem__, default=None)
    row: dict[str, Any] = {"case": name, **{candidate: round(1e3 * taken, 5) for candidate, taken in medians.items()}}
    row["ratio"] = round(peers[best] / medians[OURS], 3) if best else None
    row["best_peer"] = best
    row["limit_share"] = None
    row["spread"] = {candidate: round(1e3 * spread(seconds[candidate]), 5) for candidate in medians}
    row["rounds"] = len(seconds[OURS])
    row["peak_mib"] = {}
    if num_bytes:
        row["mb_per_s"] = {candidate: round(num_bytes / 1e6 / taken, 2) for candidate, taken in medians.items()}
    return row | more


def print_row(row: dict[str, Any]) -> None:
    """The row as harness.py prints its own, and the megabytes per second."""
    print_case(Case(name=row["case"], setup=dict), row)
    if "mb_per_s" in row:
        rates = sorted(row["mb_per_s"].items(), key=lambda item: -item[1])
        print("  MB/s: " + ", ".join(f"{name} {rate:g}" for name, rate in rates), flush=True)
    for name, what in row.get("aside", {}).items():
        print(f"  {name} is not compared: {what}", flush=True)
