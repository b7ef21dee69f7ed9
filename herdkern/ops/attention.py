"""Packed attention with a document mask.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691); the mask: Llama 3 (arXiv:2407.21783), section 3.2; sinks: Xiao et
al. 2023 (arXiv:2309.17453) as learned logits; softcap: Gemma 2 (arXiv:2408.00118), section 2.

A batch is one sequence of tokens, cut into documents by `cu_seqlens`; no query sees a key of another document.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from herdkern.ops import attention_cuda
from herdkern.ops.attention_checks import (
    border_values,
    check_borders,
    check_max_seqlen,
    check_operands,
    check_softmax,
)
from herdkern.ops.backend import Backend, choose, native_module, num_threads, why_not_native, why_not_triton
from herdkern.ops.native_op import differentiable_gradients, native_op

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Storage of csrc/cpu/attention.h


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Return attention in plain torch, document by document, computed in fp32 or the dtype of `q` if that is wider."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    acc = torch.promote_types(q.dtype, torch.float32)
    q_docs = pairwise(border_values("attention", "cu_seqlens", cu_seqlens, q.shape[0]))
    k_name, cu_k = ("cu_seqlens", cu_seqlens) if cu_seqlens_k is None else ("cu_seqlens_k", cu_seqlens_k)
    k_docs = pairwise(border_values("attention", k_name, cu_k, k.shape[0]))
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0, dtype=acc)]
    for (q_begin, q_end), (k_begin, k_end) in zip(q_docs, k_docs, strict=True):
        q_doc = q[q_begin:q_end].to(acc).unflatten(1, (k.shape[1], -1))  # (q_len, num_kv_heads, group, head_dim)
        scores = torch.einsum("ihgd,jhd->hgij", q_doc, k[k_begin:k_end].to(acc)) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_visible(scores, causal, window_size), -torch.inf)
        logits = scores
        if sinks is not None:
            logits = torch.cat([scores, sinks.to(acc).view(k.shape[1], -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        lse = logits.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # sees no key: weights 0
        out = torch.einsum("hgij,jhd->ihgd", weights, v[k_begin:k_end].to(acc))
        outs.append(out.flatten(1, 2).to(q.dtype))
        lses.append(lse.flatten(0, 1))
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=1).detach()) if return_lse else out


def _visible(scores: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """(q_len, k_len): does query i see key j? Aligned at the bottom right: the last query stands at the last key."""
    q_len, k_len = scores.shape[-2:]
    left, right = window_size[0], 0 if causal else window_size[1]
    ahead = torch.arange(k_len, device=scores.device) - torch.arange(q_len, device=scores.device)[:, None]
    ahead = ahead - (k_len - q_len)  # how far key j lies ahead of where query i stands
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Any:
    """Return softmax(softmax_scale * q k^T) v within each document of a packed batch; with its lse if `return_lse`.

    q: (total_q, num_heads, head_dim), float32 | bfloat16 | float16, any strides, head_dim <= 256.
    k, v: (total_k, num_kv_heads, head_dim), dtype of q; num_heads is a multiple of num_kv_heads, and query head h reads
        head h // (num_heads // num_kv_heads).
    cu_seqlens: (num_docs + 1,) int32 borders of the documents in q, from 0 to total_q; empty documents are allowed.
    cu_seqlens_k: the same for k and v, if the lengths differ (decoding with a KV cache).
        On a GPU nothing waits for their values, so they are not checked there: what lies in no document is not written.
    max_seqlen: an upper bound of the document lengths; no kernel needs it, it never changes a result.
    causal: a query sees no later key. Where lengths differ the mask is aligned at the bottom right: the last query of a
        document stands at its last key. A query that sees no key gives 0.
    window_size: (left, right): how many keys before and after its own a query sees; -1 for all, right is 0 if causal.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    sinks: (num_heads,), one more logit in each softmax that takes weight and has no value; has a gradient.
    softmax_scale: > 0; head_dim ** -0.5 if None.
    Returns: shape and dtype of q, contiguous; with `return_lse` also softmax_lse: (num_heads, total_q) float32, the
        logarithm of each softmax denominator (-inf where a query sees no key and there is no sink), without a gradient.
        Sums and softmax are fp32. No bit of a document's result depends on the number of threads, on the other
        documents or on their order.
    Raises: TypeError for an argument that must be a tensor; ValueError if shapes, dtypes, devices, borders or options
        do not fit; NotImplementedError if no backend can run this.
    """
    check_operands("attention", q, k, v)
    _check_documents(q, k, cu_seqlens, cu_seqlens_k, max_seqlen)
    check_softmax("attention", q, window_size, softcap, sinks, softmax_scale, causal=causal, return_lse=return_lse)
    native = why_not_native(q, *_STORAGE, cuda="attention_backward") or attention_cuda.why_not_cuda(q)
    why_not = {"native": native, "triton": why_not_triton(q, backend, *_STORAGE)}
    chosen = choose("attention", backend, {**why_not, "reference": None})
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    window = window_size[0], 0 if causal else window_size[1]
    if chosen == "reference":
        masks: dict[str, Any] = {"cu_seqlens_k": cu_seqlens_k, "causal": False, "window_size": window}
        softmax: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "softmax_scale": scale}
        return attention_reference(q, k, v, cu_seqlens, **masks, **softmax, return_lse=return_lse)
    options = *window, float(softcap), scale
    sinks = None if sinks is None else sinks.float()
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out, lse = _forward_of(chosen)(q, k, v, cu_seqlens, keys, sinks, *options)
    return (out, lse) if return_lse else out


def _forward_of(chosen: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The registered op of a backend."""
    if chosen == "triton":
        from herdkern.ops.triton import attention as triton_attention

        return triton_attention.forward
    return _forward


