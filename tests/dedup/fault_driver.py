"""Runs dedup again and again in one process that has tests/engine/faults.c loaded; prints what came of it as JSON.

`python fault_driver.py WORK INPUTS SEED FAULT:POINTS...` in the environment of `fault_injector.build`: for every point
a fresh run folder, the fault, a look at what is there, then the same call once more without a fault.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import fault_injector as fi
import pipeline

from herdkern.engine import SerialExecutor, make_executor
from herdkern.engine.journal import Journal
from herdkern.engine.shards import FileRecord, verified

FAULTS = {  # name -> (calls, what arm is told)
    "ENOSPC": (fi.WRITE | fi.SYNC | fi.RENAME | fi.OPEN | fi.MKDIR, {"error": errno.ENOSPC, "sticky": True}),
    "ENOSPC once": (fi.WRITE | fi.SYNC | fi.RENAME | fi.MKDIR, {"error": errno.ENOSPC}),
    "EIO": (fi.WRITE | fi.SYNC | fi.READ, {"error": errno.EIO}),
    "EACCES": (fi.OPEN | fi.RENAME | fi.MKDIR, {"error": errno.EACCES}),
    "short": (fi.WRITE, {"action": fi.SHORT}),
}
ALL_CALLS = fi.WRITE | fi.SYNC | fi.RENAME | fi.OPEN | fi.READ | fi.MKDIR


class Driver:
    """The folders of a test, what a calm run writes, and the checks after a fault."""

    def __init__(self, work, inputs, seed):
        self.work, self.folder = work, inputs
        self.inputs = sorted(inputs.iterdir())
        self.rng = random.Random(seed)
        self.run("calm")
        self.wanted = tree(work / "calm" / "data")
        journal = (work / "calm" / "journal.jsonl").read_text()
        self.stages = [json.loads(line)["stage"] for line in journal.splitlines()]

    def run(self, name, executor=None):
        pipeline.run_stages(self.work / name, self.inputs, executor or SerialExecutor())

    def attempt(self, name, executor=None):
        """The message of what stopped the run, or None."""
        try:
            self.run(name, executor)
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return None

    def damaged(self, name):
        """Tasks that the journal has and that are not what they should be."""
        with contextlib.redirect_stderr(None):
            journal = Journal(self.work / name / "journal.jsonl")
        found = []
        for (stage, task), entry in journal.entries.items():
            folder = self.work / name / "data" / stage / task
            if verified(folder, [FileRecord(**output) for output in entry["outputs"]]) is None:
                found.append(str(folder))
        return found

    def is_calm(self, name):
        return tree(self.work / name / "data") == self.wanted


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def places(driver, count, num_points):
    """One place in each of num_points equal parts of 1..count."""
    return [int((i + driver.rng.random()) * count / num_points) + 1 for i in range(num_points)]


def fail_calls(driver, faults, fault, num_points):
    """Let the N-th call fail, N spread over all calls of a run."""
    calls, how = FAULTS[fault]
    how = {"action": fi.FAIL, **how}
    shutil.rmtree(driver.work / "counted", ignore_errors=True)  # a run that goes on makes few calls
    faults.arm(driver.work, calls, **how)
    driver.run("counted")
    count = faults.count
    for nth in places(driver, count, num_points):
        faults.arm(driver.work, calls, nth=nth, **how)
        error = driver.attempt("run")
        faults.disarm()
        report = {"nth": nth, "place": faults.place, "hits": faults.hits, "error": error}
        report |= {"identical": driver.is_calm("run"), "damaged": driver.damaged("run")}
        yield {**report, **resumed(driver)}


def resumed(driver):
    """The same call without a fault: does it end as a calm run does, and keep what was finished?"""
    journal = driver.work / "run" / "journal.jsonl"
    before = journal.read_bytes().rpartition(b"\n")[0] if journal.exists() else b""
    error = driver.attempt("run")
    kept = journal.read_bytes().startswith(before)
    report = {"resume_error": error, "resume_identical": driver.is_calm("run"), "journal_kept": kept}
    shutil.rmtree(driver.work / "run")
    return report


class DamagingExecutor(SerialExecutor):
    """Damages a file before the task of a given number is run."""

    def __init__(self, number, damage):
        self.left, self.damage = number, damage

    def submit(self, fn, /, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.damage()
        return super().submit(fn, *args, **kwargs)


def damage_files(driver, how, num_points):
    """Cut or flip a file: an input before the run, any file between two tasks, any file of a finished run."""
    backup = {path: path.read_bytes() for path in driver.inputs}
    for number in range(num_points):
        moment = ("input", "between tasks", "finished")[number % 3]
        report = {"moment": moment, "place": ""}

        def damage(report=report, moment=moment):
            files = driver.inputs if moment == "input" else files_of_run(driver)
            path = driver.rng.choice([p for p in files if p.stat().st_size])
            damage_file(path, how, driver.rng)
            report["place"] = str(path)

        if moment == "finished":
            driver.run("run")
        if moment != "between tasks":
            damage()
            error = driver.attempt("run")
        else:
            error = driver.attempt("run", DamagingExecutor(driver.rng.randint(2, len(driver.stages)), damage))
        for path, data in backup.items():
            path.write_bytes(data)
        wrong = {str(driver.work / "run" / "data" / name) for name in differing(driver)}
        report |= {"error": error, "wrong": sorted(wrong - {report["place"]}), "identical": not wrong, "hits": 1}
        yield {**report, **resumed(driver)}


def differing(driver):
    """Names below data whose bytes are there and are not those of a calm run."""
    found = tree(driver.work / "run" / "data")
    return [name for name in found if found[name] != driver.wanted.get(name) and ".tmp" not in name]


def files_of_run(driver):
    run_dir = driver.work / "run"
    return [p for p in sorted((run_dir / "data").rglob("*")) if p.is_file()] + [run_dir / "journal.jsonl"]


def damage_file(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


class CountingExecutor(SerialExecutor):
    """Notes how many calls there were before each task."""

    def __init__(self, faults):
        self.faults, self.counts = faults, []

    def submit(self, fn, /, *args, **kwargs):
        self.counts.append(self.faults.count)
        return super().submit(fn, *args, **kwargs)


def calls_of_stages(driver, faults):
    """(first call, last call) of every stage in a calm run."""
    shutil.rmtree(driver.work / "counted", ignore_errors=True)
    faults.arm(driver.work, ALL_CALLS)
    executor = CountingExecutor(faults)
    driver.run("counted", executor)
    begins = {}
    for stage, begin in zip(driver.stages, executor.counts, strict=True):
        begins.setdefault(stage, begin + 1)
    ends = [*list(begins.values())[1:], faults.count]
    return list(zip(begins.values(), ends, strict=True))


def kill(driver, faults, kind, num_kills):
    """Kill -9 a forked copy of this process before its N-th call, until as many runs were killed.

    A fresh run is killed in one stage after the other, a resumed one anywhere.
    """
    stages = calls_of_stages(driver, faults)
    kills = fresh = 0
    while kills < num_kills:
        killed_in = []
        while kills < num_kills:
            first, last = (1, stages[-1][1]) if killed_in else stages[fresh % len(stages)]
            fresh += not killed_in
            faults.arm(driver.work, ALL_CALLS, action=fi.KILL, nth=driver.rng.randint(first, last))
            child = os.fork()
            if child == 0:
                run_and_exit(driver, kind)
            _, status = os.waitpid(child, 0)
            faults.disarm()
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                break
            kills += 1
            killed_in.append([faults.place, finished(driver)])
            damaged = driver.damaged("run") if (driver.work / "run" / "journal.jsonl").exists() else []
            if damaged:
                yield {"killed_in": killed_in, "damaged": damaged, "status": 0}
        yield {"killed_in": killed_in, "damaged": [], "status": status, "hits": 1, **resumed(driver)}


def run_and_exit(driver, kind):
    code = 1
    try:
        with make_executor(kind, 2) as executor:
            driver.run("run", executor)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(driver):
    """The stage that was at work: the first whose tasks are not all in the journal."""
    journal = driver.work / "run" / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    return driver.stages[min(lines, len(driver.stages) - 1)]


def main(work, inputs, seed, *wanted):
    faults = fi.Faults(os.environ[fi.CONTROL])
    driver = Driver(Path(work), Path(inputs), int(seed))
    found = {}
    for fault, _, num_points in (text.rpartition(":") for text in wanted):
        if fault in FAULTS:
            reports = fail_calls(driver, faults, fault, int(num_points))
        elif fault.startswith("kill "):
            reports = kill(driver, faults, fault.removeprefix("kill "), int(num_points))
        else:
            reports = damage_files(driver, fault, int(num_points))
        found[fault] = list(reports)
    print(json.dumps({"stages": sorted(set(driver.stages)), "reports": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
