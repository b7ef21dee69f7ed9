"""Where the tokens of a batch of rows lie in a packed one: borders, and what is moved if padding has holes."""

import dataclasses
import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Borders of the documents, and the rows of the flattened batch that are packed (None: all, in place).

    cu_seqlens_q, cu_seqlens_k: (num_docs + 1,) int32; cu_seqlens_k is None where it would be the same.
    rows_of_q, rows_of_k: int64 into (batch * q_len,) and (batch * kv_len,).
    key_ranges: [begin, end) of the keys of each row, where rows are documents whose queries are their last tokens: a
        step of a generation, which can read its cache where it lies.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None = None
    rows_of_q: Tensor | None = None
    rows_of_k: Tensor | None = None
    key_ranges: list[tuple[int, int]] | None = None


def has_holes(valid: Tensor) -> bool:
    """Return whether a row of valid: (batch, row_len) has padding between two real tokens."""
    return bool(((valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0] > 1).any())


def pack(
    joined: Tensor, valid: Tensor | None, q_len: int, first_query: int, position_ids: Tensor | None = None
) -> Layout:
    """Return the layout of rows whose queries stand at keys first_query to first_query + q_len.

    joined: (batch, kv_len) bool, does key j belong to the document of key j - 1?
    valid: (batch, kv_len) bool, keys that are no padding; None if all are.
    position_ids: (batch or 1, q_len), counted anew in each document; first_query is 0 then.
    """
    batch_size, kv_len = joined.shape
    end = first_query + q_len
    key_ranges = None
    if position_ids is None and q_len < kv_len and bool(joined[:, 1:end].all()):
        key_ranges = _key_ranges(valid, batch_size, first_query, end)
    joined = joined.clone()
    joined[:, 0] = False
    if end < kv_len:  # behind the queries lies the part of a static cache that is still empty
        joined[:, end] = False
    keep = None
    if valid is not None and has_holes(valid):
        keep = valid.flatten().nonzero().flatten()
    elif valid is not None:  # each padding token is a document of its own, so that nothing need be moved
        joined[:, 1:] &= valid[:, 1:] & valid[:, :-1]

    def kept(x: Tensor) -> Tensor:
        return x.flatten() if keep is None else x.flatten()[keep]

    begins = _changes(kept((~joined).flatten().cumsum(0)))
    if position_ids is not None:
        positions = kept(F.pad(position_ids.expand(batch_size, -1), (0, kv_len - q_len)))
        ahead = positions.diff(prepend=positions[:1])
        if valid is None and bool(((ahead > 1) & ~begins).any()):
            warn_once(
                "herdkern in transformers: position_ids jump by more than 1, and each jump is taken as the border of a "
                "document; if they count one document in larger steps, pass its borders as cu_seq_lens_q"
            )
        # beside a mask a count may jump over padding, never fall
        begins |= (ahead != 1) if valid is None else (ahead <= 0)
    borders = torch.cat([begins, begins.new_ones(1)]).nonzero().flatten()
    if q_len == kv_len:
        return Layout(cu_seqlens_q=borders.to(torch.int32), rows_of_q=keep, rows_of_k=keep)
    place = torch.arange(kv_len, device=joined.device).expand(batch_size, kv_len)
    queries_before = F.pad(kept((place >= first_query) & (place < end)).cumsum(0), (1, 0))
    rows_of_q = None
    if keep is not None and valid is not None:
        rows_of_q = valid[:, first_query:end].flatten().nonzero().flatten()
    return Layout(
        cu_seqlens_q=queries_before[borders].to(torch.int32),
        cu_seqlens_k=borders.to(torch.int32),
        rows_of_q=rows_of_q,
        rows_of_k=keep,
        key_ranges=key_ranges,
    )


def pack_across(valid: Tensor | None, batch_size: int, q_len: int, kv_len: int, device: torch.device) -> Layout:
    """Return the layout of queries that see all real keys of their row, padding too: cross attention, encoders.

    valid: (batch, kv_len) bool, keys that are no padding; None if all are.
    """
    rows = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    if valid is None:
        return Layout(cu_seqlens_q=rows * q_len, cu_seqlens_k=rows * kv_len)
    counts = valid.sum(1)
    if has_holes(valid):
        cu_seqlens_k = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        rows_of_k = valid.flatten().nonzero().flatten()
        return Layout(cu_seqlens_q=rows * q_len, cu_seqlens_k=cu_seqlens_k, rows_of_k=rows_of_k)
    # nothing is moved: the padding before and behind the keys of a row are documents without a query
    first = rows[:-1] * kv_len + valid.to(torch.int8).argmax(1)
    borders_k = torch.stack([rows[:-1] * kv_len, first, first + counts], dim=1).flatten()
    borders_q = torch.stack([rows[:-1], rows[:-1], rows[1:]], dim=1).flatten() * q_len
    return Layout(
        cu_seqlens_q=torch.cat([borders_q, rows[-1:] * q_len]),
        cu_seqlens_k=torch.cat([borders_k, rows[-1:] * kv_len]).to(torch.int32),
    )


def counts_anew(position_ids: Tensor, valid: Tensor | None) -> bool:
    """Return whether position_ids: (batch or 1, row_len) hold a border, as `pack` would find one."""
    ahead = position_ids.diff(dim=1)
    if valid is None:
        return bool((ahead != 1).any())
    return bool(((ahead <= 0) & valid[:, 1:] & valid[:, :-1]).any())


@functools.cache
def warn_once(message: str) -> None:
    """Warn, once in a process: a model says the same in every layer and step."""
    warnings.warn(message, stacklevel=2)


def _key_ranges(valid: Tensor | None, batch_size: int, first_query: int, end: int) -> list[tuple[int, int]] | None:
    if valid is None:
        return [(0, end)] * batch_size
    if has_holes(valid) or not bool(valid[:, first_query:end].all()) or bool(valid[:, end:].any()):
        return None
    return [(begin, end) for begin in valid.to(torch.int8).argmax(1).tolist()]


def _changes(x: Tensor) -> Tensor:
    """(n,) bool: does x[i] differ from x[i - 1]? True for the first."""
    changed = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    changed[1:] = x[1:] != x[:-1]
    return changed
