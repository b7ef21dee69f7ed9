"""Attention on a paged cache: bit-equal to attention on the gathered keys, close to the reference, and wrong calls."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from attention_cases import borders, distance, short
from torch import Tensor

from herdkern.ops import attention, paged_attention, paged_attention_reference
from herdkern.ops.backend import available_isas, forced_isa

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(2, 2), (4, 1), (6, 2)]
PAGE_SIZES = [1, 3, 16, 256]
LENGTHS_Q, LENGTHS_K = [1, 5, 0, 40, 3], [300, 5, 7, 170, 1]  # the last: more queries than keys


@pytest.fixture(autouse=True)
def _one_thread(with_threads):
    with_threads(1)


@dataclass(frozen=True)
class Paged:
    """Queries and a cache; k and v are the same keys packed."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cu_seqlens: Tensor
    seqlens_k: Tensor
    k: Tensor
    v: Tensor

    def inputs(self) -> list[Tensor]:
        return [self.q, self.k_cache, self.v_cache, self.block_table, self.cu_seqlens, self.seqlens_k]

    def run(self, **options):
        return paged_attention(*self.inputs(), return_lse=True, **options)

    def run_packed(self, **options):
        cu_seqlens_k = borders(self.seqlens_k.tolist())
        return attention(self.q, self.k, self.v, self.cu_seqlens, cu_seqlens_k=cu_seqlens_k, return_lse=True, **options)


