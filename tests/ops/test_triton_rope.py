"""RoPE in Triton against fp64: dtypes, odd sizes, layouts, positions, in place, the registered op."""

import pytest
import torch
from triton_interpreter import triton_runs  # noqa: F401

from herdkern.ops import rope, rope_qk, rope_qk_reference, rope_reference, rope_table

pytestmark = pytest.mark.triton
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.bfloat16)]
STYLES = [pytest.param(False, id="half-split"), pytest.param(True, id="interleaved")]
SIZES = [(1, 1, 1, 2), (7, 3, 1, 10), (3, 40, 8, 128)]  # tokens, heads of q, of k, head_dim


def places(kind, num_tokens):
    if kind == "positions":
        return {"positions": torch.randint(0, 32, (num_tokens,))}
    if kind == "documents":
        return {"cu_seqlens": torch.tensor([0, 0, min(3, num_tokens), num_tokens], dtype=torch.int32)}
    return {}


def one_output(function, table, interleaved=False, **options):
    return lambda q, k: torch.cat(function(q, k, *table, interleaved=interleaved, **options), dim=1)


@pytest.mark.parametrize("kind", ["positions", "documents", "running"])
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_fp64(assert_matches_fp64, size, dtype, interleaved, kind):
    num_tokens, num_heads, num_kv_heads, head_dim = size
    q, k = (torch.randn(num_tokens, heads, head_dim).to(dtype) for heads in (num_heads, num_kv_heads))
    table, where = rope_table(32, head_dim), places(kind, num_tokens)
    op = one_output(rope_qk, table, interleaved, backend="triton", **where)
    assert_matches_fp64(op, one_output(rope_qk_reference, table, interleaved, **where), [q, k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_fused_projection(assert_matches_fp64, dtype):
    fused = torch.randn(9, 8, 24).to(dtype)
    table = rope_table(32, 24)
    op = one_output(rope_qk, table, backend="triton")
    assert_matches_fp64(op, one_output(rope_qk_reference, table), [fused[:, :5], fused[:, 5:7]])
    assert_matches_fp64(
        op, one_output(rope_qk_reference, table), [fused[::2, :5], fused.transpose(1, 2)[:5, :, :].mT[:, :2]]
    )


@pytest.mark.parametrize("interleaved", STYLES)
def test_one_tensor(assert_matches_fp64, interleaved):
    cos, sin = rope_table(32, 16)
    positions = torch.randint(0, 32, (11,))
    op, reference = (
        lambda x, f=f, o=options: f(x, cos, sin, positions, interleaved=interleaved, **o)
        for f, options in ((rope, {"backend": "triton"}), (rope_reference, {}))
    )
    assert_matches_fp64(op, reference, [torch.randn(11, 3, 16)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_has_the_same_bits(dtype):
    table = rope_table(32, 16)
    leaves = [torch.randn(6, heads, 16).to(dtype).requires_grad_() for heads in (4, 2)]
    expected = rope_qk(*leaves, *table, backend="triton")
    turned = [leaf * 1 for leaf in leaves]
    got = rope_qk(*turned, *table, inplace=True, backend="triton")
    assert all(a is b for a, b in zip(got, turned))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    douts = [torch.randn_like(out) for out in got]
    gradients = [torch.autograd.grad(outs, leaves, douts) for outs in (got, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_position_beyond_the_table_gives_nan():
    x = torch.ones(3, 1, 4)
    out = rope(x, *rope_table(8, 4), torch.tensor([1, 8, -1]), backend="triton")
    assert out.isnan().all(dim=(1, 2)).tolist() == [False, True, True]


def test_no_tokens_and_no_heads():
    table = rope_table(4, 8)
    for q, k in ((torch.ones(0, 2, 8), torch.ones(0, 1, 8)), (torch.ones(3, 0, 8), torch.ones(3, 1, 8))):
        assert [x.shape for x in rope_qk(q, k, *table, backend="triton")] == [q.shape, k.shape]


def test_registered_op():
    q, k = torch.randn(5, 2, 8, requires_grad=True), torch.randn(5, 1, 8, requires_grad=True)
    rope_qk(q, k, *rope_table(8, 8), backend="triton")  # registers it
    op = torch.ops.herdkern.triton_rope_qk.default
    torch.library.opcheck(op, (q, k, *rope_table(8, 8), torch.arange(5), None, True, False))


def test_compiles_without_a_graph_break():
    q, k = torch.randn(5, 2, 8, requires_grad=True), torch.randn(5, 1, 8, requires_grad=True)
    table = rope_table(8, 8)

    def function(q, k):
        return sum(x.sin().sum() for x in rope_qk(q * 2, k, *table, backend="triton"))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(q, k), (q, k)) for f in (compiled, function))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
