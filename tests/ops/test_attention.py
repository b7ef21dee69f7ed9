"""Attention against fp64: every feature with every other, document lengths, strides, threads, and the corners."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    DTYPES,
    NAMES,
    Packed,
    assert_bound,
    attention_with_lse,
    attention_with_lse_reference,
    borders,
    packed,
    plain_16bit,
    relayout,
    short,
)
from attention_grid import AXES, DEFAULT_CASES, FULL_CASES, HEAD_DIMS, MASKS

from herdkern.ops import attention, attention_reference
from herdkern.ops.backend import available_isas, forced_isa

ISAS = available_isas()
EVERYTHING = {"causal": False, "window_size": (20, 5), "softcap": 2.0}  # and sinks
FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window_size": (9, 0)},
    "around": {"causal": False, "window_size": (40, 3)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "everything": {**EVERYTHING, "sinks": True},
}
features = pytest.mark.parametrize("feature", FEATURES)


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


def split(feature: str) -> tuple[bool, dict]:
    """Whether there are sinks, and the options of the call."""
    options = dict(FEATURES[feature])
    return options.pop("sinks", False), options


def check(batch: Packed, **options) -> None:
    assert_bound(batch, batch.run(attention_with_lse, **options), **options)


def assert_same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for name, x, y in zip(NAMES, got, expected):
        assert torch.equal(x, y), name


def assert_case(case, with_threads) -> None:
    with_threads(case.num_threads)
    with forced_isa(case.isa):
        check(case.batch(), **case.options())


@pytest.mark.parametrize("case", DEFAULT_CASES, ids=str)
def test_matches_fp64(case, with_threads):
    assert_case(case, with_threads)


@pytest.mark.full
@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_matches_fp64_sampled(case, with_threads):
    assert_case(case, with_threads)


def test_every_two_features_meet():
    """The selection of the default run keeps what it promises."""
    rows = [tuple(vars(case).values()) for case in DEFAULT_CASES]
    for (i, a), (j, b) in itertools.combinations(enumerate(AXES), 2):
        assert len({(row[i], row[j]) for row in rows}) == len(set(a)) * len(set(b))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "amx"])
def test_level(isa):
    if isa not in ISAS:
        pytest.skip(f"this processor lacks level {isa}")
    with forced_isa(isa):
        check(packed([40, 3], torch.bfloat16, (4, 2), 64))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("isa", ISAS)
def test_every_head_dim(isa, dtype, head_dim):
    with forced_isa(isa):
        check(packed([1, 0, 37, 2], dtype, (4, 2), head_dim, sinks=True), **EVERYTHING)


@features
@pytest.mark.parametrize(
    "lengths",
    [[1], [2], [1, 1, 1], [0, 5], [5, 0], [0, 0, 3, 0], [31, 32, 33], [15, 16, 17], [127, 129], [64], [300], [7, 260]],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_document_lengths(dtype, lengths, feature):
    sinks, options = split(feature)
    check(packed(lengths, dtype, (4, 2), 16, sinks=sinks), **options)


@features
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
def test_keys_and_queries_of_different_length(dtype, head_dim, lengths, lengths_k, feature):
    sinks, options = split(feature)
    check(packed(lengths, dtype, (12, 6), head_dim, lengths_k=lengths_k, sinks=sinks), **options)


@pytest.mark.full
@features
@pytest.mark.parametrize("lengths", [[1500], [2049, 3], [5, 900, 1, 1100]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("isa", ISAS)
def test_long_documents(isa, dtype, lengths, feature):
    sinks, options = split(feature)
    with forced_isa(isa):
        check(packed(lengths, dtype, (2, 1), 48, sinks=sinks), **options)


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_more_heads_in_a_group_than_rows_in_a_tile(dtype, feature):
    sinks, options = split(feature)
    check(packed([3, 1, 20], dtype, (150, 1), 24, sinks=sinks), **options)


@pytest.mark.parametrize("layout", ["fused", "heads_first", "dim_strided", "every_second_token", "unaligned"])
@pytest.mark.parametrize("feature", ["causal", "everything"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("head_dim", [1, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_strides_change_nothing(dtype, head_dim, heads, feature, layout):
    sinks, options = split(feature)
    batch = packed([33, 0, 70], dtype, heads, head_dim, sinks=sinks)
    strided = relayout(batch, layout)
    assert_same_bits(strided.run(attention_with_lse, **options), batch.run(attention_with_lse, **options))


@features
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("num_threads", [2, 7])
def test_number_of_threads_changes_no_bit(num_threads, dtype, isa, feature, with_threads):
    sinks, options = split(feature)
    batch = packed([350, 1, 0, 150, 64], dtype, (4, 2), 32, sinks=sinks)
    with forced_isa(isa):
        expected = batch.run(attention_with_lse, **options)
        with_threads(num_threads)
        for _ in range(2):  # and no run differs from the next
            assert_same_bits(batch.run(attention_with_lse, **options), expected)


@pytest.mark.parametrize("scale", [0.03, 1.0, 2.5])
@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_softmax_scale(dtype, feature, scale):
    sinks, options = split(feature)
    check(packed([50, 20], dtype, (2, 1), 16, sinks=sinks), softmax_scale=scale, **options)


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_scores_do_not_overflow(dtype, feature):
    sinks, options = split(feature)
    batch = packed([90], dtype, (2, 1), 16, sinks=sinks)
    large = replace(batch, q=batch.q * 100, k=batch.k * 100)
    out, lse, *gradients = large.run(attention_with_lse, **options)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    if "softcap" not in options:
        assert lse.max() > 1e4
    else:
        assert lse.max() < options["softcap"] + math.log(91) + 12
    if dtype != torch.float16:  # where a gradient may be above 65504
        assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("sink", [-200.0, 150.0, -1e30, 1e30], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_a_sink_that_takes_no_weight_or_all(dtype, sink):
    batch = replace(packed([40, 3], dtype, (2, 1), 32), sinks=torch.full((2,), sink))
    got = batch.run(attention_with_lse)
    assert all(x.isfinite().all() for x in got)
    if sink < 0:
        expected = replace(batch, sinks=None).run(attention_with_lse)
        assert_same_bits(got[:2], expected[:2])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for name, x, y in zip(NAMES[2:], got[2:5], expected[2:]):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, msg=name)
        assert torch.equal(got[5], torch.zeros(2))
    else:
        assert got[0].float().abs().max() < 1e-30
        torch.testing.assert_close(got[1], torch.full_like(got[1], sink), atol=0, rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sink_is_a_key_of_that_score_with_value_zero(dtype):
    """One more key, first in the document, whose score is the sink for every query."""
    batch = packed([30], dtype, (1, 1), 8)
    q, k, v = batch.q.clone(), batch.k, batch.v
    q[..., 0], k = 1.0, k.clone()
    k[..., 0] = 0.0
    first = torch.zeros_like(k[:1])
    first[..., 0] = 1.5
    options = {"causal": False, "softmax_scale": 1.0}
    more_keys = Packed(q, torch.cat([first, k]), torch.cat([first * 0, v]), batch.dout, borders([30]), borders([31]))
    got = replace(batch, q=q, k=k, sinks=torch.tensor([1.5])).run(attention_with_lse, **options)
    expected = more_keys.run(attention_with_lse, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    got[2], expected[2] = got[2][..., 1:], expected[2][..., 1:]  # the sink is no function of q
    for name, x, y in zip(NAMES, got, (*expected[:3], expected[3][1:], expected[4][1:])):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("sinks_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_sinks_of_any_float_dtype_and_stride(dtype, sinks_dtype):
    batch = packed([40, 3], dtype, (4, 2), 16, sinks=True)
    rounded = batch.sinks.to(sinks_dtype)
    expected = replace(batch, sinks=rounded.float()).run(attention_with_lse)
    strided = replace(batch, sinks=torch.stack([rounded, rounded], dim=1)[:, 0])
    got = strided.run(attention_with_lse)
    assert got[5].dtype == sinks_dtype
    assert_same_bits(got, [*expected[:5], expected[5].to(sinks_dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_query_without_keys_gives_zero(dtype):
    batch = packed([5], dtype, (2, 1), 8, lengths_k=[2])
    out, lse, dq, _, _ = batch.run(attention_with_lse)
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert (lse[:, :3] == -torch.inf).all()
    assert torch.equal(dq[:3], torch.zeros_like(dq[:3]))
    assert lse[:, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_query_with_a_sink_and_no_keys_gives_zero(dtype):
    batch = packed([5, 3], dtype, (2, 1), 8, lengths_k=[2, 0], sinks=True)
    out, lse, dq, _, _, dsinks = batch.run(attention_with_lse)
    alone = [0, 1, 2, 5, 6, 7]
    assert torch.equal(out[alone], torch.zeros_like(out[alone]))
    assert torch.equal(lse[:, alone], batch.sinks[:, None].expand(2, 6))
    assert torch.equal(dq[alone], torch.zeros_like(dq[alone]))
    assert dsinks.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("window_size", [(1000, -1), (300, 300), (2**31 - 1, 2**31 - 1), (2**62, 2**62)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_window_wider_than_the_documents_is_no_window(dtype, causal, window_size):
    batch = packed([300, 7], dtype, (2, 1), 24)
    expected = batch.run(attention_with_lse, causal=causal)
    assert_same_bits(batch.run(attention_with_lse, causal=causal, window_size=window_size), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("left", [-1, 0, 5])
def test_causal_is_a_window_without_keys_ahead(dtype, left):
    batch = packed([130, 7], dtype, (2, 1), 24)
    expected = batch.run(attention_with_lse, causal=True, window_size=(left, 77))
    assert_same_bits(batch.run(attention_with_lse, causal=False, window_size=(left, 0)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_window_of_one_key_gives_its_value(dtype):
    batch = packed([70, 3], dtype, (4, 2), 24)
    out, _, dq, dk, dv = batch.run(attention_with_lse, window_size=(0, 0))
    assert torch.equal(out, batch.v.repeat_interleave(2, dim=1))
    assert torch.equal(dq, torch.zeros_like(dq))
    assert torch.equal(dk, torch.zeros_like(dk))
    if dtype == torch.float32:
        torch.testing.assert_close(dv, batch.dout.unflatten(1, (2, 2)).sum(2))


@features
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_no_tokens(dtype, lengths, feature):
    sinks, options = split(feature)
    out, lse, dq, dk, dv, *dsinks = packed(lengths, dtype, (4, 2), 16, sinks=sinks).run(attention_with_lse, **options)
    assert out.shape == dq.shape == (0, 4, 16)
    assert dk.shape == dv.shape == (0, 2, 16)
    assert lse.shape == (4, 0)
    assert all(torch.equal(x, torch.zeros(4)) for x in dsinks)


@features
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_decoding_equals_prefill(dtype, steps, feature):
    """The last queries of each document, against all of its keys, give the rows that the whole document gave."""
    sinks, options = split(feature)
    lengths = [40, 5, 170]
    batch = packed(lengths, dtype, (4, 2), 32, sinks=sinks)
    last = torch.cat([torch.arange(end - steps, end) for end in itertools.accumulate(lengths)])
    step = replace(
        batch, q=batch.q[last], dout=batch.dout[last], cu_seqlens=borders([steps] * 3), cu_seqlens_k=batch.cu_seqlens
    )
    check(step, **options)
    whole, whole_lse = batch.run(attention_with_lse, **options)[:2]
    out, lse = step.run(attention_with_lse, **options)[:2]
    if "window_size" in options:  # blocks of keys begin where the window of the tile's first query does
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, whole[last], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, whole_lse[:, last], atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(out, whole[last])
        assert torch.equal(lse, whole_lse[:, last])


def test_attention_without_the_lse():
    batch = packed([9, 30], torch.float32, (4, 2), 16)
    expected = attention_with_lse(batch.q, batch.k, batch.v, batch.cu_seqlens)[0]
    assert torch.equal(attention(batch.q, batch.k, batch.v, batch.cu_seqlens, max_seqlen=30), expected)
    reference = attention(batch.q, batch.k, batch.v, batch.cu_seqlens, backend="reference")
    assert torch.equal(reference, attention_reference(batch.q, batch.k, batch.v, batch.cu_seqlens))


@features
def test_reference_is_the_equations(feature):
    """The reference, which takes its gradients from autograd, against FlashAttention-2's equations written out."""
    sinks, options = split(feature)
    batch = packed([37, 5, 1], torch.float32, (4, 2), 16, lengths_k=[30, 9, 1], sinks=sinks)
    expected = plain_16bit(batch, **options)  # fp32 storage: nothing is rounded
    for name, x, y in zip(NAMES, batch.run(attention_with_lse_reference, **options), expected):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("mask", MASKS)
