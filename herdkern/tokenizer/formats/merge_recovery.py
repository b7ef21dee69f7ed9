"""The ordered merges of a vocabulary that lists only its tokens, each made once.

A token's merge is what greedy BPE leaves of it when only earlier tokens may be used: two parts. A token of more parts
was not learnt by a merge (it was added by hand, or comes from a second training); it is skipped, with the reason. The
kernel is csrc/text/merge_recovery.h.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from herdkern import _text

NO_TOKEN = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A token that no merge makes, and why."""

    token: bytes
    token_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Merges in the order in which they were learnt.

    left, right, made: (num_merges,) int64, ids of the two parts and of the token that they make.
    """

    left: np.ndarray
    right: np.ndarray
    made: np.ndarray
    skipped: tuple[Skipped, ...]

    def __len__(self) -> int:
        return len(self.made)

    def pairs(self) -> list[tuple[int, int]]:
        """The ids of the two parts of each merge."""
        return list(zip(self.left.tolist(), self.right.tolist()))


def recover_merges(tokens: Sequence[bytes], ids: Sequence[int], *, characters: bool = False) -> Merges:
    """The merges that make `tokens`, which come in the order in which they were learnt.

    ids: the id of each. characters: begin with the UTF-8 characters of a token, as SentencePiece does, not its bytes.
    Raises: ValueError if a token is empty or there twice.
    """
    if len(ids) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"recover_merges: tokens must differ and have an id each, got {len(tokens)} and {len(ids)}")
    if b"" in tokens:
        raise ValueError("recover_merges: tokens must not be empty")
    places, num_parts = _text.recover_merges(tokens, characters)
    unit = "character" if characters else "byte"
    skipped = []
    is_merge = (num_parts == 2) & (places != NO_TOKEN).all(axis=1)
    for place in np.flatnonzero((num_parts > 1) & ~is_merge).tolist():
        if num_parts[place] > 2:
            reason = f"is {num_parts[place]} parts of earlier tokens, not two"
        else:
            reason = f"is made of a {unit} that is no token"
        skipped.append(Skipped(token=tokens[place], token_id=int(ids[place]), reason=reason))
    all_ids = np.asarray(ids, dtype=np.int64)
    left, right = all_ids[places[is_merge].astype(np.int64)].T if is_merge.any() else np.zeros((2, 0), dtype=np.int64)
    return Merges(left=left, right=right, made=all_ids[is_merge], skipped=tuple(skipped))


def merges_of_ranks(mergeable_ranks: Mapping[bytes, int]) -> Merges:
    """The merges of a byte-level vocabulary in the order of its ranks. Raises: ValueError if a token is empty."""
    ordered = sorted(mergeable_ranks.items(), key=lambda item: item[1])
    return recover_merges([token for token, _ in ordered], [rank for _, rank in ordered])


def splits_of(tokens: Iterable[bytes], mergeable_ranks: Mapping[bytes, int]) -> list[list[tuple[int, int]]]:
    """For each of `tokens` every way to make it of two tokens of the vocabulary, as pairs of ids, in order."""
    lengths = sorted({len(token) for token in mergeable_ranks})  # few, so that one long token costs no square of it
    result = []
    for token in tokens:
        pairs = []
        for cut in lengths:
            if cut >= len(token):
                break
            left = mergeable_ranks.get(token[:cut])
            right = mergeable_ranks.get(token[cut:]) if left is not None else None
            if left is not None and right is not None:
                pairs.append((left, right))
        result.append(sorted(pairs))
    return result
