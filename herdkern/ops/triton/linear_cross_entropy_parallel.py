"""The loss of one shard of the vocabulary in Triton: statistics of its logits, and their gradient from those of all.

As linear_cross_entropy.py: torch multiplies, chunk by chunk of tokens; one program for each token reads its row once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.triton.linear_cross_entropy import add_gradients, chunks_of_logits, parts_of
from herdkern.ops.triton.softcap import capped

_BLOCK = 4096


@triton.jit
def _stats_kernel(
    logits_ptr,
    targets_ptr,
    stats_ptr,
    num_tokens,
    vocab_size,
    logits_stride,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    stats_ptr += row
    # each lane keeps a maximum and a sum of its own; they meet once, at the end
    high = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_of_logits = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + col, mask=col < vocab_size, other=float("-inf"))
        if HAS_SOFTCAP:
            logits = tl.where(col < vocab_size, capped(logits, softcap), float("-inf"))
        sum_of_logits += tl.where(col < vocab_size, logits, 0.0)
        higher = tl.maximum(high, logits)
        total = total * tl.exp(high - higher) + tl.exp(logits - higher)
        high = higher
    highest = tl.max(high, axis=0)
    target = tl.load(targets_ptr + row)
    at_target = tl.load(logits_ptr + target, mask=(target >= 0) & (target < vocab_size), other=0.0)
    if HAS_SOFTCAP:
        at_target = capped(at_target, softcap)
    tl.store(stats_ptr, highest)
    tl.store(stats_ptr + num_tokens, tl.sum(total * tl.exp(high - highest), axis=0))
    tl.store(stats_ptr + 2 * num_tokens, at_target)
    tl.store(stats_ptr + 3 * num_tokens, tl.sum(sum_of_logits, axis=0))


@triton.jit
def _gradient_kernel(
    logits_ptr,
    dlogits_ptr,
    targets_ptr,
    of_softmax_ptr,
    of_all_ptr,
    of_target_ptr,
    lse_ptr,
    vocab_size,
    logits_stride,
    dlogits_stride,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    dlogits_ptr += row * dlogits_stride
    target, lse = tl.load(targets_ptr + row), tl.load(lse_ptr + row)
    of_softmax, of_all = tl.load(of_softmax_ptr + row), tl.load(of_all_ptr + row)
    of_target = tl.load(of_target_ptr + row)
    for start in range(0, vocab_size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + col, mask=col < vocab_size, other=0.0)
        if HAS_SOFTCAP:
            logits = capped(logits, softcap)
        dlogits = of_softmax * tl.exp(logits - lse) - of_all + tl.where(col == target, of_target, 0.0)
        if HAS_SOFTCAP:
            tanh = logits / softcap
            dlogits *= 1.0 - tanh * tanh
        tl.debug_barrier()  # the 16-bit gradient lies over logits that other threads read: all have, from here on
        tl.store(dlogits_ptr + col, dlogits.to(dlogits_ptr.dtype.element_ty), mask=col < vocab_size)


def _shape(vocab_size: int, softcap: float) -> dict[str, Any]:
    block = min(triton.next_power_of_2(vocab_size), _BLOCK)
    return {"HAS_SOFTCAP": softcap != 0, "BLOCK": block, "num_warps": 8}


def shard_stats(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Return (4, n) float32: each token's largest logit, sum of exponentials below it, logit of the target (0 if it is
    elsewhere), sum of logits."""
    stats = torch.empty((4, len(targets)), dtype=torch.float32, device=hidden.device)
    targets = targets.contiguous()
    for tokens, logits, _ in chunks_of_logits(hidden, weight, parts_of(weight, hidden.dtype)):
        with torch.cuda.device_of(hidden):
            _stats_kernel[(len(logits),)](
                logits,
                targets[tokens],
                stats[:, tokens],
                len(targets),
                len(weight),
                logits.stride(0),
                softcap,
                **_shape(len(weight), softcap),
            )
    return stats


def shard_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: tuple[Tensor, Tensor, Tensor, Tensor],
    softcap: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return dhidden in float32 and dweight, each where it is needed.

    factors: (n,) float32 each; the gradient of a logit is the first times its softmax weight, less the second, plus the
    third at the target; the fourth is the logarithm of the sum of all shards' exponentials.
    """
    dhidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else None
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if needs[1] else None
    targets, parts = targets.contiguous(), parts_of(weight, hidden.dtype)
    for tokens, logits, dlogits in chunks_of_logits(hidden, weight, parts):
        with torch.cuda.device_of(hidden):
            _gradient_kernel[(len(logits),)](
                logits,
                dlogits,
                targets[tokens],
                *(x[tokens] for x in factors),
                len(weight),
                logits.stride(0),
                dlogits.stride(0),
                softcap,
                **_shape(len(weight), softcap),
            )
        rows = None if dhidden is None else dhidden[tokens]
        add_gradients(hidden[tokens], weight, dlogits, parts, rows, dweight, tokens.start)
    return dhidden, None if dweight is None else dweight.to(weight.dtype)
