"""The stages of a growing context: left only when short evaluations have recovered and every needle is found."""

import json

import numpy as np
import pytest
import torch

from herdkern.train.batch import IGNORE, build_batch
from herdkern.train.config import LLAMA3_LENGTHS, LongContextConfig, TrainConfig
from herdkern.train.long_context import LongContextGate, LongContextStalledError
from herdkern.train.one_process import OneProcess

CONFIG = LongContextConfig(lengths=(64, 128, 256), max_stage_tokens=1000)
RNG = np.random.default_rng(0)
NOISE = np.random.default_rng(1).normal(0, 0.3, 200)
NOISE -= NOISE.mean()
BASE = {"words": RNG.normal(-2.0, 0.5, 200), "choices": (RNG.random(200) < 0.7).astype(float)}
DEPTHS = (0.0, 0.5, 1.0)


def needles(*lengths, lost=()):
    return {(length, depth): (length, depth) not in lost for length in lengths for depth in DEPTHS}


def test_six_stages_from_8k_to_128k():
    assert len(LLAMA3_LENGTHS) == 7
    assert (LLAMA3_LENGTHS[0], LLAMA3_LENGTHS[-1]) == (8 * 1024, 128 * 1024)


def test_both_criteria_hold_and_the_stage_ends():
    gate = LongContextGate(CONFIG, BASE)
    assert gate.length == 128
    verdict = gate.check(500, BASE, needles(64, 128))
    assert verdict.advances
    assert verdict.reasons == ()
    assert gate.length == 256
    assert not gate.is_done
    assert gate.check(700, BASE, needles(64, 256)).stage_tokens == 200
    assert gate.is_done
    assert gate.length == 256
    with pytest.raises(ValueError, match="before the last stage ends"):
        gate.check(900, BASE, needles(256))


def test_one_lost_needle_keeps_the_stage():
    gate = LongContextGate(CONFIG, BASE)
    verdict = gate.check(100, BASE, needles(64, 128, lost=[(128, 0.5)]))
    assert not verdict.advances
    assert verdict.reasons == ("1 of 6 needles are not found, one at depth 0.5 of 128 tokens",)
    assert gate.length == 128


def test_a_task_below_its_baseline_keeps_the_stage_and_noise_does_not():
    gate = LongContextGate(CONFIG, BASE)
    worse = {**BASE, "words": BASE["words"] - 0.2 + NOISE}
    verdict = gate.check(100, worse, needles(128))
    assert not verdict.advances
    assert "words is 0.2" in verdict.reasons[0]
    noisy = {**BASE, "words": BASE["words"] + NOISE - 0.01}  # a hundredth below, +-.035 is noise
    assert gate.check(200, noisy, needles(128)).advances


def test_a_uniform_loss_is_no_noise():
    gate = LongContextGate(CONFIG, BASE)
    assert not gate.check(100, {**BASE, "words": BASE["words"] - 1e-6}, needles(128)).advances


def test_half_of_all_harmless_changes_would_not_pass_without_the_interval():
    """About confidence of the changes that are noise pass: the interval has its level."""
    passed = 0
    for seed in range(200):
        change = np.random.default_rng(seed).normal(0, 1, 100)
        gate = LongContextGate(CONFIG, {"t": np.zeros(100)})
        passed += gate.check(1, {"t": change}, needles(128)).advances
    assert 0.90 < passed / 200 < 0.99


def test_a_stage_that_may_see_no_more_tokens_stops_the_run():
    gate = LongContextGate(CONFIG, BASE)
    gate.check(999, BASE, needles(128, lost=[(128, 0.0)]))
    with pytest.raises(LongContextStalledError, match="stage of 128 tokens must pass within 1,000 tokens, got 1 of 3"):
        gate.check(1000, BASE, needles(128, lost=[(128, 0.0)]))


def test_state_goes_on():
    gate = LongContextGate(CONFIG, BASE)
    gate.check(300, BASE, needles(128))
    other = LongContextGate(CONFIG, BASE)
    other.load(json.loads(json.dumps(gate.state())))
    assert (other.stage, other.stage_began, other.verdicts) == (gate.stage, gate.stage_began, gate.verdicts)


class Recaller(torch.nn.Module):
    """Answers a question token by the token that followed it, if that was at most `reach` tokens ago: a model whose
    positions break beyond."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach, self.weight = reach, torch.nn.Parameter(torch.zeros(2, 2))

    def forward(self, tokens, cu_seqlens, positions):
        assert cu_seqlens.tolist() == [0, len(tokens)]
        hidden = torch.zeros(len(tokens), 100)
        for i, token in enumerate(tokens.tolist()):
            for j in range(max(0, i - self.reach), i):
                if tokens[j] == token:
                    hidden[i, tokens[j + 1]] = 1.0
                    break
        return hidden

    def logits(self, hidden):
        return hidden


def test_needles_tell_a_broken_context_from_a_whole_one():
    haystack = [1 + i % 40 for i in range(100)]
    answer, needle, question = [71, 72, 73], [70, 71, 72, 73], [70]

    def is_found(model, depth):
        """As the loop asks: answer tokens that are each the most likely one are what greedy writing gives."""
        at = round(depth * len(haystack))
        ids = np.array([*haystack[:at], *needle, *haystack[at:], *question, *answer])
        batch = build_batch([(ids, np.array([0, len(ids)], np.int32))])
        batch.targets[: -len(answer)] = IGNORE
        return OneProcess(model, TrainConfig(), None).num_wrong(batch) == 0

    def grid(model):
        return {depth: is_found(model, depth) for depth in (0.0, 0.3, 0.7, 1.0)}

    assert all(grid(Recaller(1000)).values())
    assert grid(Recaller(50)) == {0.0: False, 0.3: False, 0.7: True, 1.0: True}
    gate = LongContextGate(LongContextConfig(lengths=(50, 100)), BASE)
    assert not gate.check(1, BASE, {(100, d): found for d, found in grid(Recaller(50)).items()}).advances
    assert gate.check(2, BASE, {(100, d): found for d, found in grid(Recaller(1000)).items()}).advances


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LongContextConfig(lengths=(8,)), "two or more and rise"),
        (lambda: LongContextConfig(lengths=(8, 4)), "two or more and rise"),
        (lambda: LongContextConfig(confidence=1.0), "confidence lie in"),
        (lambda: LongContextGate(CONFIG, {}), "at least one task"),
        (lambda: LongContextGate(CONFIG, {"t": [1.0] * 5}), "'t' must have at least 20 examples, got 5"),
        (lambda: LongContextGate(CONFIG, BASE).check(1, {"words": BASE["words"]}, needles(128)), "scores must be of"),
        (lambda: LongContextGate(CONFIG, BASE).check(1, {**BASE, "words": [1.0]}, needles(128)), "must be 200, got 1"),
        (lambda: LongContextGate(CONFIG, BASE).check(1, BASE, needles(64)), "must reach 128 tokens and no further"),
        (lambda: LongContextGate(CONFIG, BASE).check(1, BASE, needles(128, 256)), "must reach 128 tokens and no"),
    ],
    ids=range(9),
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
