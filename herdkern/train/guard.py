"""What is looked for when a loss or gradient is not finite: the first bad tensor, by name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from herdkern.train.batch import Batch


class NonFiniteError(RuntimeError):
    """A step had a loss or gradient that is not finite; the weights are those before the step."""


def first_bad_tensor(
    model: nn.Module, objective: Callable[[Any, Batch], tuple[Tensor, dict[str, float]]], batches: Sequence[Batch]
) -> str:
    """The name of the first tensor that holds NaN or infinity: a parameter, an activation, the loss, then a gradient.

    Runs the forward pass of `batches` again with every module watched; gradients are those that `model` carries.
    """
    for name, param in model.named_parameters():
        if not _is_finite(param):
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(out, Tensor) and not _is_finite(out) for out in outputs):
                found.append(f"output of {name or 'the model'}")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for batch in batches:
                loss, _ = objective(model, batch)
                if not found and not _is_finite(loss):
                    found.append("loss")
                if found:
                    return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    for name, param in reversed(list(model.named_parameters())):  # backward reaches the last layer first
        if param.grad is not None and not _is_finite(param.grad):
            return f"gradient of {name}"
    return "nothing in a second run: the machine may be faulty"


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
