"""The peers of bench_train_step: the same model in plain torch, the same compiled, and transformers' Llama."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer
from herdkern.train.batch import Batch
from herdkern.train.config import OptimizerConfig
from herdkern.train.objective import Objective


@torch.compiler.disable
def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """SDPA document by document; split, as the backward of slices fills a whole gradient per document.

    Kept out of torch.compile: unrolled over documents and layers it compiles for minutes, anew for every batch.
    """
    outs = []
    for documents in zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True):
        heads = (t.transpose(0, 1)[None] for t in documents)  # (1, heads, length, head_dim)
        outs.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation; cos, sin: (total_tokens, 1, head_dim / 2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def plain_hidden(model: Transformer, batch: Batch) -> Tensor:
    """The forward pass of `model` on its own weights with nothing but torch."""
    config, dtype = model.config, model.compute_dtype
    cos, sin = (t[batch.positions][:, None] for t in (model.rope_cos, model.rope_sin))

    def linear(x: Tensor, module: Any) -> Tensor:
        return F.linear(x, module.weight.to(dtype))

    def norm(x: Tensor, module: Any) -> Tensor:
        return F.rms_norm(x, (config.dim,), module.weight.to(dtype), config.norm_eps)

    x = F.embedding(batch.tokens, model.embed_tokens.weight).to(dtype)
    for block in model.layers:
        n = norm(x, block.input_layernorm)
        attention: Any = block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear(n, projection).unflatten(-1, (-1, config.head_dim)) for projection in projections)
        out = attend(rope(q, cos, sin), rope(k, cos, sin), v, batch.document_lengths)
        x = x + linear(out.flatten(-2), attention.o_proj)
        n = norm(x, block.post_attention_layernorm)
        mlp: Any = block.mlp
        x = x + linear(F.silu(linear(n, mlp.gate_proj)) * linear(n, mlp.up_proj), mlp.down_proj)
    return norm(x, model.norm)


def plain_loss(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The objective of next_token_loss with all logits at once."""
    logits = F.linear(plain_hidden(model, batch), model.lm_head.weight.to(model.compute_dtype)).float()
    return F.cross_entropy(logits, batch.targets, reduction="sum"), {}


def transformers_loss(hf: Any, dtype: torch.dtype, seq_len: int) -> Objective:
    """An objective that runs the Hugging Face model `hf` on sequences as rows, documents parted by a dense mask."""

    def objective(_model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        document = torch.repeat_interleave(torch.tensor(batch.document_lengths)).view(-1, seq_len)
        mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # (batch_size, 1, seq_len, seq_len)
        rows = batch.tokens.view(-1, seq_len), batch.positions.view(-1, seq_len)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = hf(rows[0], attention_mask=mask, position_ids=rows[1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets, reduction="sum"), {}

    return objective


def transformers_model(config: ModelConfig, state: dict[str, Tensor]) -> Any:
    """LlamaForCausalLM of this shape with these weights; raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from herdkern.model.hf_weights import config_to_hf

    hf = LlamaForCausalLM(LlamaConfig(**config_to_hf(config), attn_implementation="sdpa"))
    hf.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return hf


def fused_adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW with the settings of the trainer; norms (1-D) do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
