"""SwiGLU against fp64 over dtypes, sizes, layouts and levels; errors, modes and determinism."""

import re

import pytest
import torch

from herdkern.ops import swiglu, swiglu_reference
from herdkern.ops.backend import available_isas, forced_isa

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16, FP16)]
LAYOUTS = {
    "1d": lambda x: x[0],
    "3d": lambda x: x.view(3, 7, -1),
    "no-rows": lambda x: x[:0],
    "row-slice": lambda x: x[::2],
    "halves": lambda x: x.chunk(2, dim=-1)[1],
    "column-step": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "3d-permuted": lambda x: x.view(3, 7, -1).permute(2, 0, 1),
    "expanded": lambda x: x[:1].expand(5, -1),
}


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 31, 63, 64, 123, 1024])
@pytest.mark.parametrize("num_rows", [1, 3, 63])
def test_matches_fp64(assert_matches_fp64, isa, dtype, dim, num_rows):
    with forced_isa(isa):
        assert_matches_fp64(swiglu, swiglu_reference, [torch.randn(num_rows, dim).to(dtype) * 3 for _ in range(2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up_layout", ["contiguous", "same"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(assert_matches_fp64, dtype, layout, up_layout):
    gate, up = (LAYOUTS[layout](torch.randn(21, 64).to(dtype)) for _ in range(2))
    assert_matches_fp64(swiglu, swiglu_reference, [gate, up.contiguous() if up_layout == "contiguous" else up])


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_of_one_projection(dtype):
    hidden = torch.randn(9, 2 * 63).to(dtype).requires_grad_()
    dout = torch.randn(9, 63).to(dtype)
    (got,) = torch.autograd.grad(swiglu(*hidden.chunk(2, dim=-1)), hidden, dout)
    (expected,) = torch.autograd.grad(swiglu_reference(*hidden.chunk(2, dim=-1)), hidden, dout)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn_dim", [0, 1, 5, 31, 32, 63, 256])
def test_packed_has_the_bits_of_two_tensors(isa, dtype, ffn_dim):
    packed = torch.randn(9, 2 * ffn_dim).to(dtype).requires_grad_()
    dout = torch.randn(9, ffn_dim).to(dtype)
    with forced_isa(isa):
        out = swiglu(packed)
        two = swiglu(*packed.chunk(2, dim=-1))
        (got,), (expected,) = (torch.autograd.grad(o, packed, dout) for o in (out, two))
    assert torch.equal(out, two)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_packed(assert_matches_fp64, dtype, layout):
    packed = LAYOUTS[layout](torch.randn(42, 68).to(dtype).view(21, -1))
    packed = packed[..., : packed.shape[-1] // 2 * 2]
    assert_matches_fp64(swiglu, swiglu_reference, [packed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_large_results_have_the_bits_of_small_ones(dtype, packed):
    """Results of 16 MiB and more take another way to memory."""
    num_rows, dim = (16 << 20) // (2048 * dtype.itemsize) + 3, 2048
    both, dout = torch.randn(num_rows, 2 * dim).to(dtype), torch.randn(num_rows, dim).to(dtype)
    rows = slice(num_rows - 7, num_rows)

    def step(rows):
        halves = [both[rows].clone()] if packed else [h.contiguous() for h in both[rows].chunk(2, dim=-1)]
        leaves = [h.requires_grad_() for h in halves]
        out = swiglu(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout[rows])

    for large, small in zip(step(slice(None)), step(rows)):
        assert torch.equal(large[rows], small)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2], ids=["packed", "two"])
def test_nothing_but_the_inputs_is_saved(dtype, count):
    inputs = [torch.randn(4, 6).to(dtype).requires_grad_() for _ in range(count)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = swiglu(*inputs)
    assert saved == [t.data_ptr() for t in inputs]
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dout", ["scalar", "transposed", "column-slice"])
def test_layouts_of_dout(assert_matches_fp64, dtype, dout):
    full = torch.randn(63, 63).to(dtype)
    gradient = {"scalar": full[0, 0], "transposed": full[:, :21].t(), "column-slice": full.repeat(1, 2)[:21, 5:68]}[
        dout
    ]
    assert_matches_fp64(swiglu, swiglu_reference, [torch.randn(21, 63).to(dtype) for _ in range(2)], gradient)


@pytest.mark.parametrize("isa", available_isas())
def test_sigmoid_over_its_whole_range(assert_matches_fp64, isa):
    gate = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1e-44])])
    with forced_isa(isa):
        assert_matches_fp64(swiglu, swiglu_reference, [gate, torch.ones_like(gate)], torch.ones_like(gate))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(isa, dtype):
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0], dtype=dtype)
    gate, up = values.repeat(5), torch.ones(20, dtype=dtype)
    with forced_isa(isa):
        got = swiglu(gate, up)
    expected = torch.tensor([float("nan"), float("inf"), float("nan"), 0.7310586], dtype=dtype).repeat(5)  # -inf * 0
    torch.testing.assert_close(got[gate != float("-inf")], expected[gate != float("-inf")], equal_nan=True)
    with forced_isa(isa):
        assert swiglu(up, values.repeat(5)).isnan().sum() == 5


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("layout", ["contiguous", "halves"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(with_threads, isa, dtype, layout):
    halves = torch.randn(300, 2 * 517).to(dtype).chunk(2, dim=-1)
    gate, up = (h.contiguous() if layout == "contiguous" else h for h in halves)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    results = []
    with forced_isa(isa):
        for num_threads in (1, 2, 3, 7):
            with_threads(num_threads)
            out = swiglu(gate, up)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (gate, up))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_only_wanted_gradients(wanted):
    gate, up = torch.randn(9, 20), torch.randn(9, 20)
    both = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = torch.autograd.grad(swiglu(*both).sin().sum(), both)
    some = [t.clone().requires_grad_(needed) for t, needed in zip((gate, up), wanted)]
    swiglu(*some).sin().sum().backward()
    for leaf, needed, gradient in zip(some, wanted, expected):
        assert torch.equal(leaf.grad, gradient) if needed else leaf.grad is None


def test_no_graph_without_gradients():
    assert swiglu(torch.randn(3, 4), torch.randn(3, 4)).grad_fn is None


def test_second_derivative_is_the_references():
    gate, up = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)

    def second(function):
        gradients = torch.autograd.grad(function(gate, up).sin().sum(), (gate, up), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (gate, up))

    for got, expected in zip(second(swiglu), second(swiglu_reference)):
        torch.testing.assert_close(got, expected)

    def second_packed(function):
        packed = torch.cat([gate, up], dim=-1)
        (gradient,) = torch.autograd.grad(function(packed).sin().sum(), packed, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (gate, up))

    for got, expected in zip(second_packed(swiglu), second_packed(swiglu_reference)):
        torch.testing.assert_close(got, expected)


