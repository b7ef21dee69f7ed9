"""The short path of eager mode, its conditions, and torch.compile with the code generator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from herdkern.ops import attention, linear_cross_entropy, native_op, rms_norm, rope, rope_qk, rope_table, swiglu
from herdkern.ops.native_op import is_plain_eager, rows


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "herdkern":
            self.ours.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_plain_tensors_and_parameters_take_the_short_path():
    assert is_plain_eager((torch.zeros(2), 1.0, torch.nn.Parameter(torch.zeros(2))))


def test_meta_tensors_do_not():
    assert not is_plain_eager((torch.zeros(2, device="meta"),))


def test_subclasses_do_not():
    class Tagged(torch.Tensor):
        pass

    assert not is_plain_eager((torch.zeros(2).as_subclass(Tagged),))


def test_dispatch_modes_see_the_op():
    with Counting() as mode:
        assert not is_plain_eager((torch.zeros(2),))
        rms_norm(torch.ones(2, 4), torch.ones(4))
    assert mode.ours == ["herdkern::rms_norm"]


def results_of_all_ops(dtype):
    """Results and gradients of each op that computes with numbers from Python, on fixed inputs."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape, of=dtype):
        return torch.randn(shape, generator=draw, dtype=torch.float32).to(of).requires_grad_()

    x, residual, weight, gate, up = leaf(6, 8), leaf(6, 8), leaf(8), leaf(6, 8), leaf(6, 8)
    q, k, head = leaf(6, 2, 8), leaf(6, 1, 8), leaf(11, 8)
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "return_logps": True}
    calls = [
        ((x, residual, weight), rms_norm(x, weight, residual=residual, eps=1e-5, casting="none", weight_offset=1.0)),
        ((x, weight), rms_norm(x, weight, casting="gemma", weight_offset=1.0)),
        ((gate, up), swiglu(gate, up)),
        ((gate,), swiglu(gate)),
        ((q, k), rope_qk(q, k, *rope_table(6, 8), cu_seqlens=cu_seqlens)),
        ((x, head), linear_cross_entropy(x, head, torch.arange(6), **options)),
    ]
    found = []
    for leaves, out in calls:
        outs = out if isinstance(out, tuple) else (out,)
        loss = sum((o * 0.5).sum() for o in outs)
        found += [*outs, *torch.autograd.grad(loss, leaves)]
    return [t.detach() for t in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_from_python_promote_nothing(dtype):
    """Whatever torch's default dtype is: the same dtypes, the same bits."""
    expected = results_of_all_ops(dtype)
    torch.set_default_dtype(torch.float64)
    try:
        got = results_of_all_ops(dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert {t.dtype for t in got} <= {dtype, torch.float32}
    assert all(map(torch.equal, got, expected))


def test_function_modes_do_not():
    with torch.device("cpu"):
        assert not is_plain_eager((torch.zeros(2),))


def test_functorch_does_not():
    seen = []

    def function(x):
        seen.append(is_plain_eager((x,)))
        return x.sum()

    torch.func.grad(function)(torch.zeros(2))
    assert seen == [False]


def test_without_torchs_private_names_every_call_takes_the_registered_op(monkeypatch):
    monkeypatch.setattr(native_op, "_num_dispatch_modes", lambda: 1)
    assert not is_plain_eager((torch.zeros(2),))
    x = torch.randn(3, 8, requires_grad=True)
    got = torch.autograd.grad(rms_norm(x, torch.ones(8)).sin().sum(), x)
    monkeypatch.undo()
    assert torch.equal(got[0], torch.autograd.grad(rms_norm(x, torch.ones(8)).sin().sum(), x)[0])


@pytest.mark.parametrize(
    ("shape", "change", "stride", "copies"),
    [
        ((3, 8), lambda x: x, 8, False),
        ((3, 4, 8), lambda x: x, 8, False),
        ((8,), lambda x: x, 8, False),
        ((6, 8), lambda x: x[::2], 16, False),
        ((6, 8), lambda x: x[:, 2:5], 8, False),
        ((6, 8), lambda x: x.t(), 6, True),
        ((6, 8), lambda x: x[:, ::2], 4, True),
        ((1, 8), lambda x: x.expand(5, 8), 8, True),
        ((3, 4, 8), lambda x: x[:, 1:3], 8, True),
    ],
)
def test_rows(shape, change, stride, copies):
    x = change(torch.randn(shape))
    result, distance = rows(x)
    assert torch.equal(result, x)
    assert distance == stride
    assert (result.data_ptr() != x.data_ptr()) == copies


def test_a_block_of_all_ops_compiles_without_a_graph_break():
    """torch.compile with its code generator over the five ops, forward and backward."""
    cos, sin = rope_table(12, 8)
    cu_seqlens, positions = torch.tensor([0, 5, 12], dtype=torch.int32), torch.cat([torch.arange(5), torch.arange(7)])

    def block(x, weight, head, targets):
        hidden = rms_norm(x, weight)
        q = rope(hidden.view(12, 2, 8), cos, sin, positions)
        hidden = x + attention(q, q, hidden.view(12, 2, 8), cu_seqlens).flatten(1)
        return linear_cross_entropy(hidden + swiglu(hidden, hidden * 2), head, targets)

    leaves = [torch.randn(shape, requires_grad=True) for shape in ((12, 16), (16,), (30, 16))]
    targets = torch.randint(0, 30, (12,))
    expected = block(*leaves, targets)
    got = torch.compile(block, fullgraph=True)(*leaves, targets)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_forward_mode_is_refused_and_not_taken_as_zero():
    x, borders = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="attention_forward: no backend can run this call in forward mode"):
        torch.func.jvp(lambda q: attention(q, x, x, borders), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="in forward mode"):
            attention(dual, x, x, borders)
        assert attention(x, x, x, borders).isfinite().all()
    _, tangent = torch.func.jvp(lambda q: attention(q, x, x, borders, backend="reference"), (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0
