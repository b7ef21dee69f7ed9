"""Times our code against its peers in interleaved rounds, after proving that all compute the same.

    python benchmarks/bench_X.py [--quick] [--case PART] [--threads N] [--clock wall|cpu] [--isa LEVEL] [--json FILE]
    pytest benchmarks                      ours alone, under pytest-benchmark

A case that is `reused` runs in a second process, where all candidates work under herdkern.memory.reuse(): their results
lie in memory that was there before. The others have what malloc does by default: a large result is fresh every time.

Each case is set up, checked (no time is printed if that fails) and run once to warm up; then every round times each
implementation once, in rotating order, so that a slow minute of the machine falls on all alike. The table shows
medians, the spread (half of the samples lie within it) and the memory that one call adds at its peak; "limit" is the
share of the machine that our median reaches: of the measured copy bandwidth for `bytes`; for `flops` of the arithmetic
peak or of torch's measured GEMM rate, as the case says; of two, the tighter. The last line is JSON; the file of --json
is replaced after each case. A peer that raises is named under "failed" and left out; the others are timed.

Times are of the wall clock at all cores; a benchmark that says so adds the CPU time of one thread, which a busy machine
disturbs least, for all but the slow peers (torch.compile would compile again). `--threads 1` takes CPU time alone, of
all. `--isa avx2` restricts ours and torch alike, as a processor without
AVX-512 would (HERDKERN_ISA=avx2 restricts ours alone).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import Limits, clock, describe_machine, peak_growth, process_start, timed

Functions = dict[str, Callable[[], Any]]
OURS = "herdkern"
ISA_OF_TORCH = {"ATEN_CPU_CAPABILITY": "{}", "ONEDNN_MAX_CPU_ISA": "{}", "MKL_ENABLE_INSTRUCTIONS": "{}"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `setup` builds it and returns the implementations, ours under "herdkern".

    An implementation may have `laps`, lists of the seconds of its parts that it fills by `clock` itself, and `warm_up`,
    a small call for the process in which its memory is measured.
    """

    name: str
    setup: Callable[[], Any]
    check: Callable[[Any], dict[str, str] | None] | None = None  # raises AssertionError, or tells what peers are wrong
    bytes: float = 0  # read and written by one call, at least
    flops: float = 0
    flops_dtype: str = "float32"  # whose rate is the limit
    flops_limit: str = "gemm"  # torch's product, or "peak": chains of the best instruction
    slow_peers: tuple[str, ...] = ()  # left out of --quick and of one thread; one round, or one call, is enough
    aside: tuple[str, ...] = ()  # shown, but not compared: they do no more than the lap `aside_lap` of ours
    aside_lap: str = "forward"
    is_large: bool = False  # left out of --quick and of pytest
    memory_apart: bool = False  # each implementation's memory in a process of its own; none in --quick
    reused: bool = False  # all under herdkern.memory.reuse(), in a process of its own
    extra: Callable[[Any, dict[str, Any], Limits], dict[str, Any]] | None = None  # more keys, from functions and result


