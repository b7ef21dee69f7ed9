"""Packed attention in Triton: the forward pass, and its registration with torch.

One program takes the rows of one tile (attention_tiles.py) and walks over the keys that its queries see. Blocks of keys
that every row sees are not masked; those on a border are, and nothing beyond the document is read. Source:
FlashAttention-2 (arXiv:2307.08691). Sums and softmax are fp32; weights are rounded to the dtype of v for their product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.attention import dense_last, forward_fake, register_attention
from herdkern.ops.triton.attention_backward import run_backward
from herdkern.ops.triton.attention_tiles import (
    FIELDS,
    fold_of,
    launch_shape,
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
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q,
    sums,
    high,
    total,
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
    """Adds the keys in [begin, end), in blocks, to sums = weights @ v, high = maximum, total = sum of weights."""
    number = tl.arange(0, BLOCK_N)
    k_base += begin.to(tl.int64) * k_stride
    v_base += begin.to(tl.int64) * v_stride
    for start in range(begin, end, BLOCK_N):
        key = start + number
        k = load_rows(k_base, number * k_stride, key < k_len, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            scores = capped(scores * scale, softcap) * _LOG2E
        else:
            scores *= scale * _LOG2E
        if MASKED:
            visible = (key < k_len)[None, :]
            if HAS_LEFT:
                visible = visible & (key[None, :] >= position[:, None] - left)
            if HAS_RIGHT:
                visible = visible & (key[None, :] <= position[:, None] + right)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, axis=1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(high - origin)
        total = total * decay + tl.sum(weights, axis=1)
        v = load_rows(v_base, number * v_stride, key < k_len, HEAD_DIM, BLOCK_D, MASKED)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
        high = higher
        k_base += BLOCK_N * k_stride
        v_base += BLOCK_N * v_stride
    return sums, high, total


@triton.jit(do_not_specialize=["total_q", "capacity", "left", "right"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
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
    HAS_SINKS: tl.constexpr,
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
    q_base = q_ptr + (q_begin + first).to(tl.int64) * q_stride + fold.to(tl.int64) * FOLD * q_head_stride
    q = load_rows(q_base, token * q_stride + member * q_head_stride, live, HEAD_DIM, BLOCK_D, True)
    kv_head = (fold // FOLDS_PER_KV).to(tl.int64)
    k_base = k_ptr + k_begin.to(tl.int64) * k_stride + kv_head * k_head_stride
    v_base = v_ptr + k_begin.to(tl.int64) * v_stride + kv_head * v_head_stride

    # the first query stands at key `at`, the last at `until`; the last query of a document stands at its last key
    at = first + k_len - q_len
    until = tl.minimum(first + TOKENS, q_len) - 1 + k_len - q_len
    position = at + token
    lowest, highest, full_lowest, full_highest = first * 0, k_len, first * 0, k_len
    if HAS_LEFT:
        lowest, full_lowest = tl.maximum(at - left, 0), tl.maximum(until - left, 0)
    if HAS_RIGHT:
        highest, full_highest = tl.minimum(until + right + 1, k_len), tl.minimum(at + right + 1, k_len)
    full_begin, full_end = split_range(lowest, highest, full_lowest, full_highest, BLOCK_N)

    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_SINKS:
        high = tl.load(sinks_ptr + fold * FOLD + member) * _LOG2E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    for phase in tl.static_range(3):  # masked on the left, not masked, masked on the right
        if phase != 0 or HAS_LEFT:
            sums, high, total = _attend(
                q,
                sums,
                high,
                total,
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

    empty = total == 0.0  # sees no key, and has no sink
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (high + tl.log2(total)) * _LN2)
    out_token = (q_begin + first + token).to(tl.int64)
    head = fold * FOLD + member
    num_heads = num_folds * FOLD
    tl.store(lse_ptr + head.to(tl.int64) * total_q + out_token, lse, mask=live)
    store_rows(out_ptr, (out_token * num_heads + head) * HEAD_DIM, live, sums / total[:, None], HEAD_DIM, BLOCK_D)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    out, lse = forward_fake(q, k, v, cu_seqlens, cu_seqlens_k, sinks, *options)
    (total_q, num_heads, head_dim), (total_k, num_kv_heads, _) = q.shape, k.shape
    left, right, softcap, scale = options
    fold, group = fold_of(num_heads // num_kv_heads), num_heads // num_kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    shape = launch_shape("forward", block_d, q.dtype == torch.float32, target_of(q))
    with torch.cuda.device_of(q):
        tiles, capacity = tile_list(
            cu_seqlens, cu_seqlens_k, (total_q, total_k), shape["BLOCK_M"] // fold, is_reversed=right >= 0
        )
        num_folds = num_heads // fold
        if capacity:
            _forward_kernel[(capacity * num_folds,)](
                q,
                k,
                v,
                q if sinks is None else sinks.contiguous(),
                out,
                lse,
                tiles,
                *(x.stride(i) for x in (q, k, v) for i in (0, 1)),
                num_folds,
                total_q,
                capacity,
                scale,
                HAS_SINKS=sinks is not None,
                FOLD=fold,
                FOLDS_PER_KV=group // fold,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                **mask_options(left, right, softcap, total_q + total_k),
                **shape,
            )
    return out, lse


forward, backward = register_attention("triton_attention", _forward_cuda, run_backward, ("CUDA", "CPU"))  # CPU: tests
