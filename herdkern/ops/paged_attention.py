"""Packed attention on a paged key-value cache: what generation needs, forward only.

Source: Kwon et al. 2023, PagedAttention (arXiv:2309.06180), section 4. The kernels are those of attention: a document's
keys are read page by page and nothing is gathered beforehand.
"""

from typing import Any

import torch
from torch import Tensor

from herdkern.ops.attention import _STORAGE, attention_reference, dense_last
from herdkern.ops.attention_checks import (
    check_borders,
    check_keys_match,
    check_queries,
    check_softmax,
    check_tensor,
)
from herdkern.ops.attention_cuda import rows_of_16_bytes
from herdkern.ops.backend import (
    call_cuda,
    choose,
    cuda_module,
    dtype_name,
    native_module,
    num_threads,
    why_not_native,
)
from herdkern.ops.native_op import native_op

_NAME = "paged_attention"


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seqlens_k: Tensor,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Return attention_reference on the keys and values that `block_table` names, gathered document by document."""
    cu_seqlens_k = _key_borders(seqlens_k, block_table, k_cache)
    size = k_cache.shape[1]
    keys, values = [k_cache[:0].flatten(0, 1)], [v_cache[:0].flatten(0, 1)]
    for doc, length in enumerate(seqlens_k.tolist()):
        pages = block_table[doc, : -(-length // size)]
        _check_pages(pages, doc, k_cache.shape[0])
        keys.append(k_cache[pages].flatten(0, 1)[:length])
        values.append(v_cache[pages].flatten(0, 1)[:length])
    return attention_reference(
        q,
        torch.cat(keys),
        torch.cat(values),
        cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        softmax_scale=softmax_scale,
        return_lse=return_lse,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seqlens_k: Tensor,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Return packed attention on keys and values in pages; bit for bit `attention` on the same keys gathered.

    q: (total_q, num_heads, head_dim), float32 | bfloat16 | float16, any strides, head_dim <= 256.
    k_cache, v_cache: (num_pages, page_size, num_kv_heads, head_dim), dtype of q, any strides.
    block_table: (num_docs, max_pages) int32; key j of document d is token j % page_size of page block_table[d, j //
        page_size]. Entries beyond a document's keys are not read, nor are pages that no document names.
    cu_seqlens: (num_docs + 1,) int32 borders of the documents in q, from 0 to total_q.
    seqlens_k: (num_docs,) int32, the keys of each document, 0 allowed.
    causal, window_size, softcap, sinks, softmax_scale, return_lse, Returns: as for `attention`.
    Raises: TypeError for an argument that must be a tensor; ValueError if shapes, dtypes, devices or values do not fit;
        NotImplementedError if a gradient is asked for.
    """
    check_paged(q, k_cache, v_cache, block_table, cu_seqlens, seqlens_k)
    check_softmax(_NAME, q, window_size, softcap, sinks, softmax_scale, causal=causal, return_lse=return_lse)
    _check_no_gradient(q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    inputs = q, k_cache, v_cache, block_table, cu_seqlens, seqlens_k
    left, right = window_size[0], 0 if causal else window_size[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if choose(_NAME, "auto", {"native": _why_not_native(q), "reference": None}) == "reference":
        options: dict[str, Any] = {"causal": False, "window_size": (left, right), "softcap": softcap}
        options |= {"sinks": sinks, "softmax_scale": scale, "return_lse": return_lse}
        return paged_attention_reference(*inputs, **options)
    out, lse = _forward(*inputs, None if sinks is None else sinks.float(), left, right, float(softcap), scale)
    return (out, lse) if return_lse else out


def check_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, seqlens_k: Tensor
) -> None:
    """Check the form of these arguments of `paged_attention`; the values of the last three are checked where read."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(_NAME, name, x)
    check_queries(_NAME, q)
    if k_cache.dim() != 4 or k_cache.shape[3] != q.shape[2]:
        raise ValueError(
            f"{_NAME}: k_cache must be (num_pages, page_size, num_kv_heads, {q.shape[2]}), got {tuple(k_cache.shape)}"
        )
    if k_cache.shape[1] == 0:
        raise ValueError(f"{_NAME}: k_cache must have a page_size of at least 1, got {tuple(k_cache.shape)}")
    check_keys_match(_NAME, q, {"k_cache": k_cache, "v_cache": v_cache})
    check_borders(_NAME, "cu_seqlens", cu_seqlens, q)
    num_docs = cu_seqlens.shape[0] - 1
    for name, x, shape in (("block_table", block_table, "max_pages"), ("seqlens_k", seqlens_k, "")):
        check_tensor(_NAME, name, x)
        if x.dtype != torch.int32:
            raise ValueError(f"{_NAME}: {name} must be int32, got {dtype_name(x.dtype)}")
        if x.dim() != (2 if shape else 1) or x.shape[0] != num_docs:
            raise ValueError(f"{_NAME}: {name} must have shape (num_docs={num_docs}, {shape}), got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{_NAME}: {name} must be on {q.device} as q, got {x.device}")


def _check_no_gradient(**inputs: Tensor | None) -> None:
    for name, x in inputs.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{_NAME}: {name} must not require a gradient, there is no backward pass; call it under torch.no_grad()"
            )


def _key_borders(seqlens_k: Tensor, block_table: Tensor, k_cache: Tensor) -> Tensor:
    """cu_seqlens of the keys as if they were packed, with the values of seqlens_k checked."""
    room = block_table.shape[1] * k_cache.shape[1]
    for doc, length in enumerate(seqlens_k.tolist()):
        if not 0 <= length <= room:
            raise ValueError(
                f"{_NAME}: seqlens_k must be 0 to max_pages * page_size = {room} (document {doc}), got {length}"
            )
    borders = torch.zeros(seqlens_k.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(seqlens_k, 0, out=borders[1:])
    if borders[-1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"{_NAME}: seqlens_k must add up to less than 2^31 keys, got {borders[-1].item()}; split them")
    return borders.int()


def _check_pages(pages: Tensor, doc: int, num_pages: int) -> None:
    for entry, page in enumerate(pages.tolist()):
        if not 0 <= page < num_pages:
            raise ValueError(
                f"{_NAME}: block_table must name pages from 0 to {num_pages - 1} (row {doc}, entry {entry}), got {page}"
            )


def _why_not_native(q: Tensor) -> str | None:
    """The reason why neither the kernels for the CPU nor, on a GPU, those of csrc/cuda can run."""
    if not q.is_cuda:
        return why_not_native(q, *_STORAGE)
    if q.shape[2] % 8 != 0:
        return f"head_dim must be a multiple of 8 on a GPU, got {q.shape[2]}"
    return why_not_native(q, torch.bfloat16, torch.float16, cuda="paged_attention_forward")


def forward_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seqlens_k: Tensor,
    sinks: Tensor | None,
    left: int,
    right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the kernels of csrc/cuda, without waiting for the device.

    The values of block_table, cu_seqlens and seqlens_k are not checked: a page that is none gives NaN.
    """
    q, k_cache, v_cache = map(rows_of_16_bytes, (q, k_cache, v_cache))
    block_table, sinks = dense_last(block_table), None if sinks is None else sinks.contiguous()
    (num_pages, page_size, num_kv_heads, head_dim), max_pages = k_cache.shape, block_table.shape[1]
    total_q, num_heads, num_docs = q.shape[0], q.shape[1], seqlens_k.shape[0]
    borders = torch.nn.functional.pad(seqlens_k.cumsum(0, dtype=torch.int32), (1, 0))
    cu_seqlens = cu_seqlens.contiguous()
    out, lse = _forward_fake(q, k_cache, v_cache, block_table, cu_seqlens, seqlens_k, sinks)
    max_keys = max_pages * page_size
    room = cuda_module().paged_attention_workspace_bytes(total_q, num_docs, num_heads, head_dim, max_keys)
    workspace = torch.empty(room, dtype=torch.uint8, device=q.device)
    sizes = num_docs, total_q, num_heads, num_kv_heads, head_dim, q.dtype == torch.bfloat16
    call_cuda(
        q,
        "paged_attention_forward",
        (q.data_ptr(), *q.stride()[:2], 0),
        (k_cache.data_ptr(), *k_cache.stride()[:3]),
        (v_cache.data_ptr(), *v_cache.stride()[:3]),
        (block_table.data_ptr(), block_table.stride(0), page_size, num_pages, max_keys),
        (cu_seqlens.data_ptr(), borders.data_ptr(), *sizes),
        (scale, softcap, left, right, 0 if sinks is None else sinks.data_ptr()),
        (out.data_ptr(), lse.data_ptr(), workspace.data_ptr()),
    )
    return out, lse


def _forward_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seqlens_k: Tensor,
    sinks: Tensor | None,
    left: int,
    right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k_cache, v_cache, block_table = map(dense_last, (q, k_cache, v_cache, block_table))
    sinks = None if sinks is None else sinks.contiguous()
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    cu_seqlens_k = _key_borders(seqlens_k, block_table, k_cache)
    total_k = int(cu_seqlens_k[-1])
    sizes = (seqlens_k.shape[0], q.shape[0], total_k, q.shape[1], k_cache.shape[2], q.shape[2])
    softmax = (scale, softcap, left, right, 0 if sinks is None else sinks.data_ptr())
    pages = (block_table.data_ptr(), block_table.stride(0), k_cache.shape[1], k_cache.stride(0), v_cache.stride(0))
    native_module().paged_attention_forward(
        (q.data_ptr(), q.stride(0), q.stride(1)),
        (k_cache.data_ptr(), k_cache.stride(1), k_cache.stride(2)),
        (v_cache.data_ptr(), v_cache.stride(1), v_cache.stride(2)),
        pages,
        (cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr(), *sizes, *softmax, _STORAGE[q.dtype], num_threads()),
        k_cache.shape[0],
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse


def _forward_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    seqlens_k: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _forward_either(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (forward_cuda if q.is_cuda else _forward_cpu)(q, *rest)


_forward = native_op(
    "paged_attention_forward(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens,"
    " Tensor seqlens_k, Tensor? sinks, int window_left, int window_right, float softcap, float scale)"
    " -> (Tensor, Tensor)",
    _forward_either,
    _forward_fake,
    devices=("CPU", "CUDA"),
)
