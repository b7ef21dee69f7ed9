"""RoPE in Triton: q and k in one launch, one program for each token, which reads its row of the table once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.native_op import native_op
from herdkern.ops.triton.segments import find_segment

_TILE = 2048  # pairs that a program turns at once


@triton.jit
def _turn_heads(
    x_ptr,
    out_ptr,
    c,
    s,
    num_heads,
    x_stride,
    out_stride,
    half,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn all heads of one token, from the one at x_ptr on; c, s: (1, PAIRS), beyond `half` unused."""
    dtype = out_ptr.dtype.element_ty
    for start in range(0, num_heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        from_ptr, to_ptr = x_ptr + head.to(tl.int64) * x_stride, out_ptr + head.to(tl.int64) * out_stride
        if INTERLEAVED:  # neighbours: one load of 2 * PAIRS elements, taken apart in registers
            col = tl.arange(0, 2 * PAIRS)[None, :]
            mask = (head < num_heads) & (col < 2 * half)
            x = tl.load(from_ptr + col, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
            turned = tl.join(a * c - b * s, b * c + a * s)
            tl.store(to_ptr + col, tl.reshape(turned, (HEADS, 2 * PAIRS)).to(dtype), mask=mask)
        else:
            col = tl.arange(0, PAIRS)[None, :]
            mask = (head < num_heads) & (col < half)
            a = tl.load(from_ptr + col, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(from_ptr + half + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(to_ptr + col, (a * c - b * s).to(dtype), mask=mask)
            tl.store(to_ptr + half + col, (b * c + a * s).to(dtype), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    out_q_ptr,
    out_k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_q_heads,
    num_k_heads,
    half,
    max_position,
    num_docs,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    out_q_stride,
    out_q_head_stride,
    out_k_stride,
    out_k_head_stride,
    POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = token
    if POSITIONS == "given":
        position = tl.load(positions_ptr + token).to(tl.int64)
    if POSITIONS == "documents":
        document = find_segment(positions_ptr, num_docs, tl.program_id(0))
        position = token - tl.load(positions_ptr + document).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    # a position beyond the table cannot be reported from here: it gives NaN
    inside = (pair < half) & (position >= 0) & (position < max_position)
    c = tl.load(cos_ptr + position * half + pair, mask=inside, other=float("nan")).to(tl.float32)
    s = tl.load(sin_ptr + position * half + pair, mask=inside, other=float("nan")).to(tl.float32)
    if INVERSE:
        s = -s
    q_from, q_to = q_ptr + token * q_stride, out_q_ptr + token * out_q_stride
    _turn_heads(q_from, q_to, c, s, num_q_heads, q_head_stride, out_q_head_stride, half, INTERLEAVED, HEADS, PAIRS)
    k_from, k_to = k_ptr + token * k_stride, out_k_ptr + token * out_k_stride
    _turn_heads(k_from, k_to, c, s, num_k_heads, k_head_stride, out_k_head_stride, half, INTERLEAVED, HEADS, PAIRS)


def _run(
    x: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    table: tuple[Tensor, Tensor],
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turn x into out, which may be x itself; heads are contiguous in both."""
    num_tokens, num_q_heads, head_dim = x[0].shape
    num_k_heads = x[1].shape[1]
    if not num_tokens or not head_dim:
        return
    where = positions if positions is not None else cu_seqlens
    pairs = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(max(num_q_heads, num_k_heads, 1)), max(_TILE // pairs, 1))
    with torch.cuda.device_of(x[0]):
        _rope_kernel[(num_tokens,)](
            *x,
            *out,
            *(t.contiguous() for t in table),
            table[0] if where is None else where.contiguous(),
            num_q_heads,
            num_k_heads,
            head_dim // 2,
            table[0].shape[0],
            0 if cu_seqlens is None else len(cu_seqlens) - 1,
            *(t.stride(dim) for t in (*x, *out) for dim in (0, 1)),
            POSITIONS="given" if positions is not None else "running" if cu_seqlens is None else "documents",
            INVERSE=inverse,
            INTERLEAVED=interleaved,
            HEADS=heads,
            PAIRS=pairs,
            num_warps=min(max(heads * pairs // 256, 1), 4),
        )


def _rope_qk_cuda(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _run((q, k), (out[0], out[1]), (cos, sin), positions, cu_seqlens, interleaved, inverse)
    return out[0], out[1]


def _rope_qk_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, cu_seqlens, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    # a rotation is orthogonal: its transpose is the turn by the negative angle, which is differentiable in its turn
    dq, dk = (dx if needed else None for dx, needed in zip((dq, dk), ctx.needs_input_grad, strict=False))
    some = dq if dq is not None else dk
    if some is not None:
        empty = some.new_empty((some.shape[0], 0, some.shape[2]))
        turned = rope_qk(
            empty if dq is None else dq,
            empty if dk is None else dk,
            *ctx.saved_tensors,
            ctx.interleaved,
            not ctx.inverse,
        )
        dq, dk = (None if given is None else got for given, got in zip((dq, dk), turned, strict=True))
    return dq, dk, *(None,) * 6


rope_qk = native_op(
    "triton_rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens,"
    " bool interleaved, bool inverse) -> (Tensor, Tensor)",
    _rope_qk_cuda,
    _rope_qk_fake,
    _setup_context,
    _gradients,
    devices=("CUDA", "CPU"),  # CPU: under the interpreter
)


def launch(
    function: str,
    operands: list[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turn x into out for each of one or two (x, out); heads are contiguous, and out may be x. NaN beyond the table."""
    first, *rest = operands
    second = rest[0] if rest else (first[0][:, :0], first[1][:, :0])
    _run((first[0], second[0]), (first[1], second[1]), (cos, sin), positions, cu_seqlens, interleaved, inverse)
