"""Packed batches, the roundings of bf16 and the accuracy bound, shared by the tests of attention.

gold is the reference in fp64, ref a plain implementation with the roundings of the test's dtype (fp32: the reference
itself; bf16: plain_bf16), and |got - gold| <= 2 |ref - gold| + 4 eps max(1, |gold|) in max norm.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from herdkern.ops import attention, attention_reference
from herdkern.ops.backend import active_isa, native_module

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(2, 2), (4, 2), (4, 1), (8, 1)]  # (num_heads, num_kv_heads): groups of 1, 2, 4, 8
NAMES = ("out", "softmax_lse", "dq", "dk", "dv")
attention_with_lse = functools.partial(attention, return_lse=True)
attention_with_lse_reference = functools.partial(attention_reference, return_lse=True)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@dataclass(frozen=True)
class Packed:
    """One packed batch and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None = None

    def run(self, function, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
        """[out, softmax_lse, dq, dk, dv] of `function` in `dtype`."""
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = function(*inputs, self.cu_seqlens, cu_seqlens_k=self.cu_seqlens_k, **options)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, self.dout.to(out.dtype))]


def packed(lengths, dtype, heads, head_dim, *, lengths_k=None, seed=0) -> Packed:
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens, num_heads):
        return torch.randn(tokens, num_heads, head_dim, generator=generator).to(dtype)

    total_q, total_k = sum(lengths), sum(lengths if lengths_k is None else lengths_k)
    return Packed(
        q=normal(total_q, heads[0]),
        k=normal(total_k, heads[1]),
        v=normal(total_k, heads[1]),
        dout=normal(total_q, heads[0]),
        cu_seqlens=borders(lengths),
        cu_seqlens_k=None if lengths_k is None else borders(lengths_k),
    )


def plain_bf16(batch: Packed, causal: bool = True, softmax_scale: float | None = None) -> list[Tensor]:
    """FlashAttention-2's equations in plain torch with the roundings that csrc/cpu/attention.h states.

    `out` is stored in bf16 before delta is taken from it; where the processor multiplies bf16, weights and dS are bf16
    in the second products.
    """
    head_dim, group = batch.q.shape[-1], batch.q.shape[1] // batch.k.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    bf16_products = active_isa() in ("avx512", "amx") and native_module().has_avx512_bf16() and head_dim > 16

    def factor(x: Tensor) -> Tensor:
        return x.bfloat16().float() if bf16_products else x

    results = []
    cu_k = batch.cu_seqlens if batch.cu_seqlens_k is None else batch.cu_seqlens_k
    for doc in range(len(cu_k) - 1):
        rows, keys = slice(*batch.cu_seqlens[doc : doc + 2].tolist()), slice(*cu_k[doc : doc + 2].tolist())
        q, dout = batch.q[rows].float().transpose(0, 1), batch.dout[rows].float().transpose(0, 1)
        k, v = (x[keys].float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (batch.k, batch.v))
        scores = q @ k.mT * scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        out = (factor(p) @ v).bfloat16().float()
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
        dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (factor(ds).mT @ q * scale, factor(p).mT @ dout))
        results.append([out, lse[..., None], factor(ds) @ k * scale, dk, dv])
    out, lse, dq, dk, dv = (torch.cat(x, dim=1) for x in zip(*results, strict=True))
    return [out.transpose(0, 1).bfloat16(), lse[..., 0], *(x.transpose(0, 1).bfloat16() for x in (dq, dk, dv))]


def distance(x: Tensor, gold: Tensor) -> float:
    """Largest difference; equal infinities differ by nothing, a NaN by infinity."""
    difference = torch.where(x.double() == gold, 0.0, (x.double() - gold).abs())
    return difference.nan_to_num(nan=torch.inf).max().item() if x.numel() else 0.0


def assert_bound(batch: Packed, got: list[Tensor], **options) -> None:
    gold = batch.run(attention_with_lse_reference, torch.float64, **options)
    bf16 = batch.q.dtype == torch.bfloat16
    ref = plain_bf16(batch, **options) if bf16 else batch.run(attention_with_lse_reference, **options)
    for name, g, r, x in zip(NAMES, gold, ref, got, strict=True):
        finite = g[g.isfinite()].abs()
        largest = max(1.0, finite.max().item() if finite.numel() else 0.0)
        bound = 2 * distance(r, g) + 4 * torch.finfo(torch.float32).eps * largest
        assert distance(x, g) <= bound, f"{name}: off by {distance(x, g):.3g}, may be {bound:.3g}"
