"""Packed attention with a document mask.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691); the mask: Llama 3 (arXiv:2407.21783), section 3.2.

A batch is one sequence of tokens, cut into documents by `cu_seqlens`; no query sees a key of another document.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native
from herdkern.ops.native_op import differentiable_gradients, native_op

_MAX_HEAD_DIM = 256


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return attention in plain torch, document by document, computed in fp32 or the dtype of `q` if that is wider."""
    return attention_with_lse_reference(
        q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, causal=causal, softmax_scale=softmax_scale
    )[0]


def attention_with_lse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention_with_lse in plain torch."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    acc = torch.promote_types(q.dtype, torch.float32)
    q_docs = pairwise(_borders("cu_seqlens", cu_seqlens, q.shape[0]))
    k_docs = pairwise(_borders("cu_seqlens_k", cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k.shape[0]))
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0, dtype=acc)]
    for (q_begin, q_end), (k_begin, k_end) in zip(q_docs, k_docs, strict=True):
        q_doc = q[q_begin:q_end].to(acc).unflatten(1, (k.shape[1], -1))  # (q_len, num_kv_heads, group, head_dim)
        scores = torch.einsum("ihgd,jhd->hgij", q_doc, k[k_begin:k_end].to(acc)) * scale
        if causal:  # query i sees the keys up to i + k_len - q_len
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(hidden.triu(scores.shape[-1] - scores.shape[-2] + 1), -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # sees no key: weights 0
        out = torch.einsum("hgij,jhd->ihgd", weights, v[k_begin:k_end].to(acc))
        outs.append(out.flatten(1, 2).to(q.dtype))
        lses.append(lse.flatten(0, 1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return softmax(softmax_scale * q k^T) v within each document of a packed batch.

    q: (total_q, num_heads, head_dim), float32 | bfloat16, any strides, head_dim <= 256.
    k, v: (total_k, num_kv_heads, head_dim), dtype of q; num_heads is a multiple of num_kv_heads, and query head h reads
        head h // (num_heads // num_kv_heads).
    cu_seqlens: (num_docs + 1,) int32 borders of the documents in q, from 0 to total_q; empty documents are allowed.
    cu_seqlens_k: the same for k and v, if the lengths differ (decoding with a KV cache).
    max_seqlen: an upper bound of the document lengths, for GPU kernels; never changes a result.
    causal: a query sees no later key. Where lengths differ the mask is aligned at the bottom right: the last query of a
        document sees all its keys. A query that sees no key gives 0.
    softmax_scale: > 0; head_dim ** -0.5 if None.
    Returns: shape and dtype of q, contiguous.  Sums and softmax are fp32. No bit of a document's result depends on the
        number of threads or on the other documents.
    Raises: ValueError if shapes, dtypes, devices or borders do not fit; NotImplementedError if no backend can run this.
    """
    return attention_with_lse(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen=max_seqlen,
        causal=causal,
        softmax_scale=softmax_scale,
        backend=backend,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return attention and softmax_lse, the logarithm of each query's softmax denominator. Arguments as for attention.

    Returns: out as attention; softmax_lse: (num_heads, total_q) float32, -inf where a query sees no key. It carries no
        gradient: it is for combining partial results, not for a loss.
    """
    _check(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    why_not = {"native": why_not_native(q, torch.float32, torch.bfloat16), "reference": None}
    if choose("attention", backend, why_not) == "reference":
        out, lse = attention_with_lse_reference(
            q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, causal=causal, softmax_scale=scale
        )
        return out, lse.detach()
    return _forward(q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, causal, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int | None,
    softmax_scale: float | None,
) -> None:
    if q.dim() != 3:
        raise ValueError(f"attention: q must be (total_q, num_heads, head_dim), got {tuple(q.shape)}")
    if k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(f"attention: k must be (total_k, num_kv_heads, {q.shape[2]}), got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if not 1 <= q.shape[2] <= _MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim must be 1 to {_MAX_HEAD_DIM}, got {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"attention: num_heads must be a positive multiple of num_kv_heads={k.shape[1]}, got {q.shape[1]}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} must be {dtype_name(q.dtype)} as q, got {dtype_name(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on {q.device} as q, got {x.device}")
    _check_borders("cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is not None:
        _check_borders("cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"attention: cu_seqlens_k must have as many entries as cu_seqlens ({cu_seqlens.shape[0]}), "
                f"got {cu_seqlens_k.shape[0]}"
            )
    elif k.shape[0] != q.shape[0]:
        raise ValueError(
            f"attention: k must have the {q.shape[0]} tokens of q, got {k.shape[0]}; "
            "pass cu_seqlens_k where they differ"
        )
    if max_seqlen is not None and max_seqlen < 0:
        raise ValueError(f"attention: max_seqlen must be at least 0, got {max_seqlen}")
    if softmax_scale is not None and not 0.0 < softmax_scale < float("inf"):
        raise ValueError(f"attention: softmax_scale must be positive and finite, got {softmax_scale}")


def _check_borders(name: str, borders: Tensor, q: Tensor) -> None:
    if borders.dtype != torch.int32:
        raise ValueError(f"attention: {name} must be int32, got {dtype_name(borders.dtype)}")
    if borders.dim() != 1 or borders.shape[0] < 1:
        raise ValueError(f"attention: {name} must have shape (num_docs + 1,), got {tuple(borders.shape)}")
    if not borders.is_contiguous():
        raise ValueError(f"attention: {name} must be contiguous, got stride {borders.stride(0)}; call .contiguous()")
    if borders.device != q.device:
        raise ValueError(f"attention: {name} must be on {q.device} as q, got {borders.device}")


def _borders(name: str, borders: Tensor, total: int) -> list[int]:
    """The borders as a list, checked as the native op checks them."""
    values: list[int] = borders.tolist()
    if values[0] != 0:
        raise ValueError(f"attention: {name} must start with 0, got {values[0]}")
    for doc, (begin, end) in enumerate(pairwise(values)):
        if end < begin:
            raise ValueError(f"attention: {name} must not decrease (entry {doc + 1} follows {begin}), got {end}")
    if values[-1] != total:
        raise ValueError(f"attention: {name} must end with the number of tokens {total}, got {values[-1]}")
    return values


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _operand(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _common(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float
) -> tuple[Any, ...]:
    sizes = (cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2])
    pointers = cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr()
    return *pointers, sizes, scale, causal, q.dtype == torch.bfloat16, num_threads()


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_last(q), _dense_last(k), _dense_last(v)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    common = _common(q, k, cu_seqlens, cu_seqlens_k, causal, scale)
    native_module().attention_forward(_operand(q), _operand(k), _operand(v), *common, out.data_ptr(), lse.data_ptr())
    return out, lse


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward_cpu(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = _dense_last(dout), _dense_last(q), _dense_last(k), _dense_last(v)
    out, lse = _dense_last(out), lse.contiguous()
    dq, dk, dv = (
        torch.empty(q.shape, dtype=q.dtype),
        torch.empty(k.shape, dtype=k.dtype),
        torch.empty(v.shape, dtype=v.dtype),
    )
    native_module().attention_backward(
        _operand(q),
        _operand(k),
        _operand(v),
        _operand(out),
        _operand(dout),
        lse.data_ptr(),
        *_common(q, k, cu_seqlens, cu_seqlens_k, causal, scale),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
    )
    return dq, dk, dv


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, cu_seqlens_k, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    if torch.is_grad_enabled():

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_reference(
                q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, causal=ctx.causal, softmax_scale=ctx.scale
            )

        return *differentiable_gradients(reference, (q, k, v), dout), None, None, None, None
    gradients = _backward(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, ctx.causal, ctx.scale)
    return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None, None, None, None


_backward = native_op(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
    " Tensor cu_seqlens_k, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
_forward = native_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, bool causal, float scale)"
    " -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _gradients,
)
