"""Shapes, parameter counts, FLOPs and memory of the presets; what a wrong shape says."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from herdkern.model.config import PRESETS, llama3_8b, llama3_70b, llama3_405b, micro, mini, nano
from herdkern.model.transformer import Transformer


@pytest.mark.parametrize(
    ("preset", "num_params", "kv_bytes"),
    [
        (llama3_8b, 8_030_261_248, 131_072),
        (llama3_70b, 70_553_706_496, 327_680),
        (llama3_405b, 405_853_388_800, 516_096),
    ],
    ids=["8b", "70b", "405b"],
)
def test_parameter_counts_of_table_3(preset, num_params, kv_bytes):
    assert preset().num_params == num_params
    assert preset().kv_cache_bytes_per_token == kv_bytes


@pytest.mark.parametrize(("preset", "millions"), [(nano, 1), (micro, 5), (mini, 20)], ids=["nano", "micro", "mini"])
def test_small_presets_are_about_their_size(preset, millions):
    config = preset()
    assert 0.75 * millions < config.num_params / 1e6 < 1.25 * millions
    assert config.ffn_dim / config.dim in (3.5, 3.25)
    assert config.num_heads * config.head_dim == config.dim
    assert config.num_kv_heads < config.num_heads


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_modules(name, tied):
    config = dataclasses.replace(PRESETS[name](), tied_embeddings=tied, max_seq_len=8)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params


def test_flops_of_the_405b_model():
    """The figures of the training specification: 2.52e12 at 8 K and 4.05e12 at 128 K, causal convention."""
    config = llama3_405b()
    assert config.flops_per_token(8192) == pytest.approx(2.52e12, rel=2e-3)
    assert config.flops_per_token(131_072) == pytest.approx(4.05e12, rel=2e-3)
    full = config.flops_per_token(8192, convention="full") - 6 * config.num_matmul_params
    assert full == 2 * (config.flops_per_token(8192) - 6 * config.num_matmul_params) == 12 * 126 * 16_384 * 8192


def test_flops_of_documents_lie_between_none_and_causal():
    config = micro()
    whole, halves = config.train_flops([1024]), config.train_flops([512, 512])
    assert 1024 * 6 * config.num_matmul_params < halves < whole
    assert whole == pytest.approx(1024 * config.flops_per_token(1024), rel=1e-3)


def test_flops_equal_what_torch_counts(small_config):
    """Forward and backward of all matrix products of the model, attention counted over whole documents."""

    def attend(q, k, v, cu_seqlens, *, cu_seqlens_k=None):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    model = Transformer(small_config)
    for block in model.layers:
        block.self_attn.attend = attend
    tokens = torch.arange(64)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens, torch.tensor([0, 64], dtype=torch.int32))).sum().backward()
    assert counter.get_total_flops() == pytest.approx(
        64 * small_config.flops_per_token(64, convention="full"), rel=0.01
    )


def test_memory_estimate_has_the_optimizer_and_adds_up():
    memory = llama3_8b().memory_bytes(8192)
    assert memory["params"] + memory["grads"] + memory["optimizer"] == 16 * llama3_8b().num_params
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert llama3_8b().memory_bytes(8192, compute_bytes=4)["working_copy"] == 0


def test_kept_activations_are_estimated_within_a_quarter():
    config = dataclasses.replace(micro(), vocab_size=64)
    model = Transformer(config, compute_dtype=torch.bfloat16)
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        shape = tuple(tensor.shape)
        is_weight = tensor.data_ptr() in own or shape in {tuple(p.shape) for p in model.parameters()}
        if not is_weight and tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.arange(512) % 64, torch.tensor([0, 512], dtype=torch.int32))
    assert out.requires_grad
    assert sum(kept.values()) == pytest.approx(config.memory_bytes(512)["activations"], rel=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads=4, got 6"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        ({"norm_eps": 0.0}, "must be positive"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor must be at least 1"),
        ({"rope_high_freq_factor": 1.0}, "rope_high_freq_factor above"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_shapes_are_named(small_config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_config, **change)
