"""Paged attention of csrc/cuda against fp64: page sizes, splits of long documents, groups of heads, masks, sinks."""

import pytest
import torch
from gpu_or_emulator import device, orders  # noqa: F401

from herdkern.ops.paged_attention import forward_cuda, paged_attention_reference

BF16, FP16 = torch.bfloat16, torch.float16
EPS = torch.finfo(torch.float32).eps


def cache(device, heads, dim, lengths, page_size, dtype=BF16):  # noqa: F811
    """q, k_cache, v_cache, block_table, cu_seqlens, seqlens_k of documents of (queries, keys); pages are shuffled and
    those that no document names hold NaN."""
    num_heads, num_kv_heads = heads
    pages = [-(-k // page_size) for _, k in lengths]
    num_pages = sum(pages) + 2
    order = torch.randperm(num_pages)[: sum(pages)].split(pages)
    table = torch.full((len(lengths), max(pages, default=0) + 1), -1, dtype=torch.int32)
    stored = [torch.full((num_pages, page_size, num_kv_heads, dim), torch.nan) for _ in range(2)]
    for doc, (named, (_, num_keys)) in enumerate(zip(order, lengths, strict=True)):
        table[doc, : len(named)] = named
        for x in stored:
            rows = torch.full((len(named) * page_size, num_kv_heads, dim), torch.nan)
            rows[:num_keys] = torch.randn(num_keys, num_kv_heads, dim)
            x[named] = rows.view(len(named), page_size, num_kv_heads, dim)
    num_q = torch.tensor([0] + [q for q, _ in lengths]).cumsum(0)
    q = torch.randn(int(num_q[-1]), num_heads, dim)
    numbers = table, num_q.int(), torch.tensor([k for _, k in lengths], dtype=torch.int32)
    return [x.to(device, dtype) for x in (q, *stored)] + [x.to(device) for x in numbers]


def check(inputs, window=(-1, 0), softcap=0.0, sinks=None):
    """Compare with the reference in fp64, within twice what the reference loses in the dtype of the inputs."""
    scale = inputs[0].shape[-1] ** -0.5
    out, lse = forward_cuda(*inputs, sinks, *window, softcap, scale)
    options = {"causal": False, "window_size": window, "softcap": softcap, "return_lse": True}
    wide = [x.double() for x in inputs[:3]] + inputs[3:]
    gold_sinks = None if sinks is None else sinks.double()
    gold = paged_attention_reference(*wide, sinks=gold_sinks, softmax_scale=scale, **options)
    plain = paged_attention_reference(*inputs, sinks=sinks, softmax_scale=scale, **options)
    for got, exact, ref in zip((out, lse), gold, plain, strict=True):
        seen = exact.isfinite()
        assert torch.equal(got[~seen].double(), exact[~seen])
        if not seen.any():
            continue
        errors = [(x[seen].double() - exact[seen]).abs().max() for x in (got, ref)]
        assert errors[0] <= 2 * errors[1] + 4 * EPS * max(1.0, exact[seen].abs().max()), errors
    return out, lse


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("heads", "dim"),
    [((1, 1), 8), ((4, 2), 64), ((6, 2), 96), ((8, 2), 128), ((8, 1), 40), ((3, 1), 256), ((9, 1), 16)],
)
def test_matches_fp64(device, heads, dim, dtype):  # noqa: F811
    check(cache(device, heads, dim, [(1, 70), (1, 0), (1, 1), (0, 9), (1, 33)], 16, dtype))


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_documents_of_several_splits(device, page_size):  # noqa: F811
    check(cache(device, (4, 1), 16, [(1, 1100), (2, 512), (1, 513), (1, 40)], page_size))


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (20, 0), (3, 5), (600, 0)], ids=str)
@pytest.mark.parametrize("options", ["plain", "softcap and sinks"])
def test_masks(device, window, options):  # noqa: F811
    extra = {} if options == "plain" else {"softcap": 2.0, "sinks": torch.randn(4, device=device)}
    check(cache(device, (4, 2), 16, [(7, 7), (5, 620), (3, 0), (9, 4), (0, 0)], 8), window, **extra)


def test_strides(device):  # noqa: F811
    inputs = cache(device, (4, 2), 24, [(2, 30), (1, 19)], 8)
    expected = check(inputs)
    q, k, v, table, *rest = inputs
    wide = torch.full((*k.shape[:2], 4, 24), torch.nan, device=device, dtype=BF16)
    wide[:, :, 1::2] = k
    other = v.transpose(0, 2).contiguous().transpose(0, 2)
    odd = torch.cat([q, q], dim=-1)[..., :24]
    turned = table.t().contiguous().t()
    for given in ((q, wide[:, :, 1::2], other, turned, *rest), (odd, k, v, table, *rest)):
        got = forward_cuda(*given, None, -1, 0, 0.0, 24**-0.5)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_document_has_the_same_bits_alone(device):  # noqa: F811
    q, k, v, table, cu_seqlens, seqlens_k = cache(device, (4, 2), 16, [(1, 40), (1, 700), (1, 3)], 8)
    out, lse = check([q, k, v, table, cu_seqlens, seqlens_k])
    borders = torch.tensor([0, 1], dtype=torch.int32, device=device)
    alone = forward_cuda(q[1:2], k, v, table[1:2], borders, seqlens_k[1:2], None, -1, 0, 0.0, 16**-0.5)
    assert torch.equal(alone[0], out[1:2])
    assert torch.equal(alone[1], lse[:, 1:2])


def test_a_page_that_is_none_gives_nan(device):  # noqa: F811
    inputs = cache(device, (4, 2), 16, [(1, 40), (1, 30)], 8)
    for page in (-1, inputs[1].shape[0]):
        inputs[3][0, 2] = page
        out, _ = forward_cuda(*inputs, None, -1, 0, 0.0, 0.25)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


def test_the_same_bits_in_any_order_of_lanes(device, orders):  # noqa: F811
    inputs = cache(device, (8, 2), 40, [(2, 530), (1, 20)], 16)
    orders(lambda: forward_cuda(*inputs, None, -1, 0, 0.0, 0.2))
