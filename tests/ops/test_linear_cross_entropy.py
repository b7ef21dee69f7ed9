"""Linear cross entropy against fp64 over dtypes, sizes, reductions and levels; memory, targets, errors and modes."""

import re

import pytest
import torch

from herdkern.ops import linear_cross_entropy, linear_cross_entropy_reference
from herdkern.ops.backend import available_isas, forced_isa

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16)]
REDUCTIONS = ["mean", "sum", "none"]
# (n, dim, vocab_size): one of each, odd ones, ends of tiles, several blocks of the vocabulary, several chunks of tokens
SIZES = [
    (1, 1, 1),
    (1, 2, 2),
    (7, 3, 5),
    (63, 32, 64),
    (16, 16, 96),
    (123, 63, 123),
    (100, 33, 97),
    (33, 300, 193),
    (200, 64, 301),
    (5, 16, 1000),
    (2000, 8, 70),
]


def example(n, dim, vocab_size, dtype, ignored=5):
    """x, weight, targets with every `ignored`-th one ignored; the logits are of order 1, as in training."""
    x, weight = torch.randn(n, dim).to(dtype), (torch.randn(vocab_size, dim) * dim**-0.5).to(dtype)
    targets = torch.randint(0, vocab_size, (n,))
    targets[ignored - 1 :: ignored] = -100
    return x, weight, targets


def with_targets(function, targets, **options):
    return lambda x, weight: function(x, weight, targets, **options)


def dout_of(reduction):
    """None: a random one for each token. A scalar loss's 16-bit gradients are rounded before they meet its gradient,
    so that a power of two keeps them exact; test_a_scale_that_is_no_power_of_two_rounds_once_more has the rest."""
    return None if reduction == "none" else torch.tensor(-0.5)


def both(targets, **options):
    return [with_targets(f, targets, **options) for f in (linear_cross_entropy, linear_cross_entropy_reference)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_fp64(assert_matches_fp64, isa, dtype, reduction, size):
    x, weight, targets = example(*size, dtype)
    with forced_isa(isa):
        assert_matches_fp64(*both(targets, reduction=reduction), [x, weight], dout_of(reduction))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary_in_several_chunks(assert_matches_fp64, dtype):
    x, weight, targets = example(1000, 8, 9000, dtype)
    assert_matches_fp64(*both(targets), [x, weight], dout_of("mean"))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 10.0])
def test_flat_and_sharp_distributions(assert_matches_fp64, isa, dtype, sharpness):
    x, weight, targets = example(60, 48, 200, dtype)
    with forced_isa(isa):
        assert_matches_fp64(*both(targets), [x, (weight * sharpness).to(dtype)], dout_of("mean"))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_and_right(assert_matches_fp64, isa, dtype):
    # the probability of the target is almost 1: its gradient is a difference that must not cancel
    weight = torch.eye(100, 128).to(dtype) * 4
    targets = torch.arange(100)
    with forced_isa(isa):
        assert_matches_fp64(*both(targets), [weight.clone() * 0.75, weight], dout_of("mean"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["row-slice", "column-slice", "transposed", "odd-pitch"])
def test_layouts(assert_matches_fp64, dtype, layout):
    x, weight, targets = example(40, 20, 70, dtype)

    def shaped(t):
        if layout == "row-slice":
            return t.repeat(2, 1)[::2]
        if layout == "transposed":
            return t.t().contiguous().t()
        wide = torch.nn.functional.pad(t, (2, 3 if layout == "odd-pitch" else 4))
        return wide[:, 2 : 2 + t.shape[1]]

    assert_matches_fp64(*both(targets), [shaped(x), shaped(weight)], dout_of("mean"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 69, 1000])
def test_ignore_index(assert_matches_fp64, dtype, reduction, ignore_index):
    x, weight, targets = example(40, 20, 70, dtype, ignored=100)
    targets[::3] = ignore_index
    functions = both(targets, ignore_index=ignore_index, reduction=reduction)
    assert_matches_fp64(*functions, [x, weight], dout_of(reduction))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["all-ignored", "no-tokens"])
