"""Polyak average: the mean of the weights along the annealing steps. Source: Llama 3 (2407.21783) section 3.4.3."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The running mean of a model's parameters, mean += (params - mean) / count, kept in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present parameters into the mean."""
        self.count += 1
        for name, param in model.named_parameters():
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
