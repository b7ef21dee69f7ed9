"""Who computes which tokens under context parallelism, how even that is, and how many keys must travel.

The documents of a packed batch are laid on a line and the line is cut into 2 * cp_size ranges; rank i computes range i
from the left and range i from the right. Two ways to lay and to cut:

allgather  documents in batch order, ranges of equal length. For one document that is even: early queries see few keys,
           late ones many. For several it is not. Every rank receives all keys. Llama 3's way.
needed     light documents first, and the two cuts of a rank solve two equations: it gets the mean number of tokens and
           the mean attention work. For one document that is the cut above. A rank receives only keys that it needs:
           those before its queries, in documents that a cut divides.

A cut inside a document lies at a multiple of `align` queries from its start, where the rows of a tile of the attention
kernel begin: then no bit of a query's result depends on where it is computed. One rule: `query_alignment`.

Source: Llama 3 (arXiv:2407.21783), section 3.3.2; the balanced cuts are our own.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from herdkern.documents import check_border_values
from herdkern.parallel.context_balance import Segments, Work, in_batch_order, segments_and_cuts

Mode = Literal["needed", "allgather"]
Interval = tuple[int, int]


def query_alignment(num_heads: int, num_kv_heads: int, head_dim: int, *, window: bool = False) -> int:
    """Return where documents may be cut so that results keep every bit: at multiples of this many queries.

    The CPU kernel folds the heads of a group into tiles of 512 rows (256 above head_dim 128), query after query, and
    handles 32 rows together; with a window, a tile's blocks of keys begin where its first query sees its first key.
    """
    group = num_heads // num_kv_heads
    if group & (group - 1) == 0 and not window:  # a tile is a multiple of 32 rows
        return max(1, 32 // group)
    return max(1, (512 if head_dim <= 128 else 256) // group)  # a whole tile


@dataclasses.dataclass
class Traffic:
    """Bytes that one rank exchanges with the others for one attention: keys and values forward, gradients backward.

    `backward` holds the keys and values too where they are fetched again.
    """

    forward_sent: int = 0
    forward_received: int = 0
    backward_sent: int = 0
    backward_received: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """Queries [begin, end) of one document that one rank computes; `row` is the first of them among its tokens.

    They see keys [keys_begin, keys_end) of the document.
    """

    document: int
    begin: int
    end: int
    row: int
    keys_begin: int
    keys_end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """All pieces of all ranks, int64 arrays: rank after rank, in the order in which a rank holds its tokens.

    first: (cp_size + 1,), where the pieces of each rank begin.
    """

    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    row: np.ndarray
    keys_begin: np.ndarray
    keys_end: np.ndarray
    first: np.ndarray

    def of(self, rank: int) -> slice:
        """The pieces of one rank."""
        return slice(self.first[rank], self.first[rank + 1])

    @cached_property
    def is_divided(self) -> np.ndarray:
        """Which pieces see keys outside themselves."""
        found: np.ndarray = (self.keys_begin < self.begin) | (self.keys_end > self.end)
        return found

    @cached_property
    def _few(self) -> dict[int, Piece]:
        """Those of documents that lie in several pieces or see keys outside themselves, by index: a few a rank."""
        is_one_of_several = np.bincount(self.document)[self.document] > 1 if len(self.document) else self.is_divided
        few = np.flatnonzero(is_one_of_several | self.is_divided)
        columns = (self.document, self.begin, self.end, self.row, self.keys_begin, self.keys_end)
        rows = zip(*(column[few].tolist() for column in columns), strict=True)
        return {i: Piece(*row) for i, row in zip(few.tolist(), rows, strict=True)}

    @cached_property
    def _divided(self) -> list[list[Piece]]:
        divided, firsts = np.flatnonzero(self.is_divided), self.first
        found = [self._few[i] for i in divided.tolist()]
        ends = np.searchsorted(divided, firsts).tolist()
        return [found[begin:end] for begin, end in pairwise(ends)]

    def divided(self, rank: int) -> list[Piece]:
        """The pieces of a rank that see keys outside themselves; a few."""
        return self._divided[rank]

    @cached_property
    def parts(self) -> dict[int, list[tuple[int, Piece]]]:
        """Who holds what of each document that lies in several pieces: ranks and pieces, by position."""
        ranks = np.searchsorted(self.first, list(self._few), side="right") - 1
        found: dict[int, list[tuple[int, Piece]]] = {}
        for rank, piece in zip(ranks.tolist(), self._few.values(), strict=True):
            found.setdefault(piece.document, []).append((rank, piece))
        for parts in found.values():
            parts.sort(key=lambda part: part[1].begin)
        return found


@dataclasses.dataclass(frozen=True)
class Need:
    """Keys [begin, end) of a document that a rank needs and that `rank` holds, from its row `row` on."""

    document: int
    begin: int
    end: int
    rank: int
    row: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ContextPlan:
    """The same on every rank, made on the host from the document borders alone. Make it with `ContextPlan.make`.

    cuts: 2 * cp_size + 1 borders of the ranges on the line of `segments`.
    """

    mode: Mode
    cp_size: int
    causal: bool
    window_left: int
    align: int
    cu_seqlens: np.ndarray
    segments: Segments
    cuts: list[int]
    prepared: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)  # what a rank derives, kept

    @classmethod
    def make(
        cls,
        cu_seqlens: Tensor | np.ndarray | Sequence[int],
        cp_size: int,
        *,
        mode: Mode = "needed",
        causal: bool = True,
        window_left: int = -1,
        align: int | None = None,
    ) -> "ContextPlan":
        """Return the plan for these documents on `cp_size` ranks.

        cu_seqlens: (num_docs + 1,) integers, document borders from 0 to the number of tokens.
        window_left: how many keys before its own a query sees, -1 for all of its document.
        align: where a document may be cut (`query_alignment`); the default keeps every bit if num_heads / num_kv_heads
            is a power of two. Only for mode "needed".
        Raises: ValueError for borders that decrease or do not start with 0, an unknown mode, cp_size or align below 1,
            or a window without causal attention.
        """
        borders = _borders(cu_seqlens)
        if cp_size < 1:
            raise ValueError(f"ContextPlan: cp_size must be at least 1, got {cp_size}")
        if mode not in get_args(Mode):
            raise ValueError(f"ContextPlan: mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if not causal and window_left >= 0:
            raise ValueError(f"ContextPlan: window_left must be -1 where causal is False, got {window_left}")
        if align is None:
            align = 512 if window_left >= 0 else 32
        if align < 1:
            raise ValueError(f"ContextPlan: align must be at least 1, got {align}")
        lengths = np.diff(borders)
        if mode == "needed":
            segments, cuts = segments_and_cuts(lengths, cp_size, align, Work(causal, window_left + 1))
        else:
            segments, total, align = in_batch_order(lengths), int(borders[-1]), 1
            cuts = [total * i // (2 * cp_size) for i in range(2 * cp_size + 1)]
        return cls(
            mode=mode,
            cp_size=cp_size,
            causal=causal,
            window_left=window_left,
            align=align,
            cu_seqlens=borders,
            segments=segments,
            cuts=cuts,
        )

    @property
    def total(self) -> int:
        """Tokens of the batch."""
        return int(self.cu_seqlens[-1])

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """(cp_size,) int64: tokens of each rank."""
        sizes = np.diff(self.cuts)
        return sizes[: self.cp_size] + sizes[: self.cp_size - 1 : -1]

    @cached_property
    def work(self) -> np.ndarray:
        """(cp_size,) int64: pairs of a query and a key that it sees, of each rank."""
        pieces, lengths = self.pieces, np.diff(self.cu_seqlens)[self.pieces.document]
        work = Work(self.causal, self.window_left + 1)
        own = work.before(pieces.end, lengths) - work.before(pieces.begin, lengths)
        return np.diff(np.concatenate([[0], np.cumsum(own)])[pieces.first])

    @property
    def work_imbalance(self) -> float:
        """The greatest work of a rank over the mean; 1 is even, and what a step waits for."""
        return float(self.work.max() / self.work.mean()) if self.total else 1.0

    @property
    def token_imbalance(self) -> float:
        """The greatest number of tokens of a rank over the mean: how even everything but attention is."""
        return float(self.num_tokens.max() / self.num_tokens.mean()) if self.total else 1.0

    @cached_property
    def pieces(self) -> Pieces:
        """What each rank computes: the line at its cuts and borders, neighbours of one document joined again."""
        line, cuts = self.segments.borders, np.array(self.cuts)
        borders = np.sort(np.concatenate([line, cuts]))
        sizes = np.diff(borders)
        starts, sizes = borders[:-1][sizes > 0], sizes[sizes > 0]
        ranges = np.searchsorted(cuts, starts, side="right") - 1
        ranks = np.minimum(ranges, 2 * self.cp_size - 1 - ranges)
        order = np.argsort(ranks, kind="stable")
        starts, sizes, ranks = starts[order], sizes[order], ranks[order]
        segment = np.searchsorted(line, starts, side="right") - 1
        document = self.segments.document[segment]
        begin = self.segments.offset[segment] + starts - line[segment]
        end = begin + sizes
        if len(begin):
            follows = (document[1:] == document[:-1]) & (begin[1:] == end[:-1]) & (ranks[1:] == ranks[:-1])
            opens, closes = np.append(True, ~follows), np.append(~follows, True)
            document, begin, end, ranks = document[opens], begin[opens], end[closes], ranks[opens]
        first = np.searchsorted(ranks, np.arange(self.cp_size + 1))
        rows = np.concatenate([[0], np.cumsum(end - begin)])
        row = rows[:-1] - rows[first[ranks]]
        if not self.causal:
            keys = np.zeros_like(begin), np.diff(self.cu_seqlens)[document]
        else:
            keys = np.zeros_like(begin) if self.window_left < 0 else np.maximum(begin - self.window_left, 0), end
        return Pieces(document, begin, end, row, *keys, first)

    def tokens_of(self, rank: int) -> Tensor:
        """(num_tokens[rank],) int64: where in the batch the tokens of `rank` lie, in the order that it holds them."""
        mine = self._pieces_of(rank)
        return torch.from_numpy(self._per_token(mine, self.cu_seqlens[self.pieces.document[mine]]))

    def positions_of(self, rank: int) -> Tensor:
        """(num_tokens[rank],) int64: positions of those tokens in their documents, for rotary embeddings."""
        mine = self._pieces_of(rank)
        return torch.from_numpy(self._per_token(mine, np.zeros(mine.stop - mine.start, np.int64)))

    def _pieces_of(self, rank: int) -> slice:
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"ContextPlan: rank must be 0 to {self.cp_size - 1}, got {rank}")
        return self.pieces.of(rank)

    def _per_token(self, mine: slice, starts: np.ndarray) -> np.ndarray:
        """Positions in documents plus `starts` of the documents, for each token of the pieces `mine`."""
        sizes = self.pieces.end[mine] - self.pieces.begin[mine]
        shift = starts + self.pieces.begin[mine] - self.pieces.row[mine]
        return np.arange(sizes.sum()) + np.repeat(shift, sizes)

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """(num_tokens[rank], ...) from x: (total, ...), what `rank` holds of a tensor with one row a token."""
        if x.shape[:1] != (self.total,):
            raise ValueError(f"ContextPlan: x must have {self.total} rows, got shape {tuple(x.shape)}")
        return x.index_select(0, self.tokens_of(rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """(total, ...) from what each rank holds, in the order of the ranks."""
        if [len(part) for part in parts] != self.num_tokens.tolist():
            raise ValueError(
                f"ContextPlan: parts must have {self.num_tokens.tolist()} rows, got {[len(part) for part in parts]}"
            )
        tokens = torch.cat([self.tokens_of(rank) for rank in range(self.cp_size)])
        x = torch.cat(list(parts))
        whole = torch.empty_like(x)
        whole[tokens.to(x.device)] = x
        return whole

    def wanted(self, rank: int) -> list[tuple[int, Interval]]:
        """Which keys the divided documents of `rank` need, its own among them: (document, interval) in order."""
        keys: dict[int, list[Interval]] = {}
        for piece in self.pieces.divided(rank):
            keys.setdefault(piece.document, []).append((piece.keys_begin, piece.keys_end))
        return [(document, interval) for document in sorted(keys) for interval in join(keys[document])]

    @cached_property
    def needs(self) -> list[list[Need]]:
        """Of every rank, what it wants and who holds that, itself among them; in the order of `wanted`."""
        found: list[list[Need]] = []
        for rank in range(self.cp_size):
            found.append([])
            for document, (begin, end) in self.wanted(rank):
                for holder, part in self.pieces.parts[document]:
                    low, high = max(begin, part.begin), min(end, part.end)
                    if low < high:
                        found[-1].append(Need(document, low, high, holder, part.row + low - part.begin))
        return found

    def rows_needed(self, rank: int) -> int:
        """Rows of other ranks that `rank` cannot do without: the least that any transfer under this plan moves."""
        return sum(need.end - need.begin for need in self.needs[rank] if need.rank != rank)

    def rows_sent(self, rank: int) -> int:
        """Rows that `rank` sends, each counted once for every rank that gets it."""
        if self.mode == "allgather":
            return self.rows_received(rank)
        others = (needs for other, needs in enumerate(self.needs) if other != rank)
        return sum(need.end - need.begin for needs in others for need in needs if need.rank == rank)

    def rows_received(self, rank: int) -> int:
        """Rows that `rank` receives: those that it needs, or as many as the longest rank holds from every other."""
        if self.mode == "allgather":
            return (self.cp_size - 1) * self.longest
        return self.rows_needed(rank)

    @property
    def longest(self) -> int:
        """The greatest number of tokens of a rank."""
        return int(self.num_tokens.max())

    def bytes_of(
        self,
        rank: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        keep_gathered: bool = False,
    ) -> Traffic:
        """What `rank` exchanges in one forward and one backward pass of attention; gradients travel in fp32 or wider.

        dtype: of k and v.  keep_gathered: they are not fetched again for the backward pass.
        """
        elements = 2 * num_kv_heads * head_dim
        keys, gradients = elements * dtype.itemsize, elements * max(4, dtype.itemsize)
        sent, received = self.rows_sent(rank), self.rows_received(rank)
        again = 0 if keep_gathered else keys
        return Traffic(
            forward_sent=sent * keys,
            forward_received=received * keys,
            backward_sent=received * gradients + sent * again,
            backward_received=sent * gradients + received * again,
        )


def join(intervals: list[Interval]) -> list[Interval]:
    """Return the union as disjoint intervals from left to right."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def _borders(cu_seqlens: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = cu_seqlens.detach().cpu().numpy()
    borders = np.asarray(cu_seqlens)
    if borders.ndim != 1 or len(borders) < 1 or borders.dtype.kind not in "iu":
        raise ValueError(
            f"ContextPlan: cu_seqlens must be (num_docs + 1,) integers, got {borders.shape} {borders.dtype}"
        )
    check_border_values("ContextPlan", "cu_seqlens", borders)
    return borders.astype(np.int64)
