"""RMSNorm against fp64 over dtypes, sizes, layouts and levels; casting modes, residual, errors and determinism."""

import platform
import re

import pytest
import torch

from herdkern.ops import rms_norm, rms_norm_reference
from herdkern.ops.backend import available_isas, forced_isa

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16, FP16)]
X_AND_WEIGHT = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((BF16, FP32), id="bf16-weight-fp32"),
    pytest.param((FP16, FP16), id="fp16"),
]
MODES = {
    "llama": {"casting": "llama"},
    "gemma": {"casting": "gemma"},
    "gemma-offset": {"casting": "gemma", "weight_offset": 1.0},
    "none": {"casting": "none"},
    "none-offset": {"casting": "none", "weight_offset": 1.0},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
sums_in_the_order_of_torch = pytest.mark.skipif(
    platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch adds in another order there",
)
LAYOUTS = {
    "1d": lambda x: x[0],
    "3d": lambda x: x.view(3, 7, -1),
    "4d": lambda x: x.view(3, 7, 1, -1),
    "no-rows": lambda x: x[:0],
    "no-rows-3d": lambda x: x.view(3, 7, -1)[:, :0],
    "row-slice": lambda x: x[::2],
    "column-slice": lambda x: x[:, 3:40],
    "column-step": lambda x: x[:, ::2],
    "transposed": lambda x: x.t(),
    "3d-permuted": lambda x: x.view(3, 7, -1).permute(1, 0, 2),
    "3d-inner-slice": lambda x: x.view(3, 7, -1)[:, 1:5, 2:50],
    "expanded": lambda x: x[:1].expand(5, -1),
}


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtypes", X_AND_WEIGHT)
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 63, 64, 123, 128, 1000])
@pytest.mark.parametrize("num_rows", [1, 3, 63])
def test_matches_fp64(assert_matches_fp64, isa, dtypes, dim, num_rows):
    x, weight = torch.randn(num_rows, dim).to(dtypes[0]), torch.randn(dim).to(dtypes[1])
    with forced_isa(isa):
        assert_matches_fp64(rms_norm, rms_norm_reference, [x, weight])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtypes", X_AND_WEIGHT)
@pytest.mark.parametrize("dim", [1, 16, 63, 320])
@modes
def test_every_mode_matches_fp64(assert_matches_fp64, isa, dtypes, dim, mode):
    x, weight = torch.randn(19, dim).to(dtypes[0]), torch.randn(dim).to(dtypes[1])

    def op(x, weight):
        return rms_norm(x, weight, **mode)

    def reference(x, weight):
        return rms_norm_reference(x, weight, **mode)

    with forced_isa(isa):
        assert_matches_fp64(op, reference, [x, weight])


def joined(function, mode):
    """(x, residual, weight) -> one tensor that holds the output and the new residual."""

    def both(x, residual, weight):
        return torch.cat(function(x, weight, residual=residual, **mode))

    return both


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtypes", X_AND_WEIGHT)
@pytest.mark.parametrize("dim", [1, 5, 63, 320])
@modes
def test_residual_matches_fp64(assert_matches_fp64, isa, dtypes, dim, mode):
    x, residual = (torch.randn(19, dim).to(dtypes[0]) for _ in range(2))
    weight = torch.randn(dim).to(dtypes[1])
    with forced_isa(isa):
        assert_matches_fp64(joined(rms_norm, mode), joined(rms_norm_reference, mode), [x, residual, weight])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtypes", X_AND_WEIGHT)
