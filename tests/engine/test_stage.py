import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from herdkern.engine import Run, StageError, make_executor, sha256_file

PIPELINE = Path(__file__).with_name("pipeline.py")


@dataclass(frozen=True, kw_only=True)
class Config:
    times: int = 2
    fail_on: str = ""


def copy_times(inputs, out, config):
    text = "".join(path.read_text() for path in inputs)
    if config.fail_on and config.fail_on in text:
        raise ValueError(f"cannot use {text!r}")
    (out / "text.txt").write_text(text * config.times)
    (out / "folder").mkdir()
    (out / "folder" / "copy.txt").write_text(text)
    return {"docs_in": len(inputs), "dropped": {text[0]: 1}}


def exits(inputs, out, config):
    sys.exit(0)


def read_folder(inputs, out, config):
    (out / "names.txt").write_text("\n".join(sorted(p.name for path in inputs for p in path.iterdir())))


def by_letter(inputs, out, config, num_partitions):
    text = inputs[0].read_text()
    for p in range(num_partitions):
        (out / f"part-{p:05d}").write_text("".join(c for c in text if ord(c) % num_partitions == p))
    return {"letters": len(text)}


def join(inputs, out, config):
    (out / "text.txt").write_text("|".join(path.read_text() for path in inputs))
    return {"pieces": len(inputs)}


def forgets_a_part(inputs, out, config, num_partitions):
    (out / "part-00000").write_text("x")


def returns_a_list(inputs, out, config):
    return [1]


def leaves_a_link(inputs, out, config):
    (out / "link").symlink_to(inputs[0])


def disk_full(inputs, out, config):
    if inputs[0].read_text() == "c":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "x"))
    (out / "x").write_text("done")


def ends_its_process(inputs, out, config):
    os.kill(os.getpid(), signal.SIGKILL)


class OddError(Exception):
    def __init__(self, a, b):  # cannot be unpickled
        super().__init__(f"{a} and {b}")


def raises_odd_error(inputs, out, config):
    raise OddError("this", "that")


def make_inputs(folder, texts):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"in-{i}.txt").write_text(text)
    return sorted(folder.iterdir())


