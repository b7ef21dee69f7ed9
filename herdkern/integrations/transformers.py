"""attn_implementation="herdkern" for Hugging Face transformers: `register()`, then name it when you make a model.

Both of transformers' interfaces are served. The mask function runs once a forward and returns, instead of a mask, what
the mask says about documents; the attention function runs in each layer. A packed row is cut where `position_ids` start
anew or jump, or at `cu_seq_lens_q` where the caller gives that: also when the model keeps a KV cache, and also beside
an attention_mask, where the masks of transformers let documents see each other. Padding on a side of a row costs next
to nothing in a decoder; in an encoder its queries see the real tokens, as in eager attention, which keeps cross
attention right. Padding between real tokens costs a copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from herdkern.integrations.layout import Layout, counts_anew, has_holes, pack, pack_across, warn_once
from herdkern.ops import attention
from herdkern.ops.paged_attention import paged_attention

_NAME = "herdkern in transformers"
_REMEDY = 'use attn_implementation="sdpa" or "eager" for this model'


def register(name: str = "herdkern") -> None:
    """Make `attn_implementation=name` known to transformers; twice does no harm.

    Raises: ImportError if transformers is missing or too old; ValueError if name is taken or no identifier.
    """
    interfaces = _interfaces("register")
    if not name.isidentifier() or "flash" in name:  # transformers reads more into other names
        raise ValueError(f'register: name must be an identifier without "flash", got {name!r}; try "herdkern"')
    functions = (attention_forward, document_mask)
    for interface, function in zip(interfaces, functions):
        if interface._global_mapping.get(name, function) is not function:
            raise ValueError(f"register: name must be free in transformers, got {name!r}; choose another")
    for interface, function in zip(interfaces, functions):
        interface.register(name, function)


def unregister(name: str = "herdkern") -> None:
    """Take `register(name)` back; a model made with it no longer runs.

    Raises: ImportError if transformers is missing or too old; ValueError if name was not registered here.
    """
    attentions, masks = _interfaces("unregister")
    if attentions._global_mapping.get(name) is not attention_forward:
        raise ValueError(f"unregister: name must have been registered, got {name!r}; call register first")
    del attentions._global_mapping[name], masks._global_mapping[name]


def _interfaces(function: str) -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        remedy = "pip install 'herdkern[hf]'"
        raise ImportError(f"{function}: transformers 4.53 or later must be installed; {remedy} ({error})") from error
    return AttentionInterface, AttentionMaskInterface


@dataclasses.dataclass(kw_only=True)
class Documents:
    """What the mask of one forward says.

    joined: (batch, kv_len) bool, does key j belong to the document of key j - 1?
    valid: (batch, kv_len) bool, keys that are no padding; None if all are.
    first_query: the key at which the first query of each row stands.  window_size: as in herdkern.ops.attention.
    """

    joined: Tensor
    valid: Tensor | None
    q_len: int
    first_query: int
    causal: bool
    window_size: tuple[int, int]
    known: dict[int, tuple[Tensor | None, Layout]] = dataclasses.field(default_factory=dict)

    def layout(self, position_ids: Tensor | None) -> Layout:
        """Where the tokens lie; found once for each `position_ids` object, so once a forward and not in each layer."""
        key = id(position_ids)
        if key not in self.known:
            self.known[key] = position_ids, self._layout(position_ids)  # kept, so that its id stays its own
        return self.known[key][1]

    def _layout(self, position_ids: Tensor | None) -> Layout:
        batch_size, kv_len = self.joined.shape
        limited = self.window_size != (-1, -1)
        other_keys = self.first_query + self.q_len != kv_len  # than those of the queries
        if not self.causal and limited and other_keys:
            raise NotImplementedError(f"{_NAME}: cross attention must have no window, got one; {_REMEDY}")
        if limited and self.valid is not None and has_holes(self.valid):
            where = "attention_mask must have no padding between real tokens where there is a window"
            raise NotImplementedError(f"{_NAME}: {where}, got some; {_REMEDY}")
        counted = (
            position_ids is not None
            and self.first_query == 0
            and position_ids.dim() == 2
            and position_ids.shape[0] in (1, batch_size)
            and position_ids.shape[1] == self.q_len
        )  # positions of another form (several axes, steps of a generation) say nothing about borders
        position_ids = position_ids if counted else None
        if not self.causal and not limited:
            # without a border the queries may be those of a decoder, of the encoder's length by chance: then where
            # the keys are padding the queries are not
            borders = not bool(self.joined[:, 1:].all())
            borders = borders or (position_ids is not None and counts_anew(position_ids, self.valid))
            if other_keys or not borders:
                return pack_across(self.valid, batch_size, self.q_len, kv_len, self.joined.device)
        return pack(self.joined, self.valid, self.q_len, self.first_query, position_ids)


def document_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return what the attention function needs instead of a mask: a tensor of one element for each row that carries it.

    The arguments are transformers': mask_function(batch, head, query, key) says who sees whom, attention_mask: (batch,
    kv_offset + kv_length or less) what is no padding, local_size is the window or the chunk of this kind of layer.
    cache_position: (q_length,), in place of q_length and q_offset in older versions.
    Raises: NotImplementedError for a mask that is not one of documents.
    """
    if use_vmap or mask_function is None:
        raise NotImplementedError(f"{_NAME}: the model must not overlay a mask of its own, got one; {_REMEDY}")
    if q_length is None:
        if cache_position is None:
            raise NotImplementedError(f"{_NAME}: this version of transformers says neither q_length nor cache_position")
        q_length, q_offset = len(cache_position), int(cache_position[0])
    row = torch.arange(batch_size, device=device)[:, None]
    key = torch.arange(kv_offset, kv_offset + kv_length, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    sees_last = mask_function(row, head, key[:, 1:], key[:, :-1]).expand(batch_size, kv_length - 1)
    sees_next = mask_function(row, head, key[:, :-1], key[:, 1:]).expand(batch_size, kv_length - 1)
    causal = kv_length > 1 and not bool(sees_next.any())  # one key: a decoder of any length may look at it
    if not causal and not torch.equal(sees_last, sees_next):
        raise NotImplementedError(f"{_NAME}: the mask must be causal or not for all tokens, got a mixture; {_REMEDY}")
    documents = Documents(
        joined=F.pad(sees_last, (1, 0)),
        valid=_valid_keys(attention_mask, kv_length, kv_offset),
        q_len=q_length,
        first_query=int(q_offset) - kv_offset,
        causal=causal,
        window_size=_window(local_size, causal),
    )
    mask = torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device)  # four dimensions: a finished mask
    mask.documents = documents  # type: ignore[attr-defined]
    return mask