@dataclasses.dataclass(frozen=True)
class Bench:
    """The cases of one script."""

    name: str
    cases: Sequence[Case]
    seconds: float = 20  # for one case, three rounds at least
    one_thread: bool = False  # also CPU time at one thread
    summarise: Callable[[dict[str, Any], bool], None] | None = None  # adds to the report; told whether it is --quick
    after: Callable[[Path], None] | None = None  # told where the report was written

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs the script's command line and returns its exit status."""
        options = parse(self, arguments)
        if options.memory_of:
            return print_memory(self.cases, options.memory_of, options.threads)
        chosen = [case for case in self.cases if options.case in case.name and not (options.quick and case.is_large)]
        cases = [case for case in chosen if case.reused == options.reused]
        limits = Limits(options.threads)
        machine = describe_machine(options.threads)
        print(
            f"{self.name} on {machine['cpu']}, {machine['cores']} cores, {options.threads} threads, {clock.kind} clock"
            + ", freed memory is reused" * options.reused
        )
        if options.reused:
            from herdkern import memory

            assert memory.reuse(), memory.why_not()
        else:
            print("lscpu: " + ", ".join(f"{name} {value}" for name, value in machine["lscpu"].items()))
        print_limits(cases, limits)
        results: list[dict[str, Any]] = []
        name = f"{self.name}-{options.isa}" if options.isa else self.name
        report = {"bench": name, "unit": "ms", "quick": options.quick, "cases": results, "machine": machine}
        machine["limits"] = limits.measured
        failed = 0
        for i, case in enumerate(cases):
            share = (options.until - time.time()) / (len(chosen) - i)
            result = try_case(case, max(0.2, min(share, self.seconds)), options, limits)
            if result is None:
                failed += 1
                continue
            print(f"  {i + 1} of {len(cases)}, {time.time() - process_start():.0f} s since the start", flush=True)
            results.append(result)
            write_json(options.json, report | {"unfinished": True})
        if len(cases) < len(chosen) and not options.reused:
            failed += run_reused(options, results, limits)
        by_name = {case.name: case for case in chosen}
        for result in results:  # a busy moment may have hidden a rate at first
            result |= shares(by_name[result["case"]], result[OURS] / 1e3, limits)
        if self.summarise and not options.reused:
            self.summarise(report, options.quick)
        write_json(options.json, report)
        if options.json and self.after and not options.reused:
            self.after(Path(options.json))
        if not options.reused:
            print("\n" + json.dumps(report))
        return 1 if failed else 0


def try_case(case: Case, seconds: float, options: argparse.Namespace, limits: Limits) -> dict[str, Any] | None:
    """The result of the case, printed; None if ours is wrong or raised, which is printed too."""
    try:
        result = run_case(case, seconds, options, limits)
    except Exception as error:
        wrong = isinstance(error, AssertionError)
        print(f"\n{case.name}: no times: {'WRONG RESULT: ' * wrong}{error}", flush=True)
        if not wrong:
            traceback.print_exc()
        return None
    print_case(case, result)
    return result


