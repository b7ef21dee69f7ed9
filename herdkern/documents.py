"""Document borders from what a batch carries: lengths, position ids, document ids or a padding mask, and back.

`cu_seqlens` is (num_docs + 1,) int32, from 0 to the number of tokens; document d is tokens cu_seqlens[d] to
cu_seqlens[d + 1]. A batch of rows is read row after row, and the end of a row is always a border. Nothing here loops
over documents. On a GPU, only the functions whose result has one entry for each document wait for their number.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_INT32_MAX = 2**31 - 1
PADDING = -1  # the document id of a token that belongs to no document


def cu_seqlens_from_lengths(lengths: Tensor | Iterable[int], *, device: torch.device | str | None = None) -> Tensor:
    """Return the borders of documents of these lengths, (num_docs + 1,) int32.

    lengths: (num_docs,) integers of at least 0, a tensor or an iterable.  device: that of lengths if None.
    Raises: TypeError if lengths hold no integers; ValueError if one is negative or the sum exceeds int32, if they
    lie on the CPU: no device is waited for.
    """
    function = "cu_seqlens_from_lengths"
    if not isinstance(lengths, Tensor):
        lengths = _as_tensor(function, lengths)
    _check_integers(function, "lengths", lengths)
    if lengths.dim() != 1:
        raise ValueError(f"{function}: lengths must have shape (num_docs,), got {tuple(lengths.shape)}; flatten it")
    borders = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, dtype=torch.int64, out=borders[1:])
    if _readable(borders) and len(lengths):
        if (low := int(lengths.min())) < 0:
            at = int(lengths.argmin())
            raise ValueError(f"{function}: lengths must be at least 0, got {low} at index {at}; remove it")
        total = max(int(borders[-1]), int(lengths.max()))  # a sum of huge ones may wrap
        if total > _INT32_MAX:
            raise ValueError(f"{function}: lengths must sum to at most {_INT32_MAX}, got {total}; make smaller batches")
    return borders.to(device=device, dtype=torch.int32)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Return the borders of the documents that `position_ids` count through, (num_docs + 1,) int32.

    position_ids: (total_tokens,) or (batch, row_len) integers. A document begins with a row, and wherever a position is
        not its predecessor's plus one; two documents whose counts continue each other cannot be told apart.
    Raises: TypeError or ValueError for anything but one or two dimensions of integers.
    """
    rows = _rows("cu_seqlens_from_position_ids", "position_ids", position_ids)
    return _borders(rows[:, 1:] != rows[:, :-1] + 1, rows)


def cu_seqlens_from_document_ids(document_ids: Tensor) -> Tensor:
    """Return the borders of runs of equal ids, (num_docs + 1,) int32.

    document_ids: (total_tokens,) or (batch, row_len) integers. An id may come back later: that is another document.
        Every token of id -1 (padding) is a document of its own: padding costs next to nothing and touches nothing.
    Raises: TypeError or ValueError for anything but one or two dimensions of integers.
    """
    rows = _rows("cu_seqlens_from_document_ids", "document_ids", document_ids)
    return _borders((rows[:, 1:] != rows[:, :-1]) | (rows[:, 1:] == PADDING), rows)


def position_ids_from_cu_seqlens(cu_seqlens: Tensor, total_tokens: int | None = None) -> Tensor:
    """Return the place of every token in its document, (total_tokens,) int64.

    cu_seqlens: (num_docs + 1,) int32 | int64.  total_tokens: its last entry; spares the wait for a GPU.
    Raises: TypeError or ValueError if cu_seqlens has no such form.
    """
    _check_borders("position_ids_from_cu_seqlens", cu_seqlens)
    starts = cu_seqlens[:-1].to(torch.int64)
    starts = torch.repeat_interleave(starts, cu_seqlens.diff().to(torch.int64), output_size=total_tokens)
    return torch.arange(starts.shape[0], device=starts.device) - starts


def document_ids_from_cu_seqlens(cu_seqlens: Tensor, total_tokens: int | None = None) -> Tensor:
    """Return the number of the document of every token, from 0, (total_tokens,) int64; empty ones count.

    cu_seqlens: (num_docs + 1,) int32 | int64.  total_tokens: its last entry; spares the wait for a GPU.
    Raises: TypeError or ValueError if cu_seqlens has no such form.
    """
    _check_borders("document_ids_from_cu_seqlens", cu_seqlens)
    numbers = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, cu_seqlens.diff().to(torch.int64), output_size=total_tokens)


def cu_seqlens_from_padding_mask(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (indices, cu_seqlens): where the real tokens of a padded batch lie, and their borders row by row.

    attention_mask: (batch, row_len) bool or integers; not 0 marks a real token, on either side and with holes.
    Returns: indices (total_tokens,) int64 into the batch flattened to (batch * row_len,), and cu_seqlens (batch + 1,)
        int32; a row without a real token is an empty document.
    Raises: TypeError or ValueError if attention_mask has no such form.
    """
    mask = _padding_mask("cu_seqlens_from_padding_mask", attention_mask)
    return mask.flatten().nonzero().flatten(), cu_seqlens_from_lengths(mask.sum(1))


def unpad_input(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (packed, indices, cu_seqlens): the real tokens of a padded batch end to end.

    hidden_states: (batch, row_len, ...).  attention_mask: (batch, row_len), as in `cu_seqlens_from_padding_mask`, which
    says what indices and cu_seqlens are.
    Returns: packed (total_tokens, ...), with a gradient into hidden_states.
    Raises: TypeError or ValueError if the two do not fit.
    """
    mask = _padding_mask("unpad_input", attention_mask)
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"unpad_input: hidden_states must be a tensor, got {type(hidden_states).__name__}")
    if hidden_states.shape[:2] != mask.shape:
        expected = f"({mask.shape[0]}, {mask.shape[1]}, ...) as attention_mask"
        raise ValueError(f"unpad_input: hidden_states must be {expected}, got {tuple(hidden_states.shape)}")
    indices, cu_seqlens = cu_seqlens_from_padding_mask(mask)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens


