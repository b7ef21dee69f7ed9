"""How a training step is cut: the parallel axes, micro-batches, and what is kept for the backward pass.

Source: Llama 3 (arXiv:2407.21783) section 3.3.2: axes [TP, CP, PP, DP], parameters sharded over DP (FSDP) and not
resharded after the forward pass, gradients summed in fp32.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.pipeline_schedule import PipelineSchedule, best_group_size, interleaved_schedule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut a step.

    tp, cp, pp, dp: ranks of the tensor, context, pipeline and data axis.
    num_chunks: virtual stages on each pipeline rank.  group_size: micro-batches that a stage computes one after the
    other; 0: what `interleaved_schedule` chooses.
    micro_batch_tokens: tokens of a micro-batch on all context ranks together.  num_microbatches: of a step, on each
    data rank.
    recompute: what is computed again in the backward pass instead of kept: "swiglu" the product of gate and up (no
    matrix product), "block" all of a block but its inputs.
    fsdp: parameters are sharded over dp_shard data ranks (0: all of them) and all context ranks, gathered once a step
    in `dtype`. Without it every rank holds its parameters whole in fp32 and makes 16-bit copies where they are used.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    num_chunks: int = 1
    group_size: int = 0
    micro_batch_tokens: int
    num_microbatches: int = 1
    dtype: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "swiglu", "block"] = "none"
    fsdp: bool = True
    dp_shard: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "pp", "dp", "num_chunks", "micro_batch_tokens", "num_microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Layout: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.group_size <= self.num_microbatches:
            most = f"[0, num_microbatches = {self.num_microbatches}]"
            raise ValueError(f"Layout: group_size must lie in {most}, got {self.group_size}")
        if self.dp_shard < 0 or self.dp % (self.dp_shard or 1):
            raise ValueError(f"Layout: dp_shard must be 0 (all) or divide dp = {self.dp}, got {self.dp_shard}")
        if self.num_chunks > 1 and self.pp == 1:
            raise ValueError(f"Layout: num_chunks must be 1 without a pipeline, got {self.num_chunks}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"Layout: dtype must be 'fp32' or 'bf16', got {self.dtype!r}")
        if self.recompute not in ("none", "swiglu", "block"):
            raise ValueError(f"Layout: recompute must be 'none', 'swiglu' or 'block', got {self.recompute!r}")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def shard_size(self) -> int:
        """Ranks over which the parameters of a pipeline rank are sharded."""
        return (self.dp_shard or self.dp) * self.cp if self.fsdp else 1

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline on all ranks."""
        return self.pp * self.num_chunks

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch on one context rank, rounded up."""
        return -(-self.micro_batch_tokens // self.cp)

    def parallel_config(self) -> ParallelConfig:
        """The axes of this layout as a run takes them."""
        return ParallelConfig(
            tp=self.tp,
            cp=self.cp,
            pp=self.pp,
            dp=self.dp,
            dp_shard=self.dp_shard if self.fsdp else 1,
            num_chunks=self.num_chunks,
            microbatches_in_flight=self.group_size,
        )

    def schedule(self) -> PipelineSchedule:
        """Who computes what in which order."""
        return _schedule(self.pp, self.num_chunks, self.num_microbatches, self.group_size)

    def shortened(self) -> "Layout":
        """The layout with as few micro-batches, in groups as large, as fill its pipeline and show its steady state:
        what lives at once stays the same, and more of them take as long as they compute on the longest rank."""
        group = self.group_size or best_group_size(self.pp, self.num_chunks, self.num_microbatches)
        if self.num_microbatches < 4 * group:
            return self
        return replace(self, group_size=group, num_microbatches=3 * group + self.num_microbatches % group)

    def __str__(self) -> str:
        words = [f"tp {self.tp}", f"cp {self.cp}", f"pp {self.pp}", f"dp {self.dp}"]
        words += [f"v {self.num_chunks}"] * (self.num_chunks > 1)
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(words)


@lru_cache(maxsize=256)  # a search asks for the same few schedules again and again
def _schedule(pp: int, num_chunks: int, num_microbatches: int, group_size: int) -> PipelineSchedule:
    return interleaved_schedule(pp, num_chunks, num_microbatches, group_size or None)
