"""The layers of Llama 3 on packed tokens: linear, RMSNorm, attention, feed-forward, and the cache for generation.

Shapes: total_tokens = all tokens of all documents, in one row. A layer computes in the dtype of its input; its
weights stay in the dtype they are trained in (fp32) and are cast where they are used, so gradients accumulate in
fp32. Source: Llama 3 (arXiv:2407.21783) section 3.2; grouped-query attention, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdkern import ops
from herdkern.documents import cu_seqlens_from_lengths
from herdkern.model.config import ModelConfig


class Attend(Protocol):
    """What computes attention: `ops.attention`, or a parallel version of the same signature."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, cu_seqlens_k: Tensor | None = None
    ) -> Tensor:
        """(total_q, num_heads, head_dim) from q, k, v and the document borders."""
        ...


class KVCache:
    """Keys and values of every layer for sequences that grow, in pages that a sequence takes as it needs them.

    The pool starts small and doubles when its pages run out, so memory follows the tokens that are there and not
    batch_size * capacity. A sequence that has ended gives its pages back.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        page_size: int = 64,
    ) -> None:
        shape = (config.num_layers, batch_size, page_size, config.num_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (num_layers, num_pages, page_size, heads, head_dim)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity, self.page_size = capacity, page_size
        self.lengths = [0] * batch_size
        self.pages: list[list[int]] = [[] for _ in range(batch_size)]
        self._free = list(range(batch_size - 1, -1, -1))  # the last one is taken first
        self._slots = torch.empty(0, dtype=torch.int64)
        self.cu_seqlens_q = torch.zeros(batch_size + 1, dtype=torch.int32)
        self.seqlens_k = torch.zeros(batch_size, dtype=torch.int32)
        self.block_table = torch.zeros(batch_size, 0, dtype=torch.int32)

    def begin(self, num_new: list[int]) -> Tensor:
        """Make room for `num_new[i]` more tokens of row i and return the positions of all new tokens, (sum,) int64."""
        slots: list[int] = []
        positions: list[int] = []
        for row, count in enumerate(num_new):
            start, end = self.lengths[row], self.lengths[row] + count
            if end > self.capacity:
                raise ValueError(
                    f"KVCache: row {row} must have at most {self.capacity} tokens, got {end}; raise capacity"
                )
            while len(self.pages[row]) * self.page_size < end:
                self.pages[row].append(self._take_page())
            slots.extend(
                self.pages[row][i // self.page_size] * self.page_size + i % self.page_size for i in range(start, end)
            )
            positions.extend(range(start, end))
            self.lengths[row] = end
        device = self.k.device
        width = max(map(len, self.pages), default=0)
        table = [pages + [0] * (width - len(pages)) for pages in self.pages]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.block_table = torch.tensor(table, dtype=torch.int32, device=device).view(len(table), width)
        self.cu_seqlens_q = cu_seqlens_from_lengths(torch.tensor(num_new, device=device))
        self.seqlens_k = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return torch.tensor(positions, dtype=torch.int64, device=device)

    def end(self, row: int) -> None:
        """Give the pages of a row back; the row is empty again."""
        self._free += reversed(self.pages[row])
        self.pages[row], self.lengths[row] = [], 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v: (new_tokens, num_kv_heads, head_dim) of one layer and return that layer's pages."""
        self.k[layer].flatten(0, 1).index_copy_(0, self._slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, self._slots, v)
        return self.k[layer], self.v[layer]

    def _take_page(self) -> int:
        if not self._free:
            num_pages = self.k.shape[1]
            self.k = torch.cat([self.k, torch.zeros_like(self.k)], dim=1)
            self.v = torch.cat([self.v, torch.zeros_like(self.v)], dim=1)
            self._free = list(range(2 * num_pages - 1, num_pages - 1, -1))
        return self._free.pop()


class Linear(nn.Module):
    """x @ weight.T without a bias; the weight is cast to the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_dim) from x: (..., in_dim)."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The normed (..., dim) and x, or x + branch where there is one: the add and the norm are one kernel."""
        weight = self.weight.to(x.dtype)
        if branch is None:
            return ops.rms_norm(x, weight, eps=self.eps), x
        return ops.rms_norm(branch, weight, residual=x, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention inside documents. `attend` is replaced from outside when attention is parallel."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.dim, config.num_heads * config.head_dim)
        self.k_proj = Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.v_proj = Linear(config.dim, config.num_kv_heads * config.head_dim)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.dim)
        self.attend: Attend = ops.attention

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
    ) -> Tensor:
        """(total_tokens, dim) from x: (total_tokens, dim), document borders, positions and the cos/sin table."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (total_tokens, num_heads, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (total_tokens, num_kv_heads, head_dim)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = ops.rope_qk(q, k, *rope, positions)
        if cache is None:
            out = self.attend(q, k, v, cu_seqlens)
        else:
            k, v = cache.update(self.layer, k, v)
            out = ops.paged_attention(q, k, v, cache.block_table, cache.cu_seqlens_q, cache.seqlens_k)
        return self.o_proj(out.flatten(-2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.dim, config.ffn_dim)
        self.up_proj = Linear(config.dim, config.ffn_dim)
        self.down_proj = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(total_tokens, dim) from x: (total_tokens, dim)."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)).

    The sum with the last branch is left to the norm that follows, of the next layer or of the model.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cu_seqlens: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x and a branch to be added, (total_tokens, dim) each, from x and the branch of the layer before (or None)."""
        normed, x = self.input_layernorm(x, branch)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, cu_seqlens, positions, rope, cache))
        return x, self.mlp(normed)
