"""Packed batches, the roundings of 16-bit storage and the accuracy bound, shared by the tests of attention.

gold is the reference in fp64, ref a plain implementation with the roundings of the test's dtype (fp32: the reference
itself; bf16 and fp16: plain_16bit), and |got - gold| <= 2 |ref - gold| + 4 eps max(1, |gold|) in max norm.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from herdkern.ops import attention, attention_reference
from herdkern.ops.backend import active_isa, native_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(2, 2), (4, 2), (4, 1), (8, 1)]  # (num_heads, num_kv_heads): groups of 1, 2, 4, 8
NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dsinks")
LAYOUTS = ("contiguous", "fused", "heads_first", "dim_strided", "every_second_token", "unaligned")
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
    sinks: Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies of what has a gradient, at the same strides; in `dtype` if one is given (else sinks stay fp32)."""
        inputs = {"q": self.q, "k": self.k, "v": self.v, "sinks": self.sinks}
        return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items() if x is not None}

    def run(self, function, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
        """[out, softmax_lse, dq, dk, dv] of `function` in `dtype`, and dsinks where there are sinks."""
        inputs = self.leaves(dtype)
        out, lse = function(cu_seqlens=self.cu_seqlens, cu_seqlens_k=self.cu_seqlens_k, **inputs, **options)
        gradients = torch.autograd.grad(out, list(inputs.values()), self.dout.to(out.dtype))
        return [out.detach(), lse.detach(), *gradients]

    def documents(self) -> list[tuple[slice, slice]]:
        """The rows of q and of k of each document."""
        q = self.cu_seqlens.tolist()
        k = q if self.cu_seqlens_k is None else self.cu_seqlens_k.tolist()
        return [(slice(q[d], q[d + 1]), slice(k[d], k[d + 1])) for d in range(len(q) - 1)]


def packed(lengths, dtype, heads, head_dim, *, lengths_k=None, sinks=False, seed=0) -> Packed:
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
        sinks=2 * torch.randn(heads[0], generator=generator) if sinks else None,
    )


def relayout(batch: Packed, layout: str) -> Packed:
    """The same values with other strides."""
    tensors = {"q": batch.q, "k": batch.k, "v": batch.v, "dout": batch.dout}
    if layout == "fused":  # q, k and v are slices of one projection, where they have as many tokens
        if batch.q.shape[0] != batch.k.shape[0]:
            fused = torch.cat([batch.k, batch.v], dim=1).split(batch.k.shape[1], dim=1)
            return replace(batch, k=fused[0], v=fused[1])
        sizes = [x.shape[1] for x in (batch.q, batch.k, batch.v)]
        return replace(batch, **dict(zip("qkv", torch.cat([batch.q, batch.k, batch.v], dim=1).split(sizes, dim=1))))
    change = {
        "contiguous": lambda x: x,
        "heads_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "dim_strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every_second_token": lambda x: x.repeat_interleave(2, dim=0)[::2],
        "unaligned": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    }[layout]
    return replace(batch, **{name: change(x) for name, x in tensors.items()})


