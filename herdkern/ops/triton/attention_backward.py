"""The backward pass of packed attention in Triton: one kernel for dq, one for dk and dv.

No atomics: a program owns the rows that it writes. That of dq walks over the keys its queries see and leaves behind, in
the order of rows of tiles, the lse in units of log2 and delta = sum(dout * out); that of dk and dv walks over the
queries that see its keys, head by head of the group. Both compute the weights again; weights and score gradients are
rounded to 16 bits for products of 16-bit inputs, sums are fp32. Source: FlashAttention-2 (arXiv:2307.08691), 3.1.2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.attention import backward_fake, dense_last
from herdkern.ops.triton.attention_tiles import (
    FIELDS,
    fold_of,
    launch_shape,
    load_numbers,
    load_rows,
    load_tile,
    mask_options,
    split_range,
    store_rows,
    target_of,
    tile_list,
)
from herdkern.ops.triton.softcap import capped

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weights_and_slope(products, lse, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Softmax weights of q k^T, lse (in units of log2) broadcast to it, and the derivative of the softcap."""
    if HAS_SOFTCAP:
        scores = capped(products * scale, softcap)
        tanh = scores / softcap
        weights = tl.exp2(scores * _LOG2E - lse)
        slope = 1.0 - tanh * tanh
    else:
        weights = tl.exp2(products * (scale * _LOG2E) - lse)
        slope = 1.0
    return weights, slope


