"""When a checkpoint is due: by steps, or by what a save costs and how often a job fails."""

import math

import pytest

from herdkern.train import save_clock
from herdkern.train.config import CheckpointConfig
from herdkern.train.save_clock import SaveClock


def test_every_so_many_steps():
    clock = SaveClock(CheckpointConfig(every_steps=3), 1)
    assert [step for step in range(1, 10) if clock.is_due(step)] == [3, 6, 9]
    assert not any(SaveClock(CheckpointConfig(every_steps=0), 1).is_due(step) for step in range(1, 10))


def test_auto_saves_after_the_first_step_and_then_by_young_and_daly(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(save_clock.time, "monotonic", lambda: now[0])
    clock = SaveClock(CheckpointConfig(every_steps="auto", between_failures_s=3600.0), 8)
    assert clock.is_due(1)
    clock.saved(2.0)
    due = [second for second in range(1, 200) if (now.__setitem__(0, float(second)), clock.is_due(second))[1]]
    assert due[0] == math.sqrt(2 * 2.0 * 3600.0)  # 120 s


def test_the_rate_of_failures_is_that_of_the_paper():
    clock = SaveClock(CheckpointConfig(every_steps="auto"), 16_384)
    assert clock.between_failures_s == pytest.approx(54 * 86_400 / 419)


def test_wrong_times_are_named():
    with pytest.raises(ValueError, match="between_failures_s must not be negative, got -1"):
        CheckpointConfig(between_failures_s=-1)
