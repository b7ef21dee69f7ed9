"""Linear cross entropy whose weight is split by rows of the vocabulary over the ranks of a torch.distributed group.

Each rank computes the logits of its own rows; a maximum and sums for each token are all that is exchanged.
Source: Megatron-LM 2019, section 3 (arXiv:1909.08053).
"""

import dataclasses
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from herdkern.ops.backend import Backend, choose, why_not_native, why_not_triton
from herdkern.ops.linear_cross_entropy import Options, Reduction, check, run_kernel

_NOWHERE = torch.iinfo(torch.int64).min  # ignore_index of the kernel: no row of any shard


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_logps: bool = False,
    reduce_dhidden: bool = True,
    backend: Backend = "auto",
) -> Any:
    """Return linear_cross_entropy(hidden, weight, targets, ...) where this rank holds some rows of weight.

    hidden, targets: as there, the same on every rank of `group` (None: all ranks).  weight_shard: (rows, dim), rows
    vocab_start ... vocab_start + rows - 1 of weight; shards may differ in size or be empty, and together they are all
    rows once.
    Every rank returns the same loss (and logps); the gradient of weight_shard is its rows of the gradient of weight.
    The gradient of hidden is summed over the ranks in float32; with reduce_dhidden=False it is this rank's part of it,
    for a caller that reduces or scatters it itself.
    The gradients are made in the backward pass, from logits that are computed again. Not differentiable twice.
    Raises: ValueError on every rank if a target lies in no shard or in two; ValueError if the arguments do not fit each
    other, on the rank where they do not: the others then wait for it as long as the group lets them.
    """
    op = "vocab_parallel_linear_cross_entropy"
    options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    check(hidden, weight_shard, targets, options, op, may_be_empty=True)
    if vocab_start < 0:
        raise ValueError(f"{op}: vocab_start must be 0 or more, got {vocab_start}")
    why_not = {
        "native": why_not_native(hidden, torch.float32, torch.bfloat16),
        "triton": why_not_triton(hidden, backend, torch.float32, torch.bfloat16, torch.float16),
        "reference": None,
    }
    chosen = choose(op, backend, why_not)
    shifted = torch.where(targets == ignore_index, _NOWHERE, targets - vocab_start)
    local = Options(_NOWHERE, reduction, label_smoothing, z_loss, softcap)
    loss, logps = _VocabParallel.apply(hidden, weight_shard, shifted, local, group, reduce_dhidden, chosen)
    return (loss, logps) if return_logps else loss


@dataclasses.dataclass(frozen=True)
class _Given:
    """What the gradients of a shard are made of."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    stats: Tensor
    options: Options
    total_vocab_size: int


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: Options,
        group: dist.ProcessGroup | None,
        reduce_dhidden: bool,
        chosen: str,
    ) -> tuple[Tensor, Tensor]:
        stats = (_STATS[chosen] if len(weight) else _stats_of_no_rows)(hidden, weight, targets, options)
        stats, total_vocab_size = _joined(stats, targets, weight.shape[0], group)
        losses, logps = _losses(stats, targets, options, total_vocab_size)
        ctx.save_for_backward(hidden, weight, targets, stats)
        ctx.rest = options, total_vocab_size, group, reduce_dhidden, chosen
        ctx.set_materialize_grads(False)
        loss = losses if options.reduction == "none" else losses.sum()
        return loss / (targets != _NOWHERE).sum() if options.reduction == "mean" else loss, logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, dlogps: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, stats = ctx.saved_tensors
        options, total_vocab_size, group, reduce_dhidden, chosen = ctx.rest
        given = _Given(hidden, weight, targets, stats, options, total_vocab_size)
        counts = targets != _NOWHERE
        dlosses = stats.new_zeros(targets.shape) if dloss is None else dloss.expand(targets.shape)
        if options.reduction == "mean":
            dlosses = dlosses / counts.sum()
        dlogps = torch.zeros_like(dlosses) if dlogps is None else dlogps
        gradients = _GRADIENTS[chosen] if len(weight) else _gradients_reference
        dhidden, dweight = gradients(given, dlosses, dlogps, ctx.needs_input_grad[:2])
        if dhidden is not None:
            if reduce_dhidden:
                dist.all_reduce(dhidden, group=group)
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, None, None, None, None, None


def _joined(stats: Tensor, targets: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The statistics over all shards, and the number of their rows."""
    top = stats[0].clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    sums = stats.new_empty(4, stats.shape[1] + 1, dtype=torch.float64)
    sums[0, :-1] = stats[1] * torch.exp(stats[0] - top)
    sums[1:3, :-1] = stats[2:]
    sums[3, :-1] = (targets >= 0) & (targets < rows)
    sums[:, -1] = rows
    dist.all_reduce(sums, group=group)
    wrong = ((sums[3, :-1] != 1) & (targets != _NOWHERE)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            "vocab_parallel_linear_cross_entropy: targets must lie in one shard each, got one in "
            f"{int(sums[3, index])} shards at index {index} (rank {dist.get_rank(group)}); "
            "check targets, vocab_start and the sizes of the shards"
        )
    return torch.cat([top[None], sums[:3, :-1].to(stats.dtype)]), int(sums[0, -1])


