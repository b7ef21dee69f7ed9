"""Linear cross entropy with its options: pairs of them against fp64, mixed dtypes, gradients in place, memory."""

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
from test_linear_cross_entropy import BF16, DTYPES, FP32, REDUCTIONS, example

from herdkern.ops import linear_cross_entropy, linear_cross_entropy_reference
from herdkern.ops.backend import available_isas, forced_isa

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "smoothing-z_loss": {"label_smoothing": 0.3, "z_loss": 1e-3},
    "smoothing-softcap": {"label_smoothing": 1.0, "softcap": 0.7},
    "z_loss-softcap": {"z_loss": 0.1, "softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 1.5},
}
SIZES = [(1, 2, 2), (7, 3, 5), (70, 33, 97), (45, 64, 301)]
EPS = torch.finfo(FP32).eps


def results(function, inputs, targets, douts, dtype=None, **options):
    """[loss, logps if asked for, gradient of each input that is not frozen]; douts None: not differentiated."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in inputs]
    out = function(*leaves, targets, **options)
    outs = out if isinstance(out, tuple) else (out,)
    pairs = [(o, d.to(o.dtype)) for o, d in zip(outs, douts) if d is not None]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs])
    return [*(o.detach() for o in outs), *gradients]


def assert_bound(got, ref, gold):
    for i, (g, r, t) in enumerate(zip(got, ref, gold, strict=True)):
        assert g.shape == r.shape, i
        assert g.dtype == r.dtype, i
        if g.numel():
            error, plain = ((x.double() - t).abs().max().item() for x in (g, r))
            allowed = 2 * plain + 4 * EPS * max(1.0, t.abs().max().item())
            assert error <= allowed, f"result {i}: {error / allowed:.2f} of the allowed error"


def plain(function_inputs, targets, douts, **options):
    """The reference with the roundings that the kernel states: a weight in fp32 has products of bf16 like one in bf16,
    and a scalar loss's 16-bit gradients are rounded before they meet their scale."""
    inputs = [x.detach().to(BF16 if function_inputs[0].dtype == BF16 else x.dtype) for x in function_inputs]
    inputs = [x.requires_grad_(leaf.requires_grad) for x, leaf in zip(inputs, function_inputs)]
    found = results(linear_cross_entropy_reference, inputs, targets, douts, **options)
    dtypes = [x.dtype for x in function_inputs if x.requires_grad]
    first = len(found) - len(dtypes)
    return found[:first] + [g.to(dtype) for g, dtype in zip(found[first:], dtypes)]


def check(inputs, targets, douts, **options):
    got = results(linear_cross_entropy, inputs, targets, douts, **options)
    gold = results(linear_cross_entropy_reference, inputs, targets, douts, torch.float64, **options)
    assert_bound(got, plain(inputs, targets, douts, **options), gold)


def leaves(n, dim, vocab_size, kind, frozen="neither"):
    """hidden, weight, targets; kind "mixed": an fp32 weight, of values that bf16 has, for bf16 hidden."""
    x, weight, targets = example(n, dim, vocab_size, FP32 if kind == "float32" else BF16)
    weight = weight.float() if kind == "mixed" else weight
    return [x.requires_grad_(frozen != "hidden"), weight.requires_grad_(frozen != "weight")], targets