def _valid_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask is None:
        return None
    valid = attention_mask.to(torch.bool)[:, kv_offset : kv_offset + kv_length]
    valid = F.pad(valid, (0, kv_length - valid.shape[1]))
    return None if bool(valid.all()) else valid


def _window(size: int | None, causal: bool) -> tuple[int, int]:
    """transformers counts a query's own key into a causal window, and not into one to both sides."""
    if size is None:
        return -1, -1
    return (size - 1, 0) if causal else (size, size)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return (attention, None), attention: (batch, q_len, num_heads, value_dim).

    query: (batch, num_heads, q_len, head_dim).  key: (batch, num_kv_heads, kv_len, head_dim).  value: (batch,
    num_kv_heads, kv_len, value_dim).  attention_mask: of `document_mask`, or None.  s_aux: (num_heads,) sinks.
    Raises: NotImplementedError for dropout and what else the kernels lack; ValueError for a mask of another kind.
    """
    _check_call(attention_mask, dropout, others)
    documents = getattr(attention_mask, "documents", None)
    if documents is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        documents = _whole_rows(query, key, causal, sliding_window)
        position_ids = position_ids if causal else None  # of a vision tower they are places in a picture
    if cu_seq_lens_q is not None:
        borders_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        layout = Layout(cu_seqlens_q=cu_seq_lens_q.to(torch.int32), cu_seqlens_k=borders_k.to(torch.int32))
    else:
        layout = documents.layout(position_ids)
    q, k, v = _same_form(query, key, value)
    options: dict[str, Any] = {
        "causal": documents.causal,
        "window_size": documents.window_size,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "softmax_scale": scaling,
    }
    batch_size, q_len = query.shape[0], query.shape[2]
    if layout.key_ranges is not None and batch_size > 1 and not torch.is_grad_enabled():
        return _attend_in_place(q, k, v, layout.key_ranges, options)[..., : value.shape[-1]], None
    out = attention(
        _packed(q, layout.rows_of_q),
        _packed(k, layout.rows_of_k),
        _packed(v, layout.rows_of_k),
        layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        **options,
    )
    if layout.rows_of_q is not None:
        out = out.new_zeros(batch_size * q_len, *out.shape[1:]).index_copy(0, layout.rows_of_q, out)
    return out.unflatten(0, (batch_size, q_len))[..., : value.shape[-1]], None


def _attend_in_place(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: list[tuple[int, int]], options: dict[str, Any]
) -> Tensor:
    """(batch, q_len, num_heads, head_dim): rows of a cache of several heads are not end to end, and are not made so."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, tokens, heads, head_dim)
    batch_size, q_len = q.shape[:2]
    if all(begin == 0 for begin, _ in key_ranges):  # a cache row is a page
        pages = torch.arange(batch_size, dtype=torch.int32, device=q.device)
        lengths = torch.tensor([end for _, end in key_ranges], dtype=torch.int32, device=q.device)
        borders = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * q_len
        out: Tensor = paged_attention(q.flatten(0, 1), k, v, pages[:, None], borders, lengths, **options)
        return out.unflatten(0, (batch_size, q_len))
    rows = []
    for row, (begin, end) in enumerate(key_ranges):
        borders_q, borders_k = (torch.tensor([0, n], dtype=torch.int32, device=q.device) for n in (q_len, end - begin))
        keys, values = k[row, begin:end], v[row, begin:end]
        rows.append(attention(q[row], keys, values, borders_q, cu_seqlens_k=borders_k, **options))
    return torch.stack(rows)