def paged(page_size, dtype, heads=(4, 2), head_dim=64, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, seed=0) -> Paged:
    """Pages in random order; what no document uses is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens, num_heads):
        return torch.randn(tokens, num_heads, head_dim, generator=generator).to(dtype)

    q, k, v = normal(sum(lengths_q), heads[0]), *(normal(sum(lengths_k), heads[1]) for _ in range(2))
    counts = [-(-n // page_size) for n in lengths_k]
    num_pages, max_pages = sum(counts) + 3, max(counts) + 2
    ids = torch.randperm(num_pages, generator=generator).int()
    caches = torch.full((2, num_pages, page_size, heads[1], head_dim), torch.nan, dtype=dtype)
    table = torch.full((len(lengths_k), max_pages), -7, dtype=torch.int32)  # never read
    begins = [0, *itertools.accumulate(lengths_k)]
    used = 0
    for doc, count in enumerate(counts):
        table[doc, :count] = ids[used : used + count]
        used += count
        for j in range(lengths_k[doc]):
            page, slot = table[doc, j // page_size], j % page_size
            caches[0, page, slot], caches[1, page, slot] = k[begins[doc] + j], v[begins[doc] + j]
    return Paged(q, caches[0], caches[1], table, borders(lengths_q), torch.tensor(lengths_k, dtype=torch.int32), k, v)


def assert_same(got, expected):
    for name, x, y in zip(("out", "softmax_lse"), got, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("head_dim", [8, 40, 63, 64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}over{h[1]}")
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_equals_attention_on_the_gathered_keys(dtype, page_size, heads, head_dim):
    batch = paged(page_size, dtype, heads, head_dim)
    assert_same(batch.run(), batch.run_packed())


OPTIONS = [
    {"causal": False},
    {"window_size": (9, -1)},
    {"window_size": (4, 3), "causal": False},
    {"softcap": 3.0},
    {"softmax_scale": 0.7},
    {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    {"window_size": (0, 0), "softcap": 2.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("page_size", [3, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=short)
def test_matches_the_reference_in_fp64(dtype, page_size, options):
    batch = paged(page_size, dtype)
    if dtype == torch.float64:
        with pytest.warns(UserWarning, match="float64"):
            got = batch.run(**options)
    else:
        got = batch.run(**options)
    ref = paged_attention_reference(*batch.inputs(), return_lse=True, **options)
    inputs = [x.double() if x.is_floating_point() else x for x in batch.inputs()]
    gold = paged_attention_reference(*inputs, return_lse=True, **options)
    rounded = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # of the weights before they meet v
    for name, x, r, g in zip(("out", "softmax_lse"), got, ref, gold, strict=True):
        largest = max(1.0, g[g.isfinite()].abs().max().item())
        bound = 2 * distance(r, g) + (4 * torch.finfo(torch.float32).eps + rounded) * largest
        assert distance(x, g) <= bound, name


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("page_size", [16, 256])
def test_every_level(isa, dtype, page_size):
    batch = paged(page_size, dtype, head_dim=48)
    with forced_isa(isa):
        got = batch.run()
        assert_same(got, batch.run_packed())
    assert got[0].isfinite().all()


@pytest.mark.parametrize("lengths_k", [[1], [15], [16], [17], [0], [128], [129], [700]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_one_query_against_a_cache(dtype, lengths_k):
    batch = paged(16, dtype, (8, 2), 64, [1], lengths_k)
    out, lse = batch.run()
    assert_same((out, lse), batch.run_packed())
    if lengths_k == [0]:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_number_of_threads_changes_no_bit(page_size, with_threads):
    batch = paged(page_size, torch.bfloat16, (8, 2), 64, [1, 200, 3], [900, 400, 3])
    expected = batch.run()
    with_threads(3)
    assert_same(batch.run(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_documents_may_share_pages(dtype):
    batch = paged(16, dtype, lengths_q=[2], lengths_k=[100])
    q = torch.cat([batch.q, batch.q])
    table, lengths = batch.block_table.repeat(2, 1), batch.seqlens_k.repeat(2)
    out = paged_attention(q, batch.k_cache, batch.v_cache, table, borders([2, 2]), lengths)
    assert torch.equal(out[:2], out[2:])
    assert torch.equal(out[:2], batch.run()[0])


@pytest.mark.parametrize("layout", ["heads first", "head_dim strided", "k and v in one cache", "strided table"])
def test_strides_change_nothing(layout):
    batch = paged(16, torch.float32)
    q, k, v, table, *rest = batch.inputs()
    if layout == "heads first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif layout == "head_dim strided":
        q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    elif layout == "k and v in one cache":
        k, v = torch.stack([k, v], dim=1).unbind(1)
    else:
        table = table.repeat_interleave(2, dim=1)[:, ::2]
    assert_same(paged_attention(q, k, v, table, *rest, return_lse=True), batch.run())


def test_opcheck():
    batch = paged(16, torch.float32, lengths_q=[2, 3], lengths_k=[20, 30])
    op = torch.ops.herdkern.paged_attention_forward.default
    torch.library.opcheck(op, (*batch.inputs(), None, -1, 0, 0.0, 0.125))
    torch.library.opcheck(op, (*batch.inputs(), torch.ones(4), 5, 0, 3.0, 0.125))


def test_compiles_without_a_break():
    batch = paged(16, torch.bfloat16)
    compiled = torch.compile(paged_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(*batch.inputs()), batch.run()[0])


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "sinks"])
def test_a_gradient_is_refused(name):
    batch = paged(16, torch.float32)
    names = ["q", "k_cache", "v_cache", "block_table", "cu_seqlens", "seqlens_k"]
    arguments = dict(zip(names, batch.inputs(), strict=True), sinks=torch.zeros(4))
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=f"paged_attention: {name} must not require a gradient"):
        paged_attention(**arguments)
    with torch.no_grad():
        paged_attention(**arguments)


def table_with(page):
    def change(table):
        table = table.clone()
        table[0, 0] = page
        return table

    return change


WRONG = [
    ("q", lambda x: x.tolist(), TypeError, "must be a tensor, got list"),
    ("q", lambda x: x[0], ValueError, "must be .total_q, num_heads, head_dim."),
    ("q", lambda x: x.int(), ValueError, "must be one of float16"),
    ("q", lambda x: x[:, :3], ValueError, "num_heads of q must be a positive multiple"),
    ("k_cache", lambda x: x[0], ValueError, "must be .num_pages, page_size, num_kv_heads, 64."),
    ("k_cache", lambda x: x[..., :32], ValueError, "must be .num_pages, page_size, num_kv_heads, 64."),
    ("k_cache", lambda x: x[:, :0], ValueError, "page_size of at least 1"),
    ("k_cache", lambda x: x.half(), ValueError, "must be float32 as q, got float16"),
    ("v_cache", lambda x: x[1:], ValueError, "must have the shape of k_cache"),
    ("v_cache", lambda x: x.half(), ValueError, "must be float32 as q, got float16"),
    ("v_cache", lambda x: None, TypeError, "must be a tensor, got NoneType"),
    ("block_table", lambda x: x.long(), ValueError, "must be int32, got int64"),
    ("block_table", lambda x: x[:2], ValueError, "must have shape .num_docs=5, max_pages."),
    ("block_table", lambda x: x[0], ValueError, "must have shape .num_docs=5, max_pages."),
    ("block_table", table_with(-1), ValueError, "must name pages from 0 to .*row 0, entry 0.*got -1"),
    ("block_table", table_with(10**6), ValueError, "must name pages from 0 to .*got 1000000"),
    ("block_table", lambda x: x[:, :2], ValueError, "seqlens_k must be 0 to max_pages"),
    ("cu_seqlens", lambda x: x.long(), ValueError, "must be int32, got int64"),
    ("cu_seqlens", lambda x: x[None], ValueError, "must have shape .num_docs . 1,."),
    ("cu_seqlens", lambda x: x - 1, ValueError, "must start with 0"),
    ("cu_seqlens", lambda x: x * 2, ValueError, "must end with the number of tokens"),
    ("block_table", lambda x: x.tolist(), TypeError, "block_table must be a tensor, got list"),
    ("cu_seqlens", lambda x: x.tolist(), TypeError, "cu_seqlens must be a tensor, got list"),
    ("seqlens_k", lambda x: x.tolist(), TypeError, "seqlens_k must be a tensor, got list"),
    ("k_cache", lambda x: x.tolist(), TypeError, "k_cache must be a tensor, got list"),
    ("q", lambda x: x.to_sparse(), ValueError, "q must be dense, got sparse_coo"),
    ("q", lambda x: x[..., :0], ValueError, "head_dim of q must be 1 to 256, got 0"),
    ("cu_seqlens", lambda x: x.flip(0), ValueError, "cu_seqlens must start with 0"),
    ("cu_seqlens", lambda x: x.repeat_interleave(2)[::2], ValueError, "cu_seqlens must be contiguous"),
    ("seqlens_k", lambda x: x.long(), ValueError, "must be int32, got int64"),
    ("seqlens_k", lambda x: x[1:], ValueError, "must have shape .num_docs=5"),
    ("seqlens_k", lambda x: x * 100, ValueError, "must be 0 to max_pages . page_size"),
    ("seqlens_k", lambda x: -x, ValueError, "must be 0 to max_pages . page_size.*got -300"),
]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)]
)
def test_wrong_arguments_are_named(name, change, error, message):
    names = ["q", "k_cache", "v_cache", "block_table", "cu_seqlens", "seqlens_k"]
    arguments = dict(zip(names, paged(16, torch.float32).inputs(), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message) as raised:
        paged_attention(**arguments)
    assert "attention: " in str(raised.value)
    assert name in str(raised.value) or (name, message) == ("block_table", "seqlens_k must be 0 to max_pages")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 3}, "window_size must be"),
        ({"window_size": (-2, 0)}, "window_size must hold"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"softmax_scale": 0.0}, "softmax_scale must be"),
        ({"sinks": torch.zeros(3)}, "sinks must have shape"),
        ({"causal": "no"}, "causal must be True or False, got 'no'"),
        ({"return_lse": "x"}, "return_lse must be True or False, got 'x'"),
        ({"softcap": None}, "softcap must be"),
        ({"softcap": float("nan")}, "softcap must be"),
        ({"softmax_scale": "1"}, "softmax_scale must be"),
        ({"window_size": (1.5, 0)}, "window_size must hold"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, "sinks must be floating point"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        paged_attention(*paged(16, torch.float32).inputs(), **options)