def test_nothing_counts_as_in_torch(dtype, reduction, case):
    x, weight, targets = example(12, 20, 70, dtype, ignored=1)
    x, weight = x[: 0 if case == "no-tokens" else 12].requires_grad_(), weight.requires_grad_()
    targets = targets[: x.shape[0]]
    results = []
    for function in both(targets, reduction=reduction):
        loss = function(x, weight)
        results.append((loss, *torch.autograd.grad(loss.sum(), (x, weight))))
    for got, expected in zip(*results):
        assert got.shape == expected.shape
        assert torch.equal(got.isnan(), expected.isnan())
    assert results[0][1].eq(0).all()
    assert results[0][2].eq(0).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_for_any_number_of_threads(with_threads, isa, dtype, reduction):
    x, weight, targets = example(2000, 40, 300, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    results = []
    with forced_isa(isa):
        for num_threads in (1, 2, 3, 7):
            with_threads(num_threads)
            loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad(loss.sin().sum(), (x, weight))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_does_not_depend_on_neighbours_or_on_gradients(isa, dtype):
    x, weight, targets = example(500, 40, 300, dtype)
    with forced_isa(isa):
        together = linear_cross_entropy(x, weight, targets, reduction="none")
        alone = [linear_cross_entropy(x[i : i + 1], weight, targets[i : i + 1], reduction="none") for i in (0, 97, 499)]
        with_gradient = linear_cross_entropy(x.requires_grad_(), weight, targets)
        assert torch.equal(torch.cat(alone), together[[0, 97, 499]])
        assert torch.equal(with_gradient, linear_cross_entropy(x.detach(), weight, targets))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_only_wanted_gradients(wanted, reduction):
    x, weight, targets = example(40, 20, 70, FP32)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, targets, reduction=reduction).sum(), leaves)
    some = [t.clone().requires_grad_(needed) for t, needed in zip((x, weight), wanted)]
    linear_cross_entropy(*some, targets, reduction=reduction).sum().backward()
    for leaf, needed, gradient in zip(some, wanted, expected):
        assert torch.equal(leaf.grad, gradient) if needed else leaf.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_graph_without_gradients(reduction):
    x, weight, targets = example(4, 8, 9, FP32)
    assert linear_cross_entropy(x, weight, targets, reduction=reduction).grad_fn is None
    with torch.no_grad():
        assert linear_cross_entropy(x.requires_grad_(), weight, targets, reduction=reduction).grad_fn is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_accumulates(reduction):
    x, weight, targets = example(30, 8, 90, FP32)
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum() * 0.5
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative(assert_matches_fp64, reduction):
    x, weight, targets = example(6, 8, 11, FP32)

    def gradient_norm(function):
        def norm(x, weight):
            loss = function(x, weight, targets, reduction=reduction).square().sum()
            return sum(g.square().sum() for g in torch.autograd.grad(loss, (x, weight), create_graph=True))

        return norm

    functions = gradient_norm(linear_cross_entropy), gradient_norm(linear_cross_entropy_reference)
    assert_matches_fp64(*functions, [x, weight], torch.ones(()))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("numbers", [(0.0, 0.0, 0.0), (0.1, 1e-2, 3.0)], ids=["plain", "options"])
def test_registered_op(reduction, numbers):
    x, weight, targets = example(6, 8, 11, FP32)
    x.requires_grad_()
    weight.requires_grad_()
    forward = torch.ops.herdkern.linear_cross_entropy.default
    torch.library.opcheck(forward, (x, weight, targets, -100, reduction, *numbers, reduction > 0, reduction > 0))


