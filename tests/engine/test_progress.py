import pytest

from herdkern.engine import Run, make_executor
from herdkern.engine.progress import seconds_left


def copy(inputs, out, config):
    (out / "copy").write_bytes(inputs[0].read_bytes())


def left(**changes):
    given = {"bytes_done": 100, "seconds_done": 10.0, "bytes_in_all": 800, "num_workers": 1, "elapsed": 10.0}
    return seconds_left(**{**given, **changes})


def test_nothing_is_said_before_a_task_has_finished():
    assert left(bytes_done=0, seconds_done=0.0) is None


def test_one_worker_needs_as_long_for_what_is_left():
    assert left() == pytest.approx(70.0)


def test_tasks_in_flight_count_as_far_as_they_are():
    # eight workers, eight equal tasks, the first is done: the others are about to be
    assert left(num_workers=8) == pytest.approx(0.0)
    # sixteen tasks: one more round
    assert left(num_workers=8, bytes_in_all=1600) == pytest.approx(10.0)


def test_it_is_never_negative():
    assert left(elapsed=1000.0) == 0.0


def test_each_stage_has_a_bar_of_its_tasks(tmp_path, capfd):
    inputs = [tmp_path / f"in-{i}" for i in range(3)]
    for path in inputs:
        path.write_bytes(b"x" * 1000)
    for expected in ("copy: 100%|", "copy: checking: 100%|"):
        with make_executor("threads", 2) as executor, Run(tmp_path / "run", executor=executor, progress=True) as run:
            run.map("copy", copy, inputs, config={})
        shown = capfd.readouterr().err
        assert "copy: reading inputs: 100%|" in shown
        assert expected in shown
        assert "3.00k/3.00kB" in shown
        assert "3 of 3 tasks" in shown