@pytest.mark.parametrize("layout", ["transposed", "column-slice", "3d-permuted", "expanded"])
def test_layouts_of_residual(isa, dtypes, layout):
    x = LAYOUTS[layout](torch.randn(21, 63).to(dtypes[0]))
    residual = torch.randn_like(x)
    weight = torch.randn(x.shape[-1]).to(dtypes[1])
    with forced_isa(isa):
        got = rms_norm(residual, weight, residual=x)
        same = rms_norm(x.contiguous(), weight, residual=residual.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, same))
    assert torch.equal(got[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_two_outputs_is_enough(dtype):
    x, residual, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((9, 40), (9, 40), (40,)))
    dout = torch.randn(9, 40).to(dtype)
    out, new_residual = rms_norm(x, weight, residual=residual)
    dx, dresidual, dweight = torch.autograd.grad(out, (x, residual, weight), dout, retain_graph=True)
    assert torch.equal(dx, dresidual)
    hidden = new_residual.detach().requires_grad_()
    alone = torch.autograd.grad(rms_norm(hidden, weight), (hidden, weight), dout)
    assert torch.equal(dx, alone[0])
    assert torch.equal(dweight, alone[1])
    got = torch.autograd.grad(new_residual, (x, residual, weight), dout, allow_unused=True)
    assert torch.equal(got[0], dout)
    assert torch.equal(got[1], dout)
    assert got[2] is None


def llama_formula(x, weight, eps):
    """As LlamaRMSNorm of transformers and Meta's Llama compute it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemma_formula(x, weight, eps):
    """As GemmaRMSNorm of transformers computes it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def plain_formula(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


FORMULAS = {
    "llama": (llama_formula, {"casting": "llama"}),
    "gemma": (gemma_formula, {"casting": "gemma", "weight_offset": 1.0}),
    "none": (plain_formula, {"casting": "none"}),
}
DIMS = [*range(1, 70), 96, 127, 128, 255, 511, 512, 513, 1000, 1024, 1031, 2048, 4096, 5000, 8191, 8192, 8200, 16384]


@sums_in_the_order_of_torch
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formula", FORMULAS)
def test_has_the_bits_of_the_eager_formula(with_threads, isa, dtype, formula):
    with_threads(1)
    eager, mode = FORMULAS[formula]
    with forced_isa(isa):
        for dim in DIMS:
            x, weight = torch.randn(32, dim).to(dtype), torch.randn(dim).to(dtype)
            got = rms_norm(x, weight, eps=1e-6, **mode)
            assert torch.equal(got, eager(x, weight, 1e-6)), dim
            residual = torch.randn(32, dim).to(dtype)
            got = rms_norm(x, weight, residual=residual, eps=1e-6, **mode)
            hidden = x + residual
            assert torch.equal(got[1], hidden), dim
            assert torch.equal(got[0], eager(hidden, weight, 1e-6)), dim


@sums_in_the_order_of_torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_has_the_bits_of_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm
    for dim in (64, 576, 4096):
        x, weight = torch.randn(3, 40, dim).to(dtype), torch.randn(dim).to(dtype)
        with torch.no_grad():
            norm = llama(dim, eps=1e-6).to(dtype)
            norm.weight.copy_(weight)
            assert torch.equal(rms_norm(x, weight, eps=1e-6), norm(x))
            norm = gemma(dim, eps=1e-6).to(dtype)
            norm.weight.copy_(weight)
            assert torch.equal(rms_norm(x, weight, eps=1e-6, casting="gemma", weight_offset=1.0), norm(x))


@pytest.mark.parametrize("dtypes", X_AND_WEIGHT)
def test_large_results_have_the_bits_of_small_ones(dtypes):
    """Results of 16 MiB and more take another way to memory."""
    dim = 4096
    num_rows = (16 << 20) // (dim * dtypes[0].itemsize) + 3
    x, residual, dout, dnew = (torch.randn(num_rows, dim).to(dtypes[0]) for _ in range(4))
    weight = torch.randn(dim).to(dtypes[1])
    rows = slice(num_rows - 20, num_rows)

    def step(rows):
        leaves = [x[rows].clone().requires_grad_(), residual[rows].clone().requires_grad_()]
        both = rms_norm(leaves[0], weight, residual=leaves[1])
        alone = rms_norm(leaves[0], weight)
        dx, _ = torch.autograd.grad(both, leaves, (dout[rows], dnew[rows]))
        return *(t.detach() for t in (*both, alone)), dx, torch.autograd.grad(alone, leaves[0], dout[rows])[0]

    for large, small in zip(step(slice(None)), step(rows)):
        assert torch.equal(large[rows], small)


def test_fp32_is_the_same_in_every_mode():
    x, weight = torch.randn(9, 200), torch.randn(200)
    outs = [rms_norm(x, weight, casting=casting) for casting in ("llama", "gemma", "none")]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(assert_matches_fp64, dtype, layout):
    x = LAYOUTS[layout](torch.randn(21, 63).to(dtype))
    weight = torch.randn(2 * x.shape[-1]).to(dtype)[::2]
    assert_matches_fp64(rms_norm, rms_norm_reference, [x, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dout", ["scalar", "transposed", "column-slice"])
def test_layouts_of_dout(assert_matches_fp64, dtype, dout):
    x, weight = torch.randn(21, 63).to(dtype), torch.randn(63).to(dtype)
    full = torch.randn(63, 63).to(dtype)
    gradient = {"scalar": full[0, 0], "transposed": full[:, :21].t(), "column-slice": full.repeat(1, 2)[:21, 5:68]}[
        dout
    ]
    assert_matches_fp64(rms_norm, rms_norm_reference, [x, weight], gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [17, 1025, 5000])
def test_many_rows(assert_matches_fp64, dtype, num_rows):
    assert_matches_fp64(rms_norm, rms_norm_reference, [torch.randn(num_rows, 40).to(dtype), torch.randn(40).to(dtype)])


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_eps_and_magnitude(assert_matches_fp64, eps, scale):
    def op(x, weight):
        return rms_norm(x, weight, eps=eps)

    def reference(x, weight):
        return rms_norm_reference(x, weight, eps=eps)

    assert_matches_fp64(op, reference, [torch.randn(5, 77) * scale, torch.randn(77)], torch.randn(5, 77) * scale)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_finite(isa, dtype):
    x = torch.zeros(3, 20, dtype=dtype, requires_grad=True)
    with forced_isa(isa):
        out = rms_norm(x, torch.ones(20, dtype=dtype))
        (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.eq(0).all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(isa, dtype, value):
    x = torch.randn(4, 37).to(dtype)
    x[2, 5] = value
    with forced_isa(isa):
        out = rms_norm(x, torch.ones(37, dtype=dtype))
    expected = rms_norm_reference(x, torch.ones(37, dtype=dtype))
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(with_threads, isa, dtype):
    x, weight = torch.randn(700, 333).to(dtype).requires_grad_(), torch.randn(333).to(dtype).requires_grad_()
    dout = torch.randn(700, 333).to(dtype)
    results = []
    with forced_isa(isa):
        for num_threads in (1, 2, 3, 7):
            with_threads(num_threads)
            out = rms_norm(x, weight)
            both = rms_norm(x, weight, residual=dout)
            gradients = torch.autograd.grad(out, (x, weight), dout), torch.autograd.grad(both, (x, weight), (dout, out))
            results.append([t.detach() for t in (out, *both, *gradients[0], *gradients[1])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_only_wanted_gradients(wanted):
    x, weight = torch.randn(9, 20), torch.randn(20)
    both = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(rms_norm(*both).sin().sum(), both)
    some = [t.clone().requires_grad_(needed) for t, needed in zip((x, weight), wanted)]
    rms_norm(*some).sin().sum().backward()
    for leaf, needed, gradient in zip(some, wanted, expected):
        assert torch.equal(leaf.grad, gradient) if needed else leaf.grad is None


def test_no_graph_without_gradients():
    assert rms_norm(torch.randn(3, 4), torch.randn(4)).grad_fn is None
    with torch.no_grad():
        assert rms_norm(torch.randn(3, 4, requires_grad=True), torch.randn(4)).grad_fn is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
def test_what_is_saved(dtype, has_residual):
    """The input, or the sum that is a result anyway, the weight, and one number a row: nothing else of that size."""
    x, weight = torch.randn(5, 6).to(dtype).requires_grad_(), torch.randn(6).to(dtype).requires_grad_()
    residual = torch.randn(5, 6).to(dtype) if has_residual else None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rms_norm(x, weight, residual=residual)
    normed = out[1] if has_residual else x
    assert [t.data_ptr() for t in saved[:2]] == [normed.data_ptr(), weight.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((5,), torch.float32)]


def test_backward_twice_accumulates():
    x, weight = torch.randn(6, 10, requires_grad=True), torch.randn(10, requires_grad=True)
    loss = rms_norm(x, weight).square().sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_second_derivative_is_the_references():
    x, weight = torch.randn(4, 7, requires_grad=True), torch.randn(7, requires_grad=True)

    def second(function):
        gradients = torch.autograd.grad(function(x, weight).sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight))

    for got, expected in zip(second(rms_norm), second(rms_norm_reference)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("outputs", ["both", "out", "new_residual"])
def test_second_derivative_with_residual(outputs):
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((4, 7), (4, 7), (7,))]
    chosen = {"both": (0, 1), "out": (0,), "new_residual": (1,)}[outputs]

    def second(function):
        results = function(leaves[0] * 2, leaves[2], residual=leaves[1], weight_offset=0.5)
        loss = sum(results[i].sin().sum() for i in chosen)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        loss = sum(g.square().sum() for g in gradients)
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(second(rms_norm), second(rms_norm_reference)):
        torch.testing.assert_close(got, expected)


def test_changed_input_is_noticed():
    x = torch.randn(4, 7, requires_grad=True)
    hidden = x * 1
    out = rms_norm(hidden, torch.ones(7))
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@modes
def test_registered_op(mode):
    mode = {"weight_offset": 0.0, **mode}
    modes = mode["casting"], mode["weight_offset"]
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (5, 8), (8,)))
    for added in (None, residual):
        torch.library.opcheck(torch.ops.herdkern.rms_norm.default, (x, added, weight, 1e-5, *modes))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    for dresidual in (residual, None):
        for needs in ((True, True), (False, True), (True, False)):
            arguments = x, dresidual, x, weight, torch.ones(5), *modes, *needs
            torch.library.opcheck(torch.ops.herdkern.rms_norm_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_with_residual(dtype):
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((6, 10), (6, 10), (10,))]

    def function(x, residual, weight):
        out, new_residual = rms_norm(x * 2, weight, residual=residual)
        return (out.float().sin() + new_residual).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_without_a_graph_break(dtype):
    x, weight = torch.randn(6, 10).to(dtype).requires_grad_(), torch.randn(10).to(dtype).requires_grad_()

    def function(x, weight):
        return rms_norm(x * 2, weight).float().sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    expected = torch.autograd.grad(function(x, weight), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_give_shapes(dtype):
    out = rms_norm(torch.empty(2, 3, 8, dtype=dtype, device="meta"), torch.empty(8, dtype=dtype, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 8), dtype, "meta")


def test_autocast_keeps_the_dtype_of_x():
    with torch.autocast("cpu", dtype=BF16):
        hidden = torch.nn.functional.linear(torch.randn(4, 8), torch.randn(16, 8))
        out = rms_norm(hidden, torch.randn(16))
        assert out.dtype == BF16
        assert rms_norm(torch.randn(4, 8), torch.randn(8)).dtype == FP32


def test_subclass_takes_the_registered_op():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 8)
    out = rms_norm(x.as_subclass(Tagged), torch.ones(8))
    assert torch.equal(out.as_subclass(torch.Tensor), rms_norm(x, torch.ones(8)))


def test_other_dtypes_fall_back_and_say_so():
    x, weight = torch.randn(3, 8).double(), torch.ones(8).double()
    expected = "native: dtype must be float32 or bfloat16 or float16, got float64"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        out = rms_norm(x, weight)
    assert torch.equal(out, rms_norm_reference(x, weight))
    with pytest.raises(NotImplementedError, match="asked for 'native'"):
        rms_norm(x, weight, backend="native")


def test_explicit_backends():
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, backend="reference"), rms_norm_reference(x, weight))
    assert torch.equal(rms_norm(x, weight, backend="native"), rms_norm(x, weight))


ERRORS = {
    "weight-shape": ((torch.zeros(3, 8), torch.zeros(7)), "rms_norm: weight must have shape (8,), got (7,)"),
    "weight-2d": ((torch.zeros(3, 8), torch.zeros(1, 8)), "rms_norm: weight must have shape (8,), got (1, 8)"),
    "scalar": ((torch.zeros(()), torch.zeros(1)), "rms_norm: x must have at least one dimension, got a scalar"),
    "weight-dtype": (
        (torch.zeros(3, 8), torch.zeros(8, dtype=BF16)),
        "rms_norm: weight must be float32, got bfloat16",
    ),
    "weight-dtype-bf16": (
        (torch.zeros(3, 8, dtype=BF16), torch.zeros(8, dtype=torch.float16)),
        "rms_norm: weight must be bfloat16 or float32, got float16",
    ),
    "residual-shape": (
        (torch.zeros(3, 8), torch.zeros(8), torch.zeros(8)),
        "rms_norm: residual must have the shape of x (3, 8), got (8,)",
    ),
    "residual-dtype": (
        (torch.zeros(3, 8, dtype=BF16), torch.zeros(8), torch.zeros(3, 8)),
        "rms_norm: residual must be bfloat16 as x is, got float32",
    ),
    "residual-device": (
        (torch.zeros(3, 8), torch.zeros(8), torch.zeros(3, 8, device="meta")),
        "rms_norm: residual must be on cpu, got meta",
    ),
    "weight-device": ((torch.zeros(3, 8), torch.zeros(8, device="meta")), "rms_norm: weight must be on cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    (x, weight, *residual), message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm(x, weight, residual=residual[0] if residual else None)


def test_unknown_casting():
    message = "rms_norm: casting must be one of llama, gemma, none, got 'meta'"
    with pytest.raises(ValueError, match=re.escape(message)):
        rms_norm(torch.zeros(3, 8), torch.zeros(8), casting="meta")
