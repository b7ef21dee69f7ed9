"""`kill -9` of dedup at any call and any moment, of its driver and of its workers: the next run ends byte-identical."""

import json
import os
import random
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


def write_corpus(folder):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pipeline, pathlib\n"
    code += f"pipeline.write_inputs(pathlib.Path({str(folder)!r}), 3, num_files=12, num_chars=3000)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "in"
    write_corpus(folder)
    return folder


def kill_at_calls(corpus, tmp_path, kind, num_kills, seed):
    """Kills before the N-th file call, N uniform over a run; returns how often each stage was hit."""
    environment = {**os.environ, **fault_injector.build(tmp_path)}
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(HERE / "fault_driver.py"), f"kill {kind}", str(tmp_path / "work"), str(corpus)]
    done = subprocess.run([*command, str(num_kills), str(seed)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for report in found["reports"]:
        assert report["status"] == 0 or report["killed_in"], (report, done.stderr[-4000:])
        assert not report["damaged"], report
        assert report["resume_error"] is None, report
        assert report["resume_identical"], report
        assert report["journal_kept"], report
    stages = Counter(stage for report in found["reports"] for _, stage in report["killed_in"])
    assert sum(stages.values()) == num_kills
    return stages, found["stages"]


@needs_faults
@pytest.mark.parametrize("kind", ["serial", "threads"])
def test_killed_at_a_call(corpus, tmp_path, kind):
    kill_at_calls(corpus, tmp_path, kind, 6, seed=1)


@needs_faults
@pytest.mark.full
@pytest.mark.parametrize("kind", ["serial", "threads"])
def test_killed_at_eighty_calls_in_every_stage(corpus, tmp_path, kind):
    stages, wanted = kill_at_calls(corpus, tmp_path, kind, 80, seed=2)
    if kind == "serial":
        assert set(stages) == set(wanted)


def tree(folder):
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def start(corpus, run_dir):
    command = [sys.executable, str(HERE / "pipeline.py"), str(run_dir), str(corpus), "processes", "2"]
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


def kill_processes(corpus, tmp_path, num_kills, seed):
    """At random moments kill -9 the driver alone (its workers must notice), or one of its workers."""
    rng = random.Random(seed)
    started = time.monotonic()
    calm = start(corpus, tmp_path / "calm")
    assert calm.communicate()[1] is not None
    assert calm.returncode == 0
    longest = time.monotonic() - started
    wanted = tree(tmp_path / "calm" / "data")
    kills = {"driver": 0, "worker": 0}
    attempt = 0
    while sum(kills.values()) < num_kills:
        run_dir = tmp_path / f"run-{attempt}"
        attempt += 1
        while True:
            process = start(corpus, run_dir)
            whom = "worker" if kills["worker"] < kills["driver"] else "driver"
            time.sleep(rng.uniform(0.3 * longest, longest))
            workers = [pid for pid in children(process.pid) if is_worker(pid)]
            victims = workers if whom == "worker" else [process.pid]
            if process.poll() is None and victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
            error = process.communicate()[1]
            if process.returncode == 0:
                break  # it was done, or had no more use for its workers
            if process.returncode == -signal.SIGKILL:
                kills["driver"] += 1
            else:
                assert whom == "worker", error
                assert "StageError: stage '" in error, error
                assert "the worker was lost: BrokenProcessPool" in error, error
                assert "use fewer workers" in error, error
                kills["worker"] += 1
        assert tree(run_dir / "data") == wanted
    return kills


def test_killed_processes(corpus, tmp_path):
    kill_processes(corpus, tmp_path, 2, seed=3)


@pytest.mark.full
@pytest.mark.parametrize("seed", [4, 5])
def test_twenty_killed_processes(corpus, tmp_path, seed):
    kills = kill_processes(corpus, tmp_path, 20, seed)
    assert min(kills.values()) > 0
