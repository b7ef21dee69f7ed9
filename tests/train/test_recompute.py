"""Activations computed again: the same bits, less memory, and nothing changes but what is kept."""

import dataclasses

import pytest
import torch

from herdkern.model import Transformer
from herdkern.model.config import nano
from herdkern.train.recompute import recompute_activations

CONFIG = dataclasses.replace(nano(64), num_layers=2, max_seq_len=64)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    tokens = torch.arange(40) % 64
    cu_seqlens = torch.tensor([0, 17, 40], dtype=torch.int32)
    loss = model.loss(model(tokens, cu_seqlens), (tokens + 1) % 64)
    loss.backward()
    found = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("what", ["swiglu", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_are_those_of_kept_activations(what, dtype):
    model = Transformer(CONFIG, compute_dtype=dtype)
    names = list(model.state_dict())
    kept = gradients(model)
    recompute_activations(model, what)
    again = gradients(model)
    assert list(model.state_dict()) == names
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def test_none_undoes_it():
    model = Transformer(CONFIG)
    recompute_activations(model, "block")
    recompute_activations(model, "none")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="what must be 'none', 'swiglu' or 'block', got 'all'"):
        recompute_activations(Transformer(CONFIG), "all")
    with pytest.raises(ValueError, match="must hold blocks of"):
        recompute_activations(torch.nn.Linear(2, 2), "block")