def visible(q_len: int, k_len: int, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """(q_len, k_len): which keys a query sees."""
    left, right = window_size[0], 0 if causal else window_size[1]
    ahead = torch.arange(k_len) - torch.arange(k_len - q_len, k_len)[:, None]  # the last query stands at the last key
    return ((left < 0) | (-ahead <= left)) & ((right < 0) | (ahead <= right))


def multiplies_bf16(batch: Packed) -> bool:
    """Whether the kernel takes bf16 products for this batch, as csrc/cpu/attention.h states."""
    storage = batch.q.dtype == torch.bfloat16 and batch.q.shape[-1] > 16
    return storage and active_isa() in ("avx512", "amx") and native_module().has_avx512_bf16()


def plain_16bit(
    batch: Packed,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    factors: torch.dtype | None = None,
) -> list[Tensor]:
    """FlashAttention-2's equations in plain torch with the roundings that csrc/cpu/attention.h states.

    `out` is stored in 16 bits before delta is taken from it; where the processor multiplies bf16, weights and dS are
    bf16 in the second products. factors: what they are there in other kernels.
    """
    storage, group = batch.q.dtype, batch.q.shape[1] // batch.k.shape[1]
    scale = batch.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if factors is None:
        factors = torch.bfloat16 if multiplies_bf16(batch) else torch.float32

    def factor(x: Tensor) -> Tensor:
        return x.to(factors).float()

    results = [[batch.q.float().transpose(0, 1)[:, :0]] * 3 + [batch.k.float().transpose(0, 1)[:, :0]] * 2]
    results[0][1] = results[0][1][..., :1]
    dsinks = torch.zeros(batch.q.shape[1])
    for rows, keys in batch.documents():
        q, dout = batch.q[rows].float().transpose(0, 1), batch.dout[rows].float().transpose(0, 1)
        k, v = (x[keys].float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (batch.k, batch.v))
        scores, slope = q @ k.mT * scale, 1.0
        if softcap > 0:
            tanh = torch.tanh(scores / softcap)
            scores, slope = softcap * tanh, 1 - tanh * tanh
        scores = scores.masked_fill(~visible(*scores.shape[-2:], causal, window_size), -torch.inf)
        lse = scores.logsumexp(-1)
        if batch.sinks is not None:
            lse = torch.logaddexp(lse, batch.sinks[:, None].expand(lse.shape))
        p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        top = scores.amax(-1, keepdim=True) if k.shape[1] else lse[..., None]
        weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))  # what the forward pass multiplies
        out = torch.exp(top - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]) * (factor(weights) @ v)
        out = out.to(storage).float()
        delta = (dout * out).sum(-1, keepdim=True)
        if batch.sinks is not None:
            dsinks -= (torch.exp(batch.sinks[:, None] - lse) * delta[..., 0]).sum(-1)
        ds = p * (dout @ v.mT - delta) * slope
        dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (factor(ds).mT @ q * scale, factor(p).mT @ dout))
        results.append([out, lse[..., None], factor(ds) @ k * scale, dk, dv])
    out, lse, dq, dk, dv = (torch.cat(x, dim=1) for x in zip(*results, strict=True))
    gradients = [x.transpose(0, 1).to(storage) for x in (dq, dk, dv)]
    return [out.transpose(0, 1).to(storage), lse[..., 0], *gradients, *([] if batch.sinks is None else [dsinks])]


def distance(x: Tensor, gold: Tensor) -> float:
    """Largest difference; equal infinities differ by nothing, a NaN by infinity."""
    difference = torch.where(x.double() == gold, 0.0, (x.double() - gold).abs())
    return difference.nan_to_num(nan=torch.inf).max().item() if x.numel() else 0.0


def plain(batch: Packed, factors: torch.dtype | None = None, **options) -> list[Tensor]:
    """The plain implementation in the batch's dtype."""
    if batch.q.dtype == torch.float32:
        return batch.run(attention_with_lse_reference, **options)
    return plain_16bit(batch, factors=factors, **options)


def errors(batch: Packed, got: list[Tensor], factors=None, **options) -> dict[str, tuple[float, float, float]]:
    """Of each output and gradient: (its error, the plain implementation's, the rounding floor)."""
    gold, ref = batch.run(attention_with_lse_reference, torch.float64, **options), plain(batch, factors, **options)
    found = {}
    for name, g, r, x in zip(NAMES[: len(gold)], gold, ref, got, strict=True):
        assert (x.shape, x.dtype) == (g.shape, torch.float32 if name in ("softmax_lse", "dsinks") else batch.q.dtype)
        finite = g[g.isfinite()].abs()
        floor = 4 * torch.finfo(torch.float32).eps * max(1.0, finite.max().item() if finite.numel() else 0.0)
        found[name] = distance(x, g), distance(r, g), floor
    return found


def redrawn(batch: Packed, seed: int) -> Packed:
    """A batch of the same form with other values, sinks as spread as those of `packed`."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(x, scale=1):
        return None if x is None else (scale * torch.randn(x.shape, generator=generator)).to(x.dtype)

    drawn = {name: draw(getattr(batch, name)) for name in ("q", "k", "v", "dout")}
    return replace(batch, **drawn, sinks=draw(batch.sinks, scale=2))


def assert_bound(batch: Packed, got: list[Tensor], op=attention_with_lse, factors=None, **options) -> None:
    """The bound. op: what made `got`; factors: as in plain_16bit.

    Largest errors of a few numbers are luck, the plain implementation's too: what breaks the bound on one draw must
    keep it on the largest errors of sixteen draws, this one among them.
    """
    draws = [errors(batch, got, factors, **options)]
    if all(error <= 2 * plain_error + floor for error, plain_error, floor in draws[0].values()):
        return
    for seed in range(15):
        other = redrawn(batch, seed)
        draws.append(errors(other, other.run(op, **options), factors, **options))
    for name in draws[0]:
        error, plain_error, floor = (max(draw[name][i] for draw in draws) for i in range(3))
        assert error <= 2 * plain_error + floor, f"{name}: off by {error:.3g}, may be {2 * plain_error + floor:.3g}"