def pad_input(packed: Tensor, indices: Tensor, batch_size: int, row_len: int) -> Tensor:
    """Return the padded batch that `unpad_input` has packed, (batch_size, row_len, ...); padding is 0.

    packed: (total_tokens, ...).  indices: (total_tokens,) int64, places in (batch_size * row_len,), none twice.
    Raises: TypeError or ValueError if they do not fit; places are checked if they lie on the CPU.
    """
    for name, x in (("packed", packed), ("indices", indices)):
        if not isinstance(x, Tensor):
            raise TypeError(f"pad_input: {name} must be a tensor, got {type(x).__name__}")
    if indices.dim() != 1 or packed.shape[:1] != indices.shape:
        got = f"{tuple(indices.shape)} for packed {tuple(packed.shape)}"
        raise ValueError(f"pad_input: indices must have one entry for each row of packed, got {got}")
    if indices.dtype != torch.int64:
        got = str(indices.dtype).removeprefix("torch.")
        raise TypeError(f"pad_input: indices must be int64, got {got}; convert it with .long()")
    if _readable(indices) and len(indices):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= batch_size * row_len:
            room = f"0 to batch_size * row_len - 1 = {batch_size * row_len - 1}"
            raise ValueError(f"pad_input: indices must be {room}, got {low if low < 0 else high}")
    padded = packed.new_zeros(batch_size * row_len, *packed.shape[1:])
    return padded.index_copy(0, indices, packed).unflatten(0, (batch_size, row_len))


def check_border_values(function: str, name: str, borders: np.ndarray) -> None:
    """Raise ValueError unless `borders`, (num_docs + 1,) integers on the host, start with 0 and do not decrease."""
    if borders[0] != 0:
        raise ValueError(f"{function}: {name} must start with 0, got {borders[0]}; see cu_seqlens_from_lengths")
    falls = borders[1:] < borders[:-1]
    if falls.any():
        at = int(falls.argmax()) + 1
        values = f"(entry {at} follows {borders[at - 1]}), got {borders[at]}"
        raise ValueError(f"{function}: {name} must not decrease {values}; see cu_seqlens_from_lengths")


def _as_tensor(function: str, lengths: Any) -> Tensor:
    try:
        values = list(lengths)
    except TypeError:
        got = type(lengths).__name__
        raise TypeError(f"{function}: lengths must be a tensor or an iterable of integers, got {got}") from None
    try:
        return torch.tensor(values) if values else torch.zeros(0, dtype=torch.int64)
    except (RuntimeError, TypeError, ValueError) as error:
        worst = max((n for n in values if isinstance(n, int)), key=abs, default=0)
        if not -(2**63) <= worst < 2**63:  # what error torch has for it depends on its version
            raise ValueError(
                f"{function}: lengths must be 0 to {_INT32_MAX}, got {worst}; make smaller batches"
            ) from None
        raise TypeError(f"{function}: lengths must hold integers, got something else ({error})") from None


def _check_integers(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}; use torch.as_tensor")
    if x.dtype not in _INTEGERS:
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{function}: {name} must hold integers, got {got}; convert it with .long()")


def _readable(x: Tensor) -> bool:
    """True if the values of `x` can be had without waiting for a device or breaking a trace."""
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def _rows(function: str, name: str, ids: Tensor) -> Tensor:
    _check_integers(function, name, ids)
    if ids.dim() not in (1, 2):
        got = tuple(ids.shape)
        raise ValueError(f"{function}: {name} must be (total_tokens,) or (batch, row_len), got {got}; flatten it")
    ids = ids.long() if ids.dtype.itemsize < 4 else ids  # a count may not wrap
    return ids.unsqueeze(0) if ids.dim() == 1 else ids


def _borders(begins: Tensor, rows: Tensor) -> Tensor:
    """Borders from begins: (batch, row_len - 1), does the second of two neighbours begin a document?"""
    if rows.numel() == 0:
        return torch.zeros(1, dtype=torch.int32, device=rows.device)
    flags = torch.ones(rows.numel() + 1, dtype=torch.bool, device=rows.device)  # row starts and the end stay True
    flags[:-1].view(rows.shape)[:, 1:] = begins
    return flags.nonzero().flatten().to(torch.int32)


def _check_borders(function: str, cu_seqlens: Tensor) -> None:
    _check_integers(function, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        got = tuple(cu_seqlens.shape)
        raise ValueError(f"{function}: cu_seqlens must have shape (num_docs + 1,), got {got}; start it with 0")
    if _readable(cu_seqlens):
        check_border_values(function, "cu_seqlens", cu_seqlens.detach().numpy())


def _padding_mask(function: str, attention_mask: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool:
        _check_integers(function, "attention_mask", attention_mask)
    if attention_mask.dim() != 2:
        got = tuple(attention_mask.shape)
        raise ValueError(
            f"{function}: attention_mask must be (batch, row_len), got {got}; pass the padding mask itself"
        )
    return attention_mask.to(torch.bool)
