"""rope_qk: queries and keys by one call, positions given, running or from borders, and in place with autograd."""

import itertools
import re

import pytest
import torch

from herdkern.ops import rope, rope_qk, rope_qk_reference, rope_reference, rope_table
from herdkern.ops.backend import available_isas, forced_isa

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16)]
STYLES = [pytest.param(False, id="half-split"), pytest.param(True, id="interleaved")]


def qk(num_tokens=63, head_dim=16, num_heads=4, num_kv_heads=2, dtype=FP32):
    return (torch.randn(num_tokens, heads, head_dim).to(dtype) for heads in (num_heads, num_kv_heads))


def borders(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


PLACES = {
    "running": {},
    "positions": {"positions": torch.arange(63) * 5 % 61},
    "int32-positions": {"positions": torch.arange(63, dtype=torch.int32) * 5 % 61},
    "documents": {"cu_seqlens": borders(20, 1, 42)},
    "empty-documents": {"cu_seqlens": borders(0, 0, 31, 0, 32, 0)},
    "one-document": {"cu_seqlens": borders(63)},
}


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_equals_rope_of_each(isa, dtype, interleaved, places, with_threads):
    """The same bits as rope of q and of k at the positions meant, for any number of threads."""
    q, k = qk(dtype=dtype, head_dim=64, num_heads=8)
    cos, sin = rope_table(64, 64)
    given = PLACES[places]
    positions = given.get("positions")
    if positions is None:
        lengths = given.get("cu_seqlens", borders(63)).diff().tolist()
        positions = torch.cat([torch.arange(length) for length in lengths])
    with forced_isa(isa):
        for num_threads in (1, 2, 3):
            with_threads(num_threads)
            got = rope_qk(q, k, cos, sin, interleaved=interleaved, **given)
            for x, turned in zip((q, k), got):
                assert torch.equal(turned, rope(x, cos, sin, positions, interleaved=interleaved))
    ref = rope_qk_reference(q, k, cos, sin, interleaved=interleaved, **given)
    expected = [rope_reference(x, cos, sin, positions, interleaved=interleaved) for x in (q, k)]
    assert all(torch.equal(a, b) for a, b in zip(ref, expected))


@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", PLACES)
def test_qk_matches_fp64(assert_matches_fp64, places, dtype, interleaved):
    cos, sin = rope_table(64, 30)

    def joined(function):
        return lambda q, k: torch.cat(function(q, k, cos, sin, interleaved=interleaved, **PLACES[places]), dim=1)

    assert_matches_fp64(joined(rope_qk), joined(rope_qk_reference), [*qk(head_dim=30, dtype=dtype)])


@pytest.mark.parametrize("wanted", ["q", "k"])
@pytest.mark.parametrize("used", ["q", "k", "both"])
def test_qk_gradients_of_one_alone(wanted, used):
    q, k = qk()
    cos, sin = rope_table(63, 16)
    leaf = {"q": q, "k": k}[wanted].requires_grad_()

    def gradient(function):
        turned_q, turned_k = function(q, k, cos, sin)
        loss = {"q": turned_q.sin().sum(), "k": turned_k.sin().sum()}
        total = sum(loss.values()) if used == "both" else loss[used]
        return torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None

    got, expected = gradient(rope_qk), gradient(rope_qk_reference)
    if used not in ("both", wanted):
        assert got is None or not got.any()
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("places", PLACES)
def test_neither_q_nor_k_is_saved(places):
    q, k = (x.requires_grad_() for x in qk())
    cos, sin = rope_table(63, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rope_qk(q, k, cos, sin, **PLACES[places])
    assert saved == [t.data_ptr() for t in (cos, sin, *PLACES[places].values())]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_qk_of_little(num_tokens):
    q, k = qk(num_tokens)
    for given in ({}, {"cu_seqlens": borders(num_tokens)}, {"cu_seqlens": borders(0, num_tokens)}):
        turned_q, turned_k = rope_qk(q, k, *rope_table(2, 16), **given)
        assert torch.equal(turned_q, q)
        assert torch.equal(turned_k, k)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("layout", ["contiguous", "fused", "dim-step"])
def test_in_place_without_gradients(layout, interleaved, backend):
    fused = torch.randn(63, 10, 32)
    views = {"contiguous": lambda: [*qk()], "fused": lambda: [fused[:, :6], fused[:, 6:8]]}
    views["dim-step"] = lambda: [fused[:, :6, ::2], fused[:, 6:8, 1::2]]
    q, k = views[layout]()
    table, rest = rope_table(63, q.shape[2]), fused[:, 8:].clone()
    expected = rope_qk(q, k, *table, interleaved=interleaved, backend=backend)
    got = rope_qk(q, k, *table, interleaved=interleaved, inplace=True, backend=backend)
    for x, result, right in zip((q, k), got, expected):
        assert result.data_ptr() == x.data_ptr()
        assert torch.equal(x, right)
    assert torch.equal(fused[:, 8:], rest)
    again = rope(q, *table, torch.arange(63), interleaved=interleaved, inplace=True, backend=backend)
    assert torch.equal(again, rope(expected[0], *table, torch.arange(63), interleaved=interleaved, backend=backend))
    assert again.data_ptr() == q.data_ptr()


@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("is_view", [False, True])
def test_in_place_with_gradients(interleaved, is_view):
    """Values and gradients are those of the call that is not in place, through views too."""
    hidden, weight = torch.randn(63, 24, requires_grad=True), torch.randn(24, 6 * 16)
    table, dout = rope_table(63, 16), torch.randn(63, 6, 16)

    def run(inplace):
        packed = hidden @ weight
        q, k = packed[:, :64].unflatten(1, (4, 16)), packed[:, 64:].unflatten(1, (2, 16))
        if not is_view:
            q, k = q.clone(), k.clone()
        q, k = rope_qk(q, k, *table, interleaved=interleaved, inplace=inplace)
        out = torch.cat([q, k], dim=1)
        if inplace and is_view:
            assert torch.equal(packed.unflatten(1, (6, 16)), out)  # the base sees it
        return out.detach(), torch.autograd.grad(out, hidden, dout)[0]

    for got, expected in zip(run(True), run(False)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_have_the_bits_of_small_ones(isa, dtype, interleaved):
    """Results of 16 MiB and more take another way to memory."""
    num_tokens = (16 << 20) // (20 * 64 * dtype.itemsize) + 3
    q, k = qk(num_tokens, 64, 16, 4, dtype)
    table = rope_table(num_tokens, 64)
    with forced_isa(isa):
        large = rope_qk(q, k, *table, interleaved=interleaved)
        for part in torch.arange(num_tokens).tensor_split(5):
            small = rope_qk(q[part], k[part], *table, part, interleaved=interleaved)
            assert all(torch.equal(a[part], b) for a, b in zip(large, small))


def test_in_place_is_seen_by_autograd():
    hidden, table = torch.randn(3, 1, 4, requires_grad=True), rope_table(3, 4)
    x = hidden * 2
    needed = x.sin()  # its backward needs x as it was
    rope_qk(x, x.detach().clone(), *table, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needed.sum().backward()
    q, k = (hidden * 2).view(3, 2, 2).split(1, dim=1)
    with pytest.raises(RuntimeError, match="returns multiple views"):
        rope_qk(q, k, *rope_table(3, 2), inplace=True)
    frozen = torch.randn(3, 1, 4)
    before = frozen._version
    rope(frozen, *table, torch.arange(3), inplace=True)
    assert frozen._version > before


def test_in_place_leaves_the_graph_where_a_position_is_refused():
    hidden, table = torch.randn(5, 2, 4, requires_grad=True), rope_table(4, 4)
    x = hidden * 2
    with pytest.raises(ValueError, match="positions must lie in"):
        rope(x, *table, torch.arange(5), inplace=True)
    q, k = hidden * 2, hidden * 2
    with pytest.raises(ValueError, match="positions must lie in"):
        rope_qk(q, k, *table, inplace=True)
    (x + q + k).sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 6.0))


def test_in_place_second_derivative():
    hidden, table = torch.randn(3, 2, 4, requires_grad=True), rope_table(3, 4)

    def second(inplace):
        q, k = rope_qk(hidden * 1.5, hidden * 0.5, *table, inplace=inplace)
        (first,) = torch.autograd.grad((q * k).sin().sum(), hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    torch.testing.assert_close(second(True), second(False))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_place_refuses(backend):
    q, k = qk(3, 4)
    table = rope_table(3, 4)
    leaf = q.clone().requires_grad_()
    cases = [
        ((leaf, k), "q must not be a leaf that requires a gradient with inplace=True, got a leaf; use inplace=False"),
        ((q, leaf[:, :2]), "k must not be a leaf that requires a gradient with inplace=True, got a view of one"),
        ((q[:1].expand(3, -1, -1), k), "q must not repeat elements with inplace=True, got strides (0, 4, 1); clone it"),
        ((q, q), "k must not lie where q lies with inplace=True, got one address; use inplace=False"),
        ((q, q[:, :1]), "k must not lie where q lies with inplace=True, got one address; use inplace=False"),
    ]
    for arguments, message in cases:
        before = [x.clone() for x in arguments]
        with pytest.raises(ValueError, match=re.escape(f"rope_qk: {message}")):
            rope_qk(*arguments, *table, inplace=True, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(arguments, before))
    with torch.no_grad():
        rope_qk(leaf, k, *table, inplace=True, backend=backend)


@pytest.mark.parametrize("given", ["running", "positions", "documents"])
@pytest.mark.parametrize("interleaved", STYLES)
def test_registered_qk(interleaved, given):
    q, k = (x.requires_grad_() for x in qk())
    places = {"positions": None, "cu_seqlens": None} | PLACES[given]
    torch.library.opcheck(
        torch.ops.herdkern.rope_qk.default, (q, k, *rope_table(63, 16), *places.values(), interleaved, False)
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", ["running", "positions", "documents"])
def test_qk_compiles_without_a_graph_break(given, inplace):
    q, k = (x.requires_grad_() for x in qk())
    table = rope_table(63, 16)

    def function(q, k):
        turned = rope_qk(q * 2, k * 3, *table, inplace=inplace, **PLACES[given])
        return sum(x.float().sin().sum() for x in turned)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(function(q, k), (q, k))):
        assert torch.equal(got, expected)


def qk_errors():
    q, k = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    table, cu = rope_table(5, 8), borders(1, 2)
    return {
        "2d": ((q[0], k, *table), {}, "q must be (total_tokens, num_heads, even head_dim), got (4, 8)"),
        "tokens": ((q, k[:2], *table), {}, "k must be (3, num_kv_heads, 8) as q, got (2, 2, 8)"),
        "head-dim": ((q, k[..., :6], *table), {}, "k must be (3, num_kv_heads, 8) as q, got (3, 2, 6)"),
        "dtype": ((q, k.to(BF16), *table), {}, "k must be float32 as q, got bfloat16"),
        "device": ((q, k.to("meta"), *table), {}, "k must be on cpu, got meta"),
        "both": ((q, k, *table, torch.arange(3)), {"cu_seqlens": cu}, "cu_seqlens must be None where positions"),
        "borders-dtype": ((q, k, *table), {"cu_seqlens": cu.long()}, "cu_seqlens must be int32, got int64"),
        "borders-end": (
            (q, k, *table),
            {"cu_seqlens": cu[:2]},
            "cu_seqlens must end with the number of tokens 3, got 1",
        ),
        "running": ((q, k, *(t[:2] for t in table)), {}, "positions must lie in [0, 2), got 3 tokens in a row"),
        "long": (
            (q, k, *(t[:1] for t in table)),
            {"cu_seqlens": cu},
            "positions must lie in [0, 1), got 2 tokens in a row; make a longer rope_table",
        ),
        "beyond": ((q, k, *table, torch.arange(3) + 3), {}, "positions must lie in [0, 5), got 5 at index 2"),
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", qk_errors())
def test_qk_errors(case, backend):
    arguments, options, message = qk_errors()[case]
    with pytest.raises(ValueError, match=re.escape(f"rope_qk: {message}")):
        rope_qk(*arguments, **options, backend=backend)