def attention_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks) of one call of `attention`, for callers that keep a graph of their own.

    Arguments as in `attention`, unchecked, and what it returned: out, softmax_lse: (num_heads, total_q).
    dq has the dtype of q; dk and dv are fp32 or wider, because keys that several calls see are summed by the caller.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    window = window_size[0], 0 if causal else window_size[1]
    sinks = None if sinks is None else sinks.float()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    options = *window, float(softcap), scale
    if why_not_native(q, *_STORAGE) is None:
        operands = (x.to(wide) for x in (dout, q, k, v, out))
        dq, dk, dv, dsinks = _backward(*operands, softmax_lse, cu_seqlens, cu_seqlens_k, sinks, *options)
        return dq.to(q.dtype), dk, dv, None if sinks is None else dsinks
    if why_not_triton(q, "auto", *_STORAGE) is None:
        from herdkern.ops.triton.attention_backward import run_backward

        saved = out, softmax_lse, cu_seqlens, cu_seqlens_k, sinks
        dq, dk, dv, dsinks = run_backward(dout, q, k, v, *saved, *options, wide=True)
        return dq, dk, dv, None if sinks is None else dsinks
    with torch.enable_grad():
        inputs = [x.detach().to(wide).requires_grad_() for x in (q, k, v, *(() if sinks is None else (sinks,)))]
        wide_q, wide_k, wide_v, *wide_sinks = inputs
        again = attention_reference(
            wide_q,
            wide_k,
            wide_v,
            cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            causal=False,
            window_size=window,
            softcap=softcap,
            sinks=wide_sinks[0] if wide_sinks else None,
            softmax_scale=scale,
        )
        dq, dk, dv, *more = torch.autograd.grad(again, inputs, dout.to(wide))
    return dq.to(q.dtype), dk, dv, more[0] if more else None


