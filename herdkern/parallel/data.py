"""Data parallelism by FSDP2: parameters lie in shards, are gathered once a step, gradients are reduced in fp32.

Parameters are not resharded after the forward pass, so every block is gathered once a step and not twice; with several
micro-batches the gradients add up unsharded in fp32 and are reduced after the last one. The gradients are summed, not
averaged: the loss is divided by the targets of all ranks.

Source: The Llama 3 Herd of Models, section 3.3.2 (arXiv:2407.21783).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from herdkern.parallel.pipeline_stages import MicroBatch, Stage


def shard_stages(stages: Sequence[Stage], mesh: DeviceMesh) -> None:
    """Cut the parameters of `stages`, where they lie, over the ranks of `mesh`: blocks and what is left of each stage.

    mesh: of one axis (FSDP), or of two, of which the first holds copies (HSDP).  With compute_dtype bfloat16 the
    parameters are gathered in it; shards, gradients and their sums stay fp32.
    """
    for stage in stages:
        gathered = None if stage.compute_dtype == torch.float32 else stage.compute_dtype
        # rope tables go through a block's arguments and stay fp32
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in stage.layers.values():
            fully_shard(block, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        fully_shard(stage, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums


def reduce_after_last(stage: Stage, is_last: bool) -> None:
    """For `Pipeline(before_backward=...)`: gradients are reduced after the last micro-batch, parameters kept until
    then."""
    if isinstance(stage, FSDPModule):
        stage.set_is_last_backward(is_last)
        stage.set_requires_gradient_sync(is_last)
        stage.set_reshard_after_backward(is_last)


def reshard(stages: Sequence[Stage]) -> None:
    """Let the gathered parameters go, as after forward passes without backward ones."""
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def num_targets_of_all(microbatches: Sequence[MicroBatch], group: dist.ProcessGroup, device: torch.device) -> int:
    """The targets of the micro-batches of all ranks of `group`."""
    count = torch.tensor(sum(batch.num_targets for batch in microbatches), dtype=torch.int64, device=device)
    dist.all_reduce(count, group=group)
    return int(count)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


@torch.no_grad()
def clip_gradients(params: Sequence[nn.Parameter], copies: Sequence[float], max_norm: float) -> Tensor:
    """The norm of the gradients of all parameters of a run, () fp64; above `max_norm` (0: never) they are scaled down.

    Gradients whose norm is not finite stay as they are.

    params: of this rank.  copies: of each, on how many ranks of the run the same part of it lies.
    """
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    gradients = [local(param.grad) for param in params if param.grad is not None]
    counts = [count for param, count in zip(params, copies, strict=True) if param.grad is not None]
    for gradient, count in zip(gradients, counts, strict=True):
        total += gradient.double().square().sum() / count
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm and max_norm < norm < math.inf:
        for gradient in gradients:
            gradient.mul_((max_norm / norm).to(gradient.dtype))
    return norm
