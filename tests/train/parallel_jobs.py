"""What the ranks of the parallel training tests do; each job returns plain values."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import torch
from documents_in_memory import PARALLEL_MODEL, PARALLEL_RUN, sampler_of

from herdkern.model.transformer import Transformer
from herdkern.parallel import ParallelConfig
from herdkern.parallel.data import local
from herdkern.parallel.flight_ring import read_rings, ring_folder
from herdkern.parallel.heartbeat import Heartbeat
from herdkern.parallel.stragglers import StragglerWatch
from herdkern.train import one_process, parallel_engine
from herdkern.train.config import LongContextConfig, ScheduleConfig
from herdkern.train.corruption import SilentCorruptionError
from herdkern.train.guard import NonFiniteError
from herdkern.train.trainer import PackedBatches, Trainer

for module in (one_process, parallel_engine):  # a rate is not what these tests look at
    module.measured_peak_flops = lambda *_, **__: 1e11
TIMING = ("time", "seconds", "tokens_per_s", "mfu", "mfu_convention", "corruption_check_seconds")
FEW_STEPS = {"schedule": ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=1, anneal_steps=4)}
MARK = 57  # a token that no document has


def facts(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


class Watched(PackedBatches):
    """Remembers which sequences were asked for; the sequences `bad` consist of MARK alone."""

    def __init__(self, sampler, config, bad=()):
        super().__init__(sampler, config)
        self.seen, self.bad = [], bad

    def batch(self, first, count):
        self.seen.append(first)
        made = super().batch(first, count)
        return dataclasses.replace(made, tokens=torch.full_like(made.tokens, MARK)) if first in self.bad else made

    def batch_at(self, token, count, seq_len):
        self.seen.append((token, count, seq_len))
        return super().batch_at(token, count, seq_len)


def poisoned_by_mark(module, inputs, output):
    """A hook for an embedding: sequences of MARK give NaN."""
    return output * float("nan") if bool((inputs[0] == MARK).any()) else output


def trainer_of(folder, sizes, *, tied=False, num_layers=2, bad=(), **changes):
    """A trainer of the small run; sizes: of the layout, None in one process."""
    config = dataclasses.replace(PARALLEL_RUN, **changes)
    model = Transformer(dataclasses.replace(PARALLEL_MODEL, tied_embeddings=tied, num_layers=num_layers), seed=3)
    if bad:
        model.embed_tokens.register_forward_hook(poisoned_by_mark)
    parallel = None if sizes is None else ParallelConfig(**sizes)
    source = Watched(sampler_of(config.longest_seq_len), config, bad)
    return Trainer(model, config, source, folder, parallel=parallel)


def train(rank, folder, sizes, changes=None):
    """(what was read, the mean that the average holds of this rank's parts, their names) of a whole run."""
    trainer = trainer_of(folder, sizes, **(changes or {}))
    result = trainer.fit()
    return trainer.source.seen, result.step, result.tokens, result.interrupted


def train_badly(rank, folder, sizes, changes):
    """The message of the error that a run ends with, or "" if it has none, and what the weights were then."""
    trainer = trainer_of(folder, sizes, **changes)
    try:
        trainer.fit()
    except NonFiniteError as error:
        return str(error)
    return ""


def train_and_die_behind_a_rollback(rank, folder, sizes, changes):
    """All ranks are killed in the second step behind the first rollback."""
    trainer = trainer_of(folder, sizes, **changes)
    steps = []

    def beat(step, phase):
        if phase == "step":
            steps.append(step)
            if steps[-3:] == [6, 5, 6]:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.on_beat = beat
    trainer.fit()


def train_with_a_slow_rank(rank, folder, sizes, slow):
    """What the watch of a supervisor finds while the last of 56 steps is made; rank `slow` sleeps in each."""
    few = {"schedule": ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=1), "average_every_steps": 0}
    trainer = trainer_of(folder, sizes, steps=56, batch_size=3, **few)
    heartbeat, found, began = Heartbeat(folder, rank), [], []

    def beat(step, phase):
        heartbeat.beat(step=step, phase=phase)
        if phase == "data":
            began.append(time.monotonic())
            if rank == slow:  # half a step: it counts, however loaded the machine is
                time.sleep(max(0.03, 0.5 * min(1.0, began[-1] - began[-2] if step > 1 else 0.0)))
        if phase == "step" and rank == 0 and step == 56:
            found.extend(str(one) for one in StragglerWatch(folder).look(read_rings(ring_folder(folder))))

    trainer.on_beat = beat
    trainer.fit()
    heartbeat.close()
    return found


def train_until_signal(rank, folder, sizes, step, number, changes=None):
    """A run in which the last rank gets a signal in a step."""
    trainer = trainer_of(folder, sizes, **(changes or {}))
    last = trainer.engine.num_ranks - 1
    phases = []

    def beat(step, phase, at=step):
        phases.append((step, phase))
        if phase == "step" and step == at and rank == last:
            os.kill(os.getpid(), number)

    trainer.on_beat = beat
    before = signal.getsignal(number)
    result = trainer.fit()
    assert signal.getsignal(number) is before
    return result.step, result.interrupted, result.checkpoint.name, phases