def _check_documents(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, max_seqlen: int | None
) -> None:
    check_borders("attention", "cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is not None:
        check_borders("attention", "cu_seqlens_k", cu_seqlens_k, q)
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
    check_max_seqlen("attention", max_seqlen)


def dense_last(x: Tensor) -> Tensor:
    """Return `x`, copied if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _operand(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _shape(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The arguments of shape() in csrc/cpu/bind_attention.cpp; options: window left, right, softcap, scale."""
    sizes = (cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2])
    left, right, softcap, scale = options
    softmax = (scale, softcap, left, right, 0 if sinks is None else sinks.data_ptr())
    return cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr(), *sizes, *softmax, _STORAGE[q.dtype], num_threads()


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = dense_last(q), dense_last(k), dense_last(v)
    sinks = None if sinks is None else sinks.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    shape = _shape(q, k, cu_seqlens, cu_seqlens_k, sinks, options)
    native_module().attention_forward(_operand(q), _operand(k), _operand(v), shape, out.data_ptr(), lse.data_ptr())
    return out, lse


def forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Return out and lse of a forward pass, not filled."""
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
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, q, k, v = dense_last(dout), dense_last(q), dense_last(k), dense_last(v)
    out, lse = dense_last(out), lse.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    dq, dk, dv, dsinks = backward_fake(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, sinks, *options)
    native_module().attention_backward(
        *map(_operand, (q, k, v, out, dout)),
        lse.data_ptr(),
        _shape(q, k, cu_seqlens, cu_seqlens_k, sinks, options),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        0 if sinks is None else dsinks.data_ptr(),
    )
    return dq, dk, dv, dsinks


def backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dsinks of a backward pass, not filled; dsinks is empty without sinks."""
    dsinks = q.new_empty((0,) if sinks is None else sinks.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, left, right, softcap, scale = inputs
    ctx.options = left, right, softcap, scale
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def register_attention(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], devices: Sequence[str] = ("CPU",)
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register herdkern::<name>_forward and <name>_backward, implemented as _forward_cpu and _backward_cpu are.

    Returns the calls of both; the first has gradients.
    """
    options = "Tensor? sinks, int window_left, int window_right, float softcap, float scale"
    backward_op = native_op(
        f"{name}_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens,"
        f" Tensor cu_seqlens_k, {options}) -> (Tensor, Tensor, Tensor, Tensor)",
        backward,
        backward_fake,
        devices=devices,
    )

    def gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
        q, k, v, cu_seqlens, cu_seqlens_k, sinks, out, lse = ctx.saved_tensors
        no_options = (None,) * 4
        if dout is None:
            return (None,) * 10
        if torch.is_grad_enabled():
            return *_second_order(ctx, dout), *no_options
        dq, dk, dv, dsinks = backward_op(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, sinks, *ctx.options)
        found = dq, dk, dv, None, None, None if sinks is None else dsinks
        return *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad)), *no_options

    forward_op = native_op(
        f"{name}_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, {options})"
        " -> (Tensor, Tensor)",
        forward,
        forward_fake,
        _setup_context,
        gradients,
        devices,
    )
    return forward_op, backward_op


def _second_order(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    """The gradients of q, k, v, both borders and sinks, with a graph of their own."""
    q, k, v, cu_seqlens, cu_seqlens_k, sinks, *_ = ctx.saved_tensors
    left, right, softcap, scale = ctx.options

    def reference(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        out: Tensor = attention_reference(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            causal=False,
            window_size=(left, right),
            softcap=softcap,
            sinks=sinks[0] if sinks else None,
            softmax_scale=scale,
        )
        return out

    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    dq, dk, dv, *dsinks = differentiable_gradients(reference, inputs, dout)
    return dq, dk, dv, None, None, dsinks[0] if dsinks else None


def _forward_native(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (attention_cuda.forward if q.is_cuda else _forward_cpu)(q, *rest)


def _backward_native(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (attention_cuda.backward if dout.is_cuda else _backward_cpu)(dout, *rest)


_forward, _backward = register_attention("attention", _forward_native, _backward_native, ("CPU", "CUDA"))