def test_registered_op():
    gate, up = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    for second in (up, None):
        torch.library.opcheck(torch.ops.herdkern.swiglu.default, (gate, second))
    detached = torch.randn(5, 8), gate.detach(), up.detach()
    packed = torch.randn(5, 4), gate.detach(), None, True, False
    torch.library.opcheck(torch.ops.herdkern.swiglu_backward.default, packed)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.herdkern.swiglu_backward.default, (*detached, *needs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_without_a_graph_break(dtype):
    gate, up = (torch.randn(6, 10).to(dtype).requires_grad_() for _ in range(2))

    def function(gate, up):
        return swiglu(gate * 2, up).float().sin().sum() + swiglu(up * 3).float().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(gate, up), (gate, up))
    expected = torch.autograd.grad(function(gate, up), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_give_shapes(dtype):
    out = swiglu(*(torch.empty(2, 3, 8, dtype=dtype, device="meta") for _ in range(2)))
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 8), dtype, "meta")


def test_autocast_keeps_the_dtype_of_its_inputs():
    with torch.autocast("cpu", dtype=BF16):
        gate, up = (torch.nn.functional.linear(torch.randn(4, 8), torch.randn(16, 8)) for _ in range(2))
        assert swiglu(gate, up).dtype == BF16


def test_other_dtypes_fall_back_and_say_so():
    gate, up = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    expected = "native: dtype must be float32 or bfloat16 or float16, got float64"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))
    with pytest.raises(NotImplementedError, match="asked for 'native'"):
        swiglu(gate, up, backend="native")


def test_explicit_backends():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(swiglu(gate, up, backend="reference"), swiglu_reference(gate, up))
    assert torch.equal(swiglu(gate, up, backend="native"), swiglu(gate, up))


ERRORS = {
    "shape": ((torch.zeros(3, 8), torch.zeros(3, 7)), "swiglu: up must have the shape of gate (3, 8), got (3, 7)"),
    "no-broadcast": ((torch.zeros(3, 8), torch.zeros(8)), "swiglu: up must have the shape of gate (3, 8), got (8,)"),
    "odd": (
        (torch.zeros(3, 7),),
        "swiglu: gate must have an even last dimension [gate | up], got 7; pass up as well",
    ),
    "scalar": ((torch.zeros(()), torch.zeros(())), "swiglu: gate must have at least one dimension, got a scalar"),
    "dtype": (
        (torch.zeros(3, 8), torch.zeros(3, 8, dtype=BF16)),
        "swiglu: up must be float32 as gate is, got bfloat16",
    ),
    "device": ((torch.zeros(3, 8), torch.zeros(3, 8, device="meta")), "swiglu: up must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        swiglu(*arguments)