@triton.jit
def _add_dq(
    dq,
    q,
    dout,
    lse,
    delta,
    k_base,
    v_base,
    k_stride,
    v_stride,
    begin,
    end,
    k_len,
    position,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq plus the part of the keys in [begin, end)."""
    number = tl.arange(0, BLOCK_N)
    k_base += begin.to(tl.int64) * k_stride
    v_base += begin.to(tl.int64) * v_stride
    for start in range(begin, end, BLOCK_N):
        key = start + number
        k = load_rows(k_base, number * k_stride, key < k_len, HEAD_DIM, BLOCK_D, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights, slope = _weights_and_slope(products, lse[:, None], scale, softcap, HAS_SOFTCAP)
        if MASKED:
            visible = (key < k_len)[None, :]
            if HAS_LEFT:
                visible = visible & (key[None, :] >= position[:, None] - left)
            if HAS_RIGHT:
                visible = visible & (key[None, :] <= position[:, None] + right)
            weights = tl.where(visible, weights, 0.0)  # a row without keys has lse = -inf
        v = load_rows(v_base, number * v_stride, key < k_len, HEAD_DIM, BLOCK_D, MASKED)
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None]) * slope
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
        k_base += BLOCK_N * k_stride
        v_base += BLOCK_N * v_stride
    return dq


@triton.jit(do_not_specialize=["total_q", "capacity", "left", "right"])
def _dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    row_lse_ptr,
    row_delta_ptr,
    dq_ptr,
    tiles_ptr,
    dout_stride,
    dout_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    num_folds,
    total_q,
    capacity,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    FOLDS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // FOLD
    place = tl.program_id(0) // num_folds
    fold = tl.program_id(0) % num_folds
    if place >= tl.load(tiles_ptr + FIELDS * capacity):
        return
    first, q_begin, q_len, k_begin, k_len = load_tile(tiles_ptr, place, capacity)

    row = tl.arange(0, BLOCK_M)
    token, member = row // FOLD, row % FOLD
    live = (token < TOKENS) & (first + token < q_len)
    begin = (q_begin + first).to(tl.int64)
    head = fold.to(tl.int64) * FOLD
    q_base = q_ptr + begin * q_stride + head * q_head_stride
    dout_base = dout_ptr + begin * dout_stride + head * dout_head_stride
    out_base = out_ptr + begin * out_stride + head * out_head_stride
    q = load_rows(q_base, token * q_stride + member * q_head_stride, live, HEAD_DIM, BLOCK_D, True)
    dout = load_rows(dout_base, token * dout_stride + member * dout_head_stride, live, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_base, token * out_stride + member * out_head_stride, live, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + (head + member) * total_q + begin + token, mask=live, other=0.0) * _LOG2E
    of_rows = (fold.to(tl.int64) * total_q + begin) * FOLD
    tl.store(row_lse_ptr + of_rows + row, lse, mask=live)
    tl.store(row_delta_ptr + of_rows + row, delta, mask=live)
    kv_head = (fold // FOLDS_PER_KV).to(tl.int64)
    k_base = k_ptr + k_begin.to(tl.int64) * k_stride + kv_head * k_head_stride
    v_base = v_ptr + k_begin.to(tl.int64) * v_stride + kv_head * v_head_stride

    # the first query stands at key `at`, the last at `until`
    at = first + k_len - q_len
    until = tl.minimum(first + TOKENS, q_len) - 1 + k_len - q_len
    position = at + token
    lowest, highest, full_lowest, full_highest = first * 0, k_len, first * 0, k_len
    if HAS_LEFT:
        lowest, full_lowest = tl.maximum(at - left, 0), tl.maximum(until - left, 0)
    if HAS_RIGHT:
        highest, full_highest = tl.minimum(until + right + 1, k_len), tl.minimum(at + right + 1, k_len)
    full_begin, full_end = split_range(lowest, highest, full_lowest, full_highest, BLOCK_N)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for phase in tl.static_range(3):  # masked on the left, not masked, masked on the right
        if phase != 0 or HAS_LEFT:
            dq = _add_dq(
                dq,
                q,
                dout,
                lse,
                delta,
                k_base,
                v_base,
                k_stride,
                v_stride,
                lowest if phase == 0 else full_begin if phase == 1 else full_end,
                full_begin if phase == 0 else full_end if phase == 1 else highest,
                k_len,
                position,
                scale,
                softcap,
                left,
                right,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_N,
                phase != 1,
            )
    dq_rows = ((begin + token) * (num_folds * FOLD) + head + member) * HEAD_DIM
    store_rows(dq_ptr, dq_rows, live, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _add_dk_dv(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse_base,
    num_rows,
    q_stride,
    q_head_stride,
    dout_stride,
    dout_head_stride,
    begin,
    end,
    q_len,
    position,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    LAST: tl.constexpr,
):
    """dk and dv plus the part of the queries in [begin, end); position: the queries that stand at the keys.

    LAST: these are the last queries that see the keys, so that without a window on the left they see all of them.
    """
    TOKENS: tl.constexpr = BLOCK_M // FOLD
    row = tl.arange(0, BLOCK_M)
    token, member = row // FOLD, row % FOLD
    q_base += begin.to(tl.int64) * q_stride
    dout_base += begin.to(tl.int64) * dout_stride
    lse_base += begin * FOLD
    for start in range(begin, end, TOKENS):
        live = (token < TOKENS) & (start + token < q_len)
        q_rows, dout_rows = token * q_stride + member * q_head_stride, token * dout_stride + member * dout_head_stride
        # a row that is not live has q = dout = delta = 0 and adds nothing; where FOLD leaves rows over, some never are
        q = load_rows(q_base, q_rows, live, HEAD_DIM, BLOCK_D, MASKED or BLOCK_M % FOLD != 0)
        lse = load_numbers(lse_base, row, live, MASKED or BLOCK_M % FOLD != 0)
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        weights, slope = _weights_and_slope(products, lse[None, :], scale, softcap, HAS_SOFTCAP)
        if MASKED and HAS_LEFT:
            weights = tl.where(token[None, :] <= (position - start + left)[:, None], weights, 0.0)
        if MASKED and HAS_RIGHT and (HAS_LEFT or not LAST):
            weights = tl.where(token[None, :] >= (position - start - right)[:, None], weights, 0.0)
        dout = load_rows(dout_base, dout_rows, live, HEAD_DIM, BLOCK_D, MASKED or BLOCK_M % FOLD != 0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = load_numbers(lse_base + num_rows, row, live, MASKED or BLOCK_M % FOLD != 0)
        dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dscores = weights * (dweights - delta[None, :]) * slope
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
        q_base += TOKENS * q_stride
        dout_base += TOKENS * dout_stride
        lse_base += TOKENS * FOLD
    return dk, dv


@triton.jit(do_not_specialize=["total_q", "num_rows", "capacity", "left", "right"])
def _dk_dv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    row_lse_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    dout_stride,
    dout_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    num_kv_heads,
    total_q,
    num_rows,
    capacity,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
    FOLDS_PER_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // FOLD
    place = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    if place >= tl.load(tiles_ptr + FIELDS * capacity):
        return
    first, k_begin, k_len, q_begin, q_len = load_tile(tiles_ptr, place, capacity)

    key = tl.arange(0, BLOCK_N)
    live = first + key < k_len
    begin = (k_begin + first).to(tl.int64)
    k = load_rows(k_ptr + begin * k_stride + kv_head * k_head_stride, key * k_stride, live, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr + begin * v_stride + kv_head * v_head_stride, key * v_stride, live, HEAD_DIM, BLOCK_D, True)

    # query `at` stands at the first key, query `until` at the last
    at = first + q_len - k_len
    until = tl.minimum(first + BLOCK_N, k_len) - 1 + q_len - k_len
    position = at + key
    lowest, highest, full_lowest, full_highest = first * 0, q_len, first * 0, q_len
    if HAS_RIGHT:
        lowest, full_lowest = tl.maximum(at - right, 0), tl.maximum(until - right, 0)
    if HAS_LEFT:
        highest, full_highest = tl.minimum(until + left + 1, q_len), tl.minimum(at + left + 1, q_len)
    full_begin, full_end = split_range(lowest, highest, full_lowest, full_highest, TOKENS)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for number in range(FOLDS_PER_KV):
        head = (kv_head * FOLDS_PER_KV + number) * FOLD
        for phase in tl.static_range(3):  # masked at the first queries, not masked, masked at the last
            if phase != 0 or HAS_RIGHT:
                dk, dv = _add_dk_dv(
                    dk,
                    dv,
                    k,
                    v,
                    q_ptr + q_begin.to(tl.int64) * q_stride + head * q_head_stride,
                    dout_ptr + q_begin.to(tl.int64) * dout_stride + head * dout_head_stride,
                    row_lse_ptr + head * total_q + q_begin.to(tl.int64) * FOLD,
                    num_rows,
                    q_stride,
                    q_head_stride,
                    dout_stride,
                    dout_head_stride,
                    lowest if phase == 0 else full_begin if phase == 1 else full_end,
                    full_begin if phase == 0 else full_end if phase == 1 else highest,
                    q_len,
                    position,
                    scale,
                    softcap,
                    left,
                    right,
                    HAS_LEFT,
                    HAS_RIGHT,
                    HAS_SOFTCAP,
                    FOLD,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_M,
                    phase != 1,
                    phase == 2,
                )
    rows = ((begin + key) * num_kv_heads + kv_head) * HEAD_DIM
    store_rows(dk_ptr, rows, live, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, rows, live, dv, HEAD_DIM, BLOCK_D)


def run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    *options: Any,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dsinks (empty without sinks); options: window left and right, softcap, scale.

    wide: dk and dv are float32, whatever the dtype of k.
    """
    dout, q, k, v, out, lse = (*(dense_last(x) for x in (dout, q, k, v, out)), lse.contiguous())
    dq, dk, dv, dsinks = backward_fake(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, sinks, *options)
    if wide:
        dk, dv = dk.float(), dv.float()
    rows = torch.empty((2, lse.numel()), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _run_dq((dout, q, k, v, out), lse, rows, dq, (cu_seqlens, cu_seqlens_k), options)
        _run_dk_dv((dout, q, k, v), rows, (dk, dv), (cu_seqlens, cu_seqlens_k), options)
    if sinks is not None:
        fold = _constants(q, k)["FOLD"]
        row_lse, delta = rows.view(2, -1, q.shape[0], fold)  # (folds, total_q, fold)
        share = torch.exp2(sinks.view(-1, 1, fold) * _LOG2E.value - row_lse.masked_fill(row_lse == -torch.inf, 0.0))
        dsinks = (share * delta).sum(1).neg_().flatten()
    return dq, dk, dv, dsinks


def _constants(q: Tensor, k: Tensor) -> dict[str, int]:
    (_, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    group = num_heads // num_kv_heads
    fold = fold_of(group)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    return {"FOLD": fold, "FOLDS_PER_KV": group // fold, "HEAD_DIM": head_dim, "BLOCK_D": block_d}


def _run_dq(
    operands: tuple[Tensor, ...],
    lse: Tensor,
    rows: Tensor,
    dq: Tensor,
    borders: tuple[Tensor, Tensor],
    options: tuple[Any, ...],
) -> None:
    _, q, k, *_ = operands
    left, right, softcap, scale = options
    constants = _constants(q, k)
    shape = launch_shape("dq", constants["BLOCK_D"], q.dtype == torch.float32, target_of(q))
    totals = q.shape[0], k.shape[0]
    tiles, capacity = tile_list(*borders, totals, shape["BLOCK_M"] // constants["FOLD"], is_reversed=right >= 0)
    num_folds = q.shape[1] // constants["FOLD"]
    if capacity:
        _dq_kernel[(capacity * num_folds,)](
            *operands,
            lse,
            *rows,
            dq,
            tiles,
            *(x.stride(i) for x in operands for i in (0, 1)),
            num_folds,
            totals[0],
            capacity,
            scale,
            **mask_options(left, right, softcap, sum(totals)),
            **constants,
            **shape,
        )


def _run_dk_dv(
    operands: tuple[Tensor, ...],
    rows: Tensor,
    found: tuple[Tensor, Tensor],
    borders: tuple[Tensor, Tensor],
    options: tuple[Any, ...],
) -> None:
    _, q, k, _ = operands
    left, right, softcap, scale = options
    constants = _constants(q, k)
    shape = launch_shape("dkdv", constants["BLOCK_D"], q.dtype == torch.float32, target_of(q))
    totals = k.shape[0], q.shape[0]
    few_at_first = left >= 0 and right < 0  # the first keys are seen by fewest queries
    tiles, capacity = tile_list(borders[1], borders[0], totals, shape["BLOCK_N"], is_reversed=few_at_first)
    if capacity:
        _dk_dv_kernel[(capacity * k.shape[1],)](
            *operands,
            rows,
            *found,
            tiles,
            *(x.stride(i) for x in operands for i in (0, 1)),
            k.shape[1],
            totals[1],
            rows.shape[1],
            capacity,
            scale,
            **mask_options(left, right, softcap, sum(totals)),
            **constants,
            **shape,
        )
