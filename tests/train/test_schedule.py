"""The learning rate against its closed form."""

import dataclasses
import math

import pytest

from herdkern.train.config import ScheduleConfig
from herdkern.train.schedule import learning_rate

PAPER = ScheduleConfig(peak_lr=8e-5, min_lr=8e-7, warmup_steps=8000, cosine_steps=1_200_000)


@pytest.mark.parametrize(
    "step",
    [
        *[1, 2, 100, 4000, 7999, 8000, 8001, 10_000, 50_000, 100_000, 250_000, 400_000],
        *[600_000, 604_000, 800_000, 900_000, 1_000_000, 1_100_000, 1_199_999, 1_200_000],
    ],
)
def test_paper_schedule_equals_the_closed_form(step):
    if step < 8000:
        want = 8e-5 * step / 8000
    else:
        want = 8e-7 + 0.5 * (8e-5 - 8e-7) * (1 + math.cos(math.pi * (step - 8000) / (1_200_000 - 8000)))
    assert learning_rate(step, PAPER, steps=1_200_000) == pytest.approx(want, rel=1e-12, abs=0)


def test_annealing_is_a_straight_line_to_exactly_zero():
    config = dataclasses.replace(PAPER, anneal_steps=1000, cosine_steps=0, min_lr=8e-6)
    rates = [learning_rate(s, config, steps=20_000) for s in range(19_000, 20_002)]
    assert rates[0] == 8e-6  # the end of the cosine, and the first annealing update
    for done, rate in enumerate(rates[1:-1]):
        assert rate == pytest.approx(8e-6 * (1 - done / 1000), rel=1e-12, abs=0)
    assert rates[-1] == 0.0
    assert learning_rate(30_000, config, steps=20_000) == 0.0


def test_annealing_starts_from_where_the_cosine_is():
    config = ScheduleConfig(peak_lr=1.0, min_lr=0.0, warmup_steps=0, anneal_steps=50, cosine_steps=200)
    assert learning_rate(101, config, steps=150) == pytest.approx(0.5, rel=1e-12, abs=0)


@pytest.mark.parametrize("anneal_steps", [0, 1, 10])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_every_rate_is_positive_and_at_most_the_peak(warmup_steps, anneal_steps):
    config = ScheduleConfig(peak_lr=1.0, min_lr=0.1, warmup_steps=warmup_steps, anneal_steps=anneal_steps)
    rates = [learning_rate(s, config, steps=20) for s in range(1, 21)]
    assert all(0 < rate <= 1 for rate in rates)
    assert learning_rate(21, config, steps=20) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_lr": 1.0}, "min_lr must be in"),
        ({"warmup_steps": -1}, "warmup_steps, anneal_steps, cosine_steps must not"),
    ],
    ids=["min_lr", "warmup"],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**{"peak_lr": 0.1, "min_lr": 0.01, **change})
