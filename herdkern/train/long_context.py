"""Context that grows in stages, each left only when two criteria hold: short evaluations are back where they were, and
every needle is found.

Source: Llama 3 (arXiv:2407.21783) section 3.4.2: six stages from 8 K to 128 K; a stage ends when the performance on
short-context evaluations has recovered completely and needle-in-a-haystack is solved perfectly up to its length. The
lengths between are not published.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern.train.config import LongContextConfig

FEWEST_EXAMPLES = 20
DRAWS = 2000


class LongContextStalledError(RuntimeError):
    """A stage saw all the tokens that it may and its criteria do not hold."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check found: length of the stage it was made in, whether it ends, and why not."""

    length: int
    stage_tokens: int
    advances: bool
    reasons: tuple[str, ...]


class LongContextGate:
    """The state of the stages: which length is trained, since how many tokens, and what every check found.

    baselines: task -> scores of its examples (higher is better) before the first stage; the same examples, in the same
    order, are given to every check.
    """

    def __init__(self, config: LongContextConfig, baselines: Mapping[str, Sequence[float]]) -> None:
        if not baselines:
            raise ValueError("LongContextGate: baselines must have at least one task, got none")
        for task, scores in baselines.items():
            if len(scores) < FEWEST_EXAMPLES:
                raise ValueError(
                    f"LongContextGate: baselines of {task!r} must have at least {FEWEST_EXAMPLES} examples, "
                    f"got {len(scores)}; fewer cannot tell a loss from noise"
                )
        self.config = config
        self.baselines = {task: np.asarray(scores, np.float64) for task, scores in baselines.items()}
        self.stage = 1
        self.stage_began = 0  # token
        self.verdicts: list[Verdict] = []

    @property
    def is_done(self) -> bool:
        """Whether the last stage has ended."""
        return self.stage == len(self.config.lengths)

    @property
    def length(self) -> int:
        """The context to train with now; after the last stage, its own."""
        return self.config.lengths[min(self.stage, len(self.config.lengths) - 1)]

    def check(
        self, tokens: int, scores: Mapping[str, Sequence[float]], needles: Mapping[tuple[int, float], bool]
    ) -> Verdict:
        """Judge the stage after `tokens` tokens of the run, and go on to the next one if both criteria hold.

        scores: as baselines.  needles: (length, depth) -> found; lengths up to that of the stage, that one included.
        Raises: LongContextStalledError if the stage may see no more tokens; ValueError if tasks, examples or lengths
        are not those that the stage asks for, or all stages have ended.
        """
        self._check_arguments(scores, needles)
        length, seen = self.length, tokens - self.stage_began
        reasons = [reason for task in sorted(scores) if (reason := self._short_of(task, scores[task]))]
        lost = sorted(place for place, found in needles.items() if not found)
        if lost:
            at, depth = lost[0]
            reasons.append(
                f"{len(lost)} of {len(needles)} needles are not found, one at depth {depth:g} of {at} tokens"
            )
        verdict = Verdict(length=length, stage_tokens=seen, advances=not reasons, reasons=tuple(reasons))
        self.verdicts.append(verdict)
        if verdict.advances:
            self.stage, self.stage_began = self.stage + 1, tokens
        elif seen >= self.config.max_stage_tokens:
            raise LongContextStalledError(
                f"long context: the stage of {length} tokens must pass within {self.config.max_stage_tokens:,} tokens, "
                f"got {'; '.join(reasons)}; change the mix or raise max_stage_tokens"
            )
        return verdict

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {"stage": self.stage, "stage_began": self.stage_began, "verdicts": verdicts}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.stage, self.stage_began = state["stage"], state["stage_began"]
        self.verdicts = [Verdict(**{**v, "reasons": tuple(v["reasons"])}) for v in state["verdicts"]]

    def _short_of(self, task: str, scores: Sequence[float]) -> str:
        """ "" if the task is back where it was, else how far it is below."""
        change = np.asarray(scores, np.float64) - self.baselines[task]
        allowed = half_width(change, self.config.confidence, self.config.seed)
        if change.mean() >= -allowed:
            return ""
        return f"{task} is {-change.mean():.4g} below its baseline, {allowed:.2g} would be noise"

    def _check_arguments(
        self, scores: Mapping[str, Sequence[float]], needles: Mapping[tuple[int, float], bool]
    ) -> None:
        if self.is_done:
            raise ValueError(f"LongContextGate: check must come before the last stage ends, got stage {self.stage}")
        if set(scores) != set(self.baselines):
            raise ValueError(f"LongContextGate: scores must be of {sorted(self.baselines)}, got {sorted(scores)}")
        for task, values in scores.items():
            if len(values) != len(self.baselines[task]):
                want = len(self.baselines[task])
                raise ValueError(f"LongContextGate: scores of {task!r} must be {want}, got {len(values)}")
        lengths = {length for length, _ in needles}
        if self.length not in lengths or max(lengths) > self.length:
            raise ValueError(
                f"LongContextGate: needles must reach {self.length} tokens and no further, got {sorted(lengths)}"
            )


def half_width(change: NDArray[np.float64], confidence: float, seed: int) -> float:
    """How far below 0 the mean of `change` may lie by chance: a quantile of its bootstrapped means about their own."""
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [change[rng.integers(0, len(change), (100, len(change)))].mean(axis=1) for _ in range(DRAWS // 100)]
    )
    return float(change.mean() - np.quantile(means, 1 - confidence))
