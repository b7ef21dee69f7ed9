"""RoPE of csrc/cuda: the bits of the CPU kernel, positions of every kind, layouts, in place, places off the table."""

import pytest
import torch
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops import rope_qk, rope_reference, rope_table
from herdkern.ops.rope import launch_cuda, register_rope_qk

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OP = register_rope_qk("tested_cuda_rope_qk", launch_cuda, ("CPU", "CUDA"))
BORDERS = torch.tensor([0, 5, 5, 6, 23], dtype=torch.int32)


def draw(num_heads, head_dim, dtype, num_tokens=23):
    return torch.randn(num_tokens, num_heads, head_dim).to(dtype)


def on(place, *tensors):
    return [None if x is None else x.to(place) for x in tensors]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("places", ["running", "documents", "int32", "int64"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 102])
def test_has_the_bits_of_the_cpu(device, head_dim, dtype, places, interleaved):  # noqa: F811
    q, k, table = draw(5, head_dim, dtype), draw(2, head_dim, dtype), rope_table(40, head_dim)
    positions = torch.randint(0, 40, (23,), dtype=getattr(torch, places)) if places.startswith("int") else None
    borders = BORDERS if places == "documents" else None
    expected = rope_qk(q, k, *table, positions, cu_seqlens=borders, interleaved=interleaved, backend="native")
    got = OP(*on(device, q, k, *table, positions, borders), interleaved, False)
    for a, b in zip(got, expected):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("num_heads", [(1, 0), (40, 8), (3, 3)], ids=str)
def test_numbers_of_heads_and_the_way_back(device, num_heads):  # noqa: F811
    q, k, table = draw(num_heads[0], 32, FP16), draw(num_heads[1], 32, FP16), rope_table(23, 32)
    turned = OP(*on(device, q, k, *table), None, None, False, False)
    for x, got in zip((q, k), turned):
        assert torch.equal(got.cpu(), rope_reference(x, *table, torch.arange(23)))
    back = OP(*turned, *on(device, *table), None, None, False, True)
    for x, got in zip((q, k), back):
        torch.testing.assert_close(got.cpu(), x, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("begin", [0, 3])
def test_slices_in_place(device, begin):  # noqa: F811
    both, table = torch.randn(23, 7 * 16 + begin).to(BF16), rope_table(23, 16)
    expected = both.clone()
    heads = both[:, begin:].unflatten(1, (7, 16))
    expected[:, begin:] = rope_reference(heads, *table, torch.arange(23)).flatten(1)
    (moved,) = on(device, both)
    q, k = moved[:, begin:].unflatten(1, (7, 16)).split([5, 2], dim=1)
    launch_cuda("rope_qk", [(q, q), (k, k)], *on(device, *table), None, None, False, False)
    assert torch.equal(moved.cpu(), expected)


def test_places_out_of_the_table_are_nan(device):  # noqa: F811
    q, positions = draw(2, 16, FP32, 4), torch.tensor([-1, 0, 9, 10])
    got, _ = OP(*on(device, q, q[:, :0], *rope_table(10, 16), positions), None, False, False)
    assert got.isnan().flatten(1).all(1).tolist() == [True, False, False, True]


def test_gradient_is_the_turn_back(device):  # noqa: F811
    q, k, table = draw(3, 16, FP32), draw(1, 16, FP32), rope_table(23, 16)
    dq, dk = draw(3, 16, FP32), draw(1, 16, FP32)
    leaves = [x.requires_grad_() for x in on(device, q, k)]
    turned = OP(*leaves, *on(device, *table), None, None, True, False)
    got = torch.autograd.grad(turned, leaves, on(device, dq, dk))
    expected = OP(*on(device, dq, dk, *table), None, None, True, True)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_the_same_bits_in_any_order_of_lanes(device, orders):  # noqa: F811
    q, k, cos, sin, borders = on(device, draw(12, 64, BF16), draw(4, 64, BF16), *rope_table(23, 64), BORDERS)
    orders(lambda: OP(q, k, cos, sin, None, borders, False, False))
