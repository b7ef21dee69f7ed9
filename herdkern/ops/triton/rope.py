"""RoPE in Triton: q and k in one launch, one program for each token, which reads its row of the table once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.rope import register_rope_qk
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
    q, out_q = operands[0]
    k, out_k = operands[1] if len(operands) == 2 else (q[:, :0], out_q[:, :0])
    num_tokens, num_q_heads, head_dim = q.shape
    num_k_heads = k.shape[1]
    if not num_tokens or not head_dim:
        return
    where = positions if positions is not None else cu_seqlens
    pairs = triton.next_power_of_2(head_dim // 2)
    heads = min(triton.next_power_of_2(max(num_q_heads, num_k_heads, 1)), max(_TILE // pairs, 1))
    with torch.cuda.device_of(q):
        _rope_kernel[(num_tokens,)](
            q,
            k,
            out_q,
            out_k,
            cos.contiguous(),
            sin.contiguous(),
            cos if where is None else where.contiguous(),
            num_q_heads,
            num_k_heads,
            head_dim // 2,
            cos.shape[0],
            0 if cu_seqlens is None else len(cu_seqlens) - 1,
            *(t.stride(dim) for t in (q, k, out_q, out_k) for dim in (0, 1)),
            POSITIONS="given" if positions is not None else "running" if cu_seqlens is None else "documents",
            INVERSE=inverse,
            INTERLEAVED=interleaved,
            HEADS=heads,
            PAIRS=pairs,
            num_warps=min(max(heads * pairs // 256, 1), 4),
        )


rope_qk = register_rope_qk("triton_rope_qk", launch, ("CUDA", "CPU"))  # CPU: under the interpreter