def test_reference_by_hand(mask):
    """The reference against loops over single numbers, mask, cap and sink as the docstring says."""
    causal, (left, right) = MASKS[mask]
    batch = packed([6, 4], torch.float64, (2, 1), 3, lengths_k=[5, 7], sinks=True)
    options = {"causal": causal, "window_size": (left, right), "softcap": 1.25, "softmax_scale": 0.8}
    out, lse, *_ = batch.run(attention_with_lse_reference, **options)
    for rows, keys in batch.documents():
        num_queries, num_keys = rows.stop - rows.start, keys.stop - keys.start
        for i, head in itertools.product(range(num_queries), range(2)):
            stands_at, sink = i + num_keys - num_queries, batch.sinks[head].item()
            denominator, total = math.exp(sink), [0.0] * 3
            for j in range(num_keys):
                if causal and j > stands_at:
                    continue
                if (left >= 0 and j < stands_at - left) or (not causal and right >= 0 and j > stands_at + right):
                    continue
                score = 0.8 * torch.dot(batch.q[rows.start + i, head], batch.k[keys.start + j, 0]).item()
                weight = math.exp(1.25 * math.tanh(score / 1.25))
                denominator += weight
                total = [t + weight * x for t, x in zip(total, batch.v[keys.start + j, 0].tolist())]
            expected = [t / denominator for t in total]
            assert out[rows.start + i, head].tolist() == pytest.approx(expected, abs=1e-6)
            assert lse[head, rows.start + i].item() == pytest.approx(math.log(denominator), abs=1e-6)


def test_reference_is_scaled_dot_product_attention():
    """The reference itself, on one document, against torch's."""
    batch = packed([37], torch.float64, (4, 2), 16)
    got = attention_reference(batch.q, batch.k, batch.v, batch.cu_seqlens)
    q, k, v = (x.transpose(0, 1)[None] for x in (batch.q, batch.k, batch.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))
