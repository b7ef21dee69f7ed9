"""RoPE against fp64 over dtypes, sizes, layouts and levels; its table, its group property, errors and modes."""

import math
import re

import pytest
import torch

from herdkern.ops import RopeScaling, rope, rope_reference, rope_table
from herdkern.ops.backend import available_isas, forced_isa

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (FP32, BF16)]
STYLES = [pytest.param(False, id="half-split"), pytest.param(True, id="interleaved")]
LAYOUTS = {
    "token-slice": lambda x: x[::2],
    "head-slice": lambda x: x[:, 1:3],
    "dim-slice": lambda x: x[:, :, 2:42],
    "dim-step": lambda x: x[:, :, ::2],
    "heads-first": lambda x: x.transpose(0, 1)[:3],
    "one-head-of-many": lambda x: x[:, 2:3],
    "no-tokens": lambda x: x[:0],
    "no-heads": lambda x: x[:, :0],
    "expanded": lambda x: x[:1].expand(7, -1, -1),
}


def turn(function, cos, sin, positions, interleaved):
    return lambda x: function(x, cos, sin, positions, interleaved=interleaved)


def both(positions, head_dim, interleaved):
    cos, sin = rope_table(1000, head_dim)
    return [turn(f, cos, sin, positions, interleaved) for f in (rope, rope_reference)]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 30, 32, 64, 126, 128, 256])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_matches_fp64(assert_matches_fp64, isa, interleaved, dtype, head_dim, num_heads):
    positions = torch.randint(0, 1000, (63,))
    with forced_isa(isa):
        assert_matches_fp64(*both(positions, head_dim, interleaved), [torch.randn(63, num_heads, head_dim).to(dtype)])


@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(assert_matches_fp64, dtype, layout, interleaved):
    x = LAYOUTS[layout](torch.randn(9, 5, 64).to(dtype))
    assert_matches_fp64(*both(torch.arange(x.shape[0]) * 7, x.shape[2], interleaved), [x])


@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("num_tokens", [1, 123, 1000])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
def test_positions(assert_matches_fp64, num_tokens, positions_dtype, interleaved):
    positions = torch.randint(0, 1000, (2 * num_tokens,), dtype=positions_dtype)[::2]
    assert_matches_fp64(*both(positions, 16, interleaved), [torch.randn(num_tokens, 2, 16)])


@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_one_projection_need_no_copy(dtype, interleaved):
    qkv = torch.randn(21, 6, 32).to(dtype)
    cos, sin = rope_table(21, 32)
    for heads in (qkv[:, :4], qkv[:, 4:5]):
        got = rope(heads, cos, sin, torch.arange(21), interleaved=interleaved)
        assert torch.equal(got, rope(heads.contiguous(), cos, sin, torch.arange(21), interleaved=interleaved))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", STYLES)
def test_has_the_bits_of_the_formula(isa, dtype, interleaved):
    """Output and gradient; in half-split float32 also those of Hugging Face's rotate_half."""
    for head_dim in (2, 6, 16, 30, 64, 80, 128):
        x = torch.randn(63, 4, head_dim).to(dtype).requires_grad_()
        dout = torch.randn(63, 4, head_dim).to(dtype)
        cos, sin = rope_table(63, head_dim)
        positions = torch.arange(63)
        with forced_isa(isa):
            out = rope(x, cos, sin, positions, interleaved=interleaved)
            (dx,) = torch.autograd.grad(out, x, dout)
        assert torch.equal(out, rope_reference(x, cos, sin, positions, interleaved=interleaved)), head_dim
        assert torch.equal(dx, rope_reference(dout, cos, -sin, positions, interleaved=interleaved)), head_dim
        if dtype == torch.float32 and not interleaved:
            turned = torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], dim=-1)
            wide_cos, wide_sin = (torch.cat([t, t], dim=-1).unsqueeze(1) for t in (cos, sin))
            assert torch.equal(out, x * wide_cos + turned * wide_sin), head_dim


@pytest.mark.parametrize("interleaved", STYLES)
def test_scores_depend_on_distance_alone(interleaved):
    cos, sin = rope_table(600, 64)
    q, k = torch.randn(1, 1, 64).expand(100, 1, 64), torch.randn(1, 1, 64).expand(100, 1, 64)
    positions, start = torch.arange(100), torch.zeros(100, dtype=torch.int64)

    def scores(shift):
        turned_q = rope(q, cos, sin, positions + shift, interleaved=interleaved)
        return (turned_q * rope(k, cos, sin, start + shift, interleaved=interleaved)).sum(-1)

    for shift in (17, 480):
        torch.testing.assert_close(scores(shift), scores(0))


@pytest.mark.parametrize("interleaved", STYLES)
def test_position_zero_is_the_identity(interleaved):
    x = torch.randn(5, 2, 24)
    assert torch.equal(rope(x, *rope_table(1, 24), torch.zeros(5, dtype=torch.int64), interleaved=interleaved), x)


