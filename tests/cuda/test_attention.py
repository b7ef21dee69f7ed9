"""Packed attention of csrc/cuda against fp64: every mask, groups of heads, documents of every kind, leaks, order, bits.

The plain 16-bit implementation rounds weights and dS to the dtype of the inputs for their products, as the kernels do.
"""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import Packed, assert_bound, borders, packed, relayout
from attention_grid import HEADS, LENGTHS, MASKS
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops import attention_cuda
from herdkern.ops.attention import register_attention

BF16, FP16 = torch.bfloat16, torch.float16
EVERYTHING = {"causal": False, "window_size": (20, 5), "softcap": 2.0}
CASES = {  # dtype, heads, head_dim, lengths, lengths_k, options; "sinks": they are there
    "causal": (BF16, (4, 2), 64, [1, 33, 0, 70], None, {}),
    "full": (FP16, (2, 2), 64, [40, 9], None, {"causal": False}),
    "two-tiles": (BF16, (1, 1), 64, [150], None, {"window_size": (70, 3)}),
    "everything-128": (BF16, (4, 2), 128, [37, 2], None, {**EVERYTHING, "sinks": True}),
    "decode": (FP16, (3, 1), 96, [1, 3], [70, 131], {"sinks": True}),
    "fewer-keys": (BF16, (2, 1), 64, [40, 3, 5], [10, 3, 0], {"sinks": True}),
    "no-queries": (BF16, (2, 1), 64, [0, 4], [9, 4], {"softcap": 3.0}),
    "head-dim-256": (BF16, (2, 1), 256, [35, 5], None, {"window_size": (9, -1)}),
}
MORE_CASES = {
    "long": (BF16, (2, 1), 128, [1, 400, 2], None, {}),
    "long-full": (FP16, (4, 1), 64, [260, 70], None, {"causal": False, "sinks": True}),
    "long-256": (FP16, (2, 1), 256, [140], None, {**EVERYTHING, "sinks": True}),
    "left": (BF16, (4, 1), 96, [160], None, {"causal": False, "window_size": (5, -1)}),
    "right": (FP16, (2, 1), 64, [140], None, {"causal": False, "window_size": (-1, 4)}),
    "self": (BF16, (2, 1), 64, [5, 30], None, {"window_size": (0, 0)}),
    "no-keys": (BF16, (2, 1), 64, [5, 20], [0, 25], {}),
    "many-keys": (BF16, (2, 1), 128, [40], [300], {}),
    "group-of-150": (BF16, (150, 1), 64, [3, 9], None, {}),
    "group-of-17": (FP16, (17, 1), 64, [3, 18], None, {"causal": False}),
    "head-dim-8": (BF16, (2, 1), 8, [40], None, {}),
    "head-dim-72": (BF16, (2, 1), 72, [40], None, {}),
    "head-dim-136": (FP16, (2, 1), 136, [40], None, {}),
    "softmax-scale": (BF16, (2, 1), 64, [40], None, {"softmax_scale": 0.7}),
    "nothing": (BF16, (2, 1), 64, [0, 0], None, {}),
}
HEAD_DIMS = (64, 64, 64, 80, 96, 128, 128, 256)


FORWARD, _ = register_attention(
    "tested_cuda_attention", attention_cuda.forward, attention_cuda.backward, ["CPU", "CUDA"]
)


@pytest.fixture
def kernels(device):  # noqa: F811
    """`attention` with its lse, on CPU tensors, by the kernels alone."""

    def call(q, k, v, cu_seqlens, cu_seqlens_k=None, sinks=None, softmax_scale=None, **masks):
        causal, window, softcap = (masks.get(*x) for x in (("causal", True), ("window_size", (-1, -1)), ("softcap", 0)))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        inputs = [q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, sinks]
        moved = [x if x is None else x.to(device) for x in inputs]
        return (x.cpu() for x in FORWARD(*moved, window[0], 0 if causal else window[1], float(softcap), scale))

    return call


