"""Tensor and sequence parallelism, put on the stages of a herdkern model from outside.

Wq, Wk, Wv and the two matrices into the feed-forward are cut by columns of their output (heads, neurons), Wo and the
matrix out of it by columns of their input, embedding and head by the vocabulary. Between them every rank holds a part
of the tokens: norms and sums work on it, an all-gather comes before each pair of matrices and a reduce-scatter behind
it. Gathered rows are not kept for the backward pass, which gathers them again. Where tokens do not divide by the ranks
the last part ends in rows of zeros, which touch nothing.

Parameters are DTensors, so that checkpoints know how they lie; norms have whole ones, whose gradients are summed over
the ranks after a step. With more ranks than KV heads, wk and wv are whole on all ranks, and each uses the rows of its
head.  Source: Korthikanti et al. 2022 (arXiv:2205.05198), Llama 3 (arXiv:2407.21783) section 3.3.2.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from herdkern import ops
from herdkern.model.config import ModelConfig
from herdkern.model.layers import Block
from herdkern.parallel.data import local
from herdkern.parallel.pipeline_stages import MicroBatch, Stage


def parallelize_tensor(stages: Sequence[Stage], mesh: DeviceMesh) -> None:
    """Cut `stages`, where they lie, over the ranks of the one-dimensional `mesh`.

    All ranks of the mesh must hold the same parameters. Do this before `shard_stages`.
    Raises: ValueError if the heads or ffn_dim do not divide by the ranks.
    """
    if mesh.size() == 1:
        return
    for stage in stages:
        check_widths(stage.config, mesh.size())
        group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        for block in stage.layers.values():
            assert isinstance(block, Block)
            _cut_block(block, stage.config, mesh)
        if stage.is_first:
            embedding = stage.embed_tokens
            _distribute(embedding, mesh, Shard(0))
            _replace_forward(embedding, partial(_embed, embedding, group, rank, size))
        if stage.is_last:
            if not (stage.is_first and stage.config.tied_embeddings):
                _distribute(stage.lm_head, mesh, Shard(0))
            else:
                stage.lm_head.register_parameter("weight", stage.embed_tokens.get_parameter("weight"))
            start = rank * _rows_of_part(stage.config.vocab_size, size)
            stage.cross_entropy = partial(_cross_entropy, group, start)
        stage.hidden_rows = partial(_part_of_tokens, size)


def check_widths(config: ModelConfig, tp: int) -> None:
    """Raises: ValueError if a model of this shape cannot be cut into `tp` parts."""
    for name in ("num_heads", "ffn_dim"):
        if getattr(config, name) % tp:
            raise ValueError(f"parallelize_tensor: {name} must be a multiple of tp={tp}, got {getattr(config, name)}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ValueError(
            f"parallelize_tensor: num_kv_heads must be a multiple or a divisor of tp={tp}, got {config.num_kv_heads}"
        )


def sum_norm_gradients(stages: Sequence[Stage], mesh: DeviceMesh) -> None:
    """Sum the gradients of the whole parameters over the ranks of `mesh`, each of which has seen a part of the tokens.

    To be called after each step. Those of wk and wv where they are whole are made whole, too.
    """
    if mesh.size() == 1:
        return
    some = []
    for stage in stages:
        for name, param in stage.named_parameters():
            if param.grad is None:
                continue
            if is_norm(name):
                some.append(local(param.grad))
            elif isinstance(param.grad, DTensor) and any(isinstance(one, Partial) for one in param.grad.placements):
                param.grad = param.grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    if some:
        flat = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(flat, group=mesh.get_group())
        for gradient, summed in zip(some, flat.split([one.numel() for one in some]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def is_norm(name: str) -> bool:
    """Whether a parameter of that name is whole on every tensor-parallel rank, with a gradient from a part of the
    tokens."""
    return "norm" in name


def is_whole(name: str, config: ModelConfig, tp: int) -> bool:
    """Whether every tensor-parallel rank holds all of the parameter of that name."""
    return tp == 1 or is_norm(name) or (name.endswith(("k_proj.weight", "v_proj.weight")) and config.num_kv_heads < tp)


def _cut_block(block: Block, config: ModelConfig, mesh: DeviceMesh) -> None:
    group, size = mesh.get_group(), mesh.size()
    attention, feed = block.self_attn, block.mlp
    for linear in (attention.q_proj, feed.gate_proj, feed.up_proj):
        _distribute(linear, mesh, Shard(0))
        _replace_forward(linear, partial(_linear, linear))
    for linear in (attention.o_proj, feed.down_proj):
        _distribute(linear, mesh, Shard(1))
        _replace_forward(linear, partial(_linear, linear))
    for linear in (attention.k_proj, attention.v_proj):
        if config.num_kv_heads % size == 0:
            _distribute(linear, mesh, Shard(0))
            _replace_forward(linear, partial(_linear, linear))
        else:
            _distribute(linear, mesh, Replicate())
            head = mesh.get_local_rank() * config.num_kv_heads // size
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            _replace_forward(linear, partial(_linear_of_head, linear, rows))

    def gather(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = arguments
        whole = gather_rows(x, group)
        if others:  # attention has no rows of zeros: positions tell how many tokens there are
            whole = whole[: others[1].numel()]
        whole._gathered_from = _Part(x.detach(), len(whole), group)  # type: ignore[attr-defined]
        return (whole, *others)

    def scatter(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        return scatter_rows(out, group)

    for module in (attention, feed):
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(scatter)


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    whole = module.get_parameter("weight")
    if isinstance(whole, DTensor):  # a tied head, cut with the embedding
        return
    cut = distribute_tensor(whole.detach(), mesh, [placement], src_data_rank=None)
    module.register_parameter("weight", nn.Parameter(cut))


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    with _keep_parts(x):
        return F.linear(x, module.weight.to_local().to(x.dtype))  # type: ignore[operator, union-attr]


def _linear_of_head(module: nn.Module, rows: slice, x: Tensor) -> Tensor:
    weight = module.weight.to_local(grad_placements=[Partial()])  # type: ignore[operator, union-attr]
    with _keep_parts(x):
        return F.linear(x, weight[rows].to(x.dtype))


class _Part:
    """Stands for gathered rows among what autograd keeps: this rank's part, from which they are gathered again."""

    def __init__(self, part: Tensor, rows: int, group: dist.ProcessGroup) -> None:
        self.part, self.rows, self.group = part, rows, group
        self.num_kept = 0  # by the matrices that share them, whose backward passes follow each other
        self.whole: Tensor | None = None

    def keep(self) -> "_Part":
        self.num_kept += 1
        return self

    def gathered(self) -> Tensor:
        """All rows, gathered for the first that asks and let go by the last."""
        self.num_kept -= 1
        whole = _all_gather(self.part, self.group)[: self.rows] if self.whole is None else self.whole
        self.whole = whole if self.num_kept > 0 else None
        return whole


