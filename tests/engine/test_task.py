import concurrent.futures
import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from herdkern.engine import Run, StageError, code_version, make_executor, shards, task_memory
from herdkern.engine.executors import num_workers
from herdkern.engine.shards import describe, is_as_recorded
from herdkern.engine.task import default_memory, function_name


def copy(inputs, out, config):
    (out / "copy").write_bytes(b"".join(path.read_bytes() for path in inputs))


def note_memory(inputs, out, config):
    (out / "x").write_text("x")
    return {"memory": [task_memory()]}


def memory_ends(inputs, out, config):
    raise MemoryError("cannot allocate 9 GiB")


def dies_on_c(inputs, out, config):
    if inputs[0].read_text() == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    (out / "x").write_text("x")


def writes_to_its_input(inputs, out, config):
    (out / "x").write_bytes(inputs[0].read_bytes())
    if config.get("and"):
        inputs[0].write_bytes(b"other")


def denied(inputs, out, config):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(inputs[0]))


def disk_fails(inputs, out, config):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def with_folder(inputs, out, config):
    (out / "deep" / "er").mkdir(parents=True)
    (out / "deep" / "er" / "x").write_bytes(inputs[0].read_bytes())
    (out / "y").write_text("y")


def size_of_folder(inputs, out, config):
    (out / "x").write_text(str(sum(p.stat().st_size for p in inputs[0].rglob("*") if p.is_file())))


@pytest.fixture
def inputs(tmp_path):
    paths = [tmp_path / f"in-{i}.txt" for i in range(4)]
    for path, text in zip(paths, "abcd", strict=True):
        path.write_text(text)
    return paths


