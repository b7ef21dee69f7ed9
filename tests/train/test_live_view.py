"""`herdkern top` and the event files, on folders written by hand."""

import json

import pytest

from herdkern.cli import main
from herdkern.parallel.heartbeat import Heartbeat
from herdkern.train.live_view import facts, sparkline
from herdkern.train.tensorboard import TensorBoardLog

NOW = 2000.0


def write_steps(run, first, last, loss=lambda step: 4.0 / step, mode="w"):
    with open(run / "metrics.jsonl", mode) as f:
        for step in range(first, last + 1):
            record = {"step": step, "tokens": 100 * step, "loss": loss(step), "lr": 0.01, "grad_norm": 0.5}
            speed = {
                "seconds": 2.0,
                "tokens_per_s": 50.0,
                "mfu": 0.25,
                "mfu_convention": "6N",
                "time": 1000.0 + 3 * step,
            }
            f.write(json.dumps({**record, **speed}) + "\n")


@pytest.fixture
def run(tmp_path):
    write_steps(tmp_path, 1, 40)
    (tmp_path / "training.json").write_text(json.dumps({"train": {"steps": 100}}))
    (tmp_path / "checkpoints" / "step-20").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-9").mkdir()
    events = [
        {"time": 1000.0, "event": "start", "ranks": 2, "step": 0},
        {"time": 1100.0, "event": "failure", "step": 25, "reason": "rank 1 was killed by SIGKILL"},
        {"time": 1105.0, "event": "start", "ranks": 2, "step": 20},
    ]
    (tmp_path / "restarts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    late = {"rank": 1, "group": "dp", "lateness": 0.3, "share": 0.15, "z": 12.0, "step": 40, "time": 1.0}
    (tmp_path / "stragglers.jsonl").write_text(json.dumps(late) + "\n")
    return tmp_path


def test_sparkline():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 8, 1, 1], 2) == "█▁"
    assert sparkline([3.0], 10) == "▁"
    assert sparkline([], 10) == ""


def test_facts(run):
    said = facts(run, now=NOW)
    assert said["step"] == "40 of 100, 2 min left, 14 min ago"
    assert said["loss"].startswith("0.1000  █")
    assert said["loss"].endswith("▁")
    assert said["rate"] == "learning rate 0.01, gradient norm 0.5"
    assert said["speed"] == "50 tokens/s, 2000 ms a step, MFU 25.0%"
    assert said["effective"].endswith("40 steps of 80 s in 120 s, 1 failure, 5 steps done again")
    assert said["last failure"] == "15 min ago: rank 1 was killed by SIGKILL"
    assert said["checkpoint"].startswith("step-20, ")
    assert said["straggler"].startswith("rank 1 comes 300 ms (15% of a step) late to group dp, z = 12.0")


def test_top_prints_one_frame(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for rank in (0, 1):
        Heartbeat(run, rank).beat(step=41, phase="step")
    assert main(["top", str(run), "--once"]) == 0
    said = capsys.readouterr().out
    assert "learning rate 0.01" in said
    assert len([line for line in said.splitlines() if "  41  " in line and "ago" in line]) == 2
    assert "\x1b" not in said


def test_top_of_a_run_of_one_process_and_of_no_run(tmp_path, capsys):
    write_steps(tmp_path, 1, 3)
    assert main(["top", str(tmp_path)]) == 0  # there is no terminal here either
    assert "1.3333" in capsys.readouterr().out
    assert main(["top", str(tmp_path / "nothing")]) == 1
    assert "top: run must be a folder in which training has begun" in capsys.readouterr().err


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_hold_the_metrics(run, capsys):
    assert main(["tensorboard", str(run)]) == 0
    assert capsys.readouterr().out == f"40 steps in {run / 'tensorboard'}\n"
    found = scalars(run / "tensorboard")
    assert set(found) == {"loss", "lr", "grad_norm", "seconds", "tokens_per_s", "mfu", "tokens"}
    assert found["loss"] == [(step, pytest.approx(4.0 / step)) for step in range(1, 41)]


def test_a_run_that_went_back_leaves_no_doubled_steps(tmp_path):
    write_steps(tmp_path, 1, 10)
    with TensorBoardLog(tmp_path) as log:
        assert log.update() == 10
        assert log.update() == 0
        write_steps(tmp_path, 1, 6)  # steps 7 .. 10 are lost
        log.update()
        write_steps(tmp_path, 7, 12, loss=lambda step: 100.0, mode="a")
        log.update()
    loss = scalars(tmp_path / "tensorboard")["loss"]
    assert [step for step, _ in loss] == list(range(1, 13))
    assert [value for step, value in loss if step > 6] == [100.0] * 6


def test_a_run_that_went_back_between_two_looks(tmp_path):
    write_steps(tmp_path, 1, 10)
    with TensorBoardLog(tmp_path) as log:
        log.update()
        write_steps(tmp_path, 1, 6)
        write_steps(tmp_path, 7, 12, loss=lambda step: 100.0, mode="a")
        log.update()
    loss = scalars(tmp_path / "tensorboard")["loss"]
    assert [value for step, value in loss if step > 6] == [100.0] * 6


def test_a_second_call_writes_the_run_anew(tmp_path):
    write_steps(tmp_path, 1, 10)
    for _ in range(2):
        with TensorBoardLog(tmp_path) as log:
            assert log.update() == 10
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["loss"]] == list(range(1, 11))
