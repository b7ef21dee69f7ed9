"""The vector arithmetic of csrc/common/simd.h, reached through attention on documents of one or two keys.

A document of one key gives its value; two keys of equal score their mean; the lse of one key is its capped score.
"""

import pytest
import torch
from attention_cases import attention_with_lse, borders

from herdkern.ops import attention
from herdkern.ops.backend import available_isas, forced_isa

ALL_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)
EPS = torch.finfo(torch.float32).eps
isas = pytest.mark.parametrize("isa", available_isas())
widths = pytest.mark.parametrize("head_dim", [1, 16, 32, 256, 43], ids=lambda d: f"D{d}")


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


def rows_of(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(tokens, 1, head_dim) that holds every one of `values`, padded with ones."""
    padding = values.new_ones(-len(values) % head_dim)
    return torch.cat([values, padding]).view(-1, 1, head_dim)


def one_key_each(v: torch.Tensor, q: torch.Tensor | None = None, **options) -> torch.Tensor:
    """`attention` where each token is a document."""
    q = torch.ones_like(v) if q is None else q
    return attention(q, torch.ones_like(v), v, borders([1] * len(v)), **options)


def assert_same_numbers(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, NaN to NaN; the sign of a zero may be lost in a sum."""
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@widths
@isas
def test_every_fp16_comes_back(isa, head_dim):
    v = rows_of(ALL_BITS.view(torch.float16), head_dim)
    with forced_isa(isa):
        assert_same_numbers(one_key_each(v), v)


@widths
@isas
def test_every_bf16_comes_back(isa, head_dim):
    v = rows_of(ALL_BITS.view(torch.bfloat16), head_dim)
    if isa in ("avx512", "amx") and head_dim > 16:  # products of bf16 take subnormal numbers for zero
        v = torch.where(v.abs() < torch.finfo(torch.bfloat16).tiny, 0.0, v)
    with forced_isa(isa):
        assert_same_numbers(one_key_each(v), v)


@widths
@isas
def test_every_fp16_gradient_comes_back(isa, head_dim):
    """dv of a document of one token is dout."""
    dout = rows_of(ALL_BITS.view(torch.float16), head_dim)
    v = torch.zeros_like(dout).requires_grad_()
    with forced_isa(isa):
        (dv,) = torch.autograd.grad(one_key_each(v), v, dout)
    assert_same_numbers(dv, dout)


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@widths
@isas
def test_rounds_to_nearest_even(isa, head_dim, dtype, steps):
    """The mean of two numbers: of neighbours it is a tie, between all neighbours that there are."""
    if dtype == torch.bfloat16 and head_dim > 16 and isa != "baseline" and isa != "avx2":
        low = torch.arange(0x80, 0x7F80 - steps, dtype=torch.int16)  # products of bf16 have no subnormal numbers
    else:
        low = torch.arange(0, (0x7C00 if dtype == torch.float16 else 0x7F80) - steps, dtype=torch.int16)
    low, high = (rows_of(x.view(dtype), head_dim) for x in (low, low + steps))
    if dtype == torch.bfloat16:  # whose sum would be above the largest fp32
        low, high = (torch.where(high > 1e38, 1.0, x) for x in (low, high))
    v = torch.stack([low, high], dim=1).flatten(0, 1)
    q, cu_q, cu_k = torch.ones_like(low), borders([1] * len(low)), borders([2] * len(low))
    with forced_isa(isa):
        got = attention(q, torch.ones_like(v), v, cu_q, cu_seqlens_k=cu_k)
    mean = (low.double() + high.double()) / 2
    assert_same_numbers(got, mean.float().to(dtype))


@isas
def test_fp16_above_the_largest_is_infinite(isa):
    """dv sums the gradients of a group of heads: 65504 + 16 is the first sum that rounds to infinity."""
    other = ALL_BITS.view(torch.float16)[ALL_BITS.view(torch.float16).isfinite()]
    dout = torch.stack([torch.full_like(other, 65504.0), other], dim=1)[..., None]
    q, k, v = torch.ones_like(dout), torch.ones(len(other), 1, 1).half(), torch.zeros(len(other), 1, 1).half()
    v.requires_grad_()
    with forced_isa(isa):
        (dv,) = torch.autograd.grad(attention(q, k, v, borders([1] * len(other))), v, dout)
    expected = (65504.0 + other.float()).half()
    assert expected.isinf().any()
    assert torch.equal(dv.flatten(), expected)


def scores(low: float, high: float) -> torch.Tensor:
    """Numbers of every size between two: even steps, and random ones down to the smallest."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(20_000, generator=generator) * 2.0 ** torch.randint(-30, 0, (20_000,), generator=generator)
    return torch.cat([torch.linspace(low, high, 60_001), small.clamp(low, high), -small.clamp(-high, -low)])


@isas
def test_exp(isa):
    """exp(x) / (exp(x) + exp(0)), of two keys with scores x and 0, to 4 eps and |x| eps, the rounding of x itself."""
    x = scores(-103.0, 0.0)
    q, k = torch.ones(len(x), 1, 1), torch.stack([x, torch.zeros_like(x)], dim=1).view(-1, 1, 1)
    v = torch.tensor([1.0, 0.0]).repeat(len(x)).view(-1, 1, 1)
    with forced_isa(isa):
        cu_k = borders([2] * len(x))
        out = attention(q, k, v, borders([1] * len(x)), cu_seqlens_k=cu_k, causal=False, softmax_scale=1.0)
    expected = torch.sigmoid(x.double())
    error = (out.flatten().double() - expected).abs()
    assert (error <= (4 + x.double().abs()) * EPS * expected + 2 * torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("cap", [1.0, 0.25, 50.0])
@isas
def test_tanh(isa, cap):
    """The lse of one key is its score, cap * tanh(x / cap), to 4 eps, from the smallest scores to the largest."""
    x = torch.cat([scores(-12.0, 12.0), torch.tensor([100.0, -100.0, 1e10, -1e10, 1e30, -1e30])]) * cap
    q, ones = x.view(-1, 1, 1), torch.ones(len(x), 1, 1)
    with forced_isa(isa):
        _, lse = attention_with_lse(q, ones, ones, borders([1] * len(x)), softcap=cap, softmax_scale=1.0)
    expected = cap * torch.tanh(x.double() / cap)
    assert ((lse.flatten().double() - expected).abs() <= 4 * EPS * expected.abs()).all()
    assert (lse.abs() <= cap).all()
