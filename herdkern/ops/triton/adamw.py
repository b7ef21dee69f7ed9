"""AdamW in Triton: one launch updates every tensor of a kind, found through a table of addresses.

A program updates one block of one tensor, which it finds by a search in the table of first blocks. Sums of squares are
added in a fixed order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.triton.segments import find_segment

_BLOCK = 2048
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _round_at_random(p, seed, step, stream, number):
    """Float32 to bfloat16, up with the probability of what is cut off; the bits of round_at_random in ops/adamw.py."""
    part = (number % 128 // 16).to(tl.int32)  # of the eight 16-bit parts of a Philox call
    index = number // 128 * 16 + number % 16
    zero = (index * 0).to(tl.uint32)
    now, stream = (index * 0 + step).to(tl.uint32), (index * 0 + stream).to(tl.uint32)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, now, stream)
    word = tl.where(part < 4, tl.where(part < 2, w0, w1), tl.where(part < 6, w2, w3))
    noise = tl.where(part % 2 == 1, word >> 16, word) & 0xFFFF
    bits = p.to(tl.uint32, bitcast=True)
    noise = tl.where((bits & 0x7F800000) == 0x7F800000, zero, noise)  # infinity and NaN stay what they are
    return ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _update_block(
    p_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    index,
    mask,
    scale,
    decay,
    beta1,
    beta2,
    eps,
    step_size,
    root_bias2,
    seed,
    step,
    stream,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    source_ptr = master_ptr if HAS_MASTER else p_ptr
    p = tl.load(source_ptr + index, mask=mask).to(tl.float32) * decay
    grad = tl.load(grad_ptr + index, mask=mask).to(tl.float32) * scale
    exp_avg = tl.load(exp_avg_ptr + index, mask=mask).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + index, mask=mask).to(tl.float32)
    exp_avg += (1.0 - beta1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
    p -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / root_bias2 + eps)
    tl.store(exp_avg_ptr + index, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + index, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    if HAS_MASTER:
        tl.store(master_ptr + index, p, mask=mask)
    if STOCHASTIC:
        tl.store(p_ptr + index, _round_at_random(p, seed, step, stream, index), mask=mask)
    else:
        tl.store(p_ptr + index, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr,
    num_tensors,
    scale,
    decay,
    beta1,
    beta2,
    eps,
    step_size,
    root_bias2,
    seed,
    step,
    P: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # table: (8, num_tensors + 1): addresses of p, grad, exp_avg, exp_avg_sq, master; sizes, streams, first blocks
    width = num_tensors + 1
    program = tl.program_id(0).to(tl.int64)
    tensor = find_segment(table_ptr + 7 * width, num_tensors, program)
    p_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(P))
    grad_ptr = tl.load(table_ptr + width + tensor).to(tl.pointer_type(GRAD))
    exp_avg_ptr = tl.load(table_ptr + 2 * width + tensor).to(tl.pointer_type(MOMENT))
    exp_avg_sq_ptr = tl.load(table_ptr + 3 * width + tensor).to(tl.pointer_type(MOMENT))
    master_ptr = tl.load(table_ptr + 4 * width + tensor).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        p_ptr, grad_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr, exp_avg_sq_ptr = tl.multiple_of(exp_avg_ptr, 16), tl.multiple_of(exp_avg_sq_ptr, 16)
        master_ptr = tl.multiple_of(master_ptr, 16)
    size = tl.load(table_ptr + 5 * width + tensor)
    begin = (program - tl.load(table_ptr + 7 * width + tensor)) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    stream = tl.load(table_ptr + 6 * width + tensor)
    if begin + BLOCK <= size:  # without a mask loads are 16 bytes wide whatever the size is
        _update_block(
            p_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, index, None,
            scale, decay, beta1, beta2, eps, step_size, root_bias2, seed, step, stream, HAS_MASTER, STOCHASTIC,
        )  # fmt: skip
    else:
        _update_block(
            p_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, index, index < size,
            scale, decay, beta1, beta2, eps, step_size, root_bias2, seed, step, stream, HAS_MASTER, STOCHASTIC,
        )  # fmt: skip


@triton.jit
def _sum_squares_kernel(
    table_ptr, partial_ptr, num_tensors, GRAD: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    # table: (3, num_tensors + 1): addresses, sizes, first blocks
    width = num_tensors + 1
    program = tl.program_id(0).to(tl.int64)
    tensor = find_segment(table_ptr + 2 * width, num_tensors, program)
    grad_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(GRAD))
    if IS_ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    size = tl.load(table_ptr + width + tensor)
    begin = (program - tl.load(table_ptr + 2 * width + tensor)) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= size:
        grad = tl.load(grad_ptr + index).to(tl.float32)
    else:
        grad = tl.load(grad_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    tl.store(partial_ptr + program, tl.sum(grad * grad, axis=0))


def _table(
    columns: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[int]], block: int
) -> tuple[Tensor, int, bool]:
    """Addresses and numbers by column, then first blocks; how many blocks there are; whether addresses are aligned."""
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    first = [0]
    for tensor in columns[0]:
        first.append(first[-1] + triton.cdiv(tensor.numel(), block))
    rows = [[*row, 0] for row in (*addresses, *numbers)] + [first]
    is_aligned = all(address % 16 == 0 for row in addresses for address in row)
    return torch.tensor(rows, dtype=torch.int64, device=columns[0][0].device), first[-1], is_aligned


def grad_norm(grads: Sequence[Tensor]) -> float:
    """Return the 2-norm of all elements of `grads` together: blocks summed in float32, their sums in float64."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            kinds.setdefault((grad.dtype, grad.device), []).append(grad.contiguous())
    total = 0.0
    for (dtype, _), group in kinds.items():
        table, num_blocks, is_aligned = _table([group], [[g.numel() for g in group]], 2 * _BLOCK)
        partial = torch.empty(num_blocks, dtype=torch.float32, device=table.device)
        with torch.cuda.device_of(table):
            _sum_squares_kernel[(num_blocks,)](
                table,
                partial,
                len(group),
                GRAD=_DTYPES[dtype],
                IS_ALIGNED=is_aligned,
                BLOCK=2 * _BLOCK,
                num_warps=8,
            )
        total += float(partial.sum(dtype=torch.float64))
    return math.sqrt(total)


