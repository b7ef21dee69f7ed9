"""Token arrays become tensors: sequences of seq_len + 1 tokens are laid end to end in one packed batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = -100  # a target that is not counted


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed batch.

    tokens, targets, positions: (total_tokens,) int64; a target of -100 is not counted.  cu_seqlens: (num_docs + 1,)
    int32. num_targets: how many targets count; the trainer divides the summed loss of a step by their sum.
    document_lengths: the same borders on the host, for FLOPs.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    num_targets: int
    document_lengths: tuple[int, ...]


def build_batch(
    sequences: Sequence[tuple[NDArray[np.int64], NDArray[np.int32]]],
    *,
    document_mask: bool = True,
    mask_border_targets: bool = True,
    reset_positions: bool = True,
    device: torch.device | str = "cpu",
) -> Batch:
    """A packed batch from sequences of (tokens (length + 1,), document borders from 0 to length + 1).

    Every sequence ends a document. document_mask=False keeps only these borders. Targets are the next tokens;
    mask_border_targets leaves out those that begin another document.
    Raises: ValueError if there is no sequence, or one has fewer than two tokens or borders that do not span it.
    """
    if not sequences:
        raise ValueError("build_batch: sequences must have at least one, got none")
    tokens, targets, positions, borders = [], [], [], [np.zeros(1, np.int64)]
    total = 0
    for row, (ids, cu_seqlens) in enumerate(sequences):
        length = len(ids) - 1
        if length < 1:
            raise ValueError(f"build_batch: sequence {row} must have at least 2 tokens, got {len(ids)}")
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != length + 1 or (np.diff(cu_seqlens) < 0).any():
            raise ValueError(
                f"build_batch: borders of sequence {row} must rise from 0 to {length + 1}, got {cu_seqlens[:8]}"
            )
        starts = np.unique(cu_seqlens[cu_seqlens < length]).astype(np.int64)  # of documents among the inputs
        target = ids[1:].astype(np.int64)
        if mask_border_targets:
            first = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens <= length)]  # tokens that begin a document
            target[first - 1] = IGNORE
        position = np.arange(length)
        if reset_positions:
            position = position - np.repeat(starts, np.diff(np.append(starts, length)))
        ends = np.append(starts[1:], length) if document_mask else np.array([length])
        tokens.append(ids[:-1])
        targets.append(target)
        positions.append(position)
        borders.append(ends + total)
        total += length
    cu = np.concatenate(borders)
    all_targets = np.concatenate(targets)
    return Batch(
        tokens=_tensor(np.concatenate(tokens), torch.int64, device),
        targets=_tensor(all_targets, torch.int64, device),
        cu_seqlens=_tensor(cu, torch.int32, device),
        positions=_tensor(np.concatenate(positions), torch.int64, device),
        num_targets=int((all_targets != IGNORE).sum()),
        document_lengths=tuple(np.diff(cu).tolist()),
    )


def _tensor(values: NDArray[np.integer], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=dtype)
