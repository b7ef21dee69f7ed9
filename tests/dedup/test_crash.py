"""`kill -9` of dedup at any call and any moment, of its driver and of its workers: the next run ends byte-identical."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fault_injector
import pytest

from herdkern.engine.shards import sha256_file

HERE = Path(__file__).parent
needs_faults = pytest.mark.skipif(bool(fault_injector.why_not()), reason=fault_injector.why_not() or "possible")


@pytest.fixture
def work(tmp_path):
    """A folder with the input shards in it."""
    with fault_injector.work_folder(tmp_path) as folder:
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pipeline, pathlib\n"
        code += f"pipeline.write_inputs(pathlib.Path({str(folder / 'in')!r}), 3, num_files=12, num_chars=3000)"
        subprocess.run([sys.executable, "-c", code], check=True)
        yield folder


def kill_at_calls(work, seed, kills):
    """Kills before the N-th file call, stage by stage; returns how often each stage was hit, by executor."""
    environment = {**os.environ, **fault_injector.build(work)}
    (work / "work").mkdir()
    wanted = [f"kill {kind}:{count}" for kind, count in kills.items()]
    command = [sys.executable, str(HERE / "fault_driver.py"), str(work / "work"), str(work / "in"), str(seed), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    stages = {}
    for kind, count in kills.items():
        reports = found["reports"][f"kill {kind}"]
        for report in reports:
            assert report["status"] == 0 or report["killed_in"], (report, done.stderr[-4000:])
            assert not report["damaged"], report
            assert report["resume_error"] is None, report
            assert report["resume_identical"], report
            assert report["journal_kept"], report
        stages[kind] = Counter(stage for report in reports for _, stage in report["killed_in"])
        assert sum(stages[kind].values()) == count
    return stages, set(found["stages"])


@needs_faults
def test_killed_at_a_call(work):
    kill_at_calls(work, 1, {"serial": 5, "threads": 5})


@needs_faults
@pytest.mark.full
@pytest.mark.parametrize("kind", ["serial", "threads"])
def test_killed_at_eighty_calls_in_every_stage(work, kind):
    stages, wanted = kill_at_calls(work, 2, {kind: 80})
    assert set(stages[kind]) == wanted


def tree(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def start(work, run_dir):
    command = [sys.executable, str(HERE / "pipeline.py"), str(run_dir), str(work / "in"), "processes", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_worker(pid):
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def lines(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_during(process, whom, journal, num_lines, delay):
    """kill -9 of `process` or one of its workers, `delay` seconds after the journal has so many lines."""
    while process.poll() is None:
        workers = [pid for pid in children(process.pid) if is_worker(pid)]
        if lines(journal) >= num_lines and (workers or whom == "driver"):
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid if whom == "driver" else workers[num_lines % len(workers)], signal.SIGKILL)
            return
        time.sleep(0.002)


def kill_processes(work, num_kills, seed):
    """At moments spread over the run kill -9 the driver alone (its workers must notice), or one of its workers."""
    rng = random.Random(seed)
    calm = start(work, work / "calm")
    assert calm.communicate()[1] is not None
    assert calm.returncode == 0
    wanted, in_all = tree(work / "calm" / "data"), lines(work / "calm" / "journal.jsonl")
    kills = {"driver": 0, "worker": 0}
    run_dir = work / "run"
    while sum(kills.values()) < num_kills:
        whom = "worker" if kills["worker"] < kills["driver"] else "driver"
        process = start(work, run_dir)
        kill_during(process, whom, run_dir / "journal.jsonl", rng.randrange(in_all), rng.uniform(0, 0.05))
        error = process.communicate()[1]
        if process.returncode == -signal.SIGKILL:
            kills["driver"] += 1
        elif process.returncode:
            assert whom == "worker", error
            assert "StageError: stage '" in error, error
            assert "the worker was lost: BrokenProcessPool" in error, error
            assert "use fewer workers" in error, error
            kills["worker"] += 1
        else:  # it had no more use for its workers: start over
            assert tree(run_dir / "data") == wanted
            shutil.rmtree(run_dir)
    process = start(work, run_dir)
    assert process.communicate()[1] is not None
    assert process.returncode == 0
    assert tree(run_dir / "data") == wanted
    return kills


def test_killed_processes(work):
    kill_processes(work, 2, seed=3)


@pytest.mark.full
@pytest.mark.parametrize("seed", [4, 5])
def test_twenty_killed_processes(work, seed):
    kills = kill_processes(work, 20, seed)
    assert min(kills.values()) > 0
