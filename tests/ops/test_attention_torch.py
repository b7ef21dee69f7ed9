"""Attention inside torch: gradcheck, opcheck, torch.compile, meta tensors, autograd's corners, a fork and threads."""

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMES,
    Packed,
    attention_with_lse,
    attention_with_lse_reference,
    borders,
    packed,
    short,
)

from herdkern.ops import attention, attention_reference


def normal(*shape, dtype=torch.float32, **options):
    return torch.randn(*shape, **options).to(dtype)


FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window_size": (2, 0)},
    "around": {"causal": False, "window_size": (2, 1)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "scale": {"softmax_scale": 0.7},
    "everything": {"causal": False, "window_size": (3, 1), "softcap": 1.5, "sinks": True, "softmax_scale": 0.7},
}
features = pytest.mark.parametrize("feature", FEATURES)


def split(feature: str) -> tuple[bool, dict]:
    """Whether there are sinks, and the options of the call."""
    options = dict(FEATURES[feature])
    return options.pop("sinks", False), options


def op_options(causal=True, window_size=(-1, -1), softcap=0.0, softmax_scale=0.35) -> tuple:
    """The last arguments of the registered op."""
    return window_size[0], 0 if causal else window_size[1], softcap, softmax_scale


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_opcheck_forward(dtype, feature):
    sinks, options = split(feature)
    batch = packed([5, 0, 9], dtype, (4, 2), 8, sinks=sinks)
    leaves = batch.leaves()
    arguments = leaves["q"], leaves["k"], leaves["v"], batch.cu_seqlens, batch.cu_seqlens, leaves.get("sinks")
    torch.library.opcheck(torch.ops.herdkern.attention_forward.default, (*arguments, *op_options(**options)))


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_opcheck_backward(dtype, feature):
    sinks, options = split(feature)
    batch = packed([5, 0, 9], dtype, (4, 2), 8, lengths_k=[4, 2, 11], sinks=sinks)
    borders_and_options = batch.cu_seqlens, batch.cu_seqlens_k, batch.sinks, *op_options(**options)
    out, lse = torch.ops.herdkern.attention_forward(batch.q, batch.k, batch.v, *borders_and_options)
    arguments = batch.dout, batch.q, batch.k, batch.v, out, lse, *borders_and_options
    torch.library.opcheck(torch.ops.herdkern.attention_backward.default, arguments)


def reference_in_fp64(batch: Packed, options: dict):
    """(function of leaves, leaves)"""

    def function(q, k, v, *sinks):
        borders = {"cu_seqlens": batch.cu_seqlens, "cu_seqlens_k": batch.cu_seqlens_k}
        return attention_reference(q, k, v, sinks=sinks[0] if sinks else None, **borders, **options)

    return function, tuple(batch.leaves(torch.float64).values())


@features
@pytest.mark.parametrize("lengths_k", [None, [2, 0, 5]], ids=["same", "other"])
def test_gradcheck_of_the_reference(lengths_k, feature):
    """In fp64, against differences; the first document has a query that sees no key."""
    sinks, options = split(feature)
    batch = packed([3, 1, 4], torch.float64, (4, 2), 3, lengths_k=lengths_k, sinks=sinks)
    torch.autograd.gradcheck(*reference_in_fp64(batch, options))


@features
def test_gradgradcheck_of_the_reference(feature):
    sinks, options = split(feature)
    batch = packed([3, 2], torch.float64, (2, 1), 2, sinks=sinks)
    torch.autograd.gradgradcheck(*reference_in_fp64(batch, options))


def fifty_packings() -> list[list[int]]:
    """Lengths of documents: other numbers of documents and of tokens each time, empty documents among them."""
    rng = random.Random(0)
    return [[rng.choice([0, 1, rng.randint(2, 60)]) for _ in range(rng.randint(2, 12))] + [2] for _ in range(50)]


@features
def test_fifty_packings_and_no_recompile(feature):
    """One graph, compiled once: another number of documents and of tokens is no reason for a second."""
    sinks, options = split(feature)
    torch._dynamo.reset()

    def step(q, k, v, sinks, cu_seqlens):
        return attention(q * 2, k, v, cu_seqlens, sinks=sinks, max_seqlen=64, **options).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(fifty_packings()):
        batch = packed(lengths, torch.float32, (4, 2), 16, sinks=sinks, seed=number)
        leaves = batch.leaves()
        inputs, arguments = (
            list(leaves.values()),
            (*(leaves.get(x) for x in ("q", "k", "v", "sinks")), batch.cu_seqlens),
        )
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = torch.autograd.grad(compiled(*arguments), inputs)
        for x, y in zip(got, torch.autograd.grad(step(*arguments), inputs), strict=True):
            assert torch.equal(x, y)


