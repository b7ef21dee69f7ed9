"""The model against an oracle in numpy that shares nothing with it, and against itself one document at a time."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from herdkern.model.config import ModelConfig
from herdkern.model.hf_weights import to_meta_state
from herdkern.model.transformer import Transformer


def oracle_logits(state: dict[str, np.ndarray], config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Llama 3 for one document in fp64 numpy, on weights in Meta's layout: complex rotations, explicit scores."""

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling_factor != 1:
        for i, w in enumerate(frequencies):
            wavelength, original = 2 * math.pi / w, config.rope_original_max_seq_len
            if wavelength > original / config.rope_low_freq_factor:
                frequencies[i] = w / config.rope_scaling_factor
            elif wavelength > original / config.rope_high_freq_factor:
                low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
                smooth = (original / wavelength - low) / (high - low)
                frequencies[i] = (1 - smooth) * w / config.rope_scaling_factor + smooth * w
    turns = np.exp(1j * np.arange(len(tokens))[:, None] * frequencies)  # (tokens, head_dim / 2)

    def rotate(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = state["tok_embeddings.weight"][tokens]
    mask = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(config.num_layers):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in state.items() if k.startswith(f"layers.{layer}.")}
        n = norm(x, w["attention_norm.weight"])
        q, k, v = (n @ w[f"attention.w{c}.weight"].T for c in "qkv")
        q = rotate(q.reshape(len(tokens), config.num_heads, -1))
        k = rotate(k.reshape(len(tokens), config.num_kv_heads, -1))
        v = v.reshape(len(tokens), config.num_kv_heads, -1)
        heads = []
        for h in range(config.num_heads):
            g = h // (config.num_heads // config.num_kv_heads)
            scores = q[:, h] @ k[:, g].T / math.sqrt(config.head_dim) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, g])
        x = x + np.concatenate(heads, -1) @ w["attention.wo.weight"].T
        n = norm(x, w["ffn_norm.weight"])
        gate = n @ w["feed_forward.w1.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def packed(lengths, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("scaling", [1.0, 8.0], ids=["plain", "llama31"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6], ids=["mqa", "gqa", "mha"])
def test_logits_equal_the_oracle(small_config, num_kv_heads, scaling):
    config = dataclasses.replace(
        small_config, num_kv_heads=num_kv_heads, rope_scaling_factor=scaling, rope_original_max_seq_len=64, init_std=0.1
    )
    model = Transformer(config, seed=2)
    for name, param in model.named_parameters():  # norms away from 1, so that a missing one shows
        if param.ndim == 1:
            param.data = 1 + 0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
    lengths = [5, 1, 63, 31]
    tokens, cu_seqlens = packed(lengths, config.vocab_size)
    logits = model.logits(model(tokens, cu_seqlens)).detach().double().numpy()
    state = {k: v.detach().double().numpy() for k, v in to_meta_state(model.state_dict(), config).items()}
    want = [oracle_logits(state, config, part.numpy()) for part in tokens.split(lengths)]
    assert np.abs(logits - np.concatenate(want)).max() <= 2e-5


def test_packed_equals_each_document_alone(small_model):
    lengths = [1, 17, 64, 3, 1]
    tokens, cu_seqlens = packed(lengths, 97)
    dout = torch.randn(sum(lengths), 24)

    def run(parts, douts):
        small_model.zero_grad()
        outs = []
        for part, d in zip(parts, douts, strict=True):
            cu = torch.tensor([0, len(part)], dtype=torch.int32) if len(parts) > 1 else cu_seqlens
            outs.append(small_model(part, cu))
            outs[-1].backward(d)
        return torch.cat(outs), {n: p.grad.clone() for n, p in small_model.named_parameters() if p.grad is not None}

    out, grads = run([tokens], [dout])
    alone, grads_alone = run(tokens.split(lengths), dout.split(lengths))
    assert (out - alone).abs().max() <= 1e-5
    for name, grad in grads.items():
        assert (grad - grads_alone[name]).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max())), name


def test_documents_do_not_leak(small_model):
    """Other tokens in document A change no bit of document B; without the border they do (negative control)."""
    tokens, cu_seqlens = packed([20, 30, 14], 97)
    other = tokens.clone()
    other[20:50] = (other[20:50] + 13) % 97
    one, two = small_model(tokens, cu_seqlens), small_model(other, cu_seqlens)
    assert torch.equal(one[:20], two[:20])
    assert torch.equal(one[50:], two[50:])
    assert not torch.equal(one[20:50], two[20:50])
    whole = torch.tensor([0, 64], dtype=torch.int32)
    assert (small_model(tokens, whole)[50:] - small_model(other, whole)[50:]).abs().max() > 1e-3


