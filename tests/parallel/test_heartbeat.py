"""Signs of life: what is written, how often, and what a reader sees."""

import json
import threading

import pytest

from herdkern.parallel.heartbeat import Heartbeat, clear_beats, read_beats


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_beat_is_read_back(tmp_path):
    clock = Clock()
    Heartbeat(tmp_path, 3, clock=clock).beat(step=7, phase="step")
    (beat,) = read_beats(tmp_path).values()
    assert (beat.rank, beat.step, beat.phase, beat.time, beat.longest) == (3, 7, "step", 1000.0, 0.0)


def test_at_most_one_file_a_second(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 0, clock=clock)
    written = []
    for step in range(40):
        heartbeat.beat(step=step, phase="data")
        written.append(read_beats(tmp_path)[0].step)
        clock.now += 0.1
    assert sorted(set(written)) == [0, 10, 20, 30]


def test_a_long_phase_is_told_at_once_and_so_is_its_end(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0, clock=Clock())
    seen = []
    for phase in ("data", "step", "save", "data", "step", "evaluate", "data"):
        heartbeat.beat(step=1, phase=phase)
        seen.append(read_beats(tmp_path)[0].phase)
    assert seen == ["data", "data", "save", "data", "data", "evaluate", "data"]


def test_the_longest_pause_is_told_without_saves_and_slowly_forgotten(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 0, clock=clock)
    for phase, pause in (("step", 2.0), ("step", 5.0), ("save", 60.0), ("step", 1.0)):
        heartbeat.beat(step=0, phase=phase)
        clock.now += pause
    heartbeat.beat(step=1, phase="step")
    assert read_beats(tmp_path)[0].longest == pytest.approx(5.0 * 0.99**2)


def test_a_reader_never_sees_half_a_beat(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 0, clock=clock)
    heartbeat.beat(step=0, phase="data")
    done = threading.Event()

    def write():
        for step in range(3000):
            clock.now += 1.0
            heartbeat.beat(step=step, phase="step")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        json.loads(heartbeat.path.read_text())
    thread.join()


def test_a_clock_set_back_does_not_silence_a_rank(tmp_path):
    clock = Clock()
    heartbeat = Heartbeat(tmp_path, 0, clock=clock)
    heartbeat.beat(step=0, phase="step")
    clock.now -= 500
    heartbeat.beat(step=1, phase="step")
    assert read_beats(tmp_path)[0].step == 1


def test_a_folder_that_went_away_does_not_stop_training(tmp_path):
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.path.parent.rmdir()
    heartbeat.beat(step=0, phase="step")
    assert read_beats(tmp_path) == {}


def test_damage_and_earlier_starts(tmp_path):
    Heartbeat(tmp_path, 0).beat(step=0, phase="step")
    (tmp_path / "heartbeat" / "rank-1.json").write_text('{"rank": 1')
    assert list(read_beats(tmp_path)) == [0]
    clear_beats(tmp_path)
    assert read_beats(tmp_path) == {}


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="Heartbeat: rank must be at least 0, got -1"):
        Heartbeat(tmp_path, -1)
    with pytest.raises(ValueError, match="phase must be one of data, step, save, evaluate, got 'lunch'"):
        Heartbeat(tmp_path, 0).beat(step=0, phase="lunch")