def case_of(name: str) -> tuple[Packed, dict]:
    dtype, heads, head_dim, lengths, lengths_k, options = (CASES | MORE_CASES)[name]
    options = dict(options)
    sinks = options.pop("sinks", False)
    return packed(lengths, dtype, heads, head_dim, lengths_k=lengths_k, sinks=sinks), options


def check(kernels, batch: Packed, **options) -> list[torch.Tensor]:
    got = batch.run(kernels, **options)
    assert_bound(batch, got, op=kernels, factors=batch.q.dtype, **options)
    return got


def assert_same_bits(got, expected) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(kernels, name):
    batch, options = case_of(name)
    check(kernels, batch, **options)


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_CASES)
def test_matches_fp64_more(kernels, name):
    batch, options = case_of(name)
    check(kernels, batch, **options)


@pytest.mark.full
@pytest.mark.parametrize("number", range(120))
def test_matches_fp64_sampled(kernels, number):
    rng = random.Random(number)
    lengths, lengths_k = rng.choice(list(LENGTHS.values()))
    heads, head_dim, dtype = rng.choice(HEADS), rng.choice(HEAD_DIMS), rng.choice([BF16, FP16])
    causal, window_size = rng.choice(list(MASKS.values()))
    sinks = rng.random() < 0.5
    batch = packed(lengths, dtype, heads, head_dim, lengths_k=lengths_k, sinks=sinks, seed=number)
    check(kernels, batch, causal=causal, window_size=window_size, softcap=rng.choice([0.0, 1.5, 30.0]))


def test_order_of_lanes_changes_no_bit(kernels, orders):  # noqa: F811
    """Emulated in every order of lanes, warps and blocks, where it also finds races; on a GPU from run to run."""
    batch = packed([33, 6], BF16, (2, 1), 64, sinks=True)
    orders(lambda: batch.run(kernels, window_size=(20, 5)))


@pytest.mark.parametrize("name", ["short", pytest.param("causal", marks=pytest.mark.full)])
def test_documents_are_alone(kernels, name):
    """No bit of a document depends on the others or on their order, and no NaN leaves its document."""
    short = packed([1, 33, 6], BF16, (2, 1), 64, sinks=True), {}
    batch, options = short if name == "short" else case_of(name)
    got = batch.run(kernels, **options)
    docs = batch.documents()
    order = list(reversed(range(len(docs))))

    def reordered(x):
        return torch.cat([x[docs[d][0]] for d in order])

    moved = replace(
        batch,
        **{part: reordered(getattr(batch, part)) for part in ("q", "k", "v", "dout")},
        cu_seqlens=borders([docs[d][0].stop - docs[d][0].start for d in order]),
    )
    again = moved.run(kernels, **options)
    for i in (0, 2, 3, 4):
        assert torch.equal(again[i], reordered(got[i]))
    assert torch.equal(again[1], torch.cat([got[1][:, docs[d][0]] for d in order], dim=1))

    hurt = max(range(len(docs)), key=lambda d: docs[d][0].stop - docs[d][0].start)
    poisoned = {}
    for part in ("q", "k", "v", "dout"):
        poisoned[part] = getattr(batch, part).clone()
        poisoned[part][docs[hurt][0]] = torch.nan
    leaked = replace(batch, **poisoned, sinks=None).run(kernels, **options)
    clean = replace(batch, sinks=None).run(kernels, **options)
    kept = torch.ones(batch.q.shape[0], dtype=torch.bool)
    kept[docs[hurt][0]] = False
    for i in (0, 2, 3, 4):
        assert torch.equal(leaked[i][kept], clean[i][kept])
        assert leaked[i][~kept].isnan().any()  # the test can fail: in its own document the NaN is everywhere
    one = replace(batch, **poisoned, sinks=None, cu_seqlens=borders([batch.q.shape[0]]))
    assert one.run(kernels, **options)[0][kept].isnan().any()  # without the border it does leave


def test_strides_change_nothing(kernels):
    batch, options = packed([33, 6], BF16, (2, 1), 64), {}
    expected = batch.run(kernels, **options)
    for layout in ("fused", "heads_first", "unaligned"):
        assert_same_bits(relayout(batch, layout).run(kernels, **options), expected)
