"""What one rank does under a `ContextPlan`: its calls of attention, and how keys reach it and gradients go back.

Keys and values travel as one tensor, rows of (2, num_kv_heads, head_dim), into a buffer: of the whole batch in mode
"allgather", of what divided documents of this rank need in mode "needed". Gradients of the buffer travel back in fp32
and are added in the order of the ranks, so their bits do not depend on who is early.
"""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from herdkern.parallel.context_plan import ContextPlan, Interval, Piece, Traffic

# torch 2.13 renamed both and warns at the old names.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of attention: local rows of queries, and rows of keys, local ones or of the buffer.

    cu_seqlens, cu_seqlens_k: (n + 1,) int32, borders of its documents in those rows.
    """

    queries: slice
    keys: slice
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor


class RankLayout:
    """The calls of one rank and the index tensors of its exchange, on one device; `RankLayout.of` keeps them.

    buffer_rows: rows of the buffer. In mode "allgather" it is the batch; else it holds what `plan.wanted` names.
    """

    def __init__(self, plan: ContextPlan, rank: int, device: torch.device) -> None:
        self.plan, self.rank, self.device = plan, rank, device
        self.num_tokens = int(plan.num_tokens[rank])
        self.gathers_all = plan.mode == "allgather" and plan.cp_size > 1
        self.local_calls = self._calls_of_whole_pieces()
        self._starts, self.buffer_rows = self._arrange_buffer()
        self.remote_calls = [self._call_of_divided(piece) for piece in plan.pieces.divided(rank)]
        self.does_exchange = self.gathers_all or any(
            need.rank != other for other, needs in enumerate(plan.needs) for need in needs
        )
        if self.gathers_all:
            self._index_all()
        else:
            self._index_needed()

    @classmethod
    def of(cls, plan: ContextPlan, rank: int, device: torch.device) -> "RankLayout":
        """Return the layout of `rank`, made by the first call: every layer of a model asks for the same."""
        key = rank, device
        if key not in plan.prepared:
            plan.prepared[key] = cls(plan, rank, device)
        found: RankLayout = plan.prepared[key]
        return found

    def _calls_of_whole_pieces(self) -> list[Call]:
        """One call for each run of pieces that see only themselves."""
        pieces = self.plan.pieces
        mine = pieces.of(self.rank)
        rows = np.append(pieces.row[mine], self.num_tokens)
        marks = np.concatenate([[-1], np.flatnonzero(pieces.is_divided[mine]), [mine.stop - mine.start]]).tolist()
        calls = []
        for before, after in pairwise(marks):
            if before + 1 < after:
                borders = rows[before + 1 : after + 1]
                span, cu_seqlens = slice(int(borders[0]), int(borders[-1])), self._borders(borders - borders[0])
                calls.append(Call(span, span, cu_seqlens, cu_seqlens))
        return calls

    def _arrange_buffer(self) -> tuple[dict[int, list[tuple[int, int, int]]], int]:
        """(begin, end, first row of the buffer) of the intervals of each document, and the rows of all."""
        starts: dict[int, list[tuple[int, int, int]]] = {}
        row = 0
        for document, (begin, end) in self.plan.wanted(self.rank):
            at = int(self.plan.cu_seqlens[document]) + begin if self.gathers_all else row
            starts.setdefault(document, []).append((begin, end, at))
            row += end - begin
        return starts, self.plan.total if self.gathers_all else row

    def _buffer_row(self, document: int, position: int) -> int:
        return next(row + position - begin for begin, end, row in self._starts[document] if begin <= position < end)

    def _call_of_divided(self, piece: Piece) -> Call:
        num_queries, num_keys = piece.end - piece.begin, piece.keys_end - piece.keys_begin
        keys = self._buffer_row(piece.document, piece.keys_begin)
        borders = self._borders([0, num_queries]), self._borders([0, num_keys])
        return Call(slice(piece.row, piece.row + num_queries), slice(keys, keys + num_keys), *borders)

    def _index_all(self) -> None:
        """`place`: (total,) int64, where each token of the batch lies among the shards, padded to one length."""
        self.place = torch.empty(self.plan.total, dtype=torch.int64)
        for rank in range(self.plan.cp_size):
            tokens = self.plan.tokens_of(rank)
            self.place[tokens] = torch.arange(len(tokens)) + rank * self.plan.longest
        self.place = self.place.to(self.device)

    def _index_needed(self) -> None:
        """Rows that are sent and where received ones belong, rank by rank; rows of the buffer that are local."""
        send: list[list[Interval]] = [[] for _ in range(self.plan.cp_size)]
        receive: list[list[Interval]] = [[] for _ in range(self.plan.cp_size)]
        own: list[Interval] = []
        for other, needs in enumerate(self.plan.needs):
            for need in needs:
                count = need.end - need.begin
                if other == self.rank:
                    row = self._buffer_row(need.document, need.begin)
                    receive[need.rank].append((row, row + count))
                    if need.rank == self.rank:
                        own.append((need.row, need.row + count))
                elif need.rank == self.rank:
                    send[other].append((need.row, need.row + count))
        self.own_local, self.own_buffer = self._rows(own), self._rows(receive[self.rank])
        receive[self.rank] = []
        self.send_rows = self._rows([rows for of_rank in send for rows in of_rank])
        self.receive_rows = self._rows([rows for of_rank in receive for rows in of_rank])
        self.send_splits, self.receive_splits = (
            [sum(end - begin for begin, end in of_rank) for of_rank in side] for side in (send, receive)
        )

    def _rows(self, intervals: list[Interval]) -> Tensor:
        rows = np.concatenate([np.empty(0, np.int64), *(np.arange(begin, end) for begin, end in intervals)])
        return torch.from_numpy(rows).to(self.device)

    def _borders(self, borders: Any) -> Tensor:
        return torch.as_tensor(borders, dtype=torch.int32).to(self.device)


def fetch_keys(
    layout: RankLayout, k: Tensor, v: Tensor, group: Any, traffic: Traffic, *, backward: bool = False
) -> Callable[[], Tensor]:
    """Start the exchange of keys and values; the function that is returned waits and gives the buffer.

    k, v: (num_tokens, num_kv_heads, head_dim).  The buffer: (buffer_rows, 2, num_kv_heads, head_dim).
    """
    shape = (2, *k.shape[1:])
    if not layout.does_exchange:
        return lambda: k.new_empty(layout.buffer_rows, *shape)
    if layout.plan.mode == "allgather":
        shard = k.new_zeros(layout.plan.longest, *shape)
        shard[: layout.num_tokens, 0], shard[: layout.num_tokens, 1] = k, v
        shards = k.new_empty(layout.plan.cp_size * layout.plan.longest, *shape)
        handle = getattr(dist, GATHER)(shards, shard, group=group, async_op=True)
        _count(traffic, backward, (layout.plan.cp_size - 1) * shard.nbytes, shards.nbytes - shard.nbytes)

        def gathered() -> Tensor:
            handle.wait()
            return shards.index_select(0, layout.place)

        return gathered

    sent = k.new_empty(len(layout.send_rows), *shape)
    sent[:, 0], sent[:, 1] = k.index_select(0, layout.send_rows), v.index_select(0, layout.send_rows)
    received = k.new_empty(len(layout.receive_rows), *shape)
    handle = dist.all_to_all_single(
        received, sent, layout.receive_splits, layout.send_splits, group=group, async_op=True
    )
    _count(traffic, backward, sent.nbytes, received.nbytes)
    buffer = k.new_empty(layout.buffer_rows, *shape)
    own = torch.stack((k.index_select(0, layout.own_local), v.index_select(0, layout.own_local)), 1)
    buffer.index_copy_(0, layout.own_buffer, own)

    def placed() -> Tensor:
        handle.wait()
        return buffer.index_copy_(0, layout.receive_rows, received)

    return placed


def return_gradients(layout: RankLayout, dbuffer: Tensor, group: Any, traffic: Traffic) -> Callable[[Tensor], None]:
    """Start the exchange of the buffer's gradients; the function that is returned waits and adds what is of this rank.

    dbuffer: (buffer_rows, 2, num_kv_heads, head_dim), fp32 or wider.  The function takes (num_tokens, 2, num_kv_heads,
    head_dim), gradients of the rank's own calls, to which it adds in place.
    """
    if not layout.does_exchange:
        return lambda dkv: None
    shape = dbuffer.shape[1:]
    if layout.plan.mode == "allgather":
        shards = dbuffer.new_zeros(layout.plan.cp_size * layout.plan.longest, *shape)
        shards.index_copy_(0, layout.place, dbuffer)
        summed = dbuffer.new_empty(layout.plan.longest, *shape)
        handle = getattr(dist, SCATTER)(summed, shards, group=group, async_op=True)
        _count(traffic, True, shards.nbytes - summed.nbytes, (layout.plan.cp_size - 1) * summed.nbytes)

        def add_sum(dkv: Tensor) -> None:
            handle.wait()
            dkv += summed[: layout.num_tokens]

        return add_sum

    sent = dbuffer.index_select(0, layout.receive_rows)
    received = dbuffer.new_empty(len(layout.send_rows), *shape)
    handle = dist.all_to_all_single(
        received, sent, layout.send_splits, layout.receive_splits, group=group, async_op=True
    )
    _count(traffic, True, sent.nbytes, received.nbytes)

    def add_each(dkv: Tensor) -> None:
        dkv.index_add_(0, layout.own_local, dbuffer.index_select(0, layout.own_buffer))
        handle.wait()
        borders = [0, *np.cumsum(layout.send_splits).tolist()]
        for begin, end in pairwise(borders):  # rows of one rank are all different: no sum depends on an order
            if begin < end:
                dkv.index_add_(0, layout.send_rows[begin:end], received[begin:end])

    return add_each


def _count(traffic: Traffic, backward: bool, sent: int, received: int) -> None:
    if backward:
        traffic.backward_sent += sent
        traffic.backward_received += received
    else:
        traffic.forward_sent += sent
        traffic.forward_received += received
