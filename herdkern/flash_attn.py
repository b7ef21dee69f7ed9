"""The functions of flash-attn 2 on herdkern's kernels: same names, argument order, defaults and shapes.

`from herdkern.flash_attn import flash_attn_varlen_func` in place of `from flash_attn import ...` runs on a CPU.
Arguments are those of flash-attn 2.8; `sinks` at the end of each is ours. What differs:
- dropout_p must be 0 and alibi_slopes None: the kernels have neither.
- deterministic may be anything: results never depend on threads or on the order of documents.
- float32 runs too. A query that sees no key gives 0 as there, and -inf as softmax_lse where flash-attn writes +inf.
- max_seqlen_q and max_seqlen_k may be None: the borders say it all.
- Probabilities are never returned: return_attn_probs gives (out, softmax_lse, None).

Batched arguments (batch, seqlen, num_heads, head_dim) are packed documents of one length: nothing is padded, and
nothing copied if rows lie end to end; those of (batch, num_heads, seqlen, head_dim).transpose(1, 2) do not: a copy.
"""

from typing import Any

import torch
from torch import Tensor

from herdkern.documents import cu_seqlens_from_lengths
from herdkern.ops import attention, rope
from herdkern.ops.attention_checks import check_softmax, check_tensor, is_integer, is_number
from herdkern.ops.backend import dtype_name
from herdkern.ops.paged_attention import check_paged, paged_attention

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return attention of a batch of sequences of one length.

    q: (batch, seqlen_q, num_heads, head_dim).  k, v: (batch, seqlen_k, num_kv_heads, head_dim).  The rest: as in
    `herdkern.ops.attention`, where seqlen_q and seqlen_k differ also.
    Returns: shape of q; with return_attn_probs (out, softmax_lse (batch, num_heads, seqlen_q) float32, None).
    Raises: NotImplementedError for dropout or ALiBi; ValueError if shapes or options do not fit.
    """
    function = "flash_attn_func"
    _check_batched(function, q=q, k=k, v=v)
    _check_keys(function, q, k, v)
    options = _options(function, dropout_p, alibi_slopes, softmax_scale, causal, window_size, softcap, sinks)
    borders, borders_k = (_even_borders(x.shape[0], x.shape[1], x) for x in (q, k))
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = attention(flat_q, flat_k, flat_v, borders, cu_seqlens_k=borders_k, return_lse=True, **options)
    out = out.view(q.shape)
    return (out, _batched_lse(lse, q), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Any:
    """Return attention within each document of a packed batch.

    q: (total_q, num_heads, head_dim).  k, v: (total_k, num_kv_heads, head_dim), or with block_table, which has no
        gradient, (num_pages, page_size, num_kv_heads, head_dim).
    cu_seqlens_q, cu_seqlens_k: (num_docs + 1,) int32 borders.  block_table: (num_docs, max_pages) int32, the pages of
        each document's keys. The rest: as in `herdkern.ops.attention`.
    Returns: shape of q; with return_attn_probs (out, softmax_lse (num_heads, total_q) float32, None).
    Raises: NotImplementedError for dropout or ALiBi; ValueError if shapes or options do not fit.
    """
    function = "flash_attn_varlen_func"
    options = _options(function, dropout_p, alibi_slopes, softmax_scale, causal, window_size, softcap, sinks)
    if block_table is None:
        out, lse = attention(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=True, **options)
    else:
        lengths = cu_seqlens_k.diff().to(torch.int32)
        out, lse = paged_attention(q, k, v, block_table, cu_seqlens_q, lengths, return_lse=True, **options)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return `flash_attn_func` of qkv: (batch, seqlen, 3, num_heads, head_dim)."""
    q, k, v = _unbind("flash_attn_qkvpacked_func", "qkv", qkv, 5, 3)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, sinks)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return `flash_attn_func` of q and kv: (batch, seqlen_k, 2, num_kv_heads, head_dim)."""
    k, v = _unbind("flash_attn_kvpacked_func", "kv", kv, 5, 2)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, sinks)
    return flash_attn_func(q, k, v, dropout_p, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return `flash_attn_varlen_func` of qkv: (total_tokens, 3, num_heads, head_dim)."""
    q, k, v = _unbind("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4, 3)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None, sinks)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, *rest)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return `flash_attn_varlen_func` of q and kv: (total_k, 2, num_kv_heads, head_dim)."""
    k, v = _unbind("flash_attn_varlen_kvpacked_func", "kv", kv, 4, 2)
    rest = (softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, None, sinks)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *rest)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> Any:
    """Return attention of new queries to a KV cache, after k and v (if given) are written into it in place.

    q: (batch, seqlen_q, num_heads, head_dim).
    k_cache, v_cache: (batch_cache, max_len, num_kv_heads, head_dim), or with block_table (num_pages, page_size,
        num_kv_heads, head_dim), any page_size.
    k, v: (batch, seqlen_new, num_kv_heads, head_dim), written behind the cache_seqlens tokens that are there.
    rotary_cos, rotary_sin: (max_position, rotary_dim // 2); turn k at its place in the cache, and q at its own place if
        causal or windowed, else at cache_seqlens. They need k.
    cache_seqlens: (batch,) int32, an int for all, or None: the cache is full.  cache_batch_idx: (batch,) rows of the
        cache; row b for b by default.  cache_leftpad: (batch,) first token of each row that counts; neither with
        block_table: (batch, max_pages) int32.  num_splits: has no effect.
    Returns: shape of q, no gradient; with return_softmax_lse also softmax_lse (batch, num_heads, seqlen_q) float32.
    Raises: NotImplementedError for ALiBi; ValueError if arguments do not fit or the cache is too short; TypeError for
        what must be a tensor. The cache is written only after all checks.
    """
    function = "flash_attn_with_kvcache"
    _check_batched(function, q=q, k_cache=k_cache, v_cache=v_cache)
    options = _options(function, 0.0, alibi_slopes, softmax_scale, causal, window_size, softcap, sinks)
    table = _block_table(q.shape[0], k_cache, block_table, cache_batch_idx, cache_leftpad)
    seqlens = _cache_lengths(q, k, v, table.shape[1] * k_cache.shape[1], cache_seqlens)
    total = (seqlens + (0 if k is None else k.shape[1])).to(torch.int32)
    check_paged(q.flatten(0, 1), k_cache, v_cache, table, _even_borders(q.shape[0], q.shape[1], q), total)
    check_softmax(function, q.flatten(0, 1), **options, return_lse=return_softmax_lse)
    _check_leftpad(q, cache_leftpad)
    if k is not None and v is not None:
        _check_new_keys(k_cache, {"k": k, "v": v}, table, total)
    if rotary_cos is not None or rotary_sin is not None:
        if k is None or rotary_cos is None or rotary_sin is None:
            raise ValueError(f"{function}: rotary_cos and rotary_sin must come together and with k, got one alone")
        first = seqlens if cache_leftpad is None else seqlens - cache_leftpad
        walks = causal or options["window_size"] != (-1, -1)
        q = _rotate(q, rotary_cos, rotary_sin, first, walks, rotary_interleaved)
        k = _rotate(k, rotary_cos, rotary_sin, first, True, rotary_interleaved)
    if k is not None and v is not None:
        _append(k_cache, v_cache, k, v, table, seqlens)
    out, lse = _attend_cache(q, k_cache, v_cache, table, total, cache_leftpad, options)
    return (out.view(q.shape), _batched_lse(lse, q)) if return_softmax_lse else out.view(q.shape)


