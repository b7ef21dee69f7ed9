"""Attention inside torch: opcheck, torch.compile, meta tensors, autograd's corners, a fork, and wrong calls."""

import hashlib
import multiprocessing
import re

import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMES,
    attention_with_lse,
    attention_with_lse_reference,
    borders,
    packed,
    short,
)

from herdkern.ops import attention, attention_reference


def normal(*shape, dtype=torch.float32, **options):
    return torch.randn(*shape, **options).to(dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_opcheck_forward(dtype, causal):
    batch = packed([5, 0, 9], dtype, (4, 2), 8)
    q, k, v = (x.requires_grad_() for x in (batch.q, batch.k, batch.v))
    op = torch.ops.herdkern.attention_forward.default
    torch.library.opcheck(op, (q, k, v, batch.cu_seqlens, batch.cu_seqlens, None, -1, 0 if causal else -1, 0.0, 0.35))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_opcheck_backward(dtype):
    batch = packed([5, 0, 9], dtype, (4, 2), 8)
    out, lse = attention_with_lse(batch.q, batch.k, batch.v, batch.cu_seqlens)
    arguments = (
        batch.dout,
        batch.q,
        batch.k,
        batch.v,
        out,
        lse,
        batch.cu_seqlens,
        batch.cu_seqlens,
        None,
        -1,
        0,
        0.0,
        0.35,
    )
    torch.library.opcheck(torch.ops.herdkern.attention_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_whole_graph_and_no_recompile_for_other_borders(dynamic):
    torch._dynamo.reset()

    def step(q, k, v, cu_seqlens):
        return attention(q * 2, k, v, cu_seqlens, max_seqlen=64).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q, k, v = (x.requires_grad_() for x in (normal(64, 4, 16), normal(64, 2, 16), normal(64, 2, 16)))
    for lengths in ([30, 34], [1, 63], [64, 0]):
        got = torch.autograd.grad(compiled(q, k, v, borders(lengths)), (q, k, v))
        expected = torch.autograd.grad(step(q, k, v, borders(lengths)), (q, k, v))
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)
        with torch._dynamo.config.patch(error_on_recompile=True):  # from the second call on
            compiled(q, k, v, borders([10, 54]))


def test_dynamic_compile_takes_other_token_counts_without_recompiling():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, lengths in ((40, [30, 10]), (50, [20, 20, 10]), (61, [61])):
        q, k, v = normal(tokens, 4, 16), normal(tokens, 2, 16), normal(tokens, 2, 16)
        assert torch.equal(compiled(q, k, v, borders(lengths)), attention(q, k, v, borders(lengths)))
        torch._dynamo.config.error_on_recompile = len(lengths) == 3
    torch._dynamo.config.error_on_recompile = False


def test_compiled_call_checks_the_borders():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = normal(8, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens must end with the number of tokens 8, got 7"):
        compiled(x, x, x, borders([7]))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_meta_tensors_give_shapes(dtype):
    q, kv = torch.empty(7, 4, 16, dtype=dtype, device="meta"), torch.empty(7, 2, 16, dtype=dtype, device="meta")
    q.requires_grad_()
    out, lse = attention_with_lse(q, kv, kv, torch.empty(3, dtype=torch.int32, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "meta")
    assert (lse.shape, lse.dtype) == ((4, 7), torch.float32)
    out.backward(torch.empty_like(out))
    assert q.grad.shape == q.shape


def test_lse_carries_no_gradient():
    batch = packed([6, 4], torch.float32, (2, 1), 8)
    q = batch.q.requires_grad_()
    for backend in ("native", "reference"):
        out, lse = attention_with_lse(q, batch.k, batch.v, batch.cu_seqlens, backend=backend)
        assert out.requires_grad
        assert not lse.requires_grad


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradient_of_one_input_alone(wanted):
    batch = packed([6, 40], torch.float32, (4, 2), 8)
    everything = dict(zip(NAMES, batch.run(attention_with_lse), strict=True))
    inputs = {"q": batch.q, "k": batch.k, "v": batch.v}
    inputs[wanted].requires_grad_()
    attention(*inputs.values(), batch.cu_seqlens).backward(batch.dout)
    assert torch.equal(inputs[wanted].grad, everything["d" + wanted])
    assert all(x.grad is None for name, x in inputs.items() if name != wanted)


def test_expanded_gradient_and_sum():
    """The gradient of a sum has stride 0 everywhere."""
    batch = packed([6, 40], torch.float32, (4, 2), 8)
    q, k, v = (x.requires_grad_() for x in (batch.q, batch.k, batch.v))
    got = torch.autograd.grad(attention(q, k, v, batch.cu_seqlens).sum(), (q, k, v))
    expected = torch.autograd.grad(attention_reference(q, k, v, batch.cu_seqlens).sum(), (q, k, v))
    torch.testing.assert_close(got, expected)


def test_second_derivative():
    batch = packed([3, 2], torch.float32, (2, 1), 4)
    q, k, v = (x.requires_grad_() for x in (batch.q, batch.k, batch.v))

    def gradient_norm(function):
        grads = torch.autograd.grad(function(q, k, v, batch.cu_seqlens).square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))

    torch.testing.assert_close(gradient_norm(attention), gradient_norm(attention_reference))


def test_runs_in_a_forked_child(with_threads):
    """Where the threads of the parent's pool do not exist. Small tensors: torch's own loops would hang there."""
    with_threads(2)
    batch = packed([300], torch.float32, (2, 1), 32)

    def digests():
        return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in batch.run(attention_with_lse)]

    expected = digests()  # starts the pool
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(digests()), daemon=True)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    assert queue.get() == expected


