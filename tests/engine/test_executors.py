import builtins
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from herdkern.engine import Run, SerialExecutor, make_executor

PIPELINE = Path(__file__).with_name("pipeline.py")


def square(x):
    return x * x


def fail(x):
    raise KeyError(x)


def copy(inputs, out, config):
    (out / "copy").write_bytes(inputs[0].read_bytes() * 2)
    return {"copied": 1}


def available(kind):
    module = {"mpi": "mpi4py", "ray": "ray", "dask": "distributed"}.get(kind)
    return module is None or importlib.util.find_spec(module) is not None


def needs(kind):
    """Marks of a kind: what starts a cluster runs with -m full, and only where it is installed."""
    if kind in ("serial", "threads", "processes"):
        return []
    return [pytest.mark.full, pytest.mark.skipif(not available(kind), reason=f"herdkern[{kind}] is not installed")]


KINDS = [pytest.param(kind, marks=needs(kind)) for kind in ("serial", "threads", "processes", "ray", "dask")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_functions_and_stages(tmp_path, kind):
    inputs = []
    for i in range(4):
        inputs.append(tmp_path / f"in-{i}")
        inputs[-1].write_text(str(i))
    with make_executor(kind, 2) as executor, Run(tmp_path / "run", executor=executor) as run:
        assert [executor.submit(square, x).result() for x in range(4)] == [0, 1, 4, 9]
        with pytest.raises(KeyError):
            executor.submit(fail, 1).result()
        result = run.map("copy", copy, inputs, config={})
    assert [p.read_text() for p in result.files("copy")] == ["00", "11", "22", "33"]
    assert result.counters == {"copied": 4}


@pytest.mark.full
@pytest.mark.skipif(not available("mpi") or shutil.which("mpiexec") is None, reason="herdkern[mpi] is not installed")
def test_mpi_gives_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / str(i)).write_bytes(bytes([65 + i]) * 1000)
    for kind in ("serial", "mpi"):
        command = [sys.executable, *(["-m", "mpi4py.futures"] if kind == "mpi" else []), str(PIPELINE)]
        launch = ["mpiexec", "-n", "3", *command] if kind == "mpi" else command
        subprocess.run([*launch, str(tmp_path / kind), str(tmp_path / "in"), kind], check=True, timeout=120)
    assert files_below(tmp_path / "serial" / "data") == files_below(tmp_path / "mpi" / "data")


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_serial_executor_has_finished_when_submit_returns():
    done = []
    future = SerialExecutor().submit(done.append, 1)
    assert done == [1]
    assert future.done()


def test_interrupts_pass_through_the_serial_executor():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SerialExecutor().submit(interrupt)


def test_workers_are_processes_of_their_own():
    with make_executor("processes", 1) as executor:
        assert executor.submit(os.getpid).result() != os.getpid()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind must be one of serial, threads, processes, mpi, ray, dask, got 'slurm'"):
        make_executor("slurm")
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        make_executor("threads", 0)


@pytest.mark.parametrize(("kind", "module"), [("mpi", "mpi4py"), ("ray", "ray"), ("dask", "distributed")])
def test_a_missing_extra_is_named(monkeypatch, kind, module):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"make_executor: '{kind}' needs the extra herdkern\[{kind}\]"):
        make_executor(kind, 1)


def kill_first_worker(process, delay):
    """`kill -9` of the first worker of a pool that another process starts, `delay` seconds after it is there."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        for child in listed.read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    time.sleep(delay)
                    os.kill(int(child), signal.SIGKILL)
                    return


@pytest.mark.parametrize("delay", [0, 0.001, 0.002, 0.005])
def test_a_worker_killed_while_others_start_leaves_nothing_to_wait_for(tmp_path, delay):
    """The standard library's pool alone hangs here now and then, in its shutdown."""
    program = """
import concurrent.futures.process, time
from herdkern.engine import make_executor

if __name__ == "__main__":
    try:
        with make_executor("processes", 3) as pool:
            futures = [pool.submit(time.sleep, 1) for _ in range(9)]
            [future.result() for future in futures]
    except concurrent.futures.process.BrokenProcessPool:
        print("told")
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_first_worker(process, delay)
    told, error = process.communicate(timeout=120)
    assert told == "told\n", error
