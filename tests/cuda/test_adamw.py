"""AdamW of csrc/cuda: the bits of the CPU's kernel for every kind of tensor, the norm and the clip, nothing on NaN."""

import math

import pytest
import torch
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops import adamw
from herdkern.ops.adamw import AdamwSettings, adamw_step, grad_norm, norm_cuda

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1,), (3, 7), (0,), (8200,), (64, 66), (0,)]
SETTINGS = [
    AdamwSettings(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1),
    AdamwSettings(lr=3e-3, beta1=0.3, eps=1e-6, maximize=True),
]


@pytest.fixture
def step_on(device, monkeypatch):  # noqa: F811
    """step_on(state, **options): one update by the kernels of csrc/cuda, in place on CPU tensors; its norm."""

    def step(state, **options):
        moved = [[None if x is None else x.to(device) for x in xs] for xs in state[:5]]
        params, grads, exp_avgs, exp_avg_sqs, masters = moved
        with monkeypatch.context() as patched:
            patched.setattr(adamw, "_step_cpu", adamw._step_cuda)
            norm = adamw_step(params, grads, exp_avgs, exp_avg_sqs, *state[5:], masters=masters, **options)
        for xs, back in zip(state[:5], moved):
            for x, new in zip(xs, back):
                if x is not None:
                    x.copy_(new)
        return norm

    return step


def make(dtype, grad_dtype=None, with_masters=False, shift=0):
    """params, grads, exp_avgs, exp_avg_sqs, masters, steps, settings; shift: elements from alignment."""

    def draw(shape, kind):
        return torch.randn(math.prod(shape) + shift)[shift:].to(kind).view(shape)

    params, grads = [draw(s, dtype) for s in SHAPES], [draw(s, grad_dtype or dtype) for s in SHAPES]
    first, second = [draw(s, FP32) for s in SHAPES], [draw(s, FP32).square() for s in SHAPES]
    masters = [p.float() for p in params] if with_masters else [None] * len(SHAPES)
    steps = [torch.tensor(float(i)) for i in range(len(SHAPES))]
    if shift:
        params = [torch.empty(p.numel() + shift, dtype=p.dtype)[shift:].view(p.shape).copy_(p) for p in params]
    return params, grads, first, second, masters, steps, [SETTINGS[i % 2] for i in range(len(SHAPES))]


def copy(state):
    return [[x if x is None or isinstance(x, AdamwSettings) else x.clone() for x in xs] for xs in state]


def assert_same(got, expected):
    for xs, ys in zip(got[:6], expected[:6]):
        for x, y in zip(xs, ys):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("seed", [None, 2**40 + 7])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "with_masters"),
    [(FP32, FP32, False), (BF16, BF16, True), (FP16, FP16, True), (BF16, BF16, False), (BF16, FP32, False)],
    ids=str,
)
def test_has_the_bits_of_the_cpu(step_on, dtype, grad_dtype, with_masters, seed):
    got = make(dtype, grad_dtype, with_masters)
    expected = copy(got)
    assert step_on(got, seed=seed) is None
    params, grads, first, second, masters, *rest = expected
    adamw_step(params, grads, first, second, *rest, masters=masters, seed=seed, backend="native")
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_unaligned_and_transposed(step_on, dtype):
    got = make(dtype, shift=1)
    got[0][4] = got[0][4].t().contiguous().t()
    expected = copy(got)
    step_on(got, seed=3)
    params, grads, first, second, masters, *rest = expected
    adamw_step(params, grads, first, second, *rest, masters=masters, seed=3, backend="native")
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_norm(device, dtype):  # noqa: F811
    grads = make(dtype)[1]
    assert norm_cuda([g.to(device) for g in grads]) == pytest.approx(grad_norm(grads), rel=1e-7)
    assert norm_cuda([g[:0].to(device) for g in grads[:1]]) == 0


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_norm_where_squares_leave_fp32(device, size):  # noqa: F811
    grads = [torch.full((1000,), size), torch.full((7,), size)]
    assert norm_cuda([g.to(device) for g in grads]) == pytest.approx(size * math.sqrt(1007), rel=1e-6)


def test_clip(step_on):
    got = make(FP32)
    expected = copy(got)
    norm = step_on(got, max_grad_norm=0.5)
    params, grads, first, second, masters, *rest = expected
    wanted = adamw_step(params, grads, first, second, *rest, masters=masters, max_grad_norm=0.5, backend="native")
    assert norm == pytest.approx(wanted, rel=1e-7)
    for xs, ys in zip(got[:4], expected[:4]):
        for x, y in zip(xs, ys):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_changes_where_the_norm_is_not_finite(step_on, value):
    got = make(BF16, with_masters=True)
    got[1][3][17] = value
    before = copy(got)
    assert not math.isfinite(step_on(got, max_grad_norm=1.0))
    assert_same([*got[:1], *got[2:6]], [*before[:1], *before[2:6]])


def test_the_same_bits_in_any_order_of_lanes(step_on, orders):  # noqa: F811
    before = make(BF16)

    def call():
        state = copy(before)
        norm = step_on(state, seed=5, max_grad_norm=0.1)
        return [torch.tensor(norm), *(x for xs in (state[0], *state[2:4]) for x in xs)]

    orders(call)
