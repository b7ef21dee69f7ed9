"""Batch size and sequence length switch on the right token, and every token is seen once."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from herdkern.model.transformer import Transformer
from herdkern.train.config import CheckpointConfig, TrainConfig
from herdkern.train.ramp import LLAMA3_RAMP, Ramp, RampPhase, TokenStream
from herdkern.train.trainer import PackedBatches, Trainer


def phase(from_tokens, batch_size, seq_len):
    return RampPhase(from_tokens=from_tokens, batch_size=batch_size, seq_len=seq_len)


RAMPS = [
    [phase(0, 4, 8)],
    [phase(0, 2, 8), phase(64, 4, 8)],  # on a border of steps
    [phase(0, 2, 8), phase(65, 4, 8), phase(66, 4, 16), phase(500, 1, 32)],  # one that lasts no step
    [phase(0, 3, 8), phase(50, 5, 16), phase(51, 1, 4)],
]


@pytest.mark.parametrize("phases", RAMPS, ids=range(len(RAMPS)))
def test_steps_and_tokens_equal_a_walk(phases):
    ramp = Ramp(phases)
    tokens = 0
    for step in range(80):
        assert ramp.tokens_before(step) == tokens
        assert ramp.steps_for(tokens) == step
        assert ramp.steps_for(tokens + 1) == step + 1
        now = ramp.at(tokens)
        assert now == max((p for p in phases if p.from_tokens <= tokens), key=lambda p: p.from_tokens)
        tokens += now.tokens_per_step


def test_the_papers_ramp_switches_where_it_says():
    ramp = Ramp(LLAMA3_RAMP)
    sizes = [4_194_304, 8_388_608, 16_777_216]
    first = -(-252_000_000 // sizes[0])
    assert first == 61  # the first step that begins behind 252 M tokens
    assert [ramp.at(ramp.tokens_before(s)).tokens_per_step for s in (first - 1, first)] == sizes[:2]
    second = ramp.steps_for(2_870_000_000_000)
    assert [ramp.at(ramp.tokens_before(s)).tokens_per_step for s in (second - 1, second)] == sizes[1:]
    assert ramp.tokens_before(second - 1) < 2_870_000_000_000 <= ramp.tokens_before(second)
    assert 1_090_000 < ramp.steps_for(15_600_000_000_000) < 1_110_000  # the cosine's end is at 1,200,000


@pytest.mark.parametrize("lengths", [(32,), (8, 8, 8), (5, 27, 1, 40, 64, 3), (100, 1, 1)], ids=str)
def test_the_stream_is_cut_without_loss(sampler, lengths):
    whole = [sampler.sequence(t) for t in range(6)]
    stream = TokenStream(sampler)
    flat = np.concatenate([ids[:-1] for ids, _ in whole])
    starts = {t * 32 + int(b) for t, (_, borders) in enumerate(whole) for b in borders[:-1]}
    cursor = 0
    for length in lengths:
        ids, borders = stream.cut(cursor, length)
        assert len(ids) == length + 1
        assert (ids[:-1] == flat[cursor : cursor + length]).all()
        t, offset = divmod(cursor + length - 1, 32)
        assert ids[-1] == whole[t][0][offset + 1]  # the target of the last token
        inside = {cursor + int(b) for b in borders[1:-1] if b < length}
        assert inside == {s for s in starts if cursor < s < cursor + length}
        assert borders[0] == 0
        assert borders[-1] == length + 1
        assert (np.diff(borders) > 0).all()
        cursor += length


def test_cuts_of_the_sampler_are_its_sequences(sampler):
    stream = TokenStream(sampler)
    for t in (0, 3, 1):
        for got, want in zip(stream.cut(32 * t, 32), sampler.sequence(t), strict=True):
            assert (got == want).all()


def ramped(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, seq_len=8, batch_size=2, ramp=(phase(40, 2, 16), phase(100, 3, 32)))


def test_a_run_switches_and_sees_every_token_once(tiny_model_config, tiny_train_config, sampler, tmp_path):
    config = ramped(tiny_train_config)
    seen = []

    class Watched(PackedBatches):
        def batch_at(self, token, count, seq_len):
            found = super().batch_at(token, count, seq_len)
            seen.append((token, count, seq_len, found.tokens))
            return found

    trainer = Trainer(Transformer(tiny_model_config, seed=3), config, Watched(sampler, config), tmp_path)
    result = trainer.fit()
    assert [(count, length) for _, count, length, _ in seen] == [(2, 8)] * 3 + [(2, 16)] * 2 + [(3, 32)] * 7
    flat = torch.cat([torch.from_numpy(sampler.sequence(t)[0][:-1]) for t in range(-(-result.tokens // 32))])
    assert torch.equal(torch.cat([tokens for *_, tokens in seen]), flat[: result.tokens])
    assert result.tokens == config.total_tokens == 3 * 16 + 2 * 32 + 7 * 96
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [config.ramp_plan().tokens_before(s) for s in range(1, 13)]


def test_a_run_resumed_across_the_switches_has_the_same_bits(tiny_model_config, tiny_train_config, sampler, tmp_path):
    whole = ramped(dataclasses.replace(tiny_train_config, checkpoint=CheckpointConfig(every_steps=0)))
    weights = []
    for name, stops in (("one", (12,)), ("two", (2, 4, 5, 12))):
        for stop in stops:
            trainer = Trainer(
                Transformer(tiny_model_config, seed=3), whole, PackedBatches(sampler, whole), tmp_path / name
            )
            run = trainer._run_step

            def step_then_stop(trainer=trainer, run=run, stop=stop):
                record = run()
                trainer._signals.came = trainer.step >= stop
                return record

            trainer._run_step = step_then_stop
            result = trainer.fit()
            assert result.step == stop
        weights.append((result.checkpoint / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_ramp_without_effect_gives_the_same_bits(tiny_model_config, tiny_train_config, sampler, tmp_path):
    """The stream of sequences as long as the sampler's is what is read without a ramp."""
    weights = []
    for name, ramp in (("without", ()), ("with", (phase(10**9, 8, 32),))):
        config = dataclasses.replace(tiny_train_config, ramp=ramp)
        trainer = Trainer(
            Transformer(tiny_model_config, seed=3), config, PackedBatches(sampler, config), tmp_path / name
        )
        weights.append((trainer.fit().checkpoint / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_recomputation_does_not_change_a_run(tiny_model_config, tiny_train_config, sampler, tmp_path):
    weights, plain = [], dataclasses.replace(tiny_train_config, steps=9, checkpoint=CheckpointConfig(every_steps=0))
    for recompute in ("none", "swiglu", "block"):
        config = dataclasses.replace(plain, recompute=recompute)
        trainer = Trainer(
            Transformer(tiny_model_config, seed=3), config, PackedBatches(sampler, config), tmp_path / recompute
        )
        weights.append((trainer.fit().checkpoint / "model.safetensors").read_bytes())
        assert config.identity() == plain.identity()
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize(
    ("phases", "message"),
    [([], "begin at token 0"), ([(5, 1, 1)], "begin at token 0"), ([(0, 1, 1), (9, 1, 1), (9, 2, 1)], "and rise")],
    ids=["none", "late", "twice"],
)
def test_wrong_ramps_are_named(phases, message):
    with pytest.raises(ValueError, match=message):
        Ramp([phase(*given) for given in phases])


def test_wrong_settings_are_named(tiny_model_config, sampler, tmp_path):
    with pytest.raises(ValueError, match="batch_size and seq_len at least 1"):
        phase(0, 0, 8)
    with pytest.raises(ValueError, match="micro_batch_size must divide batch_size=3"):
        TrainConfig(batch_size=4, micro_batch_size=2, ramp=(phase(10, 3, 8),))

    class Numbered:
        def batch(self, first, count): ...
        def fingerprint(self): ...

    config = TrainConfig(ramp=(phase(10**6, 16, 512),))
    with pytest.raises(ValueError, match=r"source must have batch_at where train\.ramp is set, got Numbered"):
        Trainer(Transformer(tiny_model_config), config, Numbered(), tmp_path)


def test_annealing_begins_at_its_sequence_of_the_sampler(tiny_train_config):
    config = ramped(tiny_train_config)  # 12 steps, the last 6 anneal
    before = config.ramp_plan().tokens_before(6)
    assert before == 3 * 16 + 2 * 32 + 96
    assert config.anneal_start_sequence == -(-before // 32)
    assert tiny_train_config.anneal_start_sequence == 6 * 4
