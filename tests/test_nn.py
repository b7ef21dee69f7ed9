"""Modules equal what they stand in for, bit for bit where the op does; names, casts and errors."""

import copy

import pytest
import torch
import torch.nn.functional as F

import herdkern
from herdkern import ops


def test_modules_are_loaded_when_they_are_named():
    assert herdkern.nn.RMSNorm.__module__ == "herdkern.nn"
    with pytest.raises(AttributeError, match="no attribute 'neural'"):
        herdkern.neural  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [1, 63, 128])
def test_rms_norm_is_its_op(dim, dtype):
    norm = herdkern.nn.RMSNorm(dim, 1e-5, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 2, 3, dim).to(dtype)
    assert torch.equal(norm(x), ops.rms_norm(x, norm.weight, eps=1e-5))
    out, new = norm(x, residual)
    assert torch.equal(new, x + residual)
    assert torch.equal(out, norm(new))


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_takes_the_state_of_torchs(eps):
    plain = torch.nn.RMSNorm(48, eps=eps)
    torch.nn.init.normal_(plain.weight)
    ours = herdkern.nn.RMSNorm(48, eps, casting="gemma")
    assert ours.load_state_dict(plain.state_dict()) == plain.load_state_dict(ours.state_dict())
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_with_an_offset_starts_as_the_plain_norm():
    norm = herdkern.nn.RMSNorm(8, casting="gemma", weight_offset=1.0)
    assert not norm.weight.any()
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), herdkern.nn.RMSNorm(8)(x))
    assert "weight_offset=1.0" in repr(norm)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_swiglu_is_the_formula(packed, bias):
    layer = herdkern.nn.SwiGLU(12, 20, packed=packed, bias=bias)
    x = torch.randn(2, 7, 12, requires_grad=True)
    gate, up = layer.gate_up_proj(x).chunk(2, -1) if packed else (layer.gate_proj(x), layer.up_proj(x))
    expected = layer.down_proj(F.silu(gate) * up)
    dout = torch.randn_like(expected)
    leaves = [x, *layer.parameters()]
    for got, want in zip(torch.autograd.grad(layer(x), leaves, dout), torch.autograd.grad(expected, leaves, dout)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_packed_swiglu_loads_what_is_not_packed():
    plain, packed = herdkern.nn.SwiGLU(6, 10, bias=True), herdkern.nn.SwiGLU(6, 10, packed=True, bias=True)
    state = plain.state_dict()
    packed.load_state_dict(state)
    assert set(state) == {f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")}
    x = torch.randn(4, 6)
    torch.testing.assert_close(packed(x), plain(x))
    outer = torch.nn.Sequential(packed)
    outer.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, ops.RopeScaling(factor=8.0, original_max_position=16)])
def test_rotary_embedding_turns_by_position(scaling, interleaved):
    rope = herdkern.nn.RotaryEmbedding(16, 32, theta=100.0, scaling=scaling, interleaved=interleaved)
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    borders = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    by_borders = rope(q, k, cu_seqlens=borders)
    for x, got in zip((q, k), by_borders):
        torch.testing.assert_close(got, ops.rope_reference(x, rope.cos, rope.sin, positions, interleaved=interleaved))
    assert all(map(torch.equal, by_borders, rope(q, k, positions)))
    assert all(map(torch.equal, rope(q, k), rope(q, k, torch.arange(9))))
    turned = rope(q, k)
    assert rope(q, k, inplace=True)[0] is q
    assert all(map(torch.equal, (q, k), turned))


def test_rotary_table_is_no_state_and_stays_float32():
    rope = herdkern.nn.RotaryEmbedding(8, 16)
    cos = rope.cos.clone()
    assert rope.state_dict() == {}
    assert torch.equal(torch.nn.Sequential(rope).bfloat16()[0].cos, cos)
    assert torch.equal(copy.deepcopy(rope).double().cos, cos)
    meta = herdkern.nn.RotaryEmbedding(8, 16, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(meta.cos, cos)
    with torch.device("meta"):
        assert herdkern.nn.SwiGLU(4, 4).down_proj.weight.is_meta


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_is_the_loss_of_the_logits(reduction):
    hidden, weight = torch.randn(2, 5, 12, requires_grad=True), torch.randn(31, 12, requires_grad=True)
    targets = torch.randint(31, (2, 5))
    targets[0, 2] = -7
    loss = herdkern.nn.LinearCrossEntropy(ignore_index=-7, reduction=reduction, label_smoothing=0.1)
    got = loss(hidden, weight, targets)
    expected = F.cross_entropy(
        (hidden @ weight.T).mT, targets, ignore_index=-7, reduction=reduction, label_smoothing=0.1
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got, expected = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_gives_log_probabilities():
    hidden, weight, targets = torch.randn(2, 5, 12), torch.randn(31, 12), torch.randint(31, (2, 5))
    loss, logps = herdkern.nn.LinearCrossEntropy(return_logps=True)(hidden, weight, targets)
    assert logps.shape == (2, 5)
    torch.testing.assert_close(loss, -logps.mean())


def test_modules_compile_whole():
    layer, norm = herdkern.nn.SwiGLU(8, 12), herdkern.nn.RMSNorm(8)

    def step(x):
        out, residual = norm(x, x)
        return layer(out) + residual

    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda nn: nn.RMSNorm(0), "RMSNorm: dim must be positive, got 0"),
        (lambda nn: nn.RMSNorm(4, casting="bf16"), "RMSNorm: casting must be llama, gemma or none, got 'bf16'"),
        (lambda nn: nn.SwiGLU(4, -1), "SwiGLU: ffn_dim must be positive, got -1"),
        (lambda nn: nn.RotaryEmbedding(4, 0), "RotaryEmbedding: max_position must be positive, got 0"),
        (lambda nn: nn.RotaryEmbedding(5, 4), "head_dim must be positive and even, got 5"),
        (lambda nn: nn.LinearCrossEntropy(reduction="max"), "reduction must be none, sum or mean, got 'max'"),
        (lambda nn: nn.LinearCrossEntropy(label_smoothing=2), r"label_smoothing must lie in \[0, 1\], got 2"),
        (
            lambda nn: nn.LinearCrossEntropy()(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(4).long()),
            r"LinearCrossEntropy: targets must have shape \(3,\), got \(4,\)",
        ),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make(herdkern.nn)
