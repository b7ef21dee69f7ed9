"""What is looked for when a loss or gradient is not finite: the first bad tensor, by name, and the rank that has it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdkern.parallel.compose import ParallelModel
from herdkern.parallel.data import local
from herdkern.train.batch import Batch

NOTHING = "nothing in a second run: the machine may be faulty"


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
    with torch.no_grad(), _watched(model.named_modules()) as found:
        for batch in batches:
            loss, _ = objective(model, batch)
            if not found and not _is_finite(loss):
                found.append("loss")
            if found:
                return found[0] if found[0] == "loss" else f"output of {found[0]}"
    for name, param in reversed(list(model.named_parameters())):  # backward reaches the last layer first
        if param.grad is not None and not _is_finite(param.grad):
            return f"gradient of {name}"
    return NOTHING


@torch.no_grad()
def first_bad_of_ranks(model: ParallelModel, batches: Sequence[Batch]) -> str:
    """As `first_bad_tensor`, of all ranks, which call it together: "output of layers.1.mlp.up_proj on rank 2"."""
    here = f"on rank {dist.get_rank()}"
    mine: list[tuple[int, int, int, str]] = []  # kind, stage, place in the stage, what: the least is the first
    places: dict[str, tuple[int, int]] = {}
    for stage in model.stages:
        for i, (name, param) in enumerate(stage.named_parameters()):
            if not _is_finite(param):
                mine.append((0, stage.index, i, f"parameter {name} {here}"))
            if param.grad is not None and not _is_finite(param.grad):  # backward reaches the last one first
                mine.append((3, -stage.index, -i, f"gradient of {name} {here}"))
        for i, name in enumerate(_in_order_of_computing(stage)):
            places.setdefault(name, (stage.index, i))
    with _watched((name, module) for stage in model.stages for name, module in stage.named_modules()) as found:
        loss = model.evaluate(batches)
    mine += [(1, *places[name], f"output of {name} {here}") for name in found]
    mine += [] if _is_finite(loss) else [(2, 0, 0, "loss")]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sorted(mine)[:1])
    first = min((one for some in gathered for one in some), default=None)
    return NOTHING if first is None else first[3]


@contextmanager
def _watched(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[list[str]]:
    """Yields a list that gets the name of the first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(out, Tensor) and not _is_finite(out) for out in outputs):
                found.append(name or "the model")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _in_order_of_computing(module: nn.Module, name: str = "") -> list[str]:
    """The names of all modules, each behind its parts."""
    parts = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    return [one for part in parts for one in _in_order_of_computing(part[1], part[0])] + [name or "the model"]


def _is_finite(tensor: Tensor) -> bool:
    return bool(local(tensor.detach()).isfinite().all())
