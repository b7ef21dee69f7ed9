"""Stages of longer sequences in the loop: one begins only when short evaluations are back and every needle is found."""

import dataclasses
import json

import pytest
import torch
from documents_in_memory import PARALLEL_MODEL, PARALLEL_RUN, sampler_of

from herdkern.model.transformer import Transformer
from herdkern.train.batch import IGNORE
from herdkern.train.config import CheckpointConfig, LongContextConfig, TrainConfig
from herdkern.train.long_context import LongContextStalledError
from herdkern.train.trainer import PackedBatches, Trainer

STAGES = LongContextConfig(lengths=(16, 32, 64), from_tokens=100, check_every_steps=2)
CONFIG = dataclasses.replace(PARALLEL_RUN, steps=12, seq_len=16, batch_size=8, long_context=STAGES)
DEPTHS = (0.0, 0.5, 1.0)


class Probe:
    """Needles that are found from some lengths' checks on: their targets are what the model says, or are not."""

    def __init__(self, config, model, found):
        self.source, self.model, self.found = PackedBatches(sampler_of(config.longest_seq_len), config), model, found
        self.asked = []

    def short(self):
        return {"text": [self.source.batch_at(10_000 + 16 * i, 1, 16) for i in range(20)]}

    def needles(self, length):
        self.asked.append(length)
        batch = self.source.batch_at(0, 1, length)
        with torch.no_grad():
            said = self.model.logits(self.model(batch.tokens, batch.cu_seqlens, batch.positions)).argmax(-1)
        targets = torch.full_like(said, IGNORE)
        targets[-2:] = said[-2:] if self.found(len(self.asked)) else (said[-2:] + 1) % 61
        return {(length, depth): dataclasses.replace(batch, targets=targets, num_targets=2) for depth in DEPTHS}


def trainer_of(folder, config=CONFIG, found=lambda check: True, short=0.0):
    """A trainer whose short evaluations lie `short` below what they are, from the second on."""
    model = Transformer(PARALLEL_MODEL, seed=3)
    trainer = Trainer(model, config, PackedBatches(sampler_of(config.longest_seq_len), config), folder)
    trainer.probe = Probe(config, model, found)
    losses, loss = [], trainer.engine.loss

    def shifted(batch):
        losses.append(loss(batch))
        return losses[-1] + (short if len(losses) > 20 else 0.0)

    trainer.engine.loss = shifted
    return trainer


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stages_begin_when_both_criteria_hold(tmp_path):
    """128 tokens a step: 8 x 16, from the first step behind token 100 on 4 x 32, then 2 x 64, and the last stays."""
    trainer = trainer_of(tmp_path, found=lambda check: check >= 2)
    beats = []
    trainer.on_beat = lambda step, phase: beats.append((step, phase))
    trainer.fit()
    assert [step for step, phase in beats if phase == "evaluate"] == [2, 4, 6, 8]  # baselines, then behind 3, 5 and 7
    lines = records(tmp_path)
    assert [line.get("context") for line in lines] == [None] + [32] * 4 + [64] * 7
    verdicts = [(line["step"], line["long_context"]) for line in lines if "long_context" in line]
    assert [(step, v["length"], v["advances"], v["stage_tokens"]) for step, v in verdicts] == [
        (3, 32, False, 256),
        (5, 32, True, 512),
        (7, 64, True, 256),
    ]
    assert "3 of 3 needles are not found" in verdicts[0][1]["reasons"][0]
    assert trainer.probe.asked == [32, 32, 64]
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 13)]


def test_short_evaluations_that_have_not_recovered_hold_a_stage(tmp_path):
    trainer_of(tmp_path, short=5.0).fit()
    lines = records(tmp_path)
    assert {line.get("context") for line in lines} == {None, 32}
    assert "below its baseline" in next(line["long_context"]["reasons"][0] for line in lines if "long_context" in line)


def test_a_stage_that_does_not_end_stops_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, long_context=dataclasses.replace(STAGES, max_stage_tokens=500))
    with pytest.raises(LongContextStalledError, match="stage of 32 tokens must pass within 500 tokens"):
        trainer_of(tmp_path, config, found=lambda check: False).fit()


def test_a_resumed_run_goes_on_in_its_stage(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(every_steps=1, keep_last=12))
    trainer_of(tmp_path / "whole", config).fit()
    for stop in (2, 4, 12):
        trainer = trainer_of(tmp_path / "cut", config)
        trainer.on_beat = lambda step, phase, trainer=trainer, stop=stop: (
            setattr(trainer._signals, "came", True) if (step, phase) == (stop, "step") else None
        )
        assert trainer.fit().step == stop
    whole, cut = ((tmp_path / name / "checkpoints/step-12/model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    verdicts = [[line.get("long_context") for line in records(tmp_path / name)] for name in ("whole", "cut")]
    assert verdicts[0] == verdicts[1]


def test_annealing_begins_at_its_place_in_the_data(tmp_path):
    """Steps of a stage of 48 see 96 tokens of 128: without a jump the sampler's annealing mix would never come."""
    config = dataclasses.replace(CONFIG, long_context=dataclasses.replace(STAGES, lengths=(16, 48)))
    trainer = trainer_of(tmp_path, config)
    asked, cut = [], trainer.source.batch_at
    trainer.source.batch_at = lambda token, *size: asked.append(token) or cut(token, *size)
    trainer.fit()
    assert asked[:8] == [16 * i for i in range(8)]  # the step before the stages; then two sequences a step
    assert asked[8:] == [128 + 48 * i for i in range(12)] + [
        config.anneal_start_sequence * 48 + 48 * i for i in range(10)
    ]
    assert config.anneal_start_sequence == 19  # the first behind 7 steps of 128 tokens
    assert trainer.tokens == 128 + 11 * 96


def test_what_cannot_work_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"probe must be set where train\.long_context has lengths"):
        Trainer(Transformer(PARALLEL_MODEL), CONFIG, PackedBatches(sampler_of(64), CONFIG), tmp_path).fit()
    model = Transformer(dataclasses.replace(PARALLEL_MODEL, max_seq_len=32))
    with pytest.raises(ValueError, match=r"max_seq_len must be at least 64 for long_context\.lengths, got 32"):
        Trainer(model, CONFIG, PackedBatches(sampler_of(64), CONFIG), tmp_path)
    with pytest.raises(ValueError, match=r"long_context\.lengths must fit into a step of 128 tokens 4 times, got 64"):
        dataclasses.replace(CONFIG, long_context=dataclasses.replace(STAGES, batch_multiple=4))
    assert CONFIG.identity()["long_context"]["lengths"] == [16, 32, 64]
    assert "long_context" not in TrainConfig().identity()
