"""SwiGLU in Triton against fp64: dtypes, odd sizes, packed, layouts, the registered op."""

import pytest
import torch
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops import swiglu, swiglu_reference

pytestmark = pytest.mark.triton
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.bfloat16, torch.float16)]
SIZES = [(1, 1), (3, 7), (5, 3000), (2, 3, 64), (0, 4)]


def op(*inputs):
    return swiglu(*inputs, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_fp64(assert_matches_fp64, size, dtype):
    gate, up = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    assert_matches_fp64(op, swiglu_reference, [gate, up])
    assert_matches_fp64(op, swiglu_reference, [torch.cat([gate, up], dim=-1)])


def test_layouts(assert_matches_fp64):
    full = torch.randn(9, 20)
    for gate, up in (
        (full[:, :10], full[:, 10:]),
        (full[::2, :7], full[::2, 8:15]),
        (full.t(), full.t()),
        (full[0], full[1]),
    ):
        assert_matches_fp64(op, swiglu_reference, [gate, up])
    assert_matches_fp64(op, swiglu_reference, [full[:, 2:18]])


def test_large_values_stay_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    out = op(gate, torch.ones(5))
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    assert out.tolist() == [0.0, 0.0, 0.0, 100.0, 1e4]
    assert dgate.isfinite().all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_wanted_gradients(wanted):
    inputs = [torch.randn(3, 5), torch.randn(3, 5)]
    both, some = (
        [x.clone().requires_grad_(need) for x, need in zip(inputs, needs)] for needs in ((True, True), wanted)
    )
    for leaves in (both, some):
        op(*leaves).sum().backward()
    for leaf, needed, other in zip(some, wanted, both):
        assert torch.equal(leaf.grad, other.grad) if needed else leaf.grad is None


def test_registered_op():
    gate, up = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    op(gate, up)  # registers it
    for second in (up, None):
        torch.library.opcheck(torch.ops.herdkern.triton_swiglu.default, (gate, second))