def test_styles_are_permutations_of_each_other():
    x, table = torch.randn(5, 2, 24), rope_table(9, 24)
    positions = torch.tensor([0, 3, 8, 1, 1])
    order = torch.arange(24).view(12, 2).t().flatten()  # even places first, then odd
    got = rope(x, *table, positions, interleaved=True)[:, :, order]
    assert torch.equal(got, rope(x[:, :, order].contiguous(), *table, positions))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("interleaved", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(with_threads, isa, dtype, interleaved):
    x = torch.randn(311, 4, 64).to(dtype).requires_grad_()
    cos, sin = rope_table(311, 64)
    results = []
    with forced_isa(isa):
        for num_threads in (1, 2, 3, 7):
            with_threads(num_threads)
            out = rope(x, cos, sin, torch.arange(311), interleaved=interleaved)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("head_dim", [2, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_table_against_the_formula(head_dim, theta):
    cos, sin = rope_table(50, head_dim, theta=theta)
    assert cos.shape == sin.shape == (50, head_dim // 2)
    assert cos.dtype == sin.dtype == FP32
    for position in (0, 1, 49):
        for i in (0, head_dim // 2 - 1):
            angle = position * theta ** (-2 * i / head_dim)
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_scaled_table_by_wavelength():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    plain, scaled = (torch.atan2(*reversed(rope_table(2, 128, scaling=s)))[1].double() for s in (None, scaling))
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8, rtol=1e-6, atol=0)
    between = ~(short | long)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_scaled_table_equals_transformers():
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rope_theta=500000.0,
    )
    if not hasattr(config, "rope_parameters") or "rope_type" not in (config.rope_parameters or {}):
        pytest.skip("this version of transformers keeps its RoPE settings elsewhere")
    frequency, _ = utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    sin, cos = reversed(rope_table(2, 128, scaling=RopeScaling()))
    torch.testing.assert_close(torch.atan2(sin, cos)[1], frequency, rtol=1e-5, atol=0)


def test_second_derivative():
    x = torch.randn(4, 2, 8, requires_grad=True)
    cos, sin = rope_table(4, 8)

    def second(function):
        turned = function(x, cos, sin, torch.arange(4))
        (dx,) = torch.autograd.grad(turned.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(second(rope), second(rope_reference))


def test_no_graph_without_gradients():
    assert rope(torch.randn(3, 1, 4), *rope_table(3, 4), torch.arange(3)).grad_fn is None


@pytest.mark.parametrize("interleaved", STYLES)
def test_registered_op(interleaved):
    x, no_keys = torch.randn(5, 2, 8, requires_grad=True), torch.empty(5, 0, 8)
    arguments = x, no_keys, *rope_table(5, 8), torch.arange(5), None, interleaved, False
    torch.library.opcheck(torch.ops.herdkern.rope_qk.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_without_a_graph_break(dtype):
    x = torch.randn(6, 2, 8).to(dtype).requires_grad_()
    cos, sin = rope_table(6, 8)

    def function(x):
        return rope(x * 2, cos, sin, torch.arange(6)).float().sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(function(x), x)[0])


def test_meta_tensors_give_shapes():
    cos, sin = rope_table(4, 8, device="meta")
    out = rope(torch.empty(3, 2, 8, dtype=BF16, device="meta"), cos, sin, torch.arange(3, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((3, 2, 8), BF16, "meta")


def test_autocast_keeps_the_dtype_of_x():
    with torch.autocast("cpu", dtype=BF16):
        assert rope(torch.randn(3, 1, 8), *rope_table(3, 8), torch.arange(3)).dtype == FP32
        assert rope(torch.randn(3, 1, 8).to(BF16), *rope_table(3, 8), torch.arange(3)).dtype == BF16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_fall_back_and_say_so(dtype):
    arguments = torch.randn(3, 1, 8).to(dtype), *rope_table(3, 8), torch.arange(3)
    expected = f"rope: using 'reference' because native: dtype must be float32 or bfloat16, got {str(dtype)[6:]}"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        assert torch.equal(rope(*arguments), rope_reference(*arguments))


def errors():
    x, positions = torch.zeros(3, 2, 8), torch.arange(3)
    cos, sin = rope_table(5, 8)
    table = "must have shape (max_position, 4), got"
    return {
        "2d": ((x[0], cos, sin, positions), "x must be (total_tokens, num_heads, even head_dim), got (2, 8)"),
        "odd": ((x[..., :7], cos, sin, positions), "x must be (total_tokens, num_heads, even head_dim), got (3, 2, 7)"),
        "cos": ((x, cos[:, :3], sin, positions), f"cos {table} (5, 3)"),
        "sin": ((x, cos, sin[:4], positions), f"sin {table} (4, 4)"),
        "table-dtype": ((x, cos.to(BF16), sin, positions), "cos must be float32, got bfloat16"),
        "table-gradient": ((x, cos, sin.clone().requires_grad_(), positions), "sin must not require a gradient"),
        "positions-shape": ((x, cos, sin, positions[:2]), "positions must have shape (3,), got (2,)"),
        "positions-dtype": ((x, cos, sin, positions.float()), "positions must be int32 or int64, got float32"),
        "device": ((x, cos, sin, positions.to("meta")), "positions must be on cpu, got meta"),
        "beyond": (
            (x, cos, sin, positions + 3),
            "positions must lie in [0, 5), got 5 at index 2; make a longer rope_table",
        ),
        "negative": ((x, cos, sin, positions - 1), "positions must lie in [0, 5), got -1 at index 0"),
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", errors())
def test_errors(case, backend):
    arguments, message = errors()[case]
    with pytest.raises(ValueError, match=re.escape(f"rope: {message}")):
        rope(*arguments, backend=backend)


@pytest.mark.parametrize("head_dim", [0, -2, 7])
def test_table_needs_an_even_head_dim(head_dim):
    with pytest.raises(ValueError, match=f"rope_table: head_dim must be positive and even, got {head_dim}"):
        rope_table(4, head_dim)


def test_table_needs_a_positive_theta():
    with pytest.raises(ValueError, match=re.escape("rope_table: theta must be positive, got 0.0")):
        rope_table(4, 8, theta=0.0)


@pytest.mark.parametrize("setting", [{"factor": 0.5}, {"low_freq_factor": 4.0}, {"low_freq_factor": 0.0}])
def test_scaling_is_checked(setting):
    with pytest.raises(ValueError, match="RopeScaling: "):
        RopeScaling(**setting)
