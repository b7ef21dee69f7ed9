"""Cross entropy of a linear layer with a Triton softmax: torch multiplies, one kernel turns logits into their gradient.

Tokens are taken in chunks whose float32 logits fill 256 MiB at most. One program for each token reads its row once for
the log of the sum of exponentials and once more to write the gradient over it, in the dtype of hidden for the products
that follow. Memory beyond that: the sum of a 16-bit weight's gradient in float32 while there are several chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.linear_cross_entropy import empty_results, register_linear_cross_entropy
from herdkern.ops.native_op import empty_gradients
from herdkern.ops.triton.softcap import capped

_CHUNK_BYTES = 256 << 20  # of float32 logits
_PART_BYTES = 64 << 20  # of a float32 weight, rounded to 16 bits at a time
_BLOCK = 4096

Numbers = tuple[Any, ...]  # ignore_index, label_smoothing, z_loss, softcap


@triton.jit
def _loss_kernel(
    logits_ptr,
    dlogits_ptr,
    targets_ptr,
    losses_ptr,
    logps_ptr,
    dlosses_ptr,
    dlogps_ptr,
    vocab_size,
    logits_stride,
    dlogits_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_DLOGPS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    dlogits_ptr += row * dlogits_stride
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(logps_ptr + row, 0.0)
        if NEED_GRADIENT:
            for start in range(0, vocab_size, BLOCK):
                col = start + tl.arange(0, BLOCK)
                tl.store(dlogits_ptr + col, tl.zeros((BLOCK,), dlogits_ptr.dtype.element_ty), mask=col < vocab_size)
        return

    # each lane keeps a maximum and a sum of its own; they meet once, at the end
    high = tl.full((BLOCK,), -3e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sum_of_logits = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        col = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + col, mask=col < vocab_size, other=float("-inf"))
        if HAS_SOFTCAP:
            logits = tl.where(col < vocab_size, capped(logits, softcap), float("-inf"))
        if HAS_SMOOTHING:
            sum_of_logits += tl.where(col < vocab_size, logits, 0.0)
        higher = tl.maximum(high, logits)
        total = total * tl.exp(high - higher) + tl.exp(logits - higher)
        high = higher
    highest = tl.max(high, axis=0)
    lse = highest + tl.log(tl.sum(total * tl.exp(high - highest), axis=0))

    # a target that is no token id cannot be reported from here: it gives NaN
    at_target = tl.load(logits_ptr + target, mask=(target >= 0) & (target < vocab_size), other=float("nan"))
    if HAS_SOFTCAP:
        at_target = capped(at_target, softcap)
    loss = lse - at_target
    tl.store(logps_ptr + row, -loss)
    if HAS_SMOOTHING:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - tl.sum(sum_of_logits, axis=0) / vocab_size)
    tl.store(losses_ptr + row, loss + z_loss * lse * lse)

    if NEED_GRADIENT:
        dloss = tl.load(dlosses_ptr + row)
        of_softmax = dloss * (1.0 + 2.0 * z_loss * lse)
        of_target = dloss * (label_smoothing - 1.0)
        if HAS_DLOGPS:
            dlogp = tl.load(dlogps_ptr + row)
            of_softmax -= dlogp
            of_target += dlogp
        of_all = dloss * label_smoothing / vocab_size
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


def multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (float32) = a @ b, or += with accumulate; sums are float32."""
    if a.is_cuda and a.dtype != torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulate:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


