"""SwiGLU of csrc/cuda against fp64: dtypes, one packed tensor and two, odd sizes, layouts, large gates."""

import pytest
import torch
from fp64_bound import check_against_fp64
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops import swiglu_reference
from herdkern.ops.swiglu import backward_cuda, forward_cuda, register_swiglu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OP = register_swiglu("tested_cuda_swiglu", forward_cuda, backward_cuda, ("CPU", "CUDA"))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 123), (3, 24), (2, 4100), (0, 8)], ids=str)
def test_matches_fp64(device, size, dtype):  # noqa: F811
    gate, up = (torch.randn(size, device=device).to(dtype) * 3 for _ in range(2))
    check_against_fp64(OP, swiglu_reference, [gate, up])
    check_against_fp64(lambda both: OP(both, None), swiglu_reference, [torch.cat([gate, up], dim=-1)])


@pytest.mark.parametrize("layout", ["3d", "column-slice", "aligned-slice", "transposed", "other-strides"])
def test_layouts(device, layout):  # noqa: F811
    full = torch.randn(21, 64, device=device)
    slices = {"column-slice": full[:, 3:43], "aligned-slice": full[:, 4:44], "other-strides": full[:, 8:48]}
    gate = {"3d": full.view(3, 7, 64), **slices}.get(layout, full.t())
    up = torch.randn(gate.shape, device=device) if layout == "other-strides" else gate.flip(0)
    check_against_fp64(OP, swiglu_reference, [gate, up])


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(device, wanted):  # noqa: F811
    leaves = [torch.randn(4, 40, device=device) for _ in range(2)]
    leaves[wanted].requires_grad_()
    got, expected = (torch.autograd.grad(f(*leaves).sin().sum(), leaves[wanted])[0] for f in (OP, swiglu_reference))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_gates_beyond_the_exponential(device):  # noqa: F811
    gate = torch.tensor([-1e4, -200.0, -88.5, -87.5, -20.0, 0.0, 20.0, 88.5, 200.0, 1e4], device=device)
    up = torch.full_like(gate, 3.0)
    torch.testing.assert_close(OP(gate, up), swiglu_reference(gate, up), rtol=1e-5, atol=1e-30)
    dgate, dup = backward_cuda(torch.ones_like(gate), gate, up, True, True)
    assert dgate.isfinite().all()
    assert dup.isfinite().all()


def test_the_same_bits_in_any_order_of_lanes(device, orders):  # noqa: F811
    gate, up, dout = (torch.randn(7, 72, device=device).to(BF16) for _ in range(3))
    orders(lambda: (forward_cuda(gate, up), *backward_cuda(dout, gate, up, True, True)))
