"""AdamW over named parameters, and its state as named tensors. Source: Loshchilov & Hutter 2019 (arXiv:1711.05101)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from herdkern.optim import AdamW
from herdkern.train.config import OptimizerConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")
_MASTER = "master"  # the float32 value of a 16-bit parameter


def build_adamw(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters of `model`, which clips as `config` says; norms (1-D) do not decay.

    Its `grad_norm` is always measured; a step whose norm is not finite changes nothing.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return adamw_of(params, config, max_grad_norm=config.max_grad_norm or math.inf)


def adamw_of(params: Sequence[Tensor], config: OptimizerConfig, *, max_grad_norm: float) -> AdamW:
    """AdamW over tensors, of which those of one dimension do not decay; the clip is `max_grad_norm`, not config's."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=0.0, betas=betas, eps=config.eps, max_grad_norm=max_grad_norm)


def total_norm(model: nn.Module) -> float:
    """The global norm of all gradients."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state as "exp_avg.<name>", "exp_avg_sq.<name>", "step.<name>" of each parameter; none before an update.

    16-bit parameters have "master.<name>" too: without it a resumed run would go on from rounded values.
    """
    return {
        f"{key}.{name}": optimizer.state[param][key]
        for name, param in model.named_parameters()
        if param in optimizer.state
        for key in (*STATE_KEYS, _MASTER)
        if key != _MASTER or key in optimizer.state[param]
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; a master that a checkpoint does not have is made from its parameter.

    Raises: ValueError naming a tensor that is missing, unknown or of another shape.
    """
    known = {f"{key}.{name}" for name, _ in model.named_parameters() for key in (*STATE_KEYS, _MASTER)}
    if set(tensors) - known:
        raise ValueError(f"load_optimizer_tensors: tensors must be of this model, got {min(set(tensors) - known)!r}")
    for name, param in model.named_parameters():
        if not any(f"{key}.{name}" in tensors for key in (*STATE_KEYS, _MASTER)):
            continue
        wide = torch.promote_types(param.dtype, torch.float32)
        for key in (*STATE_KEYS, _MASTER):
            tensor = tensors.get(f"{key}.{name}")
            if tensor is None and key == _MASTER:
                optimizer.state[param].pop(key, None)
                continue
            shape = param.shape if key != "step" else torch.Size([])
            if tensor is None or tensor.shape != shape:
                got = "none" if tensor is None else str(tuple(tensor.shape))
                raise ValueError(f"load_optimizer_tensors: {key}.{name} must be {tuple(shape)}, got {got}")
            optimizer.state[param][key] = tensor.to(param.device, wide, copy=True) if key != "step" else tensor.clone()