def call(**changes):
    arguments = {
        "q": torch.zeros(6, 4, 8),
        "k": torch.zeros(6, 2, 8),
        "v": torch.zeros(6, 2, 8),
        "cu_seqlens": borders([2, 4]),
    }
    options = {name: changes.pop(name) for name in list(changes) if name not in arguments}
    return attention(*(arguments | changes).values(), **options)


ERRORS = [
    ({"q": torch.zeros(6, 8)}, "q must be (total_q, num_heads, head_dim), got (6, 8)"),
    ({"k": torch.zeros(6, 2, 9)}, "k must be (total_k, num_kv_heads, 8), got (6, 2, 9)"),
    ({"k": torch.zeros(6, 8)}, "k must be (total_k, num_kv_heads, 8), got (6, 8)"),
    ({"v": torch.zeros(5, 2, 8)}, "v must have the shape of k (6, 2, 8), got (5, 2, 8)"),
    ({"q": torch.zeros(6, 3, 8)}, "num_heads of q must be a positive multiple of num_kv_heads=2, got 3"),
    ({"k": torch.zeros(6, 2, 8).bfloat16()}, "k must be float32 as q, got bfloat16"),
    ({"v": torch.zeros(6, 2, 8, device="meta")}, "v must be on cpu as q, got meta"),
    ({"cu_seqlens": borders([2, 4]).long()}, "cu_seqlens must be int32, got int64"),
    ({"cu_seqlens": borders([2, 4])[None]}, "cu_seqlens must have shape (num_docs + 1,), got (1, 3)"),
    ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens must have shape (num_docs + 1,), got (0,)"),
    (
        {"cu_seqlens": torch.tensor([0, 9, 2, 9, 6, 9], dtype=torch.int32)[::2]},
        "cu_seqlens must be contiguous, got stride 2; call .contiguous()",
    ),
    ({"cu_seqlens": torch.empty(3, dtype=torch.int32, device="meta")}, "cu_seqlens must be on cpu as q, got meta"),
    ({"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}, "cu_seqlens must start with 0, got 1"),
    ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens must end with the number of tokens 6, got 5"),
    (
        {"cu_seqlens": torch.tensor([0, 5, 3, 6], dtype=torch.int32)},
        "cu_seqlens must not decrease (entry 2 follows 5), got 3",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 2, 7], dtype=torch.int32)},
        "cu_seqlens_k must end with the number of tokens 6, got 7",
    ),
    ({"cu_seqlens_k": borders([6])}, "cu_seqlens_k must have as many entries as cu_seqlens (3), got 2"),
    (
        {"k": torch.zeros(9, 2, 8), "v": torch.zeros(9, 2, 8)},
        "k must have the 6 tokens of q, got 9; pass cu_seqlens_k where they differ",
    ),
    ({"softmax_scale": 0.0}, "softmax_scale must be positive and finite, got 0.0"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
    ({"max_seqlen": -1}, "max_seqlen must be at least 0, got -1"),
    (
        {"q": torch.zeros(6, 4, 257), "k": torch.zeros(6, 2, 257), "v": torch.zeros(6, 2, 257)},
        "head_dim of q must be 1 to 256, got 257",
    ),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_wrong_call(changes, message, backend):
    with pytest.raises(ValueError, match=re.escape("attention: " + message)):
        call(**changes, backend=backend)


def test_no_backend_for_a_dtype_says_why():
    x = torch.zeros(6, 2, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="dtype must be float32 or bfloat16 or float16, got float64"):
        attention(x, x, x, borders([6]), backend="native")
    with pytest.warns(UserWarning, match="attention: using 'reference' because native: dtype"):
        attention(x, x, x, borders([6]))


def test_reference_and_native_report_the_same_lse():
    batch = packed([6, 3], torch.float32, (2, 1), 8)
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens
    torch.testing.assert_close(attention_with_lse(*arguments)[1], attention_with_lse_reference(*arguments)[1])