def _options(
    function: str,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    sinks: Tensor | None,
) -> dict[str, Any]:
    """The options of herdkern.ops.attention; a negative side of the window, as a softcap <= 0, is no limit."""
    if dropout_p != 0:
        remedy = "pass 0 (as for evaluation) or apply torch.nn.functional.dropout to the output"
        raise NotImplementedError(f"{function}: dropout_p must be 0, got {dropout_p}; {remedy}")
    if alibi_slopes is not None:
        remedy = "give the model its positions by herdkern.ops.rope"
        raise NotImplementedError(f"{function}: alibi_slopes must be None, got {type(alibi_slopes).__name__}; {remedy}")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"{function}: window_size must be (left, right), got {window_size!r}")
    if not all(is_integer(side) for side in window_size):
        raise ValueError(f"{function}: window_size must hold integers, got {window_size!r}; (-1, -1) is no limit")
    if not is_number(softcap):
        raise ValueError(f"{function}: softcap must be a number, got {softcap!r}; 0 is none")
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (max(-1, window_size[0]), max(-1, window_size[1])),
        "softcap": max(0.0, softcap),
        "sinks": sinks,
    }


def _check_batched(function: str, **operands: Tensor) -> None:
    for name, x in operands.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            got = tuple(x.shape)
            raise ValueError(
                f"{function}: {name} must be (batch, seqlen, heads, head_dim), got {got}; "
                "for packed documents there is flash_attn_varlen_func"
            )


