"""Attention against fp64, over dtypes, head dims, grouped heads, layouts, lengths, masks and instruction set levels."""

import itertools

import pytest
import torch
from attention_cases import DTYPES, HEADS, NAMES, Packed, assert_bound, attention_with_lse, borders, packed, short

from herdkern.ops import attention, attention_reference
from herdkern.ops.backend import available_isas, forced_isa

ISAS = available_isas()
HEAD_DIMS = [1, 8, 40, 63, 64, 80, 128, 256]
LENGTHS = [1, 63, 0, 17, 150]  # one token, odd, empty, and more than one chunk of keys


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_fp64(isa, dtype, head_dim, heads, causal):
    batch = packed(LENGTHS, dtype, heads, head_dim)
    with forced_isa(isa):
        assert_bound(batch, batch.run(attention_with_lse, causal=causal), causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [2],
        [1, 1, 1],
        [0, 5],
        [5, 0],
        [0, 0, 3, 0],
        [31, 32, 33],
        [15, 16, 17],
        [127, 128, 129],
        [64],
        [300],
        [7, 260],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_document_lengths(dtype, lengths, causal):
    batch = packed(lengths, dtype, (4, 2), 16)
    assert_bound(batch, batch.run(attention_with_lse, causal=causal), causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("lengths", "lengths_k"),
    [
        ([1], [200]),
        ([1, 1, 1], [5, 64, 131]),
        ([3, 40], [70, 45]),
        ([40, 3], [10, 3]),  # the first queries see no key
        ([5, 6], [0, 9]),  # a document of queries without keys
        ([0, 6], [9, 9]),  # keys that no query sees
        ([150], [20]),
        ([20], [300]),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_keys_and_queries_of_different_length(dtype, head_dim, lengths, lengths_k, causal):
    batch = packed(lengths, dtype, (4, 2), head_dim, lengths_k=lengths_k)
    assert_bound(batch, batch.run(attention_with_lse, causal=causal), causal=causal)


def relayout(batch: Packed, layout: str) -> Packed:
    """The same values with other strides."""
    q, k, v, dout = batch.q, batch.k, batch.v, batch.dout
    if layout == "slices of one projection":
        fused = torch.cat([q, k, v], dim=1)
        q, k, v = fused.split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
    elif layout == "heads first":
        q, k, v, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout))
    elif layout == "head_dim strided":
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    elif layout == "every second token":
        q, k, v, dout = (x.repeat_interleave(2, dim=0)[::2] for x in (q, k, v, dout))
    elif layout == "unaligned":
        q, k, v, dout = (torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape) for x in (q, k, v, dout))
    return Packed(q, k, v, dout, batch.cu_seqlens)


@pytest.mark.parametrize(
    "layout", ["slices of one projection", "heads first", "head_dim strided", "every second token", "unaligned"]
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("head_dim", [1, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_strides_change_nothing(dtype, head_dim, heads, layout):
    batch = packed([33, 0, 70], dtype, heads, head_dim)
    strided = relayout(batch, layout)
    expected = batch.run(attention_with_lse)

    inputs = [strided.q, strided.k, strided.v]
    for x in inputs:
        x.requires_grad_()
    out, lse = attention_with_lse(*inputs, strided.cu_seqlens)
    got = [out, lse, *torch.autograd.grad(out, inputs, strided.dout)]
    for name, x, y in zip(NAMES, got, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_number_of_threads_changes_no_bit(num_threads, dtype, isa, with_threads):
    batch = packed([700, 1, 0, 300, 64], dtype, (4, 2), 32)
    with forced_isa(isa):
        expected = batch.run(attention_with_lse)
        with_threads(num_threads)
        for _ in range(2):  # and no run differs from the next
            for name, x, y in zip(NAMES, batch.run(attention_with_lse), expected, strict=True):
                assert torch.equal(x, y), name


@pytest.mark.parametrize("scale", [0.03, 1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_softmax_scale(dtype, scale):
    batch = packed([50, 20], dtype, (2, 1), 16)
    assert_bound(batch, batch.run(attention_with_lse, softmax_scale=scale), softmax_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_scores_do_not_overflow(dtype):
    batch = packed([90], dtype, (2, 1), 16)
    large = Packed(batch.q * 100, batch.k * 100, batch.v, batch.dout, batch.cu_seqlens)
    out, lse = attention_with_lse(large.q, large.k, large.v, large.cu_seqlens)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.max() > 1e4


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_query_without_keys_gives_zero(dtype):
    batch = packed([5], dtype, (2, 1), 8, lengths_k=[2])
    out, lse, dq, _, _ = batch.run(attention_with_lse)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert (lse[:, :3] == -torch.inf).all()
    assert torch.equal(dq[:3], torch.zeros_like(dq[:3]))
    assert lse[:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(dtype, lengths):
    batch = packed(lengths, dtype, (4, 2), 16)
    out, lse, dq, dk, dv = batch.run(attention_with_lse)
    assert out.shape == dq.shape == (0, 4, 16)
    assert dk.shape == dv.shape == (0, 2, 16)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_decoding_equals_prefill(dtype, steps):
    """The last queries of each document, against all of its keys, give the rows that the whole document gave."""
    lengths = [40, 5, 170]
    batch = packed(lengths, dtype, (4, 2), 32)
    whole, whole_lse = attention_with_lse(batch.q, batch.k, batch.v, batch.cu_seqlens)
    last = torch.cat([torch.arange(end - steps, end) for end in itertools.accumulate(lengths)])
    step = Packed(batch.q[last], batch.k, batch.v, batch.dout[last], borders([steps] * 3), batch.cu_seqlens)
    out, lse = attention_with_lse(step.q, step.k, step.v, step.cu_seqlens, cu_seqlens_k=step.cu_seqlens_k)
    assert_bound(step, step.run(attention_with_lse))
    assert torch.equal(out, whole[last])
    assert torch.equal(lse, whole_lse[:, last])


def test_attention_is_attention_with_lse_without_the_lse():
    batch = packed([9, 30], torch.float32, (4, 2), 16)
    expected = attention_with_lse(batch.q, batch.k, batch.v, batch.cu_seqlens)[0]
    assert torch.equal(attention(batch.q, batch.k, batch.v, batch.cu_seqlens, max_seqlen=30), expected)
    reference = attention(batch.q, batch.k, batch.v, batch.cu_seqlens, backend="reference")
    assert torch.equal(reference, attention_reference(batch.q, batch.k, batch.v, batch.cu_seqlens))


def test_reference_is_scaled_dot_product_attention():
    """The reference itself, on one document, against torch's."""
    batch = packed([37], torch.float64, (4, 2), 16)
    got = attention_reference(batch.q, batch.k, batch.v, batch.cu_seqlens)
    q, k, v = (x.transpose(0, 1)[None] for x in (batch.q, batch.k, batch.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))
