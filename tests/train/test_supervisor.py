"""The supervisor on real ranks: who is named, that the run goes on to the same result, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import parallel_jobs
import pytest
import supervised_rank

from herdkern.parallel.heartbeat import Beat, Heartbeat
from herdkern.parallel.stragglers import read_stragglers
from herdkern.train.restarts import RestartLog, effective_time
from herdkern.train.supervisor import Watch, WatchConfig, launch
from herdkern.train.surroundings import take_lock

RANK = Path(__file__).parent / "supervised_rank.py"
COMMAND = [sys.executable, str(RANK)]


def start(run, *arguments, nproc=2, options=()):
    """A supervised run in the background; its messages go to a file beside it."""
    limits = ["--hang-after", "10", "--grace", "60", *options]
    command = [sys.executable, "-m", "herdkern", "launch", "--run", str(run), "--nproc", str(nproc), *limits, "--"]
    with open(f"{run}.log", "w") as log:
        return subprocess.Popen(
            [*command, *COMMAND, str(run), *map(str, arguments)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def supervised(run, *arguments, nproc=2, options=("--fork",), seconds=240):
    process = start(run, *arguments, nproc=nproc, options=options)
    try:
        status = process.wait(seconds)
    finally:
        process.kill()
    return status, RestartLog(run).read(), Path(f"{run}.log").read_text()


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def undisturbed(rank, *arguments):
    supervised_rank.train(*arguments)


@pytest.mark.distributed
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_result(worlds, tmp_path):
    status, events, said = supervised(tmp_path / "a", 9, 2, "kill", 5, 1)
    assert status == 0, said
    first, failure, second, last = events
    assert [event["event"] for event in events] == ["start", "failure", "start", "finished"]
    assert (failure["ranks"], failure["exit_codes"]["1"], failure["step"]) == ([1], -9, 5)
    assert failure["reason"].startswith("rank 1 was killed by SIGKILL")
    assert first["step"] == 0
    assert second["step"] in (2, 4)  # the last whole checkpoint, or the one before if that was being written
    assert second["time"] - failure["time"] < 30
    assert "effective training time" in said
    assert effective_time(tmp_path / "a").lost_steps == 5 - second["step"]
    assert last["step"] == 9
    worlds(2).run(undisturbed, tmp_path / "b", 9, 0)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_rank_that_sleeps_in_its_steps_is_told_as_a_straggler(worlds, tmp_path, slow):
    found, *_ = worlds(3).run(parallel_jobs.train_with_a_slow_rank, tmp_path, {"dp": 3}, slow)
    assert found
    assert all(line.startswith(f"rank {slow} comes ") for line in found)
    assert {one.rank for one in read_stragglers(tmp_path)} == {slow}


FAULTS = {
    "stop": ("gone", "rank 1 is stopped (SIGSTOP)"),
    "sleep": ("absent", "rank 1 has not come to all_reduce"),
    "skip": ("skipped", "rank 1 skipped all_reduce"),
    "size": ("different", "rank 1 called all_reduce"),
    "raise": ("gone", "rank 1 "),
}


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named_within_thirty_seconds(tmp_path, fault):
    status, events, said = supervised(tmp_path / "run", 9, 2, fault, 5, 1, nproc=4)
    assert status == 0, said
    failure = next(event for event in events if event["event"] == "failure")
    kind, begins = FAULTS[fault]
    assert failure["kind"] == kind
    assert failure["reason"].startswith(begins) or (fault == "raise" and 1 in failure["ranks"])
    harmed = (tmp_path / "run" / "fault.happened").stat().st_mtime
    assert failure["time"] - harmed < 30
    assert events[-1]["event"] == "finished"


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("options", [(), ("--fork",)], ids=["started", "forked"])
def test_sigterm_leaves_a_checkpoint_and_status_0(tmp_path, options):
    run = tmp_path / "run"
    process = start(run, 100000, 0, "", 0, 0, 0.01, options=options)
    until = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0, Path(f"{run}.log").read_text()
    last = RestartLog(run).read()[-1]
    assert last["event"] == "stopped"
    assert (run / "checkpoints" / f"step-{last['step']}" / "manifest.json").exists()


@pytest.mark.full
@pytest.mark.distributed
def test_a_run_that_comes_no_further_is_given_up(tmp_path):
    status, events, _ = supervised(tmp_path / "run", "not a number", 0, options=("--fork", "--max-restarts", "1"))
    assert status == 1
    assert [event["event"] for event in events] == ["start", "failure", "start", "failure", "given up"]


@pytest.mark.full
@pytest.mark.distributed
def test_one_kill_a_minute_for_twenty_minutes(tmp_path):
    run = tmp_path / "run"
    process = start(run, 10**6, 10, "", 0, 0, 0.02, options=("--fork",))
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.5)
    for minute in range(19):
        time.sleep(60)
        os.kill(json.loads((run / "heartbeat" / f"rank-{minute % 2}.json").read_text())["pid"], signal.SIGKILL)
    time.sleep(60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    effective = effective_time(run)
    assert effective.failures == 19
    assert effective.share >= 0.9, str(effective)


def watch(tmp_path, **limits):
    made = Watch(tmp_path, WatchConfig(**limits))
    made.start([0, 1], 2, True)
    return made


def test_ranks_that_give_no_sign_of_life(tmp_path):
    made = watch(tmp_path, hang_after=20, start_after=100)
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.beat(step=3, phase="step")
    pids = {0: os.getpid(), 1: os.getpid()}
    assert made.hung(pids) == {}
    made.began -= 101
    assert list(made.hung(pids)) == [1]  # it has never said anything
    beat = {**json.loads(heartbeat.path.read_text()), "time": time.time() - 21}
    heartbeat.path.write_text(json.dumps(beat))
    assert "silent for 21 s at step 3" in made.hung(pids)[0]
    heartbeat.path.write_text(json.dumps({**beat, "phase": "save"}))
    assert list(made.hung(pids)) == [1]  # a save may take longer
    heartbeat.path.write_text(json.dumps({**beat, "longest": 8.0}))
    assert list(made.hung(pids)) == [1]  # its steps take 8 seconds
    heartbeat.path.write_text(json.dumps({**beat, "longest": 6.0}))
    assert list(made.hung(pids)) == [0, 1]


def test_a_beat_of_an_earlier_start_counts_for_nothing(tmp_path):
    Heartbeat(tmp_path, 0).beat(step=3, phase="step")
    assert watch(tmp_path).hung({0: os.getpid()}) == {}


def test_a_first_step_may_take_as_long_as_a_start(tmp_path):
    """Nothing is known of it yet; killed for it, the run would never come beyond it."""
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    made = watch(tmp_path, hang_after=20, start_after=100)
    for step, limit in ((5, 100), (6, 20)):
        assert made.limit(Beat(rank=0, step=step, phase="step", time=0.0, longest=0.1, pid=1, host="h")) == limit
    assert made.log.read()[-1]["step"] == 4


def test_limits():
    beat = Beat(rank=0, step=1, phase="step", time=0.0, longest=10.0, pid=1, host="h")
    assert Watch(Path("unused"), WatchConfig(hang_after=20)).limit(beat) == 30.0
    with pytest.raises(ValueError, match="hang_after must be above 0 seconds, got 0"):
        WatchConfig(hang_after=0)


def test_what_cannot_be_started(tmp_path):
    with pytest.raises(ValueError, match="a command must stand behind --, got none"):
        launch(tmp_path, ["--nproc-per-node", "2"])
    with pytest.raises(ValueError, match="must be `python FILE"):
        launch(tmp_path, ["--", "sh", "-c", "true"], WatchConfig(fork=True))


def test_a_run_that_is_supervised_is_left_alone(tmp_path):
    with take_lock(tmp_path / f"launch-{socket.gethostname()}.lock"):
        with pytest.raises(RuntimeError, match="must have one process training in it, another holds"):
            launch(tmp_path, ["--nproc-per-node", "1", "--", "true"])
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def log_of(run, *lines):
    run.mkdir()
    (run / "restarts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_effective_time_counts_what_stayed(tmp_path):
    run = tmp_path / "run"
    log_of(
        run,
        {"time": 100.0, "event": "start", "ranks": 2, "step": 0},
        {"time": 150.0, "event": "failure", "step": 45, "kind": "gone", "ranks": [1], "reason": "x"},
        {"time": 160.0, "event": "start", "ranks": 2, "step": 40},
        {"time": 200.0, "event": "finished", "step": 60},
    )
    times = [*(101.0 + i for i in range(40)), *(162.0 + i for i in range(20))]
    lines = [{"step": i + 1, "seconds": 1.0, "time": when} for i, when in enumerate(times)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = effective_time(run, now=900.0)  # it has finished: nothing is lost since
    assert (found.useful, found.wall, found.lost_steps, found.failures) == (60.0, 100.0, 5, 1)
    assert found.share == 0.6
    assert str(found) == ("effective training time 60.0%: 60 steps of 60 s in 100 s, 1 failure, 5 steps done again")


def test_effective_time_of_a_run_without_supervisor(tmp_path):
    lines = [{"step": i, "seconds": 2.0, "time": 100.0 + 4 * i} for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = effective_time(tmp_path)
    assert (found.useful, found.wall) == (10.0, 18.0)
    assert effective_time(tmp_path, now=202.0).wall == 100.0
    assert effective_time(tmp_path / "none").share == 0.0
