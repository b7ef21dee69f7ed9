"""flash-attn 2's functions: their signatures, and their results against the plain formula."""

import inspect
import math

import pytest
import torch

from herdkern import flash_attn
from herdkern.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from herdkern.ops import rope_table

pytestmark = pytest.mark.filterwarnings("error:.*using 'reference'")

TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
TAIL += ["return_attn_probs"]
BORDERS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
KVCACHE = ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"]
KVCACHE += ["cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved"]
KVCACHE += ["alibi_slopes", "num_splits", "return_softmax_lse"]
ORDER = {
    "flash_attn_func": ["q", "k", "v", *TAIL],
    "flash_attn_varlen_func": ["q", "k", "v", *BORDERS, *TAIL, "block_table"],
    "flash_attn_qkvpacked_func": ["qkv", *TAIL],
    "flash_attn_kvpacked_func": ["q", "kv", *TAIL],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *TAIL],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *BORDERS, *TAIL],
    "flash_attn_with_kvcache": KVCACHE,
}
OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (2, 0)},
    {"window_size": (1, 2)},
    {"softcap": 3.0, "softmax_scale": 0.7},
    {"causal": True, "sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
]


def plain(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, softmax_scale=None, sinks=None):
    """(out, lse) of one sequence in fp64: q (seqlen_q, heads, dim); every score is written down."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size[0], 0 if causal else window_size[1]
    for i in range(q.shape[0]):
        place = i + k.shape[0] - q.shape[0]
        for j in range(k.shape[0]):
            if (left >= 0 and j < place - left) or (right >= 0 and j > place + right):
                scores[:, i, j] = -math.inf
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], -1)
    lse = logits.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=-1e300)[..., None])
    return torch.einsum("hij,jhd->ihd", weights, v).float(), lse.float()


def sequences(*shapes, dtype=torch.float32):
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def same(got, expected, tolerance=2e-6):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ORDER)
def test_signature_is_that_of_flash_attn_2(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == [*ORDER[name], "sinks"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    defaults = {n: p.default for n, p in parameters.items()}
    assert defaults["causal"] is False
    assert defaults["window_size"] == (-1, -1)
    assert defaults["softcap"] == 0.0
    assert defaults.get("rotary_interleaved", True) is True


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(7, 7), (3, 8), (5, 2)], ids=str)
def test_batched(options, lengths):
    len_q, len_k = lengths
    q, k, v = sequences((2, len_q, 4, 8), (2, len_k, 2, 8), (2, len_k, 2, 8))
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert probs is None
    assert lse.shape == (2, 4, len_q)
    assert out.shape == q.shape
    expected = [plain(*rows, **options) for rows in zip(q, k, v)]
    same(out, torch.stack([x for x, _ in expected]))
    same(lse, torch.stack([x for _, x in expected]))
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    again = torch.autograd.grad(sum(x.square().sum() for x, _ in expected), (q, k, v))
    for got, wanted in zip(gradients, again):
        same(got, wanted, 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen(options):
    borders_q, borders_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 9], [0, 5, 7, 13]))
    q, k, v = sequences((9, 4, 8), (13, 2, 8), (13, 2, 8))
    args = (q, k, v, borders_q, borders_k, None, None)
    out, lse, _ = flash_attn_varlen_func(*args, return_attn_probs=True, **options)
    assert lse.shape == (4, 9)
    expected = [plain(q[a:b], k[c:d], v[c:d], **options) for a, b, c, d in [(0, 3, 0, 5), (3, 9, 7, 13)]]
    same(out, torch.cat([x for x, _ in expected]))
    same(lse, torch.cat([x for _, x in expected], 1))
    assert torch.equal(flash_attn_varlen_func(*args, **options), out)


def test_packed_forms_equal_the_plain_ones():
    qkv = torch.randn(2, 5, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    expected = flash_attn_func(q, k, v, causal=True, softcap=4.0)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True, softcap=4.0), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True, softcap=4.0), expected)
    borders, options = torch.tensor([0, 5, 10], dtype=torch.int32), {"causal": True, "softcap": 4.0}
    flat, q = qkv.flatten(0, 1), q.flatten(0, 1)
    expected = expected.flatten(0, 1)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(flat, borders, 5, **options), expected)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, flat[:, 1:], borders, borders, 5, 5, **options), expected)


def test_negative_softcap_and_window_mean_none():
    q, k, v = sequences((1, 6, 2, 8), (1, 6, 2, 8), (1, 6, 2, 8))
    assert torch.equal(flash_attn_func(q, k, v, softcap=-1.0, window_size=(-7, -2)), flash_attn_func(q, k, v))


def test_query_that_sees_no_key_gives_0():
    q, k, v = sequences((1, 3, 2, 8), (1, 1, 2, 8), (1, 1, 2, 8))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :2].any()
    assert (lse[:, :, :2] == -math.inf).all()


def dense_to_pages(cache, page_size):
    """The rows of a dense cache cut into shuffled pages, and the block table that finds them."""
    pages = cache.unflatten(1, (-1, page_size)).flatten(0, 1)
    order = torch.randperm(len(pages))
    return pages[order].clone(), order.argsort().int().view(len(cache), -1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_kvcache_appends_and_attends(options, paged):
    k_cache, v_cache = torch.randn(2, 3, 12, 2, 8).unbind()
    q, k, v = (x.detach() for x in sequences((3, 2, 4, 8), (3, 2, 2, 8), (3, 2, 2, 8)))
    lengths = torch.tensor([4, 0, 10], dtype=torch.int32)
    full_k, full_v = k_cache.clone(), v_cache.clone()
    for row, length in enumerate(lengths.tolist()):
        full_k[row, length : length + 2], full_v[row, length : length + 2] = k[row], v[row]
    table = None
    if paged:
        (k_cache, table), (v_cache, _) = (torch.manual_seed(1) and dense_to_pages(x, 3) for x in (k_cache, v_cache))
    args = (q, k_cache, v_cache, k, v)
    out, lse = flash_attn_with_kvcache(
        *args, cache_seqlens=lengths, block_table=table, return_softmax_lse=True, **options
    )
    for row, length in enumerate((lengths + 2).tolist()):
        expected, expected_lse = plain(q[row], full_k[row, :length], full_v[row, :length], **options)
        same(out[row], expected)
        same(lse[row], expected_lse)
    written = k_cache[table.long()].flatten(1, 2) if paged else k_cache
    assert torch.equal(written, full_k)


def test_kvcache_rows_leftpad_and_full_cache():
    k_cache, v_cache = torch.randn(2, 4, 9, 2, 8).unbind()
    q = torch.randn(2, 1, 4, 8)
    rows, leftpad = torch.tensor([3, 1]), torch.tensor([2, 0])
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=7, cache_batch_idx=rows, cache_leftpad=leftpad, causal=True
    )
    same(out[0], plain(q[0], k_cache[3, 2:7], v_cache[3, 2:7])[0])
    same(out[1], plain(q[1], k_cache[1, :7], v_cache[1, :7])[0])
    same(flash_attn_with_kvcache(q, k_cache, v_cache)[0], plain(q[0], k_cache[0], v_cache[0])[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kvcache_rotates(interleaved, rotary_dim, causal, dtype):
    """A prefill and a step equal attention over keys rotated at their places; q stands still unless causal."""
    cos, sin = rope_table(20, rotary_dim, theta=100.0)

    def turned(x, first, walks=True):
        y = x.float().clone()
        for t in range(x.shape[0]):
            c, s = (table[first + t * walks] for table in (cos, sin))
            half = rotary_dim // 2
            pairs = (
                (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
                if interleaved
                else (slice(half), slice(half, rotary_dim))
            )
            a, b = (x[t, :, pair].float() for pair in pairs)
            y[t, :, pairs[0]], y[t, :, pairs[1]] = a * c - b * s, b * c + a * s
        return y.to(x.dtype)

    k_cache, v_cache = torch.zeros(2, 2, 16, 2, 8, dtype=dtype).unbind()
    q, k, v = (x.detach() for x in sequences((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), dtype=dtype))
    common = {"causal": causal, "rotary_interleaved": interleaved}
    for begin, end in ((0, 6), (6, 9)):
        new = (x[:, begin:end] for x in (k, v))
        out = flash_attn_with_kvcache(q[:, begin:end], k_cache, v_cache, *new, cos, sin, begin, **common)
        for row in range(2):
            queries, keys = turned(q[row, begin:end], begin, causal), turned(k[row, :end], 0)
            same(
                out[row].float(),
                plain(queries, keys, v[row, :end], causal)[0],
                2e-6 if dtype == torch.float32 else 5e-3,
            )


TABLES = {
    "page -1": torch.tensor([[0], [-1]], dtype=torch.int32),
    "page 9": torch.tensor([[0], [9]], dtype=torch.int32),
    "int64": torch.tensor([[0], [1]]),
    "one dimension": torch.tensor([0, 1], dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"block_table": table}, "block_table must") for table in TABLES.values()),
        ({"sinks": torch.zeros(3)}, r"sinks must have shape"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
        ({"causal": "no"}, "causal must be True or False"),
        ({"k": torch.ones(2, 3, 1, 8), "v": torch.ones(2, 3, 1, 8)}, r"k must be \(batch, seqlen, 2, 8\) as the cache"),
        ({"k": torch.ones(2, 3, 2, 1), "v": torch.ones(2, 3, 2, 1)}, r"k must be \(batch, seqlen, 2, 8\) as the cache"),
        ({"k": torch.ones(2, 3, 2, 8).bfloat16()}, "k must be float32 on cpu as the cache, got bfloat16 on cpu"),
        ({"v": torch.ones(2, 3, 2, 8).double()}, "v must be float32 on cpu as the cache, got float64 on cpu"),
        ({"v_cache": torch.ones(2, 9, 2, 8)}, "v_cache must have the shape of k_cache"),
        ({"q": torch.ones(2, 3, 3, 8)}, "num_heads of q must be a positive multiple"),
        ({"q": torch.ones(2, 3, 4, 8).bfloat16()}, "k_cache must be bfloat16 as q, got float32"),
        (
            {"cache_batch_idx": torch.tensor([0, -1])},
            r"cache_batch_idx must name rows of the cache, 0 to 1, got \[0, -1\]",
        ),
        ({"cache_batch_idx": torch.tensor([0, 2])}, "cache_batch_idx must name rows of the cache"),
        ({"cache_leftpad": torch.zeros(3).int()}, r"cache_leftpad must be integers of shape \(2,\)"),
        ({"cache_leftpad": torch.zeros(2)}, r"cache_leftpad must be integers of shape"),
        ({"cache_seqlens": 8}, "cache_seqlens must lie in the cache"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_call_leaves_the_cache_as_it_was(change, message):
    caches = [torch.zeros(2, 10, 2, 8) for _ in "kv"]
    arguments = {"q": torch.ones(2, 3, 4, 8), "k_cache": caches[0], "v_cache": caches[1], "cache_seqlens": 2}
    arguments |= {name: torch.ones(2, 3, 2, 8) for name in "kv"}
    flash_attn_with_kvcache(**arguments, block_table=torch.tensor([[0], [1]], dtype=torch.int32))
    assert all(cache.any() for cache in caches)
    for cache in caches:
        cache.zero_()
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**(arguments | change))
    assert not any(cache.any() for cache in caches)


T = torch.zeros(1, 2, 2, 8)
CACHE = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flash_attn_func(T, T, T, 0.1), NotImplementedError, r"dropout_p must be 0, got 0.1; pass 0"),
        (lambda: flash_attn_func(T, T, T, alibi_slopes=T), NotImplementedError, r"alibi_slopes must be None"),
        (lambda: flash_attn_func(T[0], T, T), ValueError, r"q must be .*got \(2, 2, 8\); for packed documents"),
        (lambda: flash_attn_func(T, T, CACHE), ValueError, r"v must have the shape of k \(1, 2, 2, 8\), got"),
        (lambda: flash_attn_func(T, T, T[..., :4]), ValueError, r"v must have the shape of k .* got \(1, 2, 2, 4\)"),
        (lambda: flash_attn_func(T, T[:0], T[:0]), ValueError, r"k and v must have the batch size 1 of q, got 0"),
        (lambda: flash_attn_func(T, T, T, softcap=None), ValueError, r"softcap must be a number, got None"),
        (lambda: flash_attn_func(T, T, T, softcap="1"), ValueError, r"softcap must be a number, got '1'"),
        (lambda: flash_attn_func(T, T, T, window_size=(None, 0)), ValueError, r"window_size must hold integers"),
        (lambda: flash_attn_func(T, T, T, causal="no"), ValueError, r"causal must be True or False, got 'no'"),
        (lambda: flash_attn_func(T, None, T), TypeError, r"k must be a tensor, got NoneType"),
        (lambda: flash_attn_func(T, T, T, window_size=3), ValueError, r"window_size must be \(left, right\), got 3"),
        (lambda: flash_attn_qkvpacked_func(T), ValueError, r"qkv must be \(batch, seqlen, 3, heads, head_dim\)"),
        (lambda: flash_attn_varlen_kvpacked_func(T[0], T[:, :1], T, T), ValueError, r"kv must be \(total_tokens, 2"),
        (lambda: flash_attn_with_kvcache(T, CACHE, CACHE, T), ValueError, r"k and v must come together"),
        (lambda: flash_attn_with_kvcache(T, CACHE, CACHE, T, T), ValueError, r"cache_seqlens must say where k goes"),
        (
            lambda: flash_attn_with_kvcache(T, CACHE, CACHE, cache_seqlens=5),
            ValueError,
            r"must lie in the cache, got 5",
        ),
        (
            lambda: flash_attn_with_kvcache(T, CACHE, CACHE, T, T, cache_seqlens=3),
            ValueError,
            r"got 3 and 2 new tokens for a cache of 4",
        ),
        (
            lambda: flash_attn_with_kvcache(T, CACHE, CACHE, rotary_cos=T[0, 0], rotary_sin=T[0, 0]),
            ValueError,
            r"rotary_cos and rotary_sin must come together and with k",
        ),
        (
            lambda: flash_attn_with_kvcache(T, CACHE, CACHE, cache_leftpad=T, block_table=T),
            ValueError,
            r"cache_leftpad must be None with a block_table",
        ),
        (lambda: flash_attn_with_kvcache(CACHE.expand(3, 4, 2, 8), CACHE, CACHE), ValueError, r"got 3 for 1 rows"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
