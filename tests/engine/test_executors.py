import builtins
import importlib.util
import os

import pytest

from herdkern.engine import Run, SerialExecutor, make_executor


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


KINDS = [
    pytest.param(k, marks=[] if available(k) else pytest.mark.skip(reason=f"the extra for {k} is not installed"))
    for k in ("serial", "threads", "processes", "ray", "dask")
]


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
