"""Transformer: packed tokens in, hidden states, logits or loss out. Knows nothing of parallelism or of training.

Parameter names are those of Hugging Face's Llama without the leading "model.", and rotation pairs are half-split as
there, so weights map one to one (hf_weights.py).  Source: Llama 3 (arXiv:2407.21783) section 3.2.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdkern import ops
from herdkern.documents import position_ids_from_cu_seqlens
from herdkern.model.config import ModelConfig
from herdkern.model.layers import Block, KVCache, Linear, RMSNorm


class Transformer(nn.Module):
    """A Llama 3 decoder on packed documents; attention never crosses a border of `cu_seqlens`.

    Parameters are fp32 (or what `.to` makes of them); activations are `compute_dtype`.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size)
        if config.tied_embeddings:
            self.tie_embeddings()
        table = torch.empty(config.max_seq_len, config.head_dim // 2)
        self.register_buffer("rope_cos", table, persistent=False)
        self.register_buffer("rope_sin", table.clone(), persistent=False)
        if not table.is_meta:
            self.fill_rope_table()
            self.init_weights(seed)

    def tie_embeddings(self) -> None:
        """Make the head use the embedding matrix."""
        self.lm_head.register_parameter("weight", self.embed_tokens.get_parameter("weight"))

    def fill_rope_table(self) -> None:
        """Compute the cos and sin of every position, (max_seq_len, head_dim / 2) fp32."""
        cos, sin = _rope_table(self.config)
        self.rope_cos = cos.to(self.rope_cos.device)
        self.rope_sin = sin.to(self.rope_sin.device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights from N(0, init_std), a layer's two output projections scaled by 1 / sqrt(2 num_layers)."""
        generator = torch.Generator().manual_seed(seed)
        output_std = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, param in self.named_parameters():
            if param.ndim == 1:
                param.fill_(1.0)
                continue
            std = output_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.config.init_std
            param.copy_(torch.randn(param.shape, generator=generator).mul_(std))

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None, *, cache: KVCache | None = None
    ) -> Tensor:
        """The hidden states after the last norm, (total_tokens, dim) in compute_dtype.

        tokens: (total_tokens,) int64.  cu_seqlens: (num_docs + 1,) int32, document borders.  positions:
        (total_tokens,) int64; by default they start at 0 in every document.  With `cache`, tokens continue the
        cached rows and the borders come from the cache.  Raises: ValueError on shapes or dtypes that do not fit.
        """
        if tokens.ndim != 1 or tokens.dtype != torch.int64:
            raise ValueError(
                f"Transformer: tokens must be (total_tokens,) int64, got {tuple(tokens.shape)} {tokens.dtype}"
            )
        if positions is None:
            positions = position_ids_from_cu_seqlens(cu_seqlens, tokens.numel())
        if positions.shape != tokens.shape:
            raise ValueError(f"Transformer: positions must be {tuple(tokens.shape)}, got {tuple(positions.shape)}")
        x = self.embed_tokens(tokens).to(self.compute_dtype)  # (total_tokens, dim)
        rope = (self.rope_cos, self.rope_sin)
        branch: Tensor | None = None
        for block in self.layers:
            x, branch = block(x, branch, cu_seqlens, positions, rope, cache)
        hidden: Tensor = self.norm(x, branch)[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) fp32 from hidden: (..., dim)."""
        return F.linear(hidden, self.lm_head.weight.to(hidden.dtype)).float()

    def loss(self, hidden: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """Cross entropy in nats of targets: (total_tokens,) int64 (-100: not counted), never holding all logits."""
        weight: Tensor = self.lm_head.weight
        if weight.dtype != torch.float32:  # an fp32 head needs no 16-bit copy: the kernel rounds what it reads
            weight = weight.to(hidden.dtype)
        loss: Tensor = ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        return loss


def _rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    scaling = None
    if config.rope_scaling_factor != 1.0:
        scaling = ops.RopeScaling(
            factor=config.rope_scaling_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            original_max_position=config.rope_original_max_seq_len,
        )
    return ops.rope_table(config.max_seq_len, config.head_dim, theta=config.rope_theta, scaling=scaling)