def test_positions_may_continue_across_documents(small_model):
    """Rotations are relative: positions that run on give the same output inside every document."""
    tokens, cu_seqlens = packed([20, 44], 97)
    reset = small_model(tokens, cu_seqlens)
    running = small_model(tokens, cu_seqlens, torch.arange(64))
    assert (reset - running).abs().max() <= 2e-5


@pytest.mark.filterwarnings("ignore:.*using 'reference'")  # native kernels are fp32 and bf16
def test_gradients_equal_finite_differences_in_fp64():
    config = ModelConfig(
        vocab_size=11,
        dim=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        ffn_dim=12,
        max_seq_len=8,
        init_std=0.5,
    )
    model = Transformer(config, compute_dtype=torch.float64).double()
    tokens, cu_seqlens = packed([3, 2], 11)
    params = dict(model.named_parameters())

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(params, values, strict=True)), (tokens, cu_seqlens))

    inputs = tuple(p.detach().clone().requires_grad_() for p in params.values())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_bf16_computes_in_bf16_and_stays_near(small_config):
    model = Transformer(small_config, seed=1)
    tokens, cu_seqlens = packed([40, 24], 97)
    exact = model(tokens, cu_seqlens)
    model.compute_dtype = torch.bfloat16
    rough = model(tokens, cu_seqlens)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() <= 16 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_loss_is_the_cross_entropy_of_the_logits(small_model):
    tokens, cu_seqlens = packed([40, 24], 97)
    hidden = small_model(tokens, cu_seqlens)
    targets = tokens.roll(-1)
    targets[5] = -100
    want = torch.nn.functional.cross_entropy(small_model.logits(hidden), targets, reduction="sum")
    got = small_model.loss(hidden, targets, reduction="sum")
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_tied_embeddings_share_one_matrix(small_config):
    model = Transformer(dataclasses.replace(small_config, tied_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight


def test_init_follows_the_recipe(small_config):
    config = dataclasses.replace(small_config, dim=128, ffn_dim=256, head_dim=32, init_std=0.02)
    model = Transformer(config, seed=9)
    assert model.layers[0].mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert model.layers[2].self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    same = Transformer(config, seed=9).state_dict()
    assert all(torch.equal(v, same[k]) for k, v in model.state_dict().items())
    assert not torch.equal(Transformer(config, seed=8).lm_head.weight, model.lm_head.weight)


def test_attend_can_be_replaced(small_model):
    calls = []
    inner = small_model.layers[1].self_attn.attend

    def attend(q, k, v, cu_seqlens, **kwargs):
        calls.append((tuple(q.shape), tuple(k.shape)))
        return inner(q, k, v, cu_seqlens, **kwargs)

    small_model.layers[1].self_attn.attend = attend
    small_model(*packed([9], 97))
    assert calls == [((9, 6, 8), (9, 2, 8))]


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), None, r"tokens must be \(total_tokens,\) int64, got \(2, 3\)"),
        (torch.zeros(3), None, "int64, got .* torch.float32"),
        (torch.zeros(3, dtype=torch.int64), torch.arange(2), r"positions must be \(3,\), got \(2,\)"),
    ],
    ids=["2-d", "float", "positions"],
)
def test_wrong_inputs_are_named(small_model, tokens, positions, message):
    with pytest.raises(ValueError, match=message):
        small_model(tokens, torch.tensor([0, 3], dtype=torch.int32), positions)


def test_compiles_into_one_graph(small_model):
    """No graph break from tokens to loss, for two packings; the compiled loss and gradients are the eager ones."""
    torch.compiler.reset()

    def loss(tokens, cu_seqlens, targets):
        return small_model.loss(small_model(tokens, cu_seqlens), targets)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for lengths in ([20, 44], [7, 13, 44]):
        tokens, cu_seqlens = packed(lengths, 97)
        found = []
        for function in (loss, compiled):
            small_model.zero_grad()
            value = function(tokens, cu_seqlens, tokens.roll(-1))
            value.backward()
            found.append((value.detach(), small_model.layers[0].self_attn.k_proj.weight.grad.clone()))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