KINDS = ["float32", "bfloat16", "mixed"]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_fp64(isa, kind, reduction, options):
    with forced_isa(isa):
        for size in SIZES:
            inputs, targets = leaves(*size, kind)
            dout = torch.randn(size[0]) if reduction == "none" else torch.tensor(-0.5)
            check(inputs, targets, [dout], reduction=reduction, **OPTIONS[options])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["neither", "hidden", "weight"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_logps_match_fp64(isa, kind, frozen, options):
    with forced_isa(isa):
        for size, reduction in itertools.product(SIZES, REDUCTIONS):
            inputs, targets = leaves(*size, kind, frozen)
            scalar = torch.randn(()) if kind == "float32" else torch.tensor(2.0)
            dloss, dlogps = torch.randn(size[0]) if reduction == "none" else scalar, torch.randn(size[0])
            for douts in ((dloss, dlogps), (dloss, None), (None, dlogps)):
                check(inputs, targets, douts, reduction=reduction, return_logps=True, **OPTIONS[options])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_half_changes_no_bit(kind, frozen, reduction):
    inputs, targets = leaves(70, 32, 200, kind)
    dout = torch.randn(70) if reduction == "none" else torch.tensor(1.0)
    both = results(linear_cross_entropy, inputs, targets, [dout], reduction=reduction)
    inputs[frozen == "weight"].requires_grad_(False)
    half = results(linear_cross_entropy, inputs, targets, [dout], reduction=reduction)
    assert torch.equal(half[0], both[0])
    assert torch.equal(half[1], both[1 if frozen == "weight" else 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_half_is_no_work(kind, reduction, with_threads):
    """Of three products without a frozen half, two are left with one: less than 0.9 of the processor time."""
    with_threads(1)

    def seconds(frozen):
        inputs, targets = leaves(512, 256, 4096, kind, frozen)
        start = time.thread_time()
        for _ in range(2):
            dout = torch.ones(512 if reduction == "none" else ())
            results(linear_cross_entropy, inputs, targets, [dout], reduction=reduction)
        return time.thread_time() - start

    rounds = [[seconds(frozen) for frozen in ("neither", "hidden", "weight")] for _ in range(5)]
    both, *halves = map(min, zip(*rounds))
    assert max(halves) < 0.9 * both


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_counts(dtype, options):
    x, weight, targets = example(12, 20, 70, dtype, ignored=1)
    for n, reduction in itertools.product((12, 0), REDUCTIONS):
        inputs = [x[:n].detach().requires_grad_(), weight.requires_grad_()]
        loss, logps = linear_cross_entropy(
            *inputs, targets[:n], reduction=reduction, return_logps=True, **OPTIONS[options]
        )
        assert loss.isnan() if reduction == "mean" else loss.eq(0).all()
        assert logps.eq(0).all()
        for out in (loss, logps):
            for gradient in torch.autograd.grad(out.sum(), inputs, retain_graph=True):
                assert gradient.eq(0).all()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(with_threads, isa, kind):
    inputs, targets = leaves(700, 40, 1201, kind)
    found = []
    with forced_isa(isa):
        for num_threads in (1, 2, 3, 7):
            with_threads(num_threads)
            for options in (OPTIONS["plain"], OPTIONS["all"]):
                douts = torch.tensor(1.0), torch.linspace(-1, 1, 700)
                found.append(results(linear_cross_entropy, inputs, targets, douts, return_logps=True, **options))
    for i, result in enumerate(found[2:]):
        assert all(torch.equal(a, b) for a, b in zip(result, found[i % 2]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", ["smoothing", "all"])
def test_second_derivatives(reduction, options):
    inputs, targets = leaves(6, 8, 11, "float32")

    def second(function, dtype):
        x, weight = (t.detach().to(dtype).requires_grad_() for t in inputs)
        loss, logps = function(x, weight, targets, reduction=reduction, return_logps=True, **OPTIONS[options])
        first = torch.autograd.grad(loss.square().sum() + logps.sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    got, ref = (second(f, FP32) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert_bound(got, ref, second(linear_cross_entropy_reference, torch.float64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(reduction, kind):
    inputs, targets = leaves(12, 8, 70, kind)

    def function(x, weight):
        loss, logps = linear_cross_entropy(
            x * 2, weight, targets, reduction=reduction, return_logps=True, **OPTIONS["all"]
        )
        return loss.sin().sum() + logps.cos().sum()

    torch.compiler.reset()  # one function in nine forms would meet the limit of recompilations
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    expected = torch.autograd.grad(function(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_of_its_own_hands_its_gradients_on_uncopied(dtype, monkeypatch):
    module = sys.modules["herdkern.ops.linear_cross_entropy"]
    made = []
    make = module.empty_gradients

    def noting(*args):
        gradients = make(*args)
        made.append([g.data_ptr() for g in gradients])
        return gradients

    monkeypatch.setattr(module, "empty_gradients", noting)
    for scale in (1.0, 0.5):
        x, weight, targets = example(30, 16, 90, dtype)
        x.requires_grad_()
        weight.requires_grad_()
        (linear_cross_entropy(x, weight, targets) * scale).backward()
        assert [x.grad.data_ptr(), weight.grad.data_ptr()] == made.pop()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_four_numbers_a_token_are_saved_beside_the_inputs(kind, reduction):
    (x, weight), targets = leaves(30, 16, 90, kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets, reduction=reduction, label_smoothing=0.1)
    assert [t.data_ptr() for t in saved[:3]] == [x.data_ptr(), weight.data_ptr(), targets.data_ptr()]
    assert [t.shape for t in saved[3:]] == [(4, 30)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_graph_gives_the_same_gradients_again(dtype):
    x, weight, targets = example(30, 16, 90, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets)
    found = [torch.autograd.grad(loss * s, (x, weight), retain_graph=True) for s in (2.0, 2.0, 1.0)]
    found.append(torch.autograd.grad(loss, (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert all(torch.equal(a, b * 2) for a, b in zip(found[0], found[2]))
    assert all(torch.equal(a, b) for a, b in zip(found[2], found[3]))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, weight))


def test_a_scale_that_is_no_power_of_two_rounds_once_more():
    x, weight, targets = example(30, 16, 90, BF16)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    once = results(linear_cross_entropy, inputs, targets, [torch.tensor(1.0)])
    scaled = results(linear_cross_entropy, inputs, targets, [torch.tensor(0.3)])
    for a, b in zip(once[1:], scaled[1:]):
        assert torch.equal((a.float() * torch.tensor(0.3)).to(BF16), b)


@pytest.mark.parametrize(("kind", "reduction"), [("float32", "mean"), ("bfloat16", "none"), ("mixed", "sum")])
def test_a_vocabulary_in_several_passes(kind, reduction):
    """The logits of 16 tokens, the fewest that are taken at once, do not fit into what may be held."""
    n, vocab_size = 34, 850_003
    inputs, _ = leaves(n, 4, vocab_size, kind)
    targets = torch.arange(n) * (vocab_size // n)
    targets[1], targets[2] = vocab_size - 1, -100
    dout = torch.linspace(1, 2, n) if reduction == "none" else torch.tensor(1.0)
    check(inputs, targets, [dout], reduction=reduction, label_smoothing=0.1)


MEMORY = """
import sys, torch
from pathlib import Path
from herdkern.ops import linear_cross_entropy
n, dim, vocab_size = map(int, sys.argv[1:4])
dtypes = [getattr(torch, name) for name in sys.argv[4:6]]
x = torch.randn(n, dim).to(dtypes[0]).requires_grad_()
weight = torch.randn(vocab_size, dim).to(dtypes[1]).requires_grad_()
targets = torch.randint(0, vocab_size, (n,))
reduction = sys.argv[6]
linear_cross_entropy(x[:8], weight[:8], targets[:8] % 8, reduction=reduction).sum().backward()
x.grad = weight.grad = None
def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
try:
    Path("/proc/self/clear_refs").write_text("5")
except OSError:
    print("no way to measure"); sys.exit()
before = status("VmHWM")
linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
gradients = x.grad.nbytes + weight.grad.nbytes
print((status("VmHWM") - before) / 1024 - gradients / 2**20)
"""


@pytest.mark.parametrize(
    "case",
    [
        "4096 8 60000 float32 float32 mean",  # 938 MiB of logits
        "600 200 33000 bfloat16 bfloat16 mean",  # the sums of dweight are held
        "300 400 130001 bfloat16 bfloat16 mean",  # some are not: 198 MiB of fp32
        "300 400 130001 bfloat16 bfloat16 none",
        "200 401 60000 bfloat16 float32 sum",
        "96 4 1300000 float32 float32 mean",  # not even a panel of tokens has all its logits at once
        "96 4 1300000 bfloat16 bfloat16 none",
    ],
)
def test_memory_beyond_inputs_and_gradients(tmp_path, case):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # what was freed before is gone, not kept
    command = [sys.executable, "-c", MEMORY, *case.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    if "no way" in done.stdout:
        pytest.skip("this system does not let a process reset its peak of memory")
    assert float(done.stdout) <= 64
