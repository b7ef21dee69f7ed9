"""Stages of a pipeline, cut from a model: some consecutive layers, the embedding before the first, the loss at the end.

A stage keeps the names that its parameters have in the model, so the stages of all ranks together are its state dict.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from herdkern import ops
from herdkern.model.transformer import Transformer
from herdkern.parallel.pipeline_schedule import layers_of_stages


class MicroBatch(Protocol):
    """A packed micro-batch, as `herdkern.train.Batch`.

    tokens, targets, positions: (total_tokens,) int64; a target of -100 is not counted.  cu_seqlens: (num_docs + 1,)
    int32.  num_targets: how many targets count.
    """

    @property
    def tokens(self) -> Tensor:
        """Inputs of the first stage."""

    @property
    def targets(self) -> Tensor:
        """What the last stage compares with."""

    @property
    def positions(self) -> Tensor:
        """Of each token in its document."""

    @property
    def cu_seqlens(self) -> Tensor:
        """Document borders."""

    @property
    def num_targets(self) -> int:
        """Targets that are not -100."""


class Stage(nn.Module):
    """Layers `layers` of `model`, whose modules it shares.

    index, num_stages: its place.  `hidden_rows` tells how many rows a hidden state of a micro-batch has, and
    `cross_entropy(hidden, weight, targets)` computes the summed loss; both, and each layer's `self_attn.attend`, are
    replaced from outside where tokens or the vocabulary are split over ranks.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, model: Transformer, index: int, num_stages: int, layers: range) -> None:
        super().__init__()
        self.config = model.config
        self.compute_dtype = model.compute_dtype
        self.index, self.num_stages = index, num_stages
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        if self.is_first:
            self.embed_tokens = model.embed_tokens
        self.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in layers})
        if self.is_last:
            self.norm, self.lm_head = model.norm, model.lm_head
        self.register_buffer("rope_cos", model.rope_cos, persistent=False)
        self.register_buffer("rope_sin", model.rope_sin, persistent=False)
        self.hidden_rows: Callable[[MicroBatch], int] = _all_tokens
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = summed_cross_entropy

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """The hidden state for the next stage, (rows, dim) in compute_dtype; of the last stage the summed loss, fp32.

        x: what the stage before returned; None for the first.
        """
        if self.is_first:
            x = self.embed_tokens(batch.tokens).to(self.compute_dtype)
        rope = (self.rope_cos, self.rope_sin)
        branch: Tensor | None = None
        for block in self.layers.values():
            x, branch = block(x, branch, batch.cu_seqlens, batch.positions, rope)
        assert x is not None
        if not self.is_last:
            return x if branch is None else x + branch
        hidden = self.norm(x, branch)[0]
        return self.cross_entropy(hidden, self.lm_head.weight, batch.targets)

    def new_hidden(self, batch: MicroBatch) -> Tensor:
        """Room for a hidden state of `batch`, or for its gradient."""
        shape = (self.hidden_rows(batch), self.config.dim)
        return torch.empty(shape, dtype=self.compute_dtype, device=self.rope_cos.device)


def stages_of_rank(model: Transformer, pp_size: int, pp_rank: int, num_chunks: int = 1) -> list[Stage]:
    """The stages of one rank, by chunk; `layers_of_stages` says which layers they hold.

    They share their modules with `model`; the others of its modules go when it goes.
    Raises: ValueError if there are more stages than layers, embedding and head together, or no such rank.
    """
    layers = layers_of_stages(len(model.layers), pp_size, num_chunks)
    if not 0 <= pp_rank < pp_size:
        raise ValueError(f"stages_of_rank: pp_rank must lie in [0, pp_size = {pp_size}), got {pp_rank}")
    return [Stage(model, i, len(layers), layers[i]) for i in range(pp_rank, len(layers), pp_size)]


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss in nats, fp32, as `Transformer.loss`: an fp32 head needs no 16-bit copy."""
    weight = weight if weight.dtype == torch.float32 else weight.to(hidden.dtype)
    loss: Tensor = ops.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return loss


def _all_tokens(batch: MicroBatch) -> int:
    return batch.tokens.numel()
