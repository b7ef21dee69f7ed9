"""RMSNorm in Triton against fp64: dtypes, odd sizes, modes, residual, layouts, determinism, the registered op."""

import pytest
import torch
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops import rms_norm, rms_norm_reference

pytestmark = pytest.mark.triton
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-weight-fp32"),
]
MODES = [("llama", 0.0), ("llama", 1.0), ("gemma", 1.0), ("none", 0.0), ("none", 1.0)]
SIZES = [(1, 1), (3, 7), (63, 123), (5, 3000)]


def one_output(function, **options):
    def call(x, weight, residual):
        return torch.stack(function(x, weight, residual=residual, **options))

    return call


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_residual_and_modes_match_fp64(assert_matches_fp64, size, dtypes, mode):
    x, residual, weight = torch.randn(size).to(dtypes[0]), torch.randn(size).to(dtypes[0]), torch.randn(size[1])
    options = {"casting": mode[0], "weight_offset": mode[1]}
    op = one_output(rms_norm, backend="triton", **options)
    assert_matches_fp64(op, one_output(rms_norm_reference, **options), [x, weight.to(dtypes[1]), residual])


def plain(x, weight):
    return rms_norm(x, weight, backend="triton")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 130])
def test_without_residual(assert_matches_fp64, dtypes, num_rows):
    inputs = [torch.randn(num_rows, 40).to(dtypes[0]), torch.randn(40).to(dtypes[1])]
    assert_matches_fp64(plain, rms_norm_reference, inputs)


def test_rows_that_need_two_passes(assert_matches_fp64):
    assert_matches_fp64(plain, rms_norm_reference, [torch.randn(3, 8200), torch.randn(8200)])


def test_rows_that_no_program_holds_are_refused():
    with pytest.raises(NotImplementedError, match="dim must be at most 16384, got 16400"):
        plain(torch.randn(2, 16400), torch.randn(16400))


@pytest.mark.parametrize("layout", ["1d", "3d", "no-rows", "column-slice", "transposed"])
def test_layouts(assert_matches_fp64, layout):
    full = torch.randn(21, 63)
    x = {"1d": full[0], "3d": full.view(3, 7, 63), "no-rows": full[:0], "column-slice": full[:, 3:40]}.get(
        layout, full.t()
    )
    assert_matches_fp64(plain, rms_norm_reference, [x, torch.randn(2 * x.shape[-1])[::2]])


def test_the_residual_may_be_x():
    x, weight = torch.randn(3, 8), torch.randn(8)
    out, total = rms_norm(x, weight, residual=x, backend="triton")
    assert torch.equal(total, 2 * x)
    assert torch.equal(out, rms_norm(2 * x, weight, backend="triton"))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used):
    leaves = [torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(4, 8)]
    gradients = [
        torch.autograd.grad(
            f(leaves[0], leaves[1], residual=leaves[2])[used].sin().sum(), leaves[:2], allow_unused=True
        )
        for f in (lambda *a, **k: rms_norm(*a, **k, backend="triton"), rms_norm_reference)
    ]
    for got, expected in zip(*gradients):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, atol=1e-6)


def test_second_derivative_is_the_references():
    x, weight, residual = (torch.randn(s, requires_grad=True) for s in ((4, 7), (7,), (4, 7)))

    def second(function):
        loss = sum(out.sin().sum() for out in function(x, weight, residual=residual))
        gradients = torch.autograd.grad(loss, (x, weight, residual), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight))

    got = second(lambda *a, **k: rms_norm(*a, **k, backend="triton"))
    for a, b in zip(got, second(rms_norm_reference)):
        torch.testing.assert_close(a, b)


def test_registered_op():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    rms_norm(x, weight, backend="triton")  # registers it
    for residual in (None, torch.randn(5, 8)):
        torch.library.opcheck(torch.ops.herdkern.triton_rms_norm.default, (x, residual, weight, 1e-5, "llama", 0.0))


def test_compiles_without_a_graph_break():
    x, weight = torch.randn(6, 10, requires_grad=True), torch.randn(10, requires_grad=True)

    def function(x, weight):
        return sum(out.sin().sum() for out in rms_norm(x * 2, weight, residual=x, backend="triton"))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