def tree(folder):
    """Every path below a folder with its bytes (None for a folder)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def journal_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path / "in", ["a", "b", "c", "d"])


def test_map_gives_each_input_its_folder_and_sums_counters(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        result = run.map("copy", copy_times, inputs, config=Config())
    assert [t.name for t in result.tasks] == ["task-00000", "task-00001", "task-00002", "task-00003"]
    assert [p.read_text() for p in result.files("text.txt")] == ["aa", "bb", "cc", "dd"]
    assert [p.read_text() for p in result.files("folder/copy.txt")] == ["a", "b", "c", "d"]
    assert result.counters == {"docs_in": 4, "dropped": {"a": 1, "b": 1, "c": 1, "d": 1}}
    assert not result.skipped
    assert result.files("nothing") == []


def test_a_task_may_take_several_files_and_folders(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        copied = run.map("copy", copy_times, [inputs[:3], inputs[3]], config=Config())
        assert [p.read_text() for p in copied.files("text.txt")] == ["abcabc", "dd"]
        listed = run.map("list", read_folder, copied.tasks, config={})
        again = run.once("once", read_folder, copied.files("folder"), config={})
    assert listed.files("names.txt")[0].read_text() == "folder\ntext.txt"
    assert again.files("names.txt")[0].read_text() == "copy.txt\ncopy.txt"


def test_exchange_brings_keys_together_in_input_order(tmp_path):
    inputs = make_inputs(tmp_path / "in", ["abab", "ba", "", "bbc"])
    with Run(tmp_path / "run") as run:
        result = run.exchange("ex", by_letter, join, inputs, num_partitions=2, config={})
    assert [p.read_text() for p in result.files("text.txt")] == ["bb|b||bb", "aa|a||c"]
    assert result.counters == {"pieces": 8}
    assert result.partition_counters == {"letters": 9}


def test_a_second_run_skips_what_is_done(tmp_path, inputs):
    for expected in (False, True, True):
        with Run(tmp_path / "run") as run:
            result = run.map("copy", copy_times, inputs, config=Config())
            parts = run.exchange("ex", by_letter, join, result.files("text.txt"), num_partitions=2, config={})
            assert result.skipped is expected
            assert parts.skipped is expected
            assert result.counters["docs_in"] == 4
    assert len(journal_lines(tmp_path / "run")) == 4 + 4 + 2


def test_another_config_input_or_function_runs_again(tmp_path, inputs):
    run = Run(tmp_path / "run")
    run.map("copy", copy_times, inputs, config=Config())
    result = run.map("copy", copy_times, inputs, config=Config(times=3))
    assert not result.skipped
    assert result.files("text.txt")[0].read_text() == "aaa"
    inputs[1].write_text("B")
    result = run.map("copy", copy_times, inputs, config=Config(times=3))
    assert not result.skipped
    assert [p.read_text() for p in result.files("text.txt")] == ["aaa", "BBB", "ccc", "ddd"]
    assert [line["task"] for line in journal_lines(tmp_path / "run")][8:] == ["task-00001"]
    assert not run.map("copy", join, inputs, config=Config(times=3)).skipped
    run.close()


def test_fewer_inputs_leave_no_strays(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        run.map("copy", copy_times, inputs, config=Config())
        (tmp_path / "run/data/copy/task-00000.abc.tmp").mkdir()
        run.map("copy", copy_times, inputs[:2], config=Config())
    assert sorted(p.name for p in (tmp_path / "run/data/copy").iterdir()) == ["task-00000", "task-00001"]


def test_a_worker_that_outlives_a_killed_run_stops_nothing(tmp_path, inputs, monkeypatch):
    stray = tmp_path / "run/data/copy/task-00000.abc.tmp"
    stray.mkdir(parents=True)
    calls = []

    def remove_while_written(path):
        calls.append(path)
        if calls == [stray]:  # a file appears between reading the folder and removing it
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        shutil.rmtree(path)

    monkeypatch.setattr("herdkern.engine.stage.remove_folder", remove_while_written)
    with Run(tmp_path / "run") as run:
        run.map("copy", copy_times, inputs[:1], config=Config())
    assert calls == [stray, stray]
    assert [p.name for p in (tmp_path / "run/data/copy").iterdir()] == ["task-00000"]


def test_what_no_run_has_made_is_never_deleted(tmp_path, inputs):
    folder = tmp_path / "data" / "copy"  # a project whose own folder has the name of a stage
    folder.mkdir(parents=True)
    mine = [folder / name for name in ("mine.jsonl", "notes.tmp", "task-list.txt", "task-00000.jsonl")]
    for path in mine:
        path.write_text("mine")
    with Run(tmp_path) as run:
        run.map("copy", copy_times, inputs, config=Config())
        run.map("copy", copy_times, inputs[:1], config=Config(times=3))
    assert [path.read_text() for path in mine] == ["mine"] * 4


@pytest.mark.parametrize("kind", ["serial", "threads", "processes"])
def test_a_function_that_exits_has_not_finished(tmp_path, inputs, kind):
    with make_executor(kind, 1) as executor, Run(tmp_path / "run", executor=executor) as run:
        with pytest.raises(StageError, match="SystemExit: 0"):
            run.map("bad", exits, inputs[:1], config={})
    assert not (tmp_path / "run" / "journal.jsonl").exists()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_executors_give_the_same_bytes(tmp_path, inputs, kind):
    trees = []
    for name in ("serial", kind):
        with make_executor(name, 3) as executor, Run(tmp_path / name, executor=executor) as run:
            result = run.map("copy", copy_times, inputs, config=Config())
            run.exchange("ex", by_letter, join, result.files("text.txt"), num_partitions=3, config={})
        trees.append(tree(tmp_path / name / "data"))
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"zz"),  # same size
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: shutil.rmtree(path.parent),
        lambda path: (path.parent / "extra").write_bytes(b"x"),
    ],
    ids=["changed", "emptied", "deleted", "folder deleted", "file added"],
)
def test_damaged_output_is_made_again(tmp_path, inputs, damage):
    with Run(tmp_path / "run") as run:
        run.map("copy", copy_times, inputs, config=Config())
        run.map("join", join, run.map("copy", copy_times, inputs, config=Config()).files("text.txt"), config={})
    wanted = tree(tmp_path / "run/data")
    damage(tmp_path / "run/data/copy/task-00002/text.txt")
    with Run(tmp_path / "run") as run:
        result = run.map("copy", copy_times, inputs, config=Config())
        assert not result.skipped
        assert run.map("join", join, result.files("text.txt"), config={}).skipped  # it is as it was before
    assert tree(tmp_path / "run/data") == wanted
    assert [line["task"] for line in journal_lines(tmp_path / "run")][8:] == ["task-00002"]


def test_a_damaged_input_from_an_earlier_stage_is_refused(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        files = run.map("copy", copy_times, inputs, config=Config()).files("text.txt")
    files[1].write_text("zz")
    with Run(tmp_path / "run") as run, pytest.raises(StageError, match=r"is damaged.*run stage 'copy' again"):
        run.map("join", join, files, config={})


def test_a_missing_input_is_named(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        with pytest.raises(StageError, match=r"stage 'copy': cannot read the input .*gone\.txt: .*No such file"):
            run.map("copy", copy_times, [*inputs, tmp_path / "gone.txt"], config=Config())
        files = run.map("copy", copy_times, inputs, config=Config()).files("text.txt")
    files[0].unlink()
    with Run(tmp_path / "run") as run, pytest.raises(StageError, match="output of stage 'copy': run that stage again"):
        run.map("join", join, files, config={})


@pytest.mark.parametrize("kind", ["serial", "threads", "processes"])
def test_a_failing_task_names_stage_input_and_cause_and_keeps_the_rest(tmp_path, inputs, kind):
    with make_executor(kind, 1) as executor, Run(tmp_path / "run", executor=executor) as run:
        with pytest.raises(
            StageError, match=r"stage 'copy', task-00002 \(input .*in-2.txt\): ValueError: cannot use 'c'"
        ) as e:
            run.map("copy", copy_times, inputs, config=Config(fail_on="c"))
        assert isinstance(e.value.__cause__, ValueError)
        assert {"task-00000", "task-00001"} <= {p.name for p in (tmp_path / "run/data/copy").iterdir()}
        assert not list((tmp_path / "run/data/copy").glob("*.tmp"))
        finished = {line["task"] for line in journal_lines(tmp_path / "run")}
        inputs[2].write_text("C")
        result = run.map("copy", copy_times, inputs, config=Config(fail_on="c"))
    assert result.files("text.txt")[2].read_text() == "CC"
    assert finished >= {"task-00000", "task-00001"}
    assert len(journal_lines(tmp_path / "run")) == 4


def test_an_error_that_cannot_be_pickled_is_still_shown(tmp_path, inputs):
    with make_executor("processes", 1) as executor, Run(tmp_path / "run", executor=executor) as run:
        with pytest.raises(StageError, match=r"OddError: this and that(.|\n)*raises_odd_error"):
            run.map("odd", raises_odd_error, inputs[:1], config={})


def test_a_lost_worker_is_reported(tmp_path, inputs):
    with make_executor("processes", 1) as executor, Run(tmp_path / "run", executor=executor) as run:
        with pytest.raises(StageError, match="the worker was lost: BrokenProcessPool"):
            run.map("lost", ends_its_process, inputs[:1], config={})


def test_a_full_disk_says_so_and_keeps_what_is_finished(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        with pytest.raises(StageError, match=r"No space left on device.*is full: free space and run again"):
            run.map("write", disk_full, inputs, config={})
    assert len(journal_lines(tmp_path / "run")) == 2
    assert sorted(p.name for p in (tmp_path / "run/data/write").iterdir()) == ["task-00000", "task-00001"]


def write_much(inputs, out, config):
    (out / "much.bin").write_bytes(inputs[0].read_bytes() * config["times"])


def test_a_file_that_may_not_grow_is_an_error_and_not_a_short_file(tmp_path, inputs):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run(tmp_path / "run") as run:
        run.map("write", write_much, inputs[:1], config={"times": 1})
        before = tree(tmp_path / "run/data")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(StageError, match="may not grow further"):
                run.map("write", write_much, inputs[:1], config={"times": 200_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert tree(tmp_path / "run/data") == before
        assert not run.map("write", write_much, inputs[:1], config={"times": 200_000}).skipped


def test_a_journal_that_cannot_grow_stays_readable(tmp_path, inputs):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run(tmp_path / "run") as run:
        run.map("one", copy_times, inputs[:1], config=Config())
        size = (tmp_path / "run/journal.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
        try:
            with pytest.raises(StageError, match="cannot put the result into"):
                run.map("two", copy_times, inputs[:1], config=Config())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run/journal.jsonl").stat().st_size == size
    with Run(tmp_path / "run") as run:
        assert run.map("one", copy_times, inputs[:1], config=Config()).skipped
        assert not run.map("two", copy_times, inputs[:1], config=Config()).skipped


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Run: run_dir must be writable, got .*file/run: Not a directory"):
        Run(tmp_path / "file" / "run")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="Run: run_dir must be writable"):
        Run(tmp_path / "locked" / "run")


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (returns_a_list, "must return a dict of counters, got list"),
        (leaves_a_link, "link must be a plain file or folder"),
    ],
)
def test_what_a_stage_function_may_not_do(tmp_path, inputs, fn, message):
    with Run(tmp_path / "run") as run, pytest.raises(StageError, match=message):
        run.map("bad", fn, inputs[:1], config={})


def test_a_missing_part_is_named(tmp_path, inputs):
    with Run(tmp_path / "run") as run, pytest.raises(StageError, match=r"must write out/part-00000 to out/part-00001"):
        run.exchange("ex", forgets_a_part, join, inputs, num_partitions=2, config={})


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_bad_stage_names_are_refused(tmp_path, inputs, name):
    with Run(tmp_path / "run") as run, pytest.raises(ValueError, match="a stage name must be"):
        run.map(name, join, inputs, config={})


def test_a_closed_run_is_refused(tmp_path, inputs):
    run = Run(tmp_path / "run")
    run.close()
    with pytest.raises(ValueError, match="the run must be open"):
        run.map("copy", join, inputs, config={})


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path, inputs):
    code = f"from herdkern.engine import Run; Run({str(tmp_path / 'run')!r})"
    with Run(tmp_path / "run"), Run(tmp_path / "run"):  # one process may open it twice
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 1
        assert (
            f"must be used by one process at a time, got {tmp_path / 'run'}, in which process {os.getpid()}"
            in result.stderr
        )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_progress_counts_input_bytes(tmp_path, inputs, capfd):
    with Run(tmp_path / "run", progress=True) as run:
        run.map("copy", copy_times, inputs, config=Config())
    shown = capfd.readouterr().err
    assert "copy: 100%" in shown
    assert "4.00/4.00" in shown
    with Run(tmp_path / "run2") as run:  # not a terminal: silent
        run.map("copy", copy_times, inputs, config=Config())
    assert capfd.readouterr().err == ""


def run_pipeline(run_dir, inputs_dir, executor, kill_after=None):
    """True if the pipeline ended by itself; its whole process group is killed after kill_after seconds otherwise."""
    command = [sys.executable, str(PIPELINE), str(run_dir), str(inputs_dir), executor]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL to the main process alone: its workers must notice
        process.communicate()
        return False
    assert process.returncode == 0, error
    return True


def kill_and_resume(tmp_path, num_kills, executor, seed):
    rng = random.Random(seed)
    inputs = tmp_path / "in"
    inputs.mkdir()
    for i in range(12):
        (inputs / f"in-{i:02d}").write_bytes(rng.randbytes(20_000 + i))
    started = time.monotonic()
    assert run_pipeline(tmp_path / "calm", inputs, executor)
    longest = time.monotonic() - started
    wanted = tree(tmp_path / "calm" / "data")
    kills = attempts = 0
    while kills < num_kills:
        attempts += 1
        run_dir = tmp_path / f"killed-{attempts}"
        while not run_pipeline(run_dir, inputs, executor, kill_after=rng.uniform(0.05, longest)):
            kills += 1
        assert tree(run_dir / "data") == wanted
        with Run(run_dir) as run:
            assert {k for k, _ in run.journal.entries} == {
                "transform",
                "exchange.partition",
                "exchange",
                "folders",
                "all",
            }
        shutil.rmtree(run_dir)
    return attempts


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_killed_runs_end_byte_identical(tmp_path, executor):
    kill_and_resume(tmp_path, 3, executor, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
def test_many_killed_runs_end_byte_identical(tmp_path, executor):
    kill_and_resume(tmp_path, 25, executor, seed=2)


def test_workers_end_with_a_killed_run(tmp_path):
    code = (
        "import os, sys, time\n"
        "from herdkern.engine import make_executor\n"
        "if __name__ == '__main__':\n"
        "    executor = make_executor('processes', 2)\n"
        "    print(*{executor.submit(os.getpid).result() for _ in range(4)}, flush=True)\n"
        "    executor.submit(time.sleep, 60)\n"
        "    time.sleep(60)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert workers
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived the run"
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_journal_hashes_are_those_of_the_files(tmp_path, inputs):
    with Run(tmp_path / "run") as run:
        run.map("copy", copy_times, inputs, config=Config())
    for line in journal_lines(tmp_path / "run"):
        folder = tmp_path / "run/data/copy" / line["task"]
        assert [o["name"] for o in line["outputs"]] == ["folder/copy.txt", "text.txt"]
        for output in line["outputs"]:
            assert output["sha256"] == sha256_file(folder / output["name"])
            assert output["bytes"] == (folder / output["name"]).stat().st_size
