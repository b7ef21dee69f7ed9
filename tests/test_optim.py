"""herdkern.optim.AdamW in the place of torch.optim.AdamW: groups, schedules, state both ways, masters, resumption."""

import copy
import io
import math
import re

import pytest
import torch
from torch import nn

from herdkern.optim import AdamW

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def make_params(dtype=FP32):
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((40, 33), (33,), (1,), (2, 3, 5))]


def set_grads(params, step, skipped=()):
    draw = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        p.grad = None if i in skipped else torch.randn(p.shape, generator=draw).to(p.dtype)


def run(optimizer, params, steps, skipped=lambda step: (), scheduler=None):
    for step in steps:
        set_grads(params, step, skipped(step))
        optimizer.step()
        if scheduler:
            scheduler.step()


def assert_close(params, others):
    for p, q in zip(params, others):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def groups_of(params):
    return [
        {"params": params[:2], "weight_decay": 0.3, "lr": 1e-2},
        {"params": params[2:], "betas": (0.8, 0.9), "maximize": True},
    ]


def as_groups(make):
    return lambda params, **options: make(groups_of(params), **options)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_torch(grouped, fused):
    """With schedule, groups and gradients that are missing now and then."""
    mine, theirs = make_params(), make_params()
    optimizers = []
    for make, params, options in ((AdamW, mine, {}), (torch.optim.AdamW, theirs, {"fused": fused})):
        optimizer = make(groups_of(params) if grouped else params, lr=3e-3, **options)
        optimizers.append(optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20, cycle_momentum=False)
        run(optimizer, params, range(12), lambda step: [(), (1,), (0, 3)][step % 3], scheduler)
    assert_close(mine, theirs)
    for p, q in zip(mine, theirs):
        assert float(optimizers[0].state[p]["step"]) == float(optimizers[1].state[q]["step"])


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
@pytest.mark.parametrize("fused", [False, True, None])
def test_state_dict_both_ways(direction, fused):
    """Half of a run with one class, the state through a file, the rest with the other."""
    whole, split = make_params(), make_params()
    run(torch.optim.AdamW(groups_of(whole), lr=1e-2, fused=fused), whole, range(8))
    first, second = (AdamW, torch.optim.AdamW)[:: 1 if direction == "to torch" else -1]
    started = first(groups_of(split), lr=1e-2, **({"fused": fused} if first is not AdamW else {}))
    run(started, split, range(4))
    file = io.BytesIO()
    torch.save(started.state_dict(), file)
    file.seek(0)
    continued = second(groups_of(split), lr=0.5)
    continued.load_state_dict(torch.load(file, weights_only=True))
    run(continued, split, range(4, 8))
    assert_close(whole, split)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True, "seed": 7}, {"master_weights": False}])
@pytest.mark.filterwarnings("ignore:AdamW. stochastic_rounding has no effect")
def test_resumed_run_has_the_bits_of_an_undisturbed_one(dtype, options):
    whole, split = make_params(dtype), make_params(dtype)
    straight = AdamW(whole, lr=1e-2, max_grad_norm=1.0, **options)
    run(straight, whole, range(8), lambda step: (step % 3,))
    first = AdamW(split, lr=1e-2, max_grad_norm=1.0, **options)
    run(first, split, range(4), lambda step: (step % 3,))
    state, weights = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in split]
    fresh = [nn.Parameter(torch.zeros_like(p)) for p in split]
    second = AdamW(fresh, lr=1e-2, max_grad_norm=1.0, **options)
    second.load_state_dict(state)  # before the weights, as some do
    with torch.no_grad():
        for p, saved in zip(fresh, weights):
            p.copy_(saved)
    run(second, fresh, range(4, 8), lambda step: (step % 3,))
    for p, q in zip(whole, fresh):
        assert torch.equal(p, q)
        for key, value in straight.state[p].items():
            assert torch.equal(value, second.state[q][key])
            assert value.dtype == second.state[q][key].dtype == FP32
    run(first, split, range(4, 8))  # went on alone: the loaded state is a copy
    for saved, now in zip(state["state"].values(), second.state_dict()["state"].values()):
        assert saved["step"] != now["step"]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_masters_keep_what_16_bits_lose(dtype):
    wide, narrow, plain = ([nn.Parameter(torch.ones(500).to(d))] for d in (FP32, dtype, dtype))
    for params, options in ((wide, {}), (narrow, {}), (plain, {"master_weights": False})):
        optimizer = AdamW(params, lr=1e-5, weight_decay=0.0, **options)
        for _ in range(1000):
            params[0].grad = torch.ones_like(params[0])
            optimizer.step()
    assert torch.equal(narrow[0], wide[0].to(dtype))
    assert narrow[0][0] < 1
    assert plain[0][0] == 1


