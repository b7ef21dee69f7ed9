"""The stages of a growing context inside the training loop: the length of a step, and the checks that end a stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from herdkern.train.batch import Batch
from herdkern.train.config import TrainConfig
from herdkern.train.long_context import LongContextGate
from herdkern.train.ramp import RampPhase


class Judge(Protocol):
    """What a check asks of a run: an engine of `Trainer`."""

    def loss(self, batch: Batch) -> float:
        """The mean loss of one batch."""
        ...

    def num_wrong(self, batch: Batch) -> int:
        """How many targets of one batch are not the most likely token."""
        ...


class LongContextProbe(Protocol):
    """The examples by which stages are judged; the same on all ranks, and each time the same."""

    def short(self) -> Mapping[str, Sequence[Batch]]:
        """Task -> its examples, at least 20, of the context before the stages; the score of one is minus its loss."""
        ...

    def needles(self, length: int) -> Mapping[tuple[int, float], Batch]:
        """(length, depth) -> a text of at most `length` tokens whose targets that count are the answer."""
        ...


class LongStages:
    """Which length the sequences of a step have, from token long_context.from_tokens on."""

    def __init__(self, config: TrainConfig, probe: LongContextProbe, judge: Judge) -> None:
        self.config, self.probe, self.judge = config.long_context, probe, judge
        self.tokens_per_step = config.ramp_plan().at(self.config.from_tokens).tokens_per_step
        self.gate: LongContextGate | None = None
        self.steps = 0  # since the stages began

    def measures_next(self, tokens: int) -> bool:
        """Whether a step that begins at `tokens` measures the baselines before it, or has a check behind it."""
        if self.gate is None:
            return tokens >= self.config.from_tokens
        return not self.gate.is_done and (self.steps + 1) % self.config.check_every_steps == 0

    def phase(self, tokens: int) -> RampPhase | None:
        """Batch and length of a step that begins at `tokens`; None before the stages. The first call in them measures
        the baselines."""
        if tokens < self.config.from_tokens:
            return None
        if self.gate is None:
            self.gate = LongContextGate(self.config, self._scores())
            self.gate.stage_began = tokens
        return self.config.phase(self.gate.length, self.tokens_per_step)

    def after_step(self, tokens: int) -> dict[str, Any]:
        """What joins the metrics of a step that ended at `tokens`: the length, and the verdict where there was a check.

        Raises: LongContextStalledError if a stage may see no more tokens.
        """
        if self.gate is None:
            return {}
        checks = self.measures_next(tokens)
        self.steps += 1
        told: dict[str, Any] = {"context": self.gate.length}
        if checks:
            needles = {at: self.judge.num_wrong(b) == 0 for at, b in self.probe.needles(self.gate.length).items()}
            told["long_context"] = dataclasses.asdict(self.gate.check(tokens, self._scores(), needles))
        return told

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, as JSON values."""
        if self.gate is None:
            return None
        baselines = {task: scores.tolist() for task, scores in self.gate.baselines.items()}
        return {"steps": self.steps, "baselines": baselines, "gate": self.gate.state()}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        self.gate, self.steps = None, 0
        if state is not None:
            self.gate, self.steps = LongContextGate(self.config, state["baselines"]), state["steps"]
            self.gate.load(state["gate"])

    def _scores(self) -> dict[str, list[float]]:
        return {task: [-self.judge.loss(batch) for batch in batches] for task, batches in self.probe.short().items()}