def parts_of(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """The rows of `weight` that are held in `dtype` at once: all, if that is the weight's own."""
    vocab_size, dim = weight.shape
    step = vocab_size if weight.dtype == dtype else max(_PART_BYTES // (dim * dtype.itemsize), 1)
    return [slice(begin, min(begin + step, vocab_size)) for begin in range(0, vocab_size, step)]


def chunks_of_logits(hidden: Tensor, weight: Tensor, parts: list[slice]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield tokens, their float32 logits, and the place of their gradient in the dtype of hidden: over the logits."""
    n, vocab_size = len(hidden), len(weight)
    stride = triton.cdiv(vocab_size, 8) * 8  # rows begin at 16 bytes, whatever vocab_size is
    chunk = min(max(_CHUNK_BYTES // (4 * stride), 1), n)
    chunk = chunk // 128 * 128 if n > chunk > 128 else chunk
    buffer = torch.empty((chunk, stride), dtype=torch.float32, device=hidden.device)
    for begin in range(0, n, max(chunk, 1)):
        tokens = slice(begin, min(begin + chunk, n))
        x = hidden[tokens]
        logits = buffer[: len(x), :vocab_size]
        for part in parts:
            multiply(x, weight[part].to(x.dtype).T, logits[:, part])
        yield tokens, logits, buffer[: len(x)].view(hidden.dtype)[:, :vocab_size]


def add_gradients(
    x: Tensor,
    weight: Tensor,
    dlogits: Tensor,
    parts: list[slice],
    dhidden: Tensor | None,
    dweight_sum: Tensor | None,
    begin: int,
) -> None:
    """Write dhidden of the chunk of tokens from `begin` on, and add its part to the float32 sum of dweight."""
    dhidden_sum = None if dhidden is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for part in parts:
        if dhidden_sum is not None:
            multiply(dlogits[:, part], weight[part].to(x.dtype), dhidden_sum, part.start > 0)
        if dweight_sum is not None:
            multiply(dlogits[:, part].T, x, dweight_sum[part], begin > 0)
    if dhidden is not None and dhidden_sum is not None:
        dhidden.copy_(dhidden_sum)


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    numbers: Numbers,
    dlosses: Tensor | None,
    dlogps: Tensor | None,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses and log-probabilities of the tokens; writes the gradients that are given, scaled by dlosses and dlogps."""
    n = len(hidden)
    losses, logps = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
    parts = parts_of(weight, hidden.dtype)
    dweight_sum = dweight
    if dweight is not None and dweight.dtype != torch.float32:
        dweight_sum = torch.empty(dweight.shape, dtype=torch.float32, device=hidden.device)
    for tokens, logits, dlogits in chunks_of_logits(hidden, weight, parts):
        x = hidden[tokens]
        given = [None if t is None else t[tokens] for t in (targets, losses, logps, dlosses, dlogps)]
        _softmax(logits, dlogits, given, numbers, dhidden is not None or dweight is not None)
        add_gradients(
            x, weight, dlogits, parts, None if dhidden is None else dhidden[tokens], dweight_sum, tokens.start
        )
    if dweight is not None and dweight_sum is not None:
        if n == 0:
            dweight.zero_()
        elif dweight_sum is not dweight:
            dweight.copy_(dweight_sum)
    return losses, logps


def _softmax(
    logits: Tensor, dlogits: Tensor, given: list[Tensor | None], numbers: Numbers, need_gradient: bool
) -> None:
    """Launch the kernel for one chunk; given: targets, losses, logps, dlosses and dlogps of its tokens."""
    targets, losses, logps, dlosses, dlogps = given
    ignore_index, label_smoothing, z_loss, softcap = numbers
    with torch.cuda.device_of(logits):
        _loss_kernel[(len(logits),)](
            logits,
            dlogits,
            targets,
            losses,
            logps,
            losses if dlosses is None else dlosses,
            losses if dlogps is None else dlogps,
            logits.shape[1],
            logits.stride(0),
            dlogits.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            HAS_SOFTCAP=softcap != 0,
            HAS_SMOOTHING=label_smoothing != 0,
            HAS_DLOGPS=dlogps is not None,
            NEED_GRADIENT=need_gradient,
            BLOCK=min(triton.next_power_of_2(logits.shape[1]), _BLOCK),
            num_warps=8,
        )


def _forward_cuda(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, need_dhidden, need_dweight = rest
    _, _, stats, dhidden, dweight = empty_results(0, hidden, weight, targets, 1, need_dhidden, need_dweight)
    counts = (targets != ignore_index).to(torch.float32)
    count = counts.sum()
    losses, logps = _run(
        hidden,
        weight,
        targets.contiguous(),
        (ignore_index, *numbers),
        counts / count if reduction == 2 else counts,
        None,
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
    )
    loss = (losses, losses.sum(), losses.sum() / count)[reduction] if reduction else losses
    return loss, logps, stats, dhidden, dweight


def _gradients_cuda(
    dlosses: Tensor | None,
    dlogps: Tensor | None,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *numbers, need_dhidden, need_dweight = rest
    dhidden, dweight = empty_gradients(hidden, weight, need_dhidden, need_dweight)
    if dlosses is None:
        dlosses = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    _run(
        hidden,
        weight,
        targets.contiguous(),
        (ignore_index, *numbers),
        dlosses.float().contiguous(),
        None if dlogps is None else dlogps.float().contiguous(),
        dhidden if need_dhidden else None,
        dweight if need_dweight else None,
    )
    return dhidden, dweight


# a target that is no token id gives NaN; CPU: under the interpreter
forward = register_linear_cross_entropy(
    "triton_linear_cross_entropy", 0, _forward_cuda, _gradients_cuda, ("CUDA", "CPU")
)
