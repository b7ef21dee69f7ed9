"""RMSNorm of csrc/cuda against fp64: dtypes, modes, residual, every spread of a row, layouts, the order of lanes."""

import pytest
import torch
from fp64_bound import check_against_fp64
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops import rms_norm_reference
from herdkern.ops.rms_norm import backward_cuda, forward_cuda, register_rms_norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-weight-fp32"),
]
MODES = [("llama", 0.0), ("llama", 1.0), ("gemma", 1.0), ("none", 0.0), ("none", 1.0)]
OP = register_rms_norm("tested_cuda_rms_norm", forward_cuda, backward_cuda, ("CPU", "CUDA"))


def plain(x, weight):
    return OP(x, None, weight, 1e-5, "llama", 0.0)[0]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", [(3, 7), (21, 64)], ids=str)
def test_residual_and_modes_match_fp64(device, size, dtypes, mode):  # noqa: F811
    x, residual = (torch.randn(size, device=device).to(dtypes[0]) for _ in range(2))
    weight = torch.randn(size[1], device=device).to(dtypes[1])

    def both(x, weight, residual):
        return torch.stack(OP(x, residual, weight, 1e-5, *mode)[:2])

    def reference(x, weight, residual):
        options = {"casting": mode[0], "weight_offset": mode[1]}
        return torch.stack(rms_norm_reference(x, weight, residual=residual, **options))

    check_against_fp64(both, reference, [x, weight, residual])


# elements of a row: of one thread, several rows a block, a block of two warps, two packs a thread, too long for one
# pass of both gradients, too long for registers
@pytest.mark.parametrize("dim", [1, 8, 40, 123, 512, 1023, 3000, 8200, 16400])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_length_of_row(device, dtype, dim):  # noqa: F811
    num_rows = 130 if dim < 100 else 11 if dim < 2000 else 2
    inputs = [torch.randn(num_rows, dim, device=device).to(dtype), torch.randn(dim, device=device).to(dtype)]
    check_against_fp64(plain, rms_norm_reference, inputs)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("dim", [64, 2056, 9000])
def test_one_gradient_alone(device, dim, wanted):  # noqa: F811
    leaves = [torch.randn(5, dim, device=device), torch.randn(dim, device=device)]
    leaves[wanted].requires_grad_()
    got, expected = (
        torch.autograd.grad(f(*leaves).sin().sum(), leaves[wanted])[0] for f in (plain, rms_norm_reference)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["1d", "3d", "no-rows", "column-slice", "aligned-slice", "transposed"])
def test_layouts(device, layout):  # noqa: F811
    full = torch.randn(21, 64, device=device)
    slices = {"column-slice": full[:, 3:40], "aligned-slice": full[:, 4:44]}
    x = {"1d": full[0], "3d": full.view(3, 7, 64), "no-rows": full[:0], **slices}.get(layout, full.t())
    check_against_fp64(plain, rms_norm_reference, [x, torch.randn(2 * x.shape[-1], device=device)[::2]])


@pytest.mark.parametrize("dim", [72, 700])
def test_the_same_bits_in_any_order_of_lanes(device, orders, dim):  # noqa: F811
    x, dout = (torch.randn(19, dim, device=device).to(BF16) for _ in range(2))
    weight = torch.randn(dim, device=device)

    def call():
        out, _, rstd = forward_cuda(x, None, weight, 1e-5, "llama", 0.0)
        return out, *backward_cuda(dout, x, x, weight, rstd, "llama", 0.0, True, True)

    orders(call)


def test_the_sum_of_x_and_residual_is_what_is_normed(device):  # noqa: F811
    x, residual, weight = (torch.randn(3, 40, device=device).to(BF16) for _ in range(3))
    out, total, _ = forward_cuda(x, residual, weight[0], 1e-5, "llama", 0.0)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, forward_cuda(total, None, weight[0], 1e-5, "llama", 0.0)[0])
