"""Linear cross entropy in Triton against fp64: dtypes, options, several chunks and parts, the registered op.

For 16-bit inputs the kernel rounds the gradient of the logits to 16 bits before the products that follow, as every GPU
implementation does; the reference that measures its error (`rounded`) does the same.
"""

import pytest
import torch
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops import linear_cross_entropy, linear_cross_entropy_reference

pytestmark = pytest.mark.triton
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((BF16, FP32), id="bf16-weight-fp32"),
]
OPTIONS = {
    "plain": {},
    "smoothing-and-z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "softcap": {"softcap": 5.0, "label_smoothing": 0.2},
}
SIZES = [(1, 1, 1), (7, 3, 5), (33, 30, 97)]


@pytest.fixture
def small_chunks(monkeypatch):
    from herdkern.ops.triton import linear_cross_entropy as module

    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 104 * 10)  # ten tokens of the largest size
    monkeypatch.setattr(module, "_PART_BYTES", 2 * 30 * 40)  # forty rows of its float32 weight


def example(size, dtypes):
    n, dim, vocab_size = size
    targets = torch.randint(0, vocab_size, (n,))
    targets[4::5] = -100
    weight = torch.randn(vocab_size, dim) * dim**-0.5
    return torch.randn(n, dim).to(dtypes[0]), weight.to(dtypes[1]), targets


class Product(torch.autograd.Function):
    """hidden @ weight.T in fp32 whose backward pass takes the gradient in the dtype of hidden."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.to(hidden.dtype).float().T

    @staticmethod
    def backward(ctx, dlogits):
        hidden, weight = ctx.saved_tensors
        dlogits = dlogits.to(hidden.dtype).float()
        dhidden = dlogits @ weight.to(hidden.dtype).float()
        return dhidden.to(hidden.dtype), (dlogits.T @ hidden.float()).to(weight.dtype)


def rounded(hidden, weight, targets, **options):
    if hidden.dtype != BF16:
        return linear_cross_entropy_reference(hidden, weight, targets, **options)
    return linear_cross_entropy_reference(Product.apply(hidden, weight), torch.eye(len(weight)), targets, **options)


def sum_of(out):
    return out[0] + out[1].sum() if isinstance(out, tuple) else out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_matches_fp64(assert_matches_fp64, size, dtypes, options, reduction):
    hidden, weight, targets = example(size, dtypes)
    options = {"reduction": reduction, **OPTIONS[options]}
    dout = torch.ones(()) if reduction != "none" else None

    def op(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, backend="triton", **options)

    assert_matches_fp64(op, lambda h, w: rounded(h, w, targets, **options), [hidden, weight], dout)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_log_probabilities_and_their_gradient(assert_matches_fp64, dtypes, reduction):
    hidden, weight, targets = example((23, 8, 61), dtypes)
    options = {"reduction": reduction, "return_logps": True, "softcap": 9.0}

    def op(hidden, weight):
        return sum_of(linear_cross_entropy(hidden, weight, targets, backend="triton", **options))

    assert_matches_fp64(op, lambda h, w: sum_of(rounded(h, w, targets, **options)), [hidden, weight])


def test_several_blocks_of_the_vocabulary(assert_matches_fp64):
    hidden, weight, targets = example((3, 4, 9001), (FP32, FP32))
    op = lambda h, w: linear_cross_entropy(h, w, targets, backend="triton")  # noqa: E731
    assert_matches_fp64(op, lambda h, w: linear_cross_entropy_reference(h, w, targets), [hidden, weight])


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(wanted, reduction):
    hidden, weight, targets = example((7, 3, 5), (FP32, FP32))
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    some = [x.clone().requires_grad_(needed) for x, needed in zip((hidden, weight), wanted)]
    for leaves in (both, some):
        linear_cross_entropy(*leaves, targets, reduction=reduction, backend="triton").sum().backward()
    for leaf, needed, other in zip(some, wanted, both):
        assert torch.equal(leaf.grad, other.grad) if needed else leaf.grad is None


def test_backward_twice_accumulates():
    hidden, weight, targets = example((7, 3, 5), (FP32, FP32))
    hidden.requires_grad_()
    loss = 3 * linear_cross_entropy(hidden, weight, targets, backend="triton")
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)


def test_ignored_targets_no_tokens_and_a_target_that_is_no_token_id():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    targets = torch.full((3,), -100)
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
    loss.backward()
    assert loss.isnan()
    assert not hidden.grad.any()
    assert not weight.grad.any()
    none = linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum", backend="triton")
    none.backward()
    assert none == 0
    losses = linear_cross_entropy(hidden, weight, torch.tensor([0, 5, 4]), reduction="none", backend="triton")
    assert losses.isnan().tolist() == [False, True, False]


def test_registered_op():
    hidden, weight, targets = example((7, 3, 5), (FP32, FP32))
    linear_cross_entropy(hidden, weight, targets, backend="triton")  # registers it
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    op = torch.ops.herdkern.triton_linear_cross_entropy.default
    torch.library.opcheck(op, (*leaves, targets, -100, 2, 0.0, 0.0, 0.0, True, True))
    torch.library.opcheck(op, (*leaves, targets, -100, 0, 0.1, 0.1, 5.0, False, False))