class Probe:
    """20 short examples, and at each length one needle, whose answer is never that of the model."""

    def __init__(self, source):
        self.source = source

    def short(self):
        return {"text": [self.source.batch_at(10_000 + 16 * i, 1, 16) for i in range(20)]}

    def needles(self, length):
        batch = self.source.batch_at(0, 1, length)
        targets = torch.full_like(batch.targets, -100)
        targets[-2:] = MARK
        return {(length, 0.5): dataclasses.replace(batch, targets=targets, num_targets=2)}


def train_in_stages(rank, folder, sizes, stop=0):
    """A run in stages of 32 and 64 tokens, which end at their first check; stop: the step that a signal comes in."""
    stages = LongContextConfig(lengths=(16, 32, 64), from_tokens=100, check_every_steps=2, confidence=0.999)
    trainer = trainer_of(folder, sizes, steps=12, seq_len=16, batch_size=8, long_context=stages)
    trainer.probe = Probe(trainer.source)
    num_wrong = trainer.engine.num_wrong
    trainer.engine.num_wrong = lambda batch: num_wrong(batch) - 2  # both targets are wrong
    if stop:
        trainer.on_beat = lambda step, phase: phase == "step" and step == stop and os.kill(os.getpid(), signal.SIGTERM)
    trainer.fit()


def train_with_bad_weight(rank, folder, sizes, bad_rank, name):
    """Rank `bad_rank` holds an infinite weight; the message of the error."""
    trainer = trainer_of(folder, sizes)
    if rank == bad_rank:
        with torch.no_grad():
            trainer.engine.parts[name].view(-1)[0] = float("inf")
    try:
        trainer.fit()
    except NonFiniteError as error:
        return str(error)
    return ""


def train_with_bad_gradient(rank, folder, sizes, name):
    """The gradient behind module `name` is not finite; the message of the error."""
    trainer = trainer_of(folder, sizes)
    for stage in trainer.model.stages:
        for found, module in stage.named_modules():
            if found == name:
                module.register_full_backward_hook(lambda _, got, __: tuple(g * float("nan") for g in got))
    try:
        trainer.fit()
    except NonFiniteError as error:
        return str(error)
    return ""


def second_trainer(rank, folder, sizes):
    """What the second of two trainers in a folder says while the first works."""
    said = []
    first = trainer_of(folder, sizes)

    def beat(step, phase):
        if (step, phase) == (2, "step"):
            try:
                trainer_of(folder, sizes).fit()
            except RuntimeError as error:
                said.append(str(error))

    first.on_beat = beat
    first.fit()
    return said


def wrong_targets(rank, _, sizes, tied):
    """How many targets of some batches are not the most likely token, and the mean losses."""
    trainer = trainer_of(Path("nowhere"), sizes, tied=tied)
    batches = [trainer.source.batch(i, 2) for i in range(3)]
    return [trainer.engine.num_wrong(batch) for batch in batches], [trainer.engine.loss(batch) for batch in batches]


def flip(tensor):
    """One bit of one word of this rank's part."""
    with torch.no_grad():
        local(tensor).view(-1)[:1].view(torch.uint8)[1] ^= 4


class Flips:
    """Flips a bit of `fault` on rank 1 (of one process, on rank 0) in step `at`, or from then on."""

    def __init__(self, trainer, fault, at):
        self.trainer, self.fault, self.at = trainer, fault, at
        self.step = self.times = 0
        name = "layers.1.mlp.up_proj"
        modules = {n: module for _, stage in trainer.engine.traced() for n, module in stage.named_modules()}
        if fault.startswith("output"):
            modules[name].register_forward_hook(self.output)
        elif fault == "gradient":
            modules["layers.0.self_attn.o_proj"].register_forward_pre_hook(self.gradient)
        elif fault == "reduced":
            accumulate = trainer.engine.accumulate
            trainer.engine.accumulate = lambda batches: self.reduced(accumulate(batches), f"{name}.weight")
        else:
            self.kept = "layers.0.input_layernorm.weight" if fault == "norm" else f"{name}.weight"

    def beat(self, step, phase):
        engine, self.step = self.trainer.engine, step
        if phase == "step" and step == self.at and hasattr(self, "kept"):
            part = engine.parts[self.kept]
            if self.fault in ("weight", "norm"):
                flip(part)
            else:
                flip(
                    engine.average.mean[self.kept]
                    if self.fault == "average"
                    else engine.optimizer.state[part][self.fault]
                )

    def output(self, module, inputs, output):
        if self.step < self.at:
            return None
        self.times += 1
        if self.fault == "output once" and self.times > 1:
            return None
        wrong = output.clone()
        flip(wrong)
        return wrong

    def gradient(self, module, inputs):
        if self.step >= self.at:
            module.weight.register_hook(self.wrong_gradient)

    def wrong_gradient(self, gradient):
        wrong = gradient.clone()
        flip(wrong)
        return wrong

    def reduced(self, answer, name):
        if self.step == self.at:
            flip(self.trainer.engine.params[name].grad)
        return answer


def train_with_a_flip(rank, folder, sizes, fault, at, changes):
    """(message, ranks of the error, the last step) of a run in which a bit flips on one rank."""
    trainer = trainer_of(folder, sizes, **changes)
    trainer.on_beat = lambda step, phase: None
    if rank == (0 if sizes is None else 1):
        trainer.on_beat = Flips(trainer, fault, at).beat
    try:
        trainer.fit()
    except SilentCorruptionError as error:
        return str(error), error.ranks, trainer.step
    return "", (), trainer.step
