"""What a wrong run configuration says, and which of its fields the result depends on."""

import dataclasses

import pytest

from herdkern.train.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size must divide batch_size=6, got 4"),
        ({"dtype": "fp8"}, "dtype must be 'fp32' or 'bf16', got 'fp8'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'stop', 'skip' or 'rollback', got 'ignore'"),
        ({"eval_every_steps": -1}, "must not be negative"),
        ({"steps": 10, "schedule": ScheduleConfig(warmup_steps=8, anneal_steps=3)}, "at most steps=10, got 8 \\+ 3"),
    ],
    ids=["steps", "micro", "dtype", "policy", "eval", "schedule"],
)
def test_wrong_runs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(beta2=1.0), "beta1, beta2"),
        (lambda: OptimizerConfig(eps=0.0), "eps must be positive"),
        (lambda: CheckpointConfig(every_steps=-1), "every_steps"),
        (lambda: CheckpointConfig(keep_last=0), "keep_last must be at least 1"),
    ],
    ids=["beta", "eps", "every", "keep"],
)
def test_wrong_parts_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_identity_leaves_out_what_changes_no_bit():
    config = TrainConfig(steps=100)
    same = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=7), eval_every_steps=3)
    assert same.identity() == config.identity()
    assert dataclasses.replace(config, seed=1).identity() != config.identity()


def test_derived_numbers():
    config = TrainConfig(steps=100, seq_len=256, batch_size=8, schedule=ScheduleConfig(anneal_steps=25))
    assert config.tokens_per_step == 2048
    assert config.anneal_start_sequence == 75 * 8


def test_an_average_without_annealing_warns():
    with pytest.warns(UserWarning, match="average_every_steps has no effect"):
        TrainConfig(average_every_steps=2)