def run_reused(options: argparse.Namespace, results: list[dict[str, Any]], limits: Limits) -> int:
    """Runs this script's `reused` cases in a second process, which adds to `results`; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, sys.argv[0], "--reused", "--json", str(path), "--until", str(options.until)]
        command += ["--case", options.case, "--threads", str(options.threads), "--clock", clock.kind]
        command += ["--quick"] * options.quick + ["--one-thread"] * options.one_thread
        status = subprocess.run(command, check=False).returncode
        if path.exists():
            report = json.loads(path.read_text())
            results += report["cases"]
            for name, rate in report["machine"]["limits"].items():
                limits.measured[name] = max(rate, limits.measured.get(name, 0.0))
    return status


def fresh_and_reused(case: Case) -> list[Case]:
    """The case as malloc serves it, and with results in memory that was there before."""
    return [case, dataclasses.replace(case, name=f"{case.name} reused", reused=True)]


def parse(bench: Bench, arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=f"Benchmark {bench.name}; cases: {', '.join(c.name for c in bench.cases)}"
    )
    parser.add_argument("--quick", action="store_true", help="end within 45 s: fewer rounds, no large cases")
    parser.add_argument("--case", default="", metavar="PART", help="only cases whose name contains PART")
    parser.add_argument("--threads", type=int, metavar="N", help=f"threads of torch and ours (default: {cores}, all)")
    parser.add_argument("--clock", choices=("wall", "cpu"), help="default: wall; cpu for one thread")
    parser.add_argument("--isa", choices=("baseline", "avx2", "avx512", "amx"), help="level of ours and of torch")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--memory-of", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--reused", action="store_true", help=argparse.SUPPRESS)  # the second process
    parser.add_argument("--one-thread", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.until is None:
        options.until = process_start() + 32 if options.quick else float("inf")
    if options.isa and os.environ.get("HERDKERN_ISA") != options.isa:  # torch reads its own when it is imported
        torch_isa = "default" if options.isa == "baseline" else options.isa
        env = {name: value.format(torch_isa) for name, value in ISA_OF_TORCH.items()}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **env, "HERDKERN_ISA": options.isa})
    alone = bench.one_thread and options.threads is None and cores > 1 and not options.quick
    options.one_thread = options.one_thread or alone
    options.threads = options.threads or cores
    clock.kind = options.clock or ("cpu" if options.threads == 1 else "wall")
    set_threads(options.threads)
    return options


def set_threads(threads: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def write_json(path: str | None, report: dict[str, Any]) -> None:
    """The whole report under a temporary name first: whoever ends the run leaves a readable file."""
    if path:
        unfinished = Path(f"{path}.part")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(path)


def reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"failed: {type(error).__name__}: {text}"


def agree(case: Case, functions: Functions) -> dict[str, str]:
    """Checks the case; takes peers that raise or are wrong out of `functions` and returns what they said."""
    failed: dict[str, str] = {}
    try:
        found = case.check(functions) if case.check else None
    except AssertionError:
        raise
    except Exception as error:
        for name in [name for name in functions if name != OURS]:
            call(functions, name, functions[name], failed)
        if not failed:
            raise error
        found = case.check(functions) if case.check else None
    for name, text in (found or {}).items():
        functions.pop(name, None)
        failed[name] = text
    return failed


def call(functions: Functions, name: str, function: Callable[[], Any], failed: dict[str, str]) -> Any:
    """What `function` returns; None if it raises, and the peer `name` is out. Ours may not raise."""
    try:
        return function()
    except Exception as error:
        if name == OURS:
            raise
        functions.pop(name, None)
        failed[name] = reason(error)
        return None


def run_case(case: Case, seconds: float, options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Times one case for about `seconds`, setup and check included."""
    start = time.time()
    if case.flops:
        limits.gemm_gflop_per_s(case.flops_dtype, again=True)
    functions = case.setup()
    for name in case.slow_peers if options.quick else ():
        functions.pop(name, None)
    failed = agree(case, functions)
    memory: dict[str, int] = {}
    first = first_calls(functions, list(functions), failed)
    if not case.memory_apart:
        few = {name: function for name, function in functions.items() if first[name] < seconds / 4}
        grown = {name: call(functions, name, lambda: peak_growth(few[name]), failed) for name in few}  # noqa: B023
        memory = {name: bytes_added for name, bytes_added in grown.items() if bytes_added is not None}
        first |= first_calls(functions, list(memory), failed)
    elif not options.quick:
        memory = {name: grown for name, grown in memory_apart(case, options).items() if name in functions}
        start = max(start, time.time() - seconds / 3)
    samples = measure(case, functions, first, start + seconds, failed, quick=options.quick)
    result = summary(case, functions, samples, limits)
    result["peak_mib"] = {name: round(grown / 2**20, 1) for name, grown in memory.items()}
    if options.one_thread:
        result |= at_one_thread(case, functions, result, seconds / 3)
    if failed:
        result["failed"] = failed
    return result | (case.extra(functions, result, limits) if case.extra else {})


def first_calls(functions: Functions, names: Sequence[str], failed: dict[str, str]) -> dict[str, float]:
    """Warms up, and tells how long a call takes. A first call of seconds may have compiled: the second counts."""
    for name in names:
        for lap in getattr(functions[name], "laps", {}).values():
            lap.clear()
    found = {name: call(functions, name, lambda: timed(functions[name], 1), failed) for name in names}  # noqa: B023
    for name, took in found.items():
        if took is not None and 1 < took < 10:
            found[name] = call(functions, name, lambda: timed(functions[name], 1), failed)  # noqa: B023
    return {name: took for name, took in found.items() if took is not None}