def test_a_parameter_written_from_outside_becomes_its_master():
    params = make_params(BF16)
    optimizer = AdamW(params, lr=1e-3)
    run(optimizer, params, range(3))
    kept = optimizer.state[params[0]]["master"].clone()
    with torch.no_grad():
        params[0][0] = 7.0  # as when other weights are loaded
    set_grads(params, 3, skipped=(0,))
    optimizer.step()  # without a gradient nothing happens to it
    assert torch.equal(optimizer.state[params[0]]["master"], kept)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    master = optimizer.state[params[0]]["master"]
    assert torch.equal(master[1:], kept[1:])
    assert (master[0] == 7.0).all()


def test_other_memory_for_a_parameter_becomes_its_master():
    params = make_params(BF16)
    optimizer = AdamW(params, lr=0.0)
    run(optimizer, params, range(2))
    params[0].data = torch.full_like(params[0], 5.0)
    run(optimizer, params, [2])
    assert (params[0] == 5.0).all()
    assert (optimizer.state[params[0]]["master"] == 5.0).all()


def test_stale_masters_after_a_run_with_torch():
    params = make_params(BF16)
    mine = AdamW(params, lr=1e-2)
    run(mine, params, range(3))
    theirs = torch.optim.AdamW(params, lr=1e-2)
    theirs.load_state_dict(mine.state_dict())
    run(theirs, params, range(3, 5))
    before = [p.detach().clone() for p in params]
    back = AdamW(params, lr=1e-2)
    back.load_state_dict(theirs.state_dict())
    for group in back.param_groups:
        group["lr"] = 0.0
    run(back, params, [5])
    assert all(torch.equal(p, q) for p, q in zip(params, before))
    assert all(float(back.state[p]["step"]) == 6 for p in params)


