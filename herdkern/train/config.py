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

    every_steps: int = 100  # 0: only at the end
    keep_last: int = 2

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"CheckpointConfig: every_steps must not be negative, got {self.every_steps}")
        if self.keep_last < 1:
            raise ValueError(f"CheckpointConfig: keep_last must be at least 1, got {self.keep_last}")


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
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10  # in a row, with on_nonfinite="skip"
    reuse_memory: bool = True  # keep freed memory for the next step (herdkern.memory); the same bits either way
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

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
        if self.on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"TrainConfig: on_nonfinite must be 'stop' or 'skip', got {self.on_nonfinite!r}")
        for name in ("average_every_steps", "average_last_steps", "eval_every_steps", "max_skipped_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.schedule.warmup_steps + self.schedule.anneal_steps > self.steps:
            raise ValueError(
                f"TrainConfig: warmup_steps + anneal_steps must be at most steps={self.steps}, "
                f"got {self.schedule.warmup_steps} + {self.schedule.anneal_steps}"
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
        """Tokens of all steps."""
        return self.ramp_plan().tokens_before(self.steps)

    @property
    def longest_seq_len(self) -> int:
        """The longest sequences of the run: what the sampler numbers where there is a ramp."""
        return max(phase.seq_len for phase in self.ramp_plan().phases)

    @property
    def anneal_start_sequence(self) -> int:
        """The number of the sampler's first sequence of the annealing phase: where an up-weighted mix starts."""
        before = self.ramp_plan().tokens_before(self.steps - self.schedule.anneal_steps)
        return -(-before // self.longest_seq_len)

    def identity(self) -> dict[str, Any]:
        """The fields that the bits of the result depend on, as JSON values; a resumed run must have the same."""
        values = dataclasses.asdict(self)
        del values["checkpoint"], values["eval_every_steps"], values["reuse_memory"], values["recompute"]
        if self.ramp:
            values["ramp"] = list(values["ramp"])  # as JSON gives it back
        else:
            del values["ramp"]  # runs from before there were ramps go on
        return values
