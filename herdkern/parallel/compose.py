"""All axes of a `ParallelConfig` put on one model: stages, tensor, context and data parallelism, and the step.

Source: The Llama 3 Herd of Models, section 3.3.2 (arXiv:2407.21783).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdkern.model.config import ModelConfig
from herdkern.model.layers import Attention
from herdkern.model.transformer import Transformer
from herdkern.parallel.config import ParallelConfig
from herdkern.parallel.context import ContextAttend
from herdkern.parallel.data import clip_gradients, local, num_targets_of_all, reduce_after_last, reshard, shard_stages
from herdkern.parallel.pipeline import Pipeline
from herdkern.parallel.pipeline_stages import MicroBatch, stages_of_rank
from herdkern.parallel.tensor import gather_rows, is_whole, parallelize_tensor, sum_norm_gradients

TIED = ("embed_tokens.weight", "lm_head.weight")


class ParallelModel:
    """`model` on the ranks of `config`, which every rank of the default process group must make at the same time.

    Every rank gives the whole model with the same parameters. `parameters()` are what this rank's optimizer updates;
    they are DTensors unless dp, cp and tp are 1, and keep the names of the model.
    Raises: ValueError if the model or the number of ranks does not fit the config.
    """

    def __init__(self, model: Transformer, config: ParallelConfig) -> None:
        self.config = config
        self.device = model.rope_cos.device
        self.mesh, self.state_mesh = config.mesh(self.device.type), config.state_mesh(self.device.type)
        pp = self.mesh["pp"]
        self.stages = stages_of_rank(model, config.pp, pp.get_local_rank(), config.num_chunks)
        parallelize_tensor(self.stages, self.state_mesh["tp"])
        self.attend = self._attend_over_context(model.config) if config.cp > 1 else None
        if config.dp * config.cp > 1:
            axes = ("dp_replicate", "dp_shard") if config.num_shards < config.dp else ("dp_shard",)
            shard_stages(self.stages, self.state_mesh[axes])
        self.pipeline = Pipeline(
            self.stages,
            pp.get_group(),
            group_size=config.microbatches_in_flight or None,
            before_backward=reduce_after_last,
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this rank's stages under the names that they have in the model."""
        return self.pipeline.named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank's stages, each once."""
        return self.pipeline.parameters()

    def step(self, microbatches: Sequence[MicroBatch]) -> Tensor:
        """Add the gradients of the mean loss over the targets of all data-parallel ranks to `.grad`; return that loss.

        microbatches: of this data-parallel rank, whole ones, the same on all ranks that differ in pp, cp or tp only.
        Returns: () fp32, the same on every rank.  Raises: as `Pipeline.step`.
        """
        num_targets = num_targets_of_all(microbatches, self.mesh["dp"].get_group(), self.device)
        loss = self.pipeline.step(self._parts(microbatches), num_targets=num_targets)
        sum_norm_gradients(self.stages, self.state_mesh["tp"])
        return self._sum_of_all(loss)

    def replay(self, microbatch: MicroBatch, microbatches: Sequence[MicroBatch]) -> None:
        """Add the gradients of one micro-batch, of any data-parallel rank, as they are in a step of `microbatches`."""
        num_targets = num_targets_of_all(microbatches, self.mesh["dp"].get_group(), self.device)
        self.pipeline.step(self._parts([microbatch]), num_targets=num_targets)

    def evaluate(self, microbatches: Sequence[MicroBatch]) -> Tensor:
        """The mean loss as `step` returns it, from forward passes only."""
        num_targets = num_targets_of_all(microbatches, self.mesh["dp"].get_group(), self.device)
        loss = self.pipeline.evaluate(self._parts(microbatches), num_targets=num_targets)
        reshard(self.stages)
        return self._sum_of_all(loss)

    def num_wrong(self, microbatch: MicroBatch) -> int:
        """How many targets of a micro-batch, the same on all data-parallel ranks, are not the most likely token."""
        group, last = self.state_mesh["tp"].get_group(), self.stages[-1]
        before = last.cross_entropy
        if last.is_last:
            last.cross_entropy = partial(num_wrong_targets, group)
        try:
            # a mean over the targets of all data-parallel ranks, which all have the same ones
            wrong = self.evaluate([microbatch]) * microbatch.num_targets
        finally:
            last.cross_entropy = before
        return round(float(wrong))

    def clip_gradients(self, max_norm: float) -> Tensor:
        """The norm of all gradients of the run, () fp64, each counted once; above `max_norm` they are scaled down."""
        named = {id(param): name for name, param in self.named_parameters().items()}
        params = self.parameters()
        return clip_gradients(params, [self._copies(named[id(param)]) for param in params], max_norm)

    def _attend_over_context(self, config: ModelConfig) -> ContextAttend:
        """Puts attention over the context ranks into all layers of this rank."""
        heads = (config.num_heads // self.config.tp, max(1, config.num_kv_heads // self.config.tp), config.head_dim)
        attend = ContextAttend(self.mesh["cp"].get_group(), "needed", heads, keep_gathered=False)
        for stage in self.stages:
            for module in stage.modules():
                if isinstance(module, Attention):
                    module.attend = attend
        return attend

    def _parts(self, microbatches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """What this context rank holds of each micro-batch."""
        if self.attend is None:
            return microbatches
        rank = self.mesh["cp"].get_local_rank()
        parts = []
        for batch in microbatches:
            plan = self.attend.plan(batch.cu_seqlens)
            parts.append(
                _Part(
                    tokens=plan.shard(batch.tokens, rank),
                    targets=plan.shard(batch.targets, rank),
                    positions=plan.shard(batch.positions, rank),
                    cu_seqlens=batch.cu_seqlens,
                    num_targets=batch.num_targets,
                )
            )
        return parts

    def _sum_of_all(self, loss: Tensor) -> Tensor:
        """The sum over the ranks that have seen other tokens."""
        for axis in ("cp", "dp"):
            dist.all_reduce(loss, group=self.mesh[axis].get_group())
        return loss

    def has_copies(self, name: str, axis: str) -> bool:
        """Whether ranks that differ along an axis of `state_mesh` only hold the same part of a parameter."""
        config = self.stages[0].config
        if axis == "tp":
            return is_whole(name, config, self.config.tp)
        return axis == "dp_replicate" or (axis == "pp" and config.tied_embeddings and name in TIED)

    def _copies(self, name: str) -> float:
        """On how many ranks the same part of a parameter lies."""
        sizes = {"dp_replicate": self.config.dp // self.config.num_shards, "tp": self.config.tp}
        sizes["pp"] = min(self.config.pp, 2)  # the first and the last stage
        return math.prod(size for axis, size in sizes.items() if self.has_copies(name, axis))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A micro-batch as one context rank holds it: its tokens, the borders of all."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    num_targets: int


@torch.no_grad()
def num_wrong_targets(group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """How many targets that count are not the most likely token, () fp32, the same on all ranks of `group`.

    hidden: (rows, dim), this rank's part of the tokens.  weight: its rows of the head.  targets: (total_tokens,) int64.
    Of equal logits the first token counts, as in one process.
    """
    counts = targets != -100
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size > 1:
        hidden = gather_rows(hidden, group)[: targets.numel()]
    vocab_size, rows = weight.shape[0], local(weight)
    logits = torch.nn.functional.linear(hidden[counts], rows.to(hidden.dtype)).float()
    start = rank * -(-vocab_size // size)
    if logits.shape[1] == 0:  # the last ranks may have no tokens of the vocabulary
        best = logits.new_full((len(logits),), -torch.inf)
        token = torch.zeros_like(best, dtype=torch.int64)
    else:
        best, token = logits.max(-1)
    mine = torch.stack([best.double(), (token + start).double()])
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group=group)
    stacked = torch.stack(every)  # (ranks, 2, targets)
    winner = stacked[:, 0].argmax(0, keepdim=True)
    chosen = stacked[:, 1].gather(0, winner)[0].long()
    return (chosen != targets[counts]).sum().float()


@torch.no_grad()
def whole_gradient(param: nn.Parameter) -> Tensor:
    """The gradient of all of a parameter, gathered from the ranks that hold its parts; every one of them must call."""
    gradient = param.grad
    assert gradient is not None
    return local(gradient.full_tensor()) if hasattr(gradient, "full_tensor") else gradient