def _check_keys(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{function}: k and v must have the batch size {q.shape[0]} of q, got {k.shape[0]}")
    if v.shape != k.shape:  # head_dim too: the kernels have one for k and v
        raise ValueError(f"{function}: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")


def _unbind(function: str, name: str, x: Tensor, dims: int, parts: int) -> tuple[Tensor, ...]:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if x.dim() != dims or x.shape[-3] != parts:
        lead = "batch, seqlen" if dims == 5 else "total_tokens"
        raise ValueError(f"{function}: {name} must be ({lead}, {parts}, heads, head_dim), got {tuple(x.shape)}")
    return x.unbind(-3)


def _even_borders(batch_size: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32, device=like.device) * length


def _batched_lse(lse: Tensor, q: Tensor) -> Tensor:
    """(num_heads, total_q) -> (batch, num_heads, seqlen_q)."""
    return lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _block_table(
    batch_size: int, k_cache: Tensor, block_table: Tensor | None, row: Tensor | None, leftpad: Tensor | None
) -> Tensor:
    """(batch, max_pages) int32; a dense cache is one of pages as long as its rows."""
    if block_table is not None:
        for name, x in (("cache_batch_idx", row), ("cache_leftpad", leftpad)):
            if x is not None:
                raise ValueError(f"flash_attn_with_kvcache: {name} must be None with a block_table, got a tensor")
        check_tensor("flash_attn_with_kvcache", "block_table", block_table)
        if block_table.dim() != 2:
            shape = tuple(block_table.shape)
            raise ValueError(f"flash_attn_with_kvcache: block_table must be (batch, max_pages), got {shape}")
        return block_table
    if row is None:
        if batch_size > k_cache.shape[0]:
            got = f"{batch_size} for {k_cache.shape[0]} rows of k_cache"
            raise ValueError(
                f"flash_attn_with_kvcache: the batch size of q must be at most that of the cache, got {got}"
            )
        row = torch.arange(batch_size, device=k_cache.device)
    if row.shape != (batch_size,):
        shape = tuple(row.shape)
        raise ValueError(f"flash_attn_with_kvcache: cache_batch_idx must have shape ({batch_size},), got {shape}")
    if row.is_cpu and bool(((row < 0) | (row >= k_cache.shape[0])).any()):
        rows = f"rows of the cache, 0 to {k_cache.shape[0] - 1}"
        raise ValueError(f"flash_attn_with_kvcache: cache_batch_idx must name {rows}, got {row.tolist()}")
    return row[:, None].to(torch.int32)


def _cache_lengths(
    q: Tensor, k: Tensor | None, v: Tensor | None, capacity: int, cache_seqlens: int | Tensor | None
) -> Tensor:
    """(batch,) int64: how many tokens each row of the cache holds before k is added."""
    function = "flash_attn_with_kvcache"
    if (k is None) != (v is None):
        raise ValueError(f"{function}: k and v must come together, got one alone")
    if k is not None and v is not None:
        _check_batched(function, k=k, v=v)
        _check_keys(function, q, k, v)
        if cache_seqlens is None:
            raise ValueError(f"{function}: cache_seqlens must say where k goes, got None; pass 0 for an empty cache")
    if not isinstance(cache_seqlens, Tensor):
        filled = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((q.shape[0],), filled, dtype=torch.int64, device=q.device)
    if cache_seqlens.shape != q.shape[:1]:
        shape = tuple(cache_seqlens.shape)
        raise ValueError(f"{function}: cache_seqlens must have shape ({q.shape[0]},), got {shape}")
    new = 0 if k is None else k.shape[1]
    if cache_seqlens.is_cpu and len(cache_seqlens):
        low, high = int(cache_seqlens.min()), int(cache_seqlens.max()) + new
        if low < 0 or high > capacity:
            got = f"{low}" if low < 0 else f"{high - new} and {new} new tokens for a cache of {capacity}"
            raise ValueError(f"{function}: cache_seqlens must lie in the cache, got {got}; make it longer")
    return cache_seqlens.long()


def _check_leftpad(q: Tensor, leftpad: Tensor | None) -> None:
    name = "flash_attn_with_kvcache: cache_leftpad"
    if leftpad is None:
        return
    if not isinstance(leftpad, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(leftpad).__name__}")
    if leftpad.shape != q.shape[:1] or leftpad.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(leftpad.shape)} of {dtype_name(leftpad.dtype)}"
        raise ValueError(f"{name} must be integers of shape ({q.shape[0]},), got {got}")