def adamw_step(
    rows: Sequence[tuple[Any, ...]],
    settings: Sequence[Any],
    streams: Sequence[int],
    max_grad_norm: float,
    seed: int | None,
) -> float:
    """Do what adamw_step of ops/adamw.py does and return the norm of all gradients; 0 if it is not asked for.

    rows: (param, grad, exp_avg, exp_avg_sq, master or None, step) of each tensor.  settings, streams: one for each.
    """
    norm, scale = 0.0, 1.0
    if max_grad_norm > 0:
        norm = grad_norm([row[1] for row in rows])
        if not math.isfinite(norm):
            return norm
        scale = min(1.0, max_grad_norm / (norm + 1e-6))
    kinds: dict[Any, list[tuple[Any, ...]]] = {}
    for (p, grad, exp_avg, exp_avg_sq, master, step), chosen, stream in zip(rows, settings, streams, strict=True):
        step += 1
        tensors = (p, grad, exp_avg, exp_avg_sq, p if master is None else master)
        kind = (chosen, int(step), master is not None, p.dtype, grad.dtype, p.device)
        if p.numel():
            kinds.setdefault(kind, []).append((*tensors, stream))
    for (chosen, step, has_master, *_), group in kinds.items():
        _update(group, chosen, step, has_master, scale, seed)
    torch.autograd.graph.increment_version([x for row in rows for i, x in enumerate(row) if i != 1 and x is not None])
    return norm


def _update(
    group: list[tuple[Any, ...]], chosen: Any, step: int, has_master: bool, scale: float, seed: int | None
) -> None:
    """Update tensors of one kind; what is not contiguous goes through a copy that is."""
    *columns, streams = zip(*group, strict=True)
    dense = [[x.contiguous() for x in column] for column in columns]
    table, num_blocks, is_aligned = _table(dense, [[p.numel() for p in dense[0]], streams], _BLOCK)
    is_random = seed is not None and not has_master and dense[0][0].dtype == torch.bfloat16
    with torch.cuda.device_of(table):
        _adamw_kernel[(num_blocks,)](
            table,
            len(group),
            -scale if chosen.maximize else scale,
            1.0 - chosen.lr * chosen.weight_decay,
            chosen.beta1,
            chosen.beta2,
            chosen.eps,
            chosen.lr / (1.0 - chosen.beta1**step),
            math.sqrt(1.0 - chosen.beta2**step),
            (seed or 0) % 2**63,
            step,
            P=_DTYPES[dense[0][0].dtype],
            GRAD=_DTYPES[dense[1][0].dtype],
            MOMENT=_DTYPES[dense[2][0].dtype],
            HAS_MASTER=has_master,
            STOCHASTIC=is_random,
            IS_ALIGNED=is_aligned,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    for i, column in enumerate(columns):
        if i != 1 and (i != 4 or has_master):
            for x, copy in zip(column, dense[i], strict=True):
                if x.data_ptr() != copy.data_ptr():
                    x.copy_(copy)