def measure(
    case: Case, functions: Functions, first: dict[str, float], end: float, failed: dict[str, str], *, quick: bool
) -> dict[str, list[float]]:
    """Rounds until `end` (in seconds since the epoch), three of them at least; a slow peer may miss the later ones.

    Where a call of a slow peer takes over a second, its first has to do.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for name in case.slow_peers:
        if name in functions and first[name] > 1:
            samples[name].append(first[name])
    repeats = {name: max(1, min(1000, round(0.003 / max(took, 1e-7)))) for name, took in first.items()}
    share = (end - time.time()) / len(functions)
    rounds = {
        name: max(1 if name in case.slow_peers else 3, min(200, int(share / (took * repeats[name]))))
        for name, took in first.items()
    }
    if quick and time.time() > end:  # no time left: the first calls have to do
        return {name: [took] for name, took in first.items()}
    order = [name for name in functions if not samples[name]]
    for name in order:
        for lap in getattr(functions[name], "laps", {}).values():
            lap.clear()
    for turn in range(max(rounds.values())):
        if time.time() > end and turn >= (1 if quick else 3):
            break
        for name in order:
            if turn < rounds[name] and name in functions:
                took = call(functions, name, lambda: timed(functions[name], repeats[name]), failed)  # noqa: B023
                samples[name] += [] if took is None else [took]
        order = order[1:] + order[:1]
    return {name: taken for name, taken in samples.items() if name in functions}


def at_one_thread(case: Case, functions: Functions, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """CPU time of ours and the peers at one thread, and what more threads bring: that time over the wall time."""
    threads, kind = sys.modules["torch"].get_num_threads(), clock.kind
    some = {name: f for name, f in functions.items() if name not in case.slow_peers}
    first = {name: 1e-3 * result[name] * threads for name in some}
    set_threads(1)
    clock.kind = "cpu"
    try:
        samples = measure(case, some, first, time.time() + seconds, {}, quick=max(first.values()) > seconds / 6)
    finally:
        set_threads(threads)
        clock.kind = kind
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    peers = [t for name, t in medians.items() if name not in (OURS, *case.aside)]
    return {
        "cpu_ms_1_thread": {name: round(1e3 * t, 5) for name, t in medians.items()},
        "ratio_1_thread": round(min(peers) / medians[OURS], 3) if peers else None,
        "not_at_1_thread": [name for name in functions if name not in medians],
        f"scaling_{threads}_threads": round(1e3 * medians[OURS] / result[OURS], 3),
    }


def summary(case: Case, functions: Functions, samples: dict[str, list[float]], limits: Limits) -> dict[str, Any]:
    """The entry of one case in the report, times in milliseconds."""
    medians = {name: statistics.median(some) for name, some in samples.items()}
    ours, peers = medians[OURS], {name: t for name, t in medians.items() if name not in (OURS, *case.aside)}
    best = min(peers, key=peers.__getitem__, default=None)
    result: dict[str, Any] = {"case": case.name, **{name: round(1e3 * t, 5) for name, t in medians.items()}}
    result["ratio"] = None if best is None else round(peers[best] / ours, 3)
    result["best_peer"] = best
    result |= shares(case, ours, limits)
    result["spread"] = {name: round(1e3 * spread(some), 5) for name, some in samples.items()}
    result["rounds"] = len(samples[OURS])
    if case.flops:
        result["gflop_per_s"] = round(case.flops / ours / 1e9, 2)
    if case.bytes:
        result["gb_per_s"] = round(case.bytes / ours / 1e9, 4)
    for name, function in functions.items():
        for lap, taken in getattr(function, "laps", {}).items():
            result.setdefault(f"{lap}_ms", {})[name] = round(1e3 * statistics.median(taken), 5)
    return result


def shares(case: Case, seconds: float, limits: Limits) -> dict[str, float | None]:
    """The limit's time over `seconds` (None if the case names neither bytes nor flops), and that of torch's GEMM."""
    least = 0.0
    found: dict[str, float | None] = {}
    if case.bytes:
        least = max(least, case.bytes / 1e9 / limits.copy_gb_per_s())
    if case.flops:
        rate = limits.peak_gflop_per_s if case.flops_limit == "peak" else limits.gemm_gflop_per_s
        least = max(least, case.flops / 1e9 / rate(case.flops_dtype))
        found["gemm_share"] = round(case.flops / 1e9 / limits.gemm_gflop_per_s(case.flops_dtype) / seconds, 4)
    return {"limit_share": round(least / seconds, 4) if least else None, **found}


def spread(samples: Sequence[float]) -> float:
    """Interquartile range."""
    if len(samples) < 2:
        return 0.0
    quarters = statistics.quantiles(samples, n=4, method="inclusive")
    return quarters[2] - quarters[0]


def print_limits(cases: Sequence[Case], limits: Limits) -> None:
    """The ceilings of the dtypes whose flops some case counts."""
    for dtype in sorted({case.flops_dtype for case in cases if case.flops}):
        parts = [f"torch GEMM {limits.gemm_gflop_per_s(dtype):g} GFLOP/s"]
        if any(case.flops_limit == "peak" for case in cases):
            parts.append(f"instruction peak {limits.peak_gflop_per_s(dtype):g} GFLOP/s")
        print(f"ceiling, {dtype}, {limits.threads} threads: {', '.join(parts)}")


def print_case(case: Case, result: dict[str, Any]) -> None:
    names = list(result["spread"])
    width = max(map(len, names))
    rates = [
        f"{result[key]:g} {unit}" for key, unit in (("gflop_per_s", "GFLOP/s"), ("gb_per_s", "GB/s")) if key in result
    ]
    if result["limit_share"] is not None:
        rates.append(f"{100 * result['limit_share']:.0f} % of the limit")
    few = ", too few to trust" if result["rounds"] < 3 else ""
    print(f"\n{result['case']}  ({result['rounds']} rounds{few}{', ours ' if rates else ''}{', '.join(rates)})")
    one = result.get("cpu_ms_1_thread", {})
    for name in sorted(names, key=lambda n: (n != OURS, result[n])):
        base = result[f"{case.aside_lap}_ms"][OURS] if name in case.aside else result[OURS]
        of = f" ({case.aside_lap})" if name in case.aside else ""
        against = "" if name == OURS else f"  {result[name] / base:6.2f} x ours{of}"
        peak = result["peak_mib"].get(name)
        added = "" if peak is None else f"  +{peak:.1f} MiB"
        alone = f"  1 thread {one[name]:.4f} ms cpu" if name in one else ""
        print(
            f"  {name:{width}s}  {result[name]:11.4f} ms  +- {result['spread'][name]:.4f}{added}{against}{alone}",
            flush=True,
        )
    shown = {"ratio", "rounds", "limit_share", "gflop_per_s", "gb_per_s", *names}
    for name, text in result.get("failed", {}).items():
        print(f"  {name:{width}s}  {text}", flush=True)
    more = [f"{key} {value:g}" for key, value in result.items() if isinstance(value, int | float) and key not in shown]
    if more:
        print(f"  {', '.join(more)}", flush=True)
    if result.get("not_at_1_thread"):
        print(
            f"  not timed at one thread, no part of ratio_1_thread: {', '.join(result['not_at_1_thread'])}", flush=True
        )


def memory_apart(case: Case, options: argparse.Namespace) -> dict[str, int]:
    """Bytes that one call adds at its peak, each implementation in a process of its own; none of the failed."""
    command = [sys.executable, sys.argv[0], "--memory-of", case.name, "--threads", str(options.threads)]
    # What a warm-up freed is gone, not kept for later; one thread: see print_memory.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
        print(f"{case.name}: memory was not measured: {reason(error)}", flush=True)
        return {}
    if done.stderr:
        print(f"{case.name}: memory: {done.stderr.strip().splitlines()[-1]}", flush=True)
    return found


def print_memory(cases: Sequence[Case], case_name: str, threads: int) -> int:
    """The process that memory_apart starts: imports once, fills the inputs on one thread (a fork does not inherit
    OpenMP's others and would wait for them) and forks for each implementation.
    """
    case = next(case for case in cases if case.name == case_name)
    set_threads(1)
    functions = case.setup()
    grown: dict[str, int] = {}
    for name, function in functions.items():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                set_threads(threads)
                getattr(function, "warm_up", lambda: None)()
                if case.reused:
                    keep_from_now_on()
                os.write(writer, str(peak_growth(function)).encode())
                status = 0
            except Exception as error:
                print(f"{name}: {reason(error)}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        if os.waitpid(child, 0)[1] == 0:
            grown[name] = int(text)
    print(json.dumps(grown))
    return 0


def keep_from_now_on() -> None:
    from herdkern import memory

    memory.reuse()
    memory.release()  # what a warm-up freed is gone, as for the others


def pytest_cases(bench: Bench) -> Callable[..., None] | None:
    """A test for pytest-benchmark: every case, checked, then ours alone. None where pytest is not installed."""
    try:
        import pytest
    except ImportError:
        return None

    @pytest.mark.parametrize(
        "case", [c for c in bench.cases if not (c.is_large or c.reused)], ids=lambda case: case.name
    )
    def test(case: Case, benchmark: Any) -> None:
        functions = case.setup()
        if case.check is not None:
            case.check(functions)
        benchmark.group = bench.name
        benchmark(functions[OURS])

    return test
