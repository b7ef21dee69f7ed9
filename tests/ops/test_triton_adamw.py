"""AdamW in Triton: against torch.optim.AdamW in fp64, masters, clip, the bits of stochastic rounding."""

import pytest
import torch
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops.adamw import AdamwSettings, adamw_step, grad_norm, round_at_random

pytestmark = pytest.mark.triton
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1,), (3, 7), (0,), (2049,), (64, 64)]
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
EPS = torch.finfo(FP32).eps


def state(dtype, with_masters):
    params = [torch.randn(s).to(dtype) for s in SHAPES]
    moments = [[torch.zeros(s) for s in SHAPES] for _ in range(2)]
    return params, *moments, [p.float() for p in params] if with_masters else [None] * len(SHAPES)


def steps():
    return [torch.zeros((), device="cpu") for _ in SHAPES]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "with_masters"), [(FP32, False), (BF16, True), (FP16, True), (BF16, False)], ids=str)
def test_matches_torch_in_fp64(dtype, with_masters, maximize):
    params, exp_avgs, exp_avg_sqs, masters = state(dtype, with_masters)
    ref, gold = ([torch.nn.Parameter(p.to(wide)) for p in params] for wide in (FP32, torch.float64))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "maximize": maximize}
    peers = [torch.optim.AdamW(leaves, **options) for leaves in (ref, gold)]
    counts, settings = steps(), [AdamwSettings(**SETTINGS, maximize=maximize)] * len(SHAPES)
    for _ in range(3):
        grads = [torch.randn(s).to(dtype) for s in SHAPES]
        for leaves, peer in zip((ref, gold), peers):
            for leaf, grad in zip(leaves, grads):
                leaf.grad = grad.to(leaf.dtype)
            peer.step()
        rest = (grads, exp_avgs, exp_avg_sqs, counts, settings)
        assert adamw_step(params, *rest, masters=masters, backend="triton") is None
        if dtype != FP32 and not with_masters:  # each step starts from the rounded value
            for leaves in (ref, gold):
                for leaf in leaves:
                    leaf.data.copy_(leaf.to(dtype))
    assert [int(count) for count in counts] == [3] * len(SHAPES)
    for p, master, r, g in zip(params, masters, ref, gold):
        if not p.numel():
            continue
        got = p if master is None else master
        assert master is None or torch.equal(p, master.to(dtype))
        error, plain = ((x.double() - g).abs().max().item() for x in (got, r.detach().to(got.dtype)))
        assert error <= 2 * plain + 4 * EPS * max(1.0, g.abs().max().item())


def test_clip_and_norm():
    params, exp_avgs, exp_avg_sqs, _ = state(FP32, False)
    grads = [torch.randn(s) for s in SHAPES]
    expected = torch.cat([g.double().flatten() for g in grads]).norm().item()
    assert grad_norm(grads, backend="triton") == pytest.approx(expected, rel=1e-6)
    scaled = [g * (0.5 / (expected + 1e-6)) for g in grads]
    settings, twins = (
        [AdamwSettings(**SETTINGS)] * len(SHAPES),
        [[x.clone() for x in xs] for xs in (params, exp_avgs, exp_avg_sqs)],
    )
    norm = adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps(), settings, max_grad_norm=0.5, backend="triton")
    assert norm == pytest.approx(expected, rel=1e-6)
    adamw_step(twins[0], scaled, *twins[1:], steps(), settings, backend="triton")
    for p, twin in zip(params, twins[0]):
        torch.testing.assert_close(p, twin)


def test_nothing_changes_where_the_norm_is_not_finite():
    params, exp_avgs, exp_avg_sqs, _ = state(FP32, False)
    before, grads, counts = [p.clone() for p in params], [torch.full(s, float("nan")) for s in SHAPES], steps()
    settings = [AdamwSettings(**SETTINGS)] * len(SHAPES)
    norm = adamw_step(params, grads, exp_avgs, exp_avg_sqs, counts, settings, max_grad_norm=1.0, backend="triton")
    assert norm != norm
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    assert not any(counts)


def test_stochastic_rounding_has_the_bits_of_the_reference():
    params, exp_avgs, exp_avg_sqs, _ = state(BF16, False)
    grads = [torch.zeros(s).to(BF16) for s in SHAPES]  # only the decay moves them
    seed, settings = 2**40 + 7, [AdamwSettings(**SETTINGS)] * len(SHAPES)
    exact = [p.float() * (1 - 1e-2 * 0.1) for p in params]
    adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps(), settings, seed=seed, backend="triton")
    for stream, (p, wide) in enumerate(zip(params, exact)):
        assert torch.equal(p, round_at_random(wide, seed, 1, stream))


def test_layouts_and_other_settings():
    p, twin = torch.randn(6, 10), torch.randn(6, 10).t().contiguous().t()
    twin.copy_(p)
    for x in (p, twin):
        zeros = [torch.zeros_like(x) for _ in range(2)]
        adamw_step(
            [x], [torch.ones(6, 10)], *([z] for z in zeros), steps()[:1], [AdamwSettings(lr=0.5)], backend="triton"
        )
    assert torch.equal(p, twin)
    assert not p.isnan().any()