def _keep_parts(x: Tensor) -> AbstractContextManager[Any]:
    """Lets autograd keep this rank's part where it would keep `x`, if that was gathered from parts."""
    kept: _Part | None = getattr(x, "_gathered_from", None)
    if kept is None:
        return nullcontext()
    same = (x.data_ptr(), x.shape)
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.keep() if (t.data_ptr(), t.shape) == same else t,
        lambda t: t.gathered() if isinstance(t, _Part) else t,
    )


def _embed(module: nn.Embedding, group: dist.ProcessGroup, rank: int, size: int, tokens: Tensor) -> Tensor:
    weight = local(module.weight)
    here = tokens - rank * _rows_of_part(module.num_embeddings, size)
    outside = (here < 0) | (here >= len(weight))
    if len(weight) == 0:
        rows = weight.new_zeros(len(tokens), module.embedding_dim)
    else:
        rows = F.embedding(here.masked_fill(outside, 0), weight).masked_fill(outside[:, None], 0)
    return scatter_rows(rows, group)


def _cross_entropy(group: dist.ProcessGroup, start: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    whole = gather_rows(hidden, group)[: targets.numel()]
    rows = local(weight)
    rows = rows if rows.dtype == torch.float32 else rows.to(hidden.dtype)
    loss: Tensor = ops.vocab_parallel_linear_cross_entropy(
        whole, rows, targets, vocab_start=start, group=group, reduction="sum", reduce_dhidden=False
    )
    return loss


def _rows_of_part(rows: int, size: int) -> int:
    return -(-rows // size)


def _part_of_tokens(size: int, batch: MicroBatch) -> int:
    return _rows_of_part(batch.tokens.numel(), size)


def gather_rows(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, one below the other; the gradient is summed over the ranks and each gets its part."""
    whole: Tensor = _Gather.apply(part, group)
    return whole


def scatter_rows(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the sum over the ranks; the last parts may end in rows of zeros."""
    part: Tensor = _Scatter.apply(whole, group)
    return part


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(part, group)

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(dwhole, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(whole)
        return _reduce_scatter(whole, group)

    @staticmethod
    def backward(ctx: Any, dpart: Tensor) -> tuple[Tensor, None]:
        return _all_gather(dpart, ctx.group)[: ctx.rows], None


def _all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(dist.get_world_size(group) * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    rows = _rows_of_part(len(whole), size)
    padded = F.pad(whole, (0, 0, 0, rows * size - len(whole)))
    part = whole.new_empty(rows, *whole.shape[1:])
    dist.reduce_scatter_tensor(part, padded.contiguous(), group=group)
    return part
