"""What a training run is, as frozen dataclasses. Needs no torch.

Source of the defaults: Llama 3 (arXiv:2407.21783) section 3.4; betas, eps, weight decay and clipping are not in the
paper and are those of common practice.
"""

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from herdkern.train.ramp import Ramp, RampPhase


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay on matrices and clipping of the global gradient norm."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0  # 0: no clipping

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"OptimizerConfig: beta1, beta2 must be in [0, 1), got {self.beta1}, {self.beta2}")
        if self.eps <= 0 or self.weight_decay < 0 or self.max_grad_norm < 0:
            raise ValueError(
                "OptimizerConfig: eps must be positive, weight_decay and max_grad_norm not negative, "
                f"got {self.eps}, {self.weight_decay}, {self.max_grad_norm}"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, cosine from peak_lr to min_lr, then a straight line to 0 over anneal_steps."""

    peak_lr: float = 3e-3
    min_lr: float = 3e-5
    warmup_steps: int = 20
    anneal_steps: int = 0
    cosine_steps: int = 0  # the update at which the cosine reaches min_lr; 0: where annealing starts

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.peak_lr:
            raise ValueError(f"ScheduleConfig: min_lr must be in [0, peak_lr={self.peak_lr}], got {self.min_lr}")
        if min(self.warmup_steps, self.anneal_steps, self.cosine_steps) < 0:
            raise ValueError(
                "ScheduleConfig: warmup_steps, anneal_steps, cosine_steps must not be negative, "
                f"got {self.warmup_steps}, {self.anneal_steps}, {self.cosine_steps}"
            )
        if 0 < self.cosine_steps <= self.warmup_steps:
            raise ValueError(
                f"ScheduleConfig: cosine_steps must be 0 or above warmup_steps={self.warmup_steps}, "
                f"got {self.cosine_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many complete checkpoints to keep."""

    every_steps: int | Literal["auto"] = 100  # 0: only at the end; "auto": by what a save costs (Young and Daly)
    keep_last: int = 2
    between_failures_s: float = 0.0  # seconds of the whole job, for "auto"; 0: the Llama 3 paper's rate for a device

    def __post_init__(self) -> None:
        if self.every_steps != "auto" and self.every_steps < 0:
            raise ValueError(f"CheckpointConfig: every_steps must not be negative, got {self.every_steps}")
        if self.between_failures_s < 0:
            raise ValueError(
                f"CheckpointConfig: between_failures_s must not be negative, got {self.between_failures_s}"
            )
        if self.keep_last < 1:
            raise ValueError(f"CheckpointConfig: keep_last must be at least 1, got {self.keep_last}")


LLAMA3_LENGTHS = (8192, 16_384, 32_768, 49_152, 65_536, 98_304, 131_072)  # where it starts, and six stages


@dataclass(frozen=True, kw_only=True)
class LongContextConfig:
    """Stages of a growing context, each left only when two criteria hold (herdkern.train.long_context).

    lengths: the context before, then that of every stage; none: no stages.  from_tokens: where the first begins.
    check_every_steps: how often the criteria are looked at.  max_stage_tokens: of a stage, after which training stops
    with an error.  confidence: of the one-sided interval that a short evaluation may lie below its baseline.
    batch_multiple: a step of a stage has as many sequences as its tokens before it give, rounded down to a multiple of
    this; each is a micro-batch.
    """

    lengths: tuple[int, ...] = LLAMA3_LENGTHS
    from_tokens: int = 0
    check_every_steps: int = 100
    max_stage_tokens: int = 200_000_000_000
    confidence: float = 0.95
    batch_multiple: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip(self.lengths, self.lengths[1:]))
        if self.lengths and (len(self.lengths) < 2 or not rises or self.lengths[0] < 1):
            raise ValueError(f"LongContextConfig: lengths must be two or more and rise, or none, got {self.lengths}")
        if self.max_stage_tokens < 1 or not 0.5 <= self.confidence < 1:
            raise ValueError(
                "LongContextConfig: max_stage_tokens must be positive and confidence lie in [0.5, 1), "
                f"got {self.max_stage_tokens}, {self.confidence}"
            )
        for name, least in (("from_tokens", 0), ("check_every_steps", 1), ("batch_multiple", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"LongContextConfig: {name} must be at least {least}, got {getattr(self, name)}")

    def phase(self, length: int, tokens_per_step: int) -> RampPhase:
        """A step of sequences of `length` that sees at most `tokens_per_step` tokens."""
        sequences = tokens_per_step // length // self.batch_multiple * self.batch_multiple
        return RampPhase(from_tokens=self.from_tokens, batch_size=sequences, seq_len=length)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of the training loop. A step sees batch_size sequences of seq_len tokens, micro_batch_size at a time;
    from the tokens that `ramp` names on, those of its phases."""

    steps: int = 200
    seq_len: int = 512
    batch_size: int = 16
    micro_batch_size: int = 0  # 0: the whole batch at once
    ramp: tuple[RampPhase, ...] = ()  # batch size and sequence length from given tokens on; LLAMA3_RAMP[1:]
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "bf16"  # of activations and matrix products; parameters and sums are always fp32
    recompute: Literal["none", "swiglu", "block"] = "none"  # made again in the backward pass: less memory, same bits
    document_mask: bool = True  # False lets attention cross documents inside a sequence: for study only
    mask_border_targets: bool = True  # do not learn to predict the first token of an unrelated next document
    reset_positions: bool = True  # rotary positions start at 0 in every document, else in every sequence
    average_every_steps: int = 0  # Polyak average over the annealing steps; 0: none
    average_last_steps: int = 0  # only over so many steps at the end; 0: over all annealing steps
    eval_every_steps: int = 0  # held-out loss; 0: never inside the loop
    # a step that is not finite ends the run, is left out, or sends the run back to a checkpoint and past that data
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_skipped_steps: int = 10  # in a row, with on_nonfinite="skip"
    max_rollbacks: int = 3  # of the run, with on_nonfinite="rollback"
    # compute a micro-batch again on a neighbour and compare all copies (herdkern.train.corruption); 0: never
    corruption_check_every_steps: int = 0
    reuse_memory: bool = True  # keep freed memory for the next step (herdkern.memory); the same bits either way
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    long_context: LongContextConfig = field(default_factory=lambda: LongContextConfig(lengths=()))

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for phase in self.ramp_plan().phases:
            if self.micro_batch_size < 0 or phase.batch_size % (self.micro_batch_size or phase.batch_size):
                raise ValueError(
                    f"TrainConfig: micro_batch_size must divide batch_size={phase.batch_size}, "
                    f"got {self.micro_batch_size}"
                )
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"TrainConfig: dtype must be 'fp32' or 'bf16', got {self.dtype!r}")
        if self.on_nonfinite not in ("stop", "skip", "rollback"):
            raise ValueError(
                f"TrainConfig: on_nonfinite must be 'stop', 'skip' or 'rollback', got {self.on_nonfinite!r}"
            )
        names = ("average_every_steps", "average_last_steps", "eval_every_steps", "corruption_check_every_steps")
        for name in (*names, "max_skipped_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.schedule.warmup_steps + self.schedule.anneal_steps > self.steps:
            raise ValueError(
                f"TrainConfig: warmup_steps + anneal_steps must be at most steps={self.steps}, "
                f"got {self.schedule.warmup_steps} + {self.schedule.anneal_steps}"
            )
        if self.long_context.lengths:
            tokens = self.ramp_plan().at(self.long_context.from_tokens).tokens_per_step
            if tokens < self.long_context.lengths[-1] * self.long_context.batch_multiple:
                raise ValueError(
                    f"TrainConfig: long_context.lengths must fit into a step of {tokens} tokens "
                    f"{self.long_context.batch_multiple} times, got {self.long_context.lengths[-1]}"
                )
        if self.average_every_steps and not self.schedule.anneal_steps:
            warnings.warn("TrainConfig: average_every_steps has no effect without schedule.anneal_steps", stacklevel=3)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update sees before the first phase of the ramp."""
        return self.batch_size * self.seq_len

    def ramp_plan(self) -> Ramp:
        """Which batch size and sequence length hold at which token."""
        return Ramp((RampPhase(from_tokens=0, batch_size=self.batch_size, seq_len=self.seq_len), *self.ramp))

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps; stages of long context may see fewer."""
        return self.ramp_plan().tokens_before(self.steps)

    @property
    def longest_seq_len(self) -> int:
        """The longest sequences of the run: what the sampler numbers where their length changes."""
        return max(*(phase.seq_len for phase in self.ramp_plan().phases), *self.long_context.lengths, 0)

    @property
    def changes_length(self) -> bool:
        """Whether sequences are cut from a stream of tokens, as their length or number changes in the run."""
        return bool(self.ramp or self.long_context.lengths)

    @property
    def anneal_start_sequence(self) -> int:
        """The number of the sampler's first sequence of the annealing phase: where an up-weighted mix starts."""
        before = self.ramp_plan().tokens_before(self.steps - self.schedule.anneal_steps)
        return -(-before // self.longest_seq_len)

    def identity(self) -> dict[str, Any]:
        """The fields that the bits of the result depend on, as JSON values; a resumed run must have the same."""
        values = dataclasses.asdict(self)
        free = ("checkpoint", "eval_every_steps", "corruption_check_every_steps")
        for name in (*free, "reuse_memory", "recompute", "max_rollbacks"):
            del values[name]
        if self.long_context.lengths:
            values["long_context"]["lengths"] = list(self.long_context.lengths)
        else:
            del values["long_context"]  # as below
        if self.ramp:
            values["ramp"] = list(values["ramp"])  # as JSON gives it back
        else:
            del values["ramp"]  # runs from before there were ramps go on
        return values
