"""AdamW in Triton: one launch updates every tensor of a kind, found through a table of addresses.

A program updates one block of one tensor, which it finds by a search in the table of first blocks. The scale that clips
gradients stays on the GPU: nothing waits for it. Sums of squares are added in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.triton.segments import find_segment

_BLOCK = 2048
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _round_stochastically(p, seed, index):
    """Float32 to bfloat16, up with the probability of the bits cut off; the noise is Philox of (seed, index)."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    noise, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = p.to(tl.uint32, bitcast=True)
    noise = tl.where((bits & 0x7F800000) == 0x7F800000, 0, noise & 0xFFFF)  # infinity and NaN stay what they are
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
    noise_index,
    scale,
    decay,
    beta1,
    beta2,
    eps,
    step_size,
    root_bias2,
    seed,
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
        tl.store(p_ptr + index, _round_stochastically(p, seed, noise_index), mask=mask)
    else:
        tl.store(p_ptr + index, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr,
    scale_ptr,
    num_tensors,
    decay,
    beta1,
    beta2,
    eps,
    step_size,
    root_bias2,
    seed,
    P: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # table: (7, num_tensors + 1): the addresses of p, grad, exp_avg, exp_avg_sq and master, sizes, first blocks
    width = num_tensors + 1
    program = tl.program_id(0).to(tl.int64)
    tensor = find_segment(table_ptr + 6 * width, num_tensors, program)
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
    begin = (program - tl.load(table_ptr + 6 * width + tensor)) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    noise_index = program * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr)
    if MAXIMIZE:
        scale = -scale
    if begin + BLOCK <= size:  # without a mask loads are 16 bytes wide whatever the size is
        _update_block(
            p_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, index, None, noise_index,
            scale, decay, beta1, beta2, eps, step_size, root_bias2, seed, HAS_MASTER, STOCHASTIC,
        )  # fmt: skip
    else:
        _update_block(
            p_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, index, index < size, noise_index,
            scale, decay, beta1, beta2, eps, step_size, root_bias2, seed, HAS_MASTER, STOCHASTIC,
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


def _table(columns: Sequence[Sequence[Tensor]], block: int) -> tuple[Tensor, int, bool]:
    """Addresses by column, sizes and first blocks as one tensor; the number of blocks; whether all are aligned."""
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]
    sizes = [tensor.numel() for tensor in columns[0]]
    first = [0]
    for size in sizes:
        first.append(first[-1] + triton.cdiv(size, block))
    rows = [[*row, 0] for row in (*addresses, sizes)] + [first]
    is_aligned = all(address % 16 == 0 for row in addresses for address in row)
    return torch.tensor(rows, dtype=torch.int64, device=columns[0][0].device), first[-1], is_aligned


def _by_kind(columns: Sequence[Sequence[Tensor]]) -> list[list[list[Tensor]]]:
    """The columns, cut into groups whose tensors have the same dtypes; empty tensors are left out."""
    groups: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for row in zip(*columns, strict=True):
        if row[0].numel():
            groups.setdefault(tuple(tensor.dtype for tensor in row), []).append(row)
    return [[list(column) for column in zip(*group, strict=True)] for group in groups.values()]


def sum_squares(grads: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, a float32 scalar on their device; contiguous, at least one."""
    sums = []
    for (group,) in _by_kind([grads]):
        table, num_blocks, is_aligned = _table([group], 2 * _BLOCK)
        partial = torch.empty(num_blocks, dtype=torch.float32, device=table.device)
        with torch.cuda.device_of(table):
            _sum_squares_kernel[(num_blocks,)](
                table,
                partial,
                len(group),
                GRAD=_DTYPES[group[0].dtype],
                IS_ALIGNED=is_aligned,
                BLOCK=2 * _BLOCK,
                num_warps=8,
            )
        sums.append(partial.sum())
    return torch.stack(sums).sum() if sums else torch.zeros((), device=grads[0].device)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    grad_scale: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """Update params, exp_avgs, exp_avg_sqs and masters in place, as torch.optim.AdamW does in its step number `step`.

    All contiguous on one GPU.  masters: the float32 values of params, or params themselves where there are none.
    grad_scale: a float32 scalar that multiplies the gradients.  seed: of stochastic rounding to bfloat16; None: off.
    """
    for group in _by_kind([params, grads, exp_avgs, exp_avg_sqs, masters]):
        table, num_blocks, is_aligned = _table(group, _BLOCK)
        p, grad, moment, _, master = (column[0] for column in group)
        with torch.cuda.device_of(table):
            _adamw_kernel[(num_blocks,)](
                table,
                grad_scale,
                len(group[0]),
                1.0 - lr * weight_decay,
                beta1,
                beta2,
                eps,
                lr / (1.0 - beta1**step),
                (1.0 - beta2**step) ** 0.5,
                0 if seed is None else seed,
                P=_DTYPES[p.dtype],
                GRAD=_DTYPES[grad.dtype],
                MOMENT=_DTYPES[moment.dtype],
                HAS_MASTER=master is not p,
                STOCHASTIC=seed is not None and p.dtype == torch.bfloat16,
                MAXIMIZE=maximize,
                IS_ALIGNED=is_aligned,
                BLOCK=_BLOCK,
                num_warps=8,
            )