def test_fifty_packings_with_other_keys_and_no_recompile():
    """The same with lengths of k of their own and bf16, without a gradient: prefill of what generation does."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(fifty_packings()):
        batch = packed(lengths, torch.bfloat16, (4, 2), 32, lengths_k=[3 + 2 * n for n in lengths], seed=number)
        arguments, options = (batch.q, batch.k, batch.v, batch.cu_seqlens), {"cu_seqlens_k": batch.cu_seqlens_k}
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(*arguments, **options)
        assert torch.equal(got, attention(*arguments, **options))


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


def test_compiled_call_checks_the_borders():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = normal(8, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens must end with the number of tokens 8, got 7"):
        compiled(x, x, x, borders([7]))


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_meta_tensors_give_shapes(dtype, feature):
    sinks, options = split(feature)
    q, kv = torch.empty(7, 4, 16, dtype=dtype, device="meta"), torch.empty(7, 2, 16, dtype=dtype, device="meta")
    q.requires_grad_()
    options["sinks"] = torch.empty(4, device="meta", requires_grad=True) if sinks else None
    out, lse = attention_with_lse(q, kv, kv, torch.empty(3, dtype=torch.int32, device="meta"), **options)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "meta")
    assert (lse.shape, lse.dtype) == ((4, 7), torch.float32)
    out.backward(torch.empty_like(out))
    assert q.grad.shape == q.shape
    assert not sinks or options["sinks"].grad.shape == (4,)


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
    everything = dict(zip(NAMES, batch.run(attention_with_lse)))
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


@features
def test_second_derivative(feature):
    sinks, options = split(feature)
    batch = packed([3, 2], torch.float32, (2, 1), 4, sinks=sinks)
    inputs = list(batch.leaves().values())

    def gradient_norm(function):
        out = function(*inputs[:3], batch.cu_seqlens, sinks=inputs[3] if sinks else None, **options)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    torch.testing.assert_close(gradient_norm(attention), gradient_norm(attention_reference))


def _tied(x, tie):
    """q, k, v that share tensors or are made from one another."""
    h = x * 1.5
    return {"k is v": (x * 1.0, h, h), "q is k is v": (h, h, h), "q from k": (h * 2, h, x), "leaves": (x, x, x)}[tie]


@pytest.mark.parametrize("tie", ["k is v", "q is k is v", "q from k", "leaves"])
def test_second_derivative_of_tied_inputs(tie):
    x = (0.3 * torch.randn(7, 2, 8)).requires_grad_()  # small, so that errors do not grow with the powers of x

    def gradients(function):
        out = function(*_tied(x, tie), borders([3, 4]))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    torch.testing.assert_close(gradients(attention), gradients(attention_reference))


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_runs_in_a_forked_child(dtype, feature, with_threads):
    """Where the threads of the parent's pool do not exist. Small tensors: torch's own loops would hang there."""
    with_threads(2)
    sinks, options = split(feature)
    batch = packed([300], dtype, (2, 1), 32, sinks=sinks)

    def digests():
        results = batch.run(attention_with_lse, **options)
        return [hashlib.sha256(x.view(torch.uint8).numpy().tobytes()).hexdigest() for x in results]

    expected = digests()  # starts the pool
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(digests()), daemon=True)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == 0
    assert queue.get() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_calls_from_several_python_threads_at_once(dtype, with_threads):
    """The GIL is released in the kernels: calls run beside each other and may not share anything."""
    with_threads(2)
    _, options = split("everything")
    batches = [packed([200 + 20 * i, 0, 33], dtype, (4, 2), 16 + 8 * i, sinks=True, seed=i) for i in range(4)]
    expected = [batch.run(attention_with_lse, **options) for batch in batches]
    wrong, start = [], threading.Barrier(len(batches))

    def work(i):
        torch.set_num_threads(2)
        start.wait()
        for _ in range(20):
            got = batches[i].run(attention_with_lse, **options)
            if not all(torch.equal(x, y) for x, y in zip(got, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("value", "is_reference"), [("reference", True), ("native", False), ("auto", False), ("", False)]
)
def test_environment_variable_chooses_the_backend(value, is_reference):
    code = """
import torch
from herdkern.ops import attention, attention_reference
torch.manual_seed(0)
q, k, v = torch.randn(3, 70, 2, 40)
borders = torch.tensor([0, 30, 70], dtype=torch.int32)
out, expected = attention(q, k, v, borders), attention_reference(q, k, v, borders)
assert torch.allclose(out, expected, atol=1e-5)
print(torch.equal(out, expected))
"""
    environment = {**os.environ, "HERDKERN_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(is_reference)


def test_environment_variable_of_an_unknown_backend():
    environment = {**os.environ, "HERDKERN_BACKEND": "fast"}
    command = [sys.executable, "-c", "import herdkern.ops"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HERDKERN_BACKEND must be one of auto, native, triton, reference, got 'fast'" in done.stderr


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_kernels_take_every_feature(dtype, feature):
    """No call of these falls back to the reference with a warning."""
    sinks, options = split(feature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed([5, 3], dtype, (2, 1), 8, sinks=sinks).run(attention_with_lse, **options)


def test_gradient_of_the_sinks_alone():
    batch = packed([6, 40], torch.float32, (4, 2), 8, sinks=True)
    expected = batch.run(attention_with_lse)[5]
    sinks = batch.sinks.clone().requires_grad_()
    attention(batch.q, batch.k, batch.v, batch.cu_seqlens, sinks=sinks).backward(batch.dout)
    assert torch.equal(sinks.grad, expected)


def test_reference_and_native_report_the_same_lse():
    batch = packed([6, 3], torch.float32, (2, 1), 8)
    arguments = batch.q, batch.k, batch.v, batch.cu_seqlens
    torch.testing.assert_close(attention_with_lse(*arguments)[1], attention_with_lse_reference(*arguments)[1])
