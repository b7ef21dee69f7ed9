"""How a training step is cut: the parallel axes of a run, its micro-batches, and what is kept for the backward pass.

Source: Llama 3 (arXiv:2407.21783) section 3.3.2: axes [TP, CP, PP, DP], parameters sharded over DP (FSDP) and not
resharded after the forward pass, gradients summed in fp32.
"""

from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.pipeline_schedule import PipelineSchedule, best_group_size, interleaved_schedule


@dataclass(frozen=True)
class Layout:
    """One way to cut a step.

    axes: as a run takes them.
    micro_batch_tokens: tokens of a micro-batch on all context ranks together.  num_microbatches: of a step, on each
    data rank.
    recompute: what is computed again in the backward pass instead of kept: "swiglu" the product of gate and up (no
    matrix product), "block" all of a block but its inputs.
    """

    axes: ParallelConfig = field(default_factory=ParallelConfig)
    _: KW_ONLY
    micro_batch_tokens: int
    num_microbatches: int = 1
    dtype: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "swiglu", "block"] = "none"

    def __post_init__(self) -> None:
        for name in ("micro_batch_tokens", "num_microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Layout: {name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"Layout: dtype must be 'fp32' or 'bf16', got {self.dtype!r}")
        if self.recompute not in ("none", "swiglu", "block"):
            raise ValueError(f"Layout: recompute must be 'none', 'swiglu' or 'block', got {self.recompute!r}")

    @property
    def tp(self) -> int:
        """Tensor ranks."""
        return self.axes.tp

    @property
    def cp(self) -> int:
        """Context ranks."""
        return self.axes.cp

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return self.axes.pp

    @property
    def dp(self) -> int:
        """Data ranks."""
        return self.axes.dp

    @property
    def num_chunks(self) -> int:
        """Stages on each pipeline rank."""
        return self.axes.num_chunks

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.axes.world_size

    @property
    def fsdp(self) -> bool:
        """Whether parameters are sharded and gathered once a step in `dtype`, as with more than one data or context
        rank. Otherwise a rank holds its parameters whole in fp32 and makes 16-bit copies where they are used."""
        return self.axes.dp * self.axes.cp > 1

    @property
    def shard_size(self) -> int:
        """Ranks over which the parameters of a pipeline rank are sharded."""
        return self.axes.num_shards * self.axes.cp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline on all ranks."""
        return self.axes.pp * self.axes.num_chunks

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch on one context rank, rounded up."""
        return -(-self.micro_batch_tokens // self.axes.cp)

    @property
    def group_size(self) -> int:
        """Micro-batches in flight, at most all of them; 0: what `interleaved_schedule` chooses."""
        return min(self.axes.microbatches_in_flight, self.num_microbatches)

    def schedule(self) -> PipelineSchedule:
        """Who computes what in which order."""
        return _schedule(self.pp, self.num_chunks, self.num_microbatches, self.group_size)

    def cut(self, **axes: Any) -> "Layout":
        """The same with some axes of `ParallelConfig` changed."""
        return replace(self, axes=replace(self.axes, **axes))

    def shortened(self) -> "Layout":
        """The layout with as few micro-batches, in groups as large, as fill its pipeline and show its steady state:
        what lives at once stays the same, and more of them take as long as they compute on the longest rank."""
        group = self.group_size or best_group_size(self.pp, self.num_chunks, self.num_microbatches)
        if self.num_microbatches < 4 * group:
            return self
        few = replace(self, num_microbatches=3 * group + self.num_microbatches % group)
        return few.cut(microbatches_in_flight=group)

    def __str__(self) -> str:
        words = [f"tp {self.tp}", f"cp {self.cp}", f"pp {self.pp}", f"dp {self.dp}"]
        words += [f"v {self.num_chunks}"] * (self.num_chunks > 1)
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " ".join(words)


@lru_cache(maxsize=256)  # a search asks for the same few schedules again and again
def _schedule(pp: int, num_chunks: int, num_microbatches: int, group_size: int) -> PipelineSchedule:
    return interleaved_schedule(pp, num_chunks, num_microbatches, group_size or None)