def _check_new_keys(k_cache: Tensor, new: dict[str, Tensor], table: Tensor, total: Tensor) -> None:
    """What is written must have the form of the cache, and go to pages that there are; total: (batch,) keys then."""
    function = "flash_attn_with_kvcache"
    for name, x in new.items():
        if x.shape[2:] != k_cache.shape[2:]:
            heads = f"{k_cache.shape[2]}, {k_cache.shape[3]}"
            raise ValueError(f"{function}: {name} must be (batch, seqlen, {heads}) as the cache, got {tuple(x.shape)}")
        if x.dtype != k_cache.dtype or x.device != k_cache.device:
            wanted = f"{dtype_name(k_cache.dtype)} on {k_cache.device}"
            got = f"{dtype_name(x.dtype)} on {x.device}"
            raise ValueError(f"{function}: {name} must be {wanted} as the cache, got {got}")
    if not table.is_cpu:
        return
    used = torch.arange(table.shape[1]) * k_cache.shape[1] < total[:, None]
    if bool((outside := used & ((table < 0) | (table >= k_cache.shape[0]))).any()):
        row, entry = outside.nonzero()[0].tolist()
        where = f"pages from 0 to {k_cache.shape[0] - 1} (row {row}, entry {entry})"
        raise ValueError(f"{function}: block_table must name {where}, got {int(table[row, entry])}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, walks: bool, interleaved: bool) -> Tensor:
    """x: (batch, seqlen, num_heads, head_dim), its first rotary_dim turned; token i stands at first + i if it walks."""
    positions = first[:, None] + torch.arange(x.shape[1], device=x.device) * int(walks)
    rotary_dim = 2 * cos.shape[-1]
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    turned = rope(
        x[..., :rotary_dim].flatten(0, 1).to(dtype),
        cos.float(),
        sin.float(),
        positions.flatten(),
        interleaved=interleaved,
    )
    turned = turned.view(*x.shape[:3], rotary_dim).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, table: Tensor, seqlens: Tensor) -> None:
    """Write k, v: (batch, seqlen_new, num_kv_heads, head_dim) into the pages behind seqlens: (batch,)."""
    page_size = k_cache.shape[1]
    place = seqlens[:, None] + torch.arange(k.shape[1], device=k.device)  # (batch, seqlen_new)
    page = table.long().gather(1, place // page_size)
    k_cache[page, place % page_size] = k
    v_cache[page, place % page_size] = v


def _attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    seqlens: Tensor,
    leftpad: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse), packed, of q: (batch, seqlen_q, num_heads, head_dim) and the seqlens tokens of each row."""
    borders, q = _even_borders(q.shape[0], q.shape[1], q), q.flatten(0, 1)
    if leftpad is None:
        out, lse = paged_attention(q, k_cache, v_cache, table, borders, seqlens, return_lse=True, **options)
        return out, lse
    place = torch.arange(k_cache.shape[1], device=k_cache.device)
    counts = (place >= leftpad[:, None]) & (place < seqlens[:, None])  # (batch, max_len)
    rows, places = counts.nonzero(as_tuple=True)
    rows = table[rows, 0].long()
    keys, values, borders_k = k_cache[rows, places], v_cache[rows, places], cu_seqlens_from_lengths(counts.sum(1))
    out, lse = attention(q, keys, values, borders, cu_seqlens_k=borders_k, return_lse=True, **options)
    return out, lse