def test_clip_and_norm():
    mine, theirs = make_params(), make_params()
    clipped, plain = AdamW(mine, lr=1e-2, max_grad_norm=0.5), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(4):
        for params in (mine, theirs):
            set_grads(params, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        plain.step()
        clipped.step()
        assert clipped.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert math.sqrt(sum(p.grad.square().sum() for p in mine)) == pytest.approx(float(norm), rel=1e-5)  # as it was
    assert_close(mine, theirs)
    unclipped = AdamW(make_params())
    run(unclipped, list(unclipped._params()), [0])
    assert unclipped.grad_norm is None


def test_a_gradient_that_is_not_finite_changes_nothing():
    params = make_params()
    optimizer = AdamW(params, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict())
    set_grads(params, 2)
    params[3].grad[0, 0, 0] = math.inf
    optimizer.step()
    assert optimizer.grad_norm == math.inf
    assert all(torch.equal(p, q) for p, q in zip(params, before[0]))
    for old, now in zip(before[1]["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(old[key], now[key]) for key in old)


def test_tensor_as_learning_rate():
    mine, theirs = make_params(), make_params()
    run(AdamW(mine, lr=torch.tensor(0.01)), mine, range(3))
    run(torch.optim.AdamW(theirs, lr=0.01), theirs, range(3))
    assert_close(mine, theirs)


def test_state_loads_where_another_device_is_the_default():
    params = make_params()
    optimizer = AdamW(params)
    run(optimizer, params, range(2))
    with torch.device("meta"):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(optimizer.state[p]["step"].is_cpu for p in params)
    run(optimizer, params, range(2, 4))
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_a_refused_state_changes_nothing():
    mine, theirs = make_params(), make_params()
    optimizer, other = AdamW(mine, lr=1e-3), torch.optim.AdamW(theirs, lr=7.0, amsgrad=True)
    run(optimizer, mine, range(2))
    run(other, theirs, range(5))
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert all(float(optimizer.state[p]["step"]) == 2 for p in mine)


def test_a_group_has_no_clip_of_its_own():
    for name in ("max_grad_norm", "master_weights", "stochastic_rounding", "seed"):
        with pytest.raises(ValueError, match=f"AdamW: {name} must be one for all groups, got one in a group; pass it"):
            AdamW([{"params": make_params(), name: 1}])


def test_closure_and_no_gradients():
    params = make_params()
    optimizer = AdamW(params)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.grad_norm is None

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_backward_after_the_update_is_caught():
    """As with torch's own: the graph still needs the weights as they were."""
    weight = nn.Parameter(torch.randn(4, 4))
    loss = (torch.randn(2, 4, requires_grad=True) @ weight).square().sum()
    loss.backward(retain_graph=True)
    AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_hooks():
    params = make_params(BF16)
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=2.0, stochastic_rounding=True, seed=3)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run(optimizer, params, range(2))
    assert len(calls) == 2
    twin = copy.deepcopy(optimizer)
    assert (twin.max_grad_norm, twin.stochastic_rounding, twin.seed) == (2.0, True, 3)
    others = [p for group in twin.param_groups for p in group["params"]]
    for some, owner in ((params, optimizer), (others, twin)):
        run(owner, some, [2])
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_compiled_train_step_has_the_same_bits():
    """The graph breaks at the update, the frames around it stay compiled: no step but the first compiles anything."""
    compiled_frames = []

    def backend(graph, _):
        compiled_frames.append(graph)
        return graph.forward

    def train(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
        batches = torch.randn(5, 4, 6)

        def train_step(x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach() * 1

        step = torch.compile(train_step, backend=backend) if compiled else train_step
        losses, frames = [], []
        for x in batches:
            losses.append(step(x))
            frames.append(len(compiled_frames))
        return losses, list(model.parameters()), frames, train_step, batches[0]

    torch._dynamo.reset()
    losses, params, frames, train_step, x = train(True)
    expected = train(False)
    assert all(map(torch.equal, losses, expected[0]))
    assert all(map(torch.equal, params, expected[1]))
    assert 0 < frames[2] == frames[-1]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(train_step, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()


def test_torchs_keywords_are_taken():
    params = make_params()
    optimizer = AdamW(params, 1e-3, (0.9, 0.99), 1e-7, 0.1, False, foreach=True, fused=True, capturable=False)
    run(optimizer, params, range(2))
    expected = set(torch.optim.AdamW(make_params()).param_groups[0])
    assert set(optimizer.param_groups[0]) >= expected - {"decoupled_weight_decay"}


def test_autocast_training_of_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)).to(BF16)
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    x = torch.randn(64, 16).to(BF16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "beta2 must lie in [0, 1), got 1.0"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
        ({"amsgrad": True}, "amsgrad must be False, got True; use torch.optim.AdamW for it"),
        ({"differentiable": True}, "differentiable must be False"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(f"AdamW: {message}")):
        AdamW(make_params(), **options)


def test_what_cannot_be_updated_is_named():
    with pytest.raises(ValueError, match="AdamW: params must be real, got complex64; give torch"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="grads must be dense, got sparse_coo at index 0; use sparse=False"):
        AdamW(table.parameters()).step()
    theirs = torch.optim.AdamW(make_params(), amsgrad=True)
    with pytest.raises(ValueError, match="AdamW: amsgrad must be False, got True"):
        AdamW(make_params()).load_state_dict(theirs.state_dict())


def test_rounding_without_bf16_warns():
    with pytest.warns(UserWarning, match="AdamW: stochastic_rounding has no effect without bfloat16 parameters"):
        AdamW(make_params(), stochastic_rounding=True)