def _check_call(attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        remedy = "set attention_dropout=0 in the config"
        raise NotImplementedError(f"{_NAME}: dropout must be 0, got {dropout}; {remedy}")
    if others.get("output_attentions"):
        warn_once(f'{_NAME}: output_attentions gives none, no probability is kept; use attn_implementation="eager"')
    for name in ("position_bias", "cache"):  # cache: transformers' continuous batching
        if others.get(name) is not None:
            raise NotImplementedError(f"{_NAME}: {name} must be None, got {type(others[name]).__name__}; {_REMEDY}")
    if attention_mask is not None and not hasattr(attention_mask, "documents"):
        got = f"one of shape {tuple(attention_mask.shape)}"
        remedy = "pass the padding mask (batch, tokens), or position_ids that start anew in each document"
        raise ValueError(f"{_NAME}: attention_mask must be made by its own mask function, got {got}; {remedy}")


def _whole_rows(query: Tensor, key: Tensor, causal: bool, sliding_window: int | None) -> Documents:
    """The documents of a call without a mask: rows."""
    q_len, kv_len = query.shape[2], key.shape[2]
    return Documents(
        joined=torch.ones(query.shape[0], kv_len, dtype=torch.bool, device=query.device),
        valid=None,
        q_len=q_len,
        first_query=kv_len - q_len if causal else 0,
        causal=causal,
        window_size=_window(sliding_window, causal),
    )


def _same_form(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype (rotation may have widened query and key) and one head_dim (a shorter value is filled up by 0)."""
    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    if value.shape[-1] < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _packed(x: Tensor, rows: Tensor | None) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (packed tokens, heads, head_dim)."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if rows is None else flat[rows]
