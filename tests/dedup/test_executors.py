"""The whole of dedup gives the same bytes and clusters with every executor, number of workers and order of shards."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PIPELINE = Path(__file__).with_name("pipeline.py")
_spec = importlib.util.spec_from_file_location("dedup_pipeline", PIPELINE)
pipeline = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pipeline)

PACKAGES = {"mpi": "mpi4py", "ray": "ray", "dask": "distributed"}


def mpiexec():
    """The launcher: beside this Python (the wheel mpich puts it there), or on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def why_not(kind):
    package = PACKAGES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'herdkern[{kind}]'"
    return "no mpiexec" if kind == "mpi" and mpiexec() is None else ""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    pipeline.write_inputs(folder / "in", 3, num_files=60, num_chars=8000)
    return folder


@pytest.fixture(scope="module")
def wanted(corpus):
    """From this process, one task after the other."""
    return run(corpus, "serial", 1, "")


def run(corpus, kind, workers, order):
    inputs = sorted((corpus / "in").iterdir(), reverse=order == "reversed")
    run_dir = corpus / f"{kind}-{workers}-{order}"
    if kind in ("serial", "threads"):
        with pipeline.make_executor(kind, workers) as executor:
            found = pipeline.summary(inputs, pipeline.run_stages(run_dir, inputs, executor))
    else:
        arguments = [str(run_dir), str(corpus / "in"), kind, str(workers), order]
        command = [sys.executable, str(PIPELINE), *arguments]
        if kind == "mpi":  # rank 0 runs the stages, the others their tasks
            launch = [mpiexec(), "-n", str(workers + 1)]
            command = [*launch, sys.executable, "-m", "mpi4py.futures", str(PIPELINE), *arguments]
        environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(run_dir)
    return json.loads(json.dumps(found))


def heavy(kind):
    skip = pytest.mark.skipif(bool(why_not(kind)), reason=why_not(kind) or "installed")
    return [pytest.mark.full, skip]


CASES = [
    ("serial", 1, "reversed"),
    ("threads", 1, ""),
    ("threads", 2, "reversed"),
    ("processes", 2, "reversed"),
    pytest.param("processes", 1, "", marks=pytest.mark.full),
    *(
        pytest.param(kind, workers, order, marks=heavy(kind))
        for kind in PACKAGES
        for workers, order in ((1, ""), (2, "reversed"))
    ),
]


@pytest.mark.parametrize(("kind", "workers", "order"), CASES)
def test_same_files_and_clusters(corpus, wanted, kind, workers, order):
    found = run(corpus, kind, workers, order)
    assert found["clusters"] == wanted["clusters"]
    assert found["files"] == wanted["files"]
    assert found["counters"] == wanted["counters"]


def test_the_corpus_has_something_to_find(wanted):
    assert len(wanted["clusters"]) > 10
    assert len(wanted["files"]) >= 3 * (2 + 2 + 3)
    assert wanted["counters"]["urls"]["dropped"]["duplicate_url"] > 10
    assert wanted["counters"]["lines"]["lines_removed"] > 10