def _losses(stats: Tensor, targets: Tensor, options: Options, total_vocab_size: int) -> tuple[Tensor, Tensor]:
    """Loss and log-probability of each token; as loss_of_token in csrc/cpu/linear_cross_entropy_plan.h."""
    top, total, target, logit_sum = stats
    log_total = total.log()
    nll = log_total - (target - top)
    losses = nll
    if options.label_smoothing:
        smooth = log_total - (logit_sum / total_vocab_size - top)
        losses = (1 - options.label_smoothing) * nll + options.label_smoothing * smooth
    if options.z_loss:
        losses = losses + options.z_loss * (top + log_total).square()
    counts = targets != _NOWHERE
    return torch.where(counts, losses, 0), torch.where(counts, -nll, 0)


def _stats_of_no_rows(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> Tensor:
    stats = hidden.new_zeros((4, *targets.shape), dtype=torch.promote_types(hidden.dtype, torch.float32))
    stats[0] = -torch.inf
    return stats


def _stats_native(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> Tensor:
    stats = hidden.new_empty((4, *targets.shape), dtype=torch.float32)
    run_kernel(hidden, weight, targets, stats, options.as_numbers())
    return stats


def _gradients_native(
    given: _Given, dlosses: Tensor, dlogps: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    hidden, weight, targets, stats = given.hidden, given.weight, given.targets, given.stats
    dhidden = torch.empty_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format) if needs[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    ignore_index, _, *numbers = given.options.as_numbers()
    run_kernel(
        hidden,
        weight,
        targets,
        stats,
        (ignore_index, get_args(Reduction).index("none"), numbers[0], numbers[1], numbers[2]),
        has_stats=True,
        dlosses=dlosses,
        dlogps=dlogps,
        dhidden=dhidden,
        dweight=dweight,
        total_vocab_size=given.total_vocab_size,
    )
    return dhidden, dweight


def _logits_reference(hidden: Tensor, weight: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Weight as the logits see it, in fp32 or wider, and the logits."""
    acc = torch.promote_types(hidden.dtype, torch.float32)
    wide = weight.to(hidden.dtype).to(acc)
    logits = hidden.to(acc) @ wide.T
    return wide, softcap * torch.tanh(logits / softcap) if softcap else logits


def _stats_reference(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> Tensor:
    _, logits = _logits_reference(hidden, weight, options.softcap)
    top = logits.amax(1)
    here = (targets >= 0) & (targets < weight.shape[0])
    at_target = logits.gather(1, torch.where(here, targets, 0)[:, None])[:, 0]
    total = (logits - top[:, None]).exp().sum(1)
    return torch.stack([top, total, torch.where(here, at_target, 0), logits.sum(1)])


def _gradients_reference(
    given: _Given, dlosses: Tensor, dlogps: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    weight, targets, stats, options = given.weight, given.targets, given.stats, given.options
    wide, logits = _logits_reference(given.hidden, weight, options.softcap)
    lse = stats[0] + stats[1].log()
    share = options.label_smoothing / given.total_vocab_size
    dlogits = (logits - lse[:, None]).exp() * (dlosses * (1 + 2 * options.z_loss * lse) - dlogps)[:, None]
    dlogits = dlogits - (dlosses * share)[:, None]
    here = ((targets >= 0) & (targets < weight.shape[0])).nonzero()[:, 0]
    dlogits[here, targets[here]] += (dlogps - (1 - options.label_smoothing) * dlosses)[here]
    dlogits = torch.where((targets != _NOWHERE)[:, None], dlogits, 0)
    if options.softcap:
        dlogits = dlogits * (1 - (logits / options.softcap).square())
    return (
        dlogits @ wide if needs[0] else None,
        (dlogits.T @ given.hidden.to(wide.dtype)).to(weight.dtype) if needs[1] else None,
    )


def _stats_triton(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> Tensor:
    from herdkern.ops.triton.linear_cross_entropy_parallel import shard_stats

    return shard_stats(hidden, weight, targets, options.softcap)


def _gradients_triton(
    given: _Given, dlosses: Tensor, dlogps: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    from herdkern.ops.triton.linear_cross_entropy_parallel import shard_gradients

    options, targets = given.options, given.targets
    lse = given.stats[0] + given.stats[1].log()
    factors = (
        dlosses * (1 + 2 * options.z_loss * lse) - dlogps,
        dlosses * (options.label_smoothing / given.total_vocab_size),
        dlogps - (1 - options.label_smoothing) * dlosses,
    )
    kept = [torch.where(targets == _NOWHERE, 0.0, factor) for factor in factors]
    return shard_gradients(
        given.hidden, given.weight, targets, (kept[0], kept[1], kept[2], lse), options.softcap, needs
    )


_STATS = {"native": _stats_native, "triton": _stats_triton, "reference": _stats_reference}
_GRADIENTS = {"native": _gradients_native, "triton": _gradients_triton, "reference": _gradients_reference}