def entries(run_dir):
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "workers"), [("serial", 1), ("threads", 2), ("processes", 2)])
def test_tasks_that_run_at_once_share_the_memory(tmp_path, inputs, kind, workers):
    with make_executor(kind, workers) as executor, Run(tmp_path / "r", executor=executor, max_memory=1000) as run:
        assert run.map("map", note_memory, inputs, config={}).counters == {"memory": [1000 // workers] * 4}
        assert run.once("once", note_memory, inputs, config={}).counters == {"memory": [1000]}
    with Run(tmp_path / "r", max_memory=7) as run:
        assert run.map("map", note_memory, inputs, config={}).skipped  # the budget is no part of the result


def test_without_a_budget_half_of_the_machine_is_shared(tmp_path, inputs):
    with Run(tmp_path / "r") as run:
        assert run.map("map", note_memory, inputs[:1], config={}).counters == {"memory": [default_memory()]}
    assert task_memory() == default_memory()  # outside of a task
    assert 0 < default_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with pytest.raises(ValueError, match="max_memory must be at least 1 byte or None, got 0"):
        Run(tmp_path / "r", max_memory=0)


def test_the_number_of_workers_is_known():
    for kind, wanted in (("serial", 1), ("threads", 3), ("processes", 2)):
        with make_executor(kind, wanted) as executor:
            assert num_workers(executor) == wanted
    assert num_workers(concurrent.futures.Executor()) == len(os.sched_getaffinity(0))


def test_another_code_version_runs_again(tmp_path, inputs):
    def run_with(version):
        fn = copy if version is None else code_version(version)(copy)
        try:
            with Run(tmp_path / "r") as run:
                return run.map("copy", fn, inputs, config={}).skipped
        finally:
            if version is not None:
                del copy.code_version

    assert [run_with(v) for v in (None, None, 1, 1, 2, 2, 1)] == [False, True, False, True, False, True, False]
    assert {e["function"].rpartition(".")[2] for e in entries(tmp_path / "r")} == {"copy", "copy@1", "copy@2"}
    assert function_name(copy) == f"{__name__}.copy"


def test_memory_that_runs_out_says_what_to_do(tmp_path, inputs):
    with Run(tmp_path / "r") as run:
        with pytest.raises(StageError, match=r"task-00000 .*in-0.txt\): MemoryError: cannot allocate.*fewer workers"):
            run.map("m", memory_ends, inputs, config={})


def test_a_dead_worker_names_the_tasks_at_work_and_a_new_executor_goes_on(tmp_path, inputs):
    with make_executor("processes", 1) as executor, Run(tmp_path / "r", executor=executor) as run:
        with pytest.raises(StageError) as e:
            run.map("s", dies_on_c, inputs, config={})
        message = str(e.value)
        assert message.startswith("stage 's': the worker was lost: BrokenProcessPool")
        assert f"At work: task-00002 (input {inputs[2]})" in message
        assert "task-00003" not in message
        assert "use fewer workers, smaller inputs or a lower max_memory" in message
        assert [line["task"] for line in entries(tmp_path / "r")] == ["task-00000", "task-00001"]
        with pytest.raises(StageError, match=r"stage 'other': the worker was lost: BrokenProcessPool.*new executor"):
            run.map("other", copy, inputs, config={})
    inputs[2].write_text("C")
    with make_executor("processes", 1) as executor, Run(tmp_path / "r", executor=executor) as run:
        assert len(run.map("s", dies_on_c, inputs, config={}).tasks) == 4
    assert [line["task"] for line in entries(tmp_path / "r")] == [f"task-{i:05d}" for i in range(4)]


def test_a_function_that_cannot_travel_is_named(tmp_path, inputs):
    def local(inputs, out, config):
        pass

    with make_executor("processes", 1) as executor, Run(tmp_path / "r", executor=executor) as run:
        with pytest.raises(StageError, match=r"task-00000 .*cannot be sent to a worker.*must be a top-level function"):
            run.map("s", local, inputs[:1], config={})


def test_a_permission_names_the_file_and_a_failing_disk_the_run(tmp_path, inputs):
    with Run(tmp_path / "r") as run:
        with pytest.raises(StageError, match=r"Permission denied: '.*in-0.txt'; check the permissions"):
            run.map("s", denied, inputs, config={})
        with pytest.raises(StageError, match=r"Input/output error; the disk failed: check it \(inputs, and .*/r\)"):
            run.map("s", disk_fails, inputs, config={})


def test_an_input_that_changes_while_a_task_runs_is_refused(tmp_path, inputs):
    with Run(tmp_path / "r") as run:
        with pytest.raises(StageError, match=r"in-0.txt was written to or damaged while the stage ran"):
            run.map("s", writes_to_its_input, inputs, config={"and": True})
        assert not (tmp_path / "r" / "journal.jsonl").exists()
    inputs[0].write_bytes(b"a")
    with Run(tmp_path / "r") as run:  # touched, with the bytes that it had
        run.map("s", writes_to_its_input, inputs, config={})
        os.utime(inputs[0], ns=(1, 1))
        assert run.map("s", writes_to_its_input, inputs, config={}).skipped


def test_an_input_that_changes_between_two_stages_is_refused(tmp_path, inputs):
    with Run(tmp_path / "r") as run:
        run.map("first", copy, inputs, config={})
        inputs[1].write_text("x")
        with pytest.raises(StageError, match=r"stage 'second': .*in-1.txt has changed since stage 'first' read"):
            run.map("second", copy, inputs, config={})
        inputs[2].write_text("y")
        assert not run.map("first", copy, inputs, config={}).skipped  # from the start it may
        result = run.map("second", copy, inputs, config={})
    assert [p.read_text() for p in result.files("copy")] == ["a", "x", "y", "d"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("inner", ["", "deep", "deep/er", "deep/er/x"])
@pytest.mark.parametrize("same_run", [True, False])
def test_a_damaged_output_is_no_input(tmp_path, inputs, inner, same_run):
    run = Run(tmp_path / "r")
    made = [task / inner for task in run.map("make", with_folder, inputs, config={}).tasks]
    flip(tmp_path / "r/data/make/task-00001/deep/er/x")
    if not same_run:
        run.close()
        run = Run(tmp_path / "r")
    with pytest.raises(StageError, match=r"task-00001.* is damaged.*run stage 'make' again"):
        run.map("use", size_of_folder if inner != "deep/er/x" else copy, made, config={})
    run.close()
    with Run(tmp_path / "r") as run:
        run.map("make", with_folder, inputs, config={})
        run.map("use", size_of_folder if inner != "deep/er/x" else copy, made, config={})


def test_no_file_is_hashed_twice(tmp_path, inputs, monkeypatch):
    """An input is hashed once by the driver, an output once by its worker; after that its stamp speaks for it."""
    hashed = []
    original = shards.sha256_file

    def note(path):
        hashed.append(re.sub(r"\.[0-9a-f]+\.tmp", "", str(path)))
        return original(path)

    monkeypatch.setattr(shards, "sha256_file", note)
    with Run(tmp_path / "r") as run:
        made = run.map("make", with_folder, inputs, config={})
        run.map("again", copy, inputs, config={})
        run.map("use", copy, made.files("deep/er/x"), config={})
        run.map("folder", size_of_folder, made.tasks, config={})
    assert len(hashed) == 4 + 4 * (2 + 1 + 1 + 1)
    assert len(set(hashed)) == len(hashed)


def test_a_record_holds_until_the_bytes_change(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("a")
    for path in (folder, folder / "a"):
        record = describe(path)
        assert is_as_recorded(path, record)
        os.utime(folder / "a", ns=(5, 5))
        assert is_as_recorded(path, record)  # by its hash
    flip(folder / "a")
    assert not is_as_recorded(folder, record)
    assert not is_as_recorded(folder / "a", record)
    shutil.rmtree(folder)
    assert not is_as_recorded(folder, record)
    assert not is_as_recorded(Path(tmp_path / "gone"), record)
