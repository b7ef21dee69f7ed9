"""AdamW against the formula in fp64, clipping against its definition, state that comes back."""

import pytest
import torch
from torch import nn

from herdkern.train.config import OptimizerConfig
from herdkern.train.optimizer import build_adamw, load_optimizer_tensors, optimizer_tensors, total_norm

MOMENTS = ("exp_avg", "exp_avg_sq")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(7, 5))
        self.scale = nn.Parameter(torch.randn(5))


def set_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def test_updates_equal_the_formula():
    """1,000 steps; norms do not decay. The bound is what fp32 rounding of 1,000 updates allows."""
    model = Two()
    config = OptimizerConfig(weight_decay=0.1, max_grad_norm=0.0)
    optimizer = build_adamw(model, config)
    want = {n: p.detach().double() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in want.items()}
    second = {n: torch.zeros_like(p) for n, p in want.items()}
    for step in range(1, 1001):
        set_grads(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        for name, param in model.named_parameters():
            grad = param.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.1 if param.ndim == 2 else 0.0
            move = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            want[name] = want[name] * (1 - 1e-3 * decay) - 1e-3 * move
    for name, param in model.named_parameters():
        assert (param.detach().double() - want[name]).abs().max() <= 1000 * torch.finfo(torch.float32).eps / 2, name


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping(max_norm):
    """The step is that of gradients scaled to the norm; the first moment shows it."""
    model = Two()
    set_grads(model, 0)
    optimizer = build_adamw(model, OptimizerConfig(max_grad_norm=max_norm))
    before = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    optimizer.step()
    first = torch.cat([optimizer.state[p]["exp_avg"].double().flatten() for p in model.parameters()]) / 0.1
    assert optimizer.grad_norm == pytest.approx(float(before.norm()), rel=1e-6)
    assert total_norm(model) == pytest.approx(float(before.norm()), rel=1e-6)
    assert float(first.norm()) == pytest.approx(max_norm if max_norm == 0.5 else optimizer.grad_norm, rel=1e-5)


def test_a_norm_that_is_not_finite_changes_nothing():
    model = Two()
    optimizer = build_adamw(model, OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    set_grads(model, 0)
    model.scale.grad[2] = float("inf")
    kept = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer.step()
    assert optimizer.grad_norm == float("inf")
    assert all(torch.equal(param, kept[name]) for name, param in model.named_parameters())
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_state_comes_back():
    one, two = Two(), Two()
    two.load_state_dict(one.state_dict())
    first, second = build_adamw(one, OptimizerConfig()), build_adamw(two, OptimizerConfig())
    assert optimizer_tensors(first, one) == {}
    for step in range(3):
        set_grads(one, step)
        first.step()
    two.load_state_dict(one.state_dict())
    saved = optimizer_tensors(first, one)
    assert sorted(saved) == sorted(f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in ("matrix", "scale"))
    load_optimizer_tensors(second, two, saved)
    for model, optimizer in ((one, first), (two, second)):
        set_grads(model, 9)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({"exp_avg.other": torch.zeros(1)}), r"must be of this model, got 'exp_avg\.other'"),
        (lambda t: t.pop("exp_avg_sq.scale"), r"exp_avg_sq\.scale must be \(5,\), got none"),
        (lambda t: t.update({"exp_avg.scale": torch.zeros(2)}), r"exp_avg\.scale must be \(5,\), got \(2,\)"),
    ],
    ids=["unknown", "missing", "shape"],
)
def test_wrong_state_is_named(damage, message):
    model = Two()
    optimizer = build_adamw(model, OptimizerConfig())
    set_grads(model, 0)
    optimizer.step()
    tensors = dict(optimizer_tensors(optimizer, model))
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(optimizer, model, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_go_on_from_their_masters(dtype):
    """A resumed run has the bits of an undisturbed one: lr is too small for a step to move a 16-bit value."""

    torch.manual_seed(0)
    model = Two().to(dtype)
    optimizer = build_adamw(model, OptimizerConfig())

    def run(some, of, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in some.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            for group in of.param_groups:
                group["lr"] = 1e-4
            of.step()

    run(model, optimizer, range(4))
    other = Two().to(dtype)
    other.load_state_dict(model.state_dict())
    resumed = build_adamw(other, OptimizerConfig())
    load_optimizer_tensors(resumed, other, optimizer_tensors(optimizer, model))
    run(model, optimizer, range(4, 40))
    run(other, resumed, range(4, 40))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    got, want = optimizer_tensors(resumed, other), optimizer_tensors(optimizer, model)
    assert any(key.startswith("master.") for key in want)
    assert set(got) == set(want)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_16_bit_moments_of_an_older_checkpoint_are_widened():
    model = Two().bfloat16()
    optimizer = build_adamw(model, OptimizerConfig())
    old = {f"{key}.{name}": torch.ones_like(p) for name, p in model.named_parameters() for key in MOMENTS}
    old |= {f"step.{name}": torch.tensor(3.0) for name, _ in model.named_parameters()}
    load_optimizer_tensors(optimizer, model, old)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
