"""Polyak average: the mean of the weights along the annealing steps. Source: Llama 3 (2407.21783) section 3.4.3."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn


class WeightAverage:
    """The running mean of a model's parameters, mean += (params - mean) / count, kept in fp64.

    A sharded parameter (DTensor) is averaged where its shards lie, element by element, with nothing sent.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Take the present parameters, of a module or by their names, into the mean."""
        self.count += 1
        named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
        for name, param in named:
            value = param.detach().to(torch.float64)
            if self.count == 1:
                self.mean[name] = value.clone()
            else:
                self.mean[name] += (value - self.mean[name]) / self.count

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the mean.

        Raises: ValueError if nothing was averaged yet.
        """
        if self.count == 0:
            raise ValueError(
                "WeightAverage: copy_to must follow at least one update, got none; set average_every_steps"
            )
        for name, param in model.named_parameters():
            param.copy_(self.mean[name])

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        """Continue from a saved mean of `count` updates."""
        self.mean = {name: tensor.clone() for name, tensor in mean.items()}
        self.count = count


def offline_mean(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, fp64 mean over `files`) of each tensor of safetensors files, in order of names; one tensor at a time is in
    memory.

    Raises: ValueError if there is no file, or one holds other tensors or another shape than the first.
    """
    if not files:
        raise ValueError("offline_mean: files must have at least one, got none")
    with safe_open(files[0], "pt") as first:
        names = sorted(first.keys())
    for path in files:
        with safe_open(path, "pt") as f:
            odd = set(names) ^ set(f.keys())
        if odd:
            raise ValueError(f"offline_mean: {path} must hold the tensors of {files[0]}, they differ in {min(odd)!r}")
    for name in names:
        total: Tensor | None = None
        for path in files:
            with safe_open(path, "pt") as f:
                value = f.get_tensor(name).to(torch.float64)
            if total is not None and total.shape != value.shape:
                raise ValueError(f"offline_mean: {name!r} in {path} must be {tuple(total.shape)}, got {value.shape}")
            total = value if total is None else total.add_(value)
        assert total is not None
        yield name, total / len(files)
