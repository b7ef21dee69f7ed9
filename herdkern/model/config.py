"""The shape of a Llama 3 model, its presets and what it costs in parameters, FLOPs and bytes. Needs no torch.

Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), section 3.2 and Table 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FlopsConvention = Literal["full", "causal", "documents"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one dense decoder. `rope_scaling_factor` 1 means no rescaling; Llama 3.1 uses 8."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int = 8192
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    tied_embeddings: bool = False
    init_std: float = 0.02
    bos_id: int = -1  # -1: not known; written to and read from Hugging Face folders
    eos_id: int = -1

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim must be even for the rotation pairs, got {self.head_dim}")
        if self.norm_eps <= 0 or self.rope_theta <= 0 or self.init_std <= 0:
            raise ValueError(
                "ModelConfig: norm_eps, rope_theta and init_std must be positive, "
                f"got {self.norm_eps}, {self.rope_theta}, {self.init_std}"
            )
        if self.rope_scaling_factor < 1 or self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(
                "ModelConfig: rope_scaling_factor must be at least 1 and rope_high_freq_factor above "
                f"rope_low_freq_factor, got {self.rope_scaling_factor}, {self.rope_high_freq_factor}, "
                f"{self.rope_low_freq_factor}"
            )

    @property
    def num_params(self) -> int:
        """The number of parameters, embeddings included; a tied head is counted once."""
        head = 0 if self.tied_embeddings else self.vocab_size * self.dim
        norms = (2 * self.num_layers + 1) * self.dim
        return self.num_layers * self._layer_matmul_params + norms + self.vocab_size * self.dim + head

    @property
    def num_matmul_params(self) -> int:
        """The parameters that multiply every token: all matrices and the head, not the embedding look-up."""
        return self.num_layers * self._layer_matmul_params + self.vocab_size * self.dim

    @property
    def _layer_matmul_params(self) -> int:
        attention = 2 * self.dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.dim * self.ffn_dim

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of bf16 keys and values that generation keeps for each token."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def flops_per_token(self, seq_len: int, *, convention: Literal["full", "causal"] = "causal") -> float:
        """Training FLOPs (forward and backward) for one token of an undivided sequence: 6 N + attention.

        "full" counts every query-key pair of the sequence (PaLM's 12 L d S), "causal" half of them.
        """
        pairs = float(seq_len) if convention == "full" else seq_len / 2
        return 6.0 * self.num_matmul_params + self._attention_flops_per_pair * pairs

    def train_flops(self, document_lengths: Sequence[int]) -> float:
        """Training FLOPs of one packed batch, counting just the pairs that the causal document mask lets through."""
        tokens = sum(document_lengths)
        pairs = sum(length * (length + 1) // 2 for length in document_lengths)
        return 6.0 * self.num_matmul_params * tokens + self._attention_flops_per_pair * pairs

    @property
    def _attention_flops_per_pair(self) -> float:
        return (
            12.0 * self.num_layers * self.num_heads * self.head_dim
        )  # q.k and p.v, 2 FLOPs each, three times for training

    def memory_bytes(self, micro_batch_tokens: int, *, compute_bytes: int = 2) -> dict[str, int]:
        """An estimate of training memory by purpose, on one device without recomputation.

        Parameters, gradients and the two AdamW moments are fp32; `compute_bytes` is the width of activations and of
        the weights they meet (2: bf16). The head keeps no logits: linear_cross_entropy works in chunks.
        """
        kv_dim = self.num_kv_heads * self.head_dim
        q_dim = self.num_heads * self.head_dim
        # Kept for backward, per layer: two norm inputs, two norm outputs, rotated q and k, v, attention out, gate,
        # up, product.
        per_layer = 4 * self.dim + 2 * q_dim + 2 * kv_dim + 3 * self.ffn_dim
        kept = micro_batch_tokens * (self.num_layers * per_layer + 2 * self.dim)
        working_copy = self.num_params if compute_bytes < 4 else 0
        parts = {
            "params": 4 * self.num_params,
            "working_copy": compute_bytes * working_copy,
            "grads": 4 * self.num_params,
            "optimizer": 8 * self.num_params,
            "activations": compute_bytes * kept,
        }
        return {**parts, "total": sum(parts.values())}


def llama3_8b(vocab_size: int = 128_256) -> ModelConfig:
    """Llama 3 8B as released."""
    return ModelConfig(
        vocab_size=vocab_size, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14_336
    )


def llama3_70b(vocab_size: int = 128_256) -> ModelConfig:
    """Llama 3 70B as released."""
    return ModelConfig(
        vocab_size=vocab_size, dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, ffn_dim=28_672
    )


def llama3_405b(vocab_size: int = 128_256) -> ModelConfig:
    """Llama 3 405B as released."""
    return ModelConfig(
        vocab_size=vocab_size, dim=16_384, num_layers=126, num_heads=128, num_kv_heads=8, head_dim=128, ffn_dim=53_248
    )


def nano(vocab_size: int = 8192) -> ModelConfig:
    """About 1 M parameters with 8 k entries: tests and smoke runs. ffn_dim = 3.5 dim as in the 8B model."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        ffn_dim=224,
        max_seq_len=2048,
    )


def micro(vocab_size: int = 8192) -> ModelConfig:
    """About 5 M parameters with 8 k entries: minutes on two cores. ffn_dim = 3.5 dim as in the 8B model."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        ffn_dim=672,
        max_seq_len=4096,
    )


def mini(vocab_size: int = 8192) -> ModelConfig:
    """About 20 M parameters with 8 k entries: an hour on two cores. ffn_dim = 3.25 dim as in the 405B model."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=384,
        num_layers=8,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        ffn_dim=1248,
        max_seq_len=8192,
    )


PRESETS = {
    "nano": nano,
    "micro": micro,
    "mini": mini,
    "llama3-8b": llama3_8b,
    "llama3-70b": llama3_70b,
    "llama3-405b": llama3_405b,
}