def test_registered_gradient_op():
    x, weight, targets = example(6, 8, 11, FP32)
    stats = torch.ops.herdkern.linear_cross_entropy(x, weight, targets, -100, 0, 0.1, 0.1, 2.0, False, False)[2]
    gradients = torch.ops.herdkern.linear_cross_entropy_gradients.default
    for needs in ((True, True), (False, True), (True, False)):
        for dlogps in (None, torch.randn(6)):
            arguments = (torch.randn(6), dlogps, stats, x, weight, targets, -100, 0.1, 0.1, 2.0, *needs)
            torch.library.opcheck(gradients, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_a_graph_break(reduction):
    x, weight, targets = example(12, 8, 70, BF16)
    x.requires_grad_()
    weight.requires_grad_()

    def function(x, weight):
        return linear_cross_entropy(x * 2, weight, targets, reduction=reduction).sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weight), (x, weight))
    expected = torch.autograd.grad(function(x, weight), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_tensors_give_shapes(reduction):
    x, weight, targets = (t.to("meta") for t in example(12, 8, 70, BF16))
    out = linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert (out.shape, out.dtype, out.device.type) == ((12,) if reduction == "none" else (), FP32, "meta")


def test_autocast_casts_like_a_linear_layer():
    x, weight, targets = example(40, 20, 70, FP32)
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_cross_entropy(x, weight, targets)
        reference = linear_cross_entropy(x, weight, targets, backend="reference")
    assert loss.dtype == FP32
    assert torch.equal(loss, linear_cross_entropy(x.to(BF16), weight.to(BF16), targets))
    torch.testing.assert_close(loss, reference)
    gradients = torch.autograd.grad(loss, (x, weight))
    assert [g.dtype for g in gradients] == [FP32, FP32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_fall_back_and_say_so(dtype):
    x, weight, targets = example(6, 8, 11, dtype)
    expected = "linear_cross_entropy: using 'reference' because native: dtype must be float32 or bfloat16, got "
    with pytest.warns(UserWarning, match=re.escape(expected + str(dtype)[6:])):
        got = linear_cross_entropy(x, weight, targets)
    assert torch.equal(got, linear_cross_entropy_reference(x, weight, targets))


def errors():
    x, weight, targets = example(4, 8, 6, FP32)
    bad = targets.clone()
    bad[2] = 6
    return {
        "hidden-3d": ((x[None], weight, targets), "hidden must be (n, dim), got (1, 4, 8)"),
        "no-dim": ((x[:, :0], weight[:, :0], targets), "hidden must be (n, dim), got (4, 0)"),
        "weight": ((x, weight[:, :7], targets), "weight must have shape (vocab_size, 8), got (6, 7)"),
        "no-vocabulary": ((x, weight[:0], targets), "weight must have shape (vocab_size, 8), got (0, 8)"),
        "dtype": ((x, weight.to(BF16), targets), "weight must be float32 as hidden is, got bfloat16"),
        "targets-shape": ((x, weight, targets[:3]), "targets must have shape (4,), got (3,)"),
        "targets-dtype": ((x, weight, targets.int()), "targets must be int64, got int32"),
        "device": ((x, weight.to("meta"), targets), "weight must be on cpu, got meta"),
        "beyond": ((x, weight, bad), "targets must lie in [0, 6) or be ignore_index=-100, got 6 at index 2"),
        "negative": ((x, weight, bad - 7), "targets must lie in [0, 6) or be ignore_index=-100, got "),
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", errors())
def test_errors(case, backend):
    arguments, message = errors()[case]
    with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {message}")):
        linear_cross_entropy(*arguments, backend=backend)


def test_unknown_reduction():
    x, weight, targets = example(4, 8, 6, FP32)
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, got 'average'"):
        linear_cross_entropy(x, weight, targets, reduction="average")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must lie in [0, 1], got 1.5"),
        ({"z_loss": -1.0}, "z_loss must be 0 (off) or positive, got -1.0"),
        ({"softcap": float("inf")}, "softcap must be 0 (off) or positive, got inf"),
    ],
)
def test_unusable_numbers(options, message):
    with pytest.raises(ValueError, match=re.escape(f"linear_cross_entropy: {message}")):
        linear_cross_entropy(*example(4, 8, 6, FP32), **options)
