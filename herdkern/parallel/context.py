"""Context parallelism: attention over packed documents whose tokens lie on several ranks.

Keys and values are gathered and every rank computes its queries against them, so that any document mask works: nothing
is merged, no score is computed twice. `ContextPlan` says which rank holds which tokens; mode "allgather" is the paper's
way, mode "needed" balances the documents and moves only the keys that some rank needs. Documents that lie on one rank
are computed while the others' keys are under way.

Forward results of mode "needed" have the bits of one rank: a query meets the same blocks of keys in the same order,
because documents are divided where tiles of the kernel begin, and no two partial results are merged. Gradients of keys
are summed over ranks in fp32, in the order of the ranks.

Source: Llama 3 (arXiv:2407.21783), section 3.3.2.
"""

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from herdkern.model.layers import Attention
from herdkern.ops.attention import attention, attention_gradients
from herdkern.ops.attention_checks import check_borders, check_operands, check_softmax
from herdkern.parallel.context_exchange import Call, RankLayout, fetch_keys, return_gradients
from herdkern.parallel.context_plan import ContextPlan, Mode, Traffic, query_alignment

_NAME = "context_parallel_attention"


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    group: Any = None,
    *,
    mode: Mode = "needed",
    plan: ContextPlan | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    keep_gathered: bool = False,
    traffic: Traffic | None = None,
) -> Tensor:
    """Return this rank's rows of `herdkern.ops.attention` over a batch whose tokens lie on the ranks of `group`.

    q: (num_tokens, num_heads, head_dim), the rows `plan.tokens_of(rank)` of the batch, in that order.
    k, v: (num_tokens, num_kv_heads, head_dim), the same rows.
    cu_seqlens: (num_docs + 1,) int32, the borders of all documents in the whole batch, the same on every rank.
    group: a process group, None for all ranks. Every rank of it must call, also with no token.
    mode: "needed" moves only keys that a rank needs, "allgather" all of them; unless `plan` says.
    plan: `ContextPlan.make` for these borders; None makes (and remembers) the one of `default_plan`.
    causal, window_size, softcap, sinks, softmax_scale: as in `attention`; a window needs `causal`. The gradient of
        sinks is of this rank's queries: sum it over ranks, as that of any weight.
    keep_gathered: keep received keys for the backward pass, instead of fetching them again.
    traffic: its counters grow by the bytes that this rank sends and receives.
    Returns: shape and dtype of q. In mode "needed" with the bits that one rank computes (CPU kernels).
    Raises: ValueError if shapes, borders or options do not fit each other, the plan or the size of the group.
    """
    check_operands(_NAME, q, k, v)
    check_borders(_NAME, "cu_seqlens", cu_seqlens, cu_seqlens)  # on any device: the host reads them
    check_softmax(_NAME, q, window_size, softcap, sinks, softmax_scale, causal=causal, keep_gathered=keep_gathered)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if not causal and tuple(window_size) != (-1, -1):
        raise ValueError(
            f"{_NAME}: window_size must be (-1, -1) where causal is False, got {tuple(window_size)} (rank {rank})"
        )
    if plan is None:
        plan = default_plan(q, k, cu_seqlens, size, mode=mode, causal=causal, window_left=window_size[0])
    _check_plan(plan, cu_seqlens, size, rank, causal, window_size[0])
    if q.shape[0] != plan.num_tokens[rank] or k.shape[0] != q.shape[0]:
        raise ValueError(
            f"{_NAME}: q and k must have the {plan.num_tokens[rank]} tokens of rank {rank} (of {plan.total} in "
            f"cu_seqlens), got {q.shape[0]} and {k.shape[0]}; take plan.shard(x, rank) of the whole"
        )
    options = {
        "causal": causal,
        "window_size": (window_size[0], -1),
        "softcap": softcap,
        "softmax_scale": softmax_scale,
    }
    exchange = _Exchange(RankLayout.of(plan, rank, q.device), group, traffic or Traffic(), keep_gathered, options)
    out: Tensor = _ContextAttention.apply(q, k, v, sinks, exchange)
    return out


def default_plan(q: Tensor, k: Tensor, cu_seqlens: Tensor, cp_size: int, **how: Any) -> ContextPlan:
    """Return the plan that keeps the bits of one rank for heads as those of q and k; the last few are remembered.

    how: mode, causal, window_left of `ContextPlan.make`.
    """
    align = query_alignment(q.shape[1], k.shape[1], q.shape[2], window=how.get("window_left", -1) >= 0)
    borders = cu_seqlens.cpu().numpy().tobytes()
    return _remembered_plan(borders, cp_size, align, tuple(sorted(how.items())))


@lru_cache(maxsize=16)  # a pipeline has several batches in flight
def _remembered_plan(borders: bytes, cp_size: int, align: int, how: tuple[Any, ...]) -> ContextPlan:
    return ContextPlan.make(np.frombuffer(borders, np.int32), cp_size, align=align, **dict(how))


def _is_plan_for(plan: ContextPlan, cu_seqlens: Tensor) -> bool:
    return np.array_equal(plan.cu_seqlens, cu_seqlens.cpu().numpy())


def _check_plan(plan: ContextPlan, cu_seqlens: Tensor, size: int, rank: int, causal: bool, window_left: int) -> None:
    if plan.cp_size != size:
        raise ValueError(
            f"{_NAME}: group must have the {plan.cp_size} ranks of plan, got {size} (rank {rank}); make a plan for it"
        )
    if plan.causal != causal or plan.window_left != window_left:
        raise ValueError(
            f"{_NAME}: plan must be made for causal={causal} and window_left={window_left}, got causal={plan.causal} "
            f"and window_left={plan.window_left} (rank {rank})"
        )
    if not _is_plan_for(plan, cu_seqlens):
        raise ValueError(
            f"{_NAME}: cu_seqlens must be the {len(plan.cu_seqlens)} borders of plan, up to {plan.total}, got "
            f"{len(cu_seqlens)} up to {int(cu_seqlens[-1])} (rank {rank}); make a plan for each batch"
        )


@dataclasses.dataclass(frozen=True)
class _Exchange:
    layout: RankLayout
    group: Any
    traffic: Traffic
    keep_gathered: bool
    options: dict[str, Any]


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, exchange: _Exchange) -> Tensor:
        layout = exchange.layout
        wait = fetch_keys(layout, k, v, exchange.group, exchange.traffic)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))

        def attend(call: Call, keys: Tensor, values: Tensor) -> None:
            out[call.queries], lse[:, call.queries] = attention(
                q[call.queries],
                keys[call.keys],
                values[call.keys],
                call.cu_seqlens,
                cu_seqlens_k=call.cu_seqlens_k,
                sinks=sinks,
                return_lse=True,
                **exchange.options,
            )

        for call in layout.local_calls:
            attend(call, k, v)
        buffer = wait()
        for call in layout.remote_calls:
            attend(call, buffer[:, 0], buffer[:, 1])
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, v, sinks, out, lse, buffer if exchange.keep_gathered else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks, out, lse, buffer = ctx.saved_tensors
        exchange: _Exchange = ctx.exchange
        layout, wide = exchange.layout, torch.promote_types(k.dtype, torch.float32)
        wait = None
        if buffer is None:
            wait = fetch_keys(layout, k, v, exchange.group, exchange.traffic, backward=True)
        dq = torch.zeros_like(q)
        dkv = k.new_zeros(k.shape[0], 2, *k.shape[1:], dtype=wide)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)

        def differentiate(call: Call, keys: Tensor, values: Tensor, gradients: Tensor) -> None:
            at, rows = call.queries, call.keys
            dq[at], dk, dv, more = attention_gradients(
                dout[at],
                q[at],
                keys[rows],
                values[rows],
                out[at],
                lse[:, at],
                call.cu_seqlens,
                call.cu_seqlens_k,
                sinks,
                **exchange.options,
            )
            gradients[rows, 0] += dk
            gradients[rows, 1] += dv
            if dsinks is not None and more is not None:
                dsinks.add_(more)

        # Own documents fill the time that keys take to arrive, or that gradients take to go back; of two calls, each.
        early = layout.local_calls[: 0 if wait is None else 1]
        for call in early:
            differentiate(call, k, v, dkv)
        if wait is not None:
            buffer = wait()
        dbuffer = torch.zeros_like(buffer, dtype=wide)
        for call in layout.remote_calls:
            differentiate(call, buffer[:, 0], buffer[:, 1], dbuffer)
        add = return_gradients(layout, dbuffer, exchange.group, exchange.traffic)
        for call in layout.local_calls[len(early) :]:
            differentiate(call, k, v, dkv)
        add(dkv)
        dk, dv = (dkv[:, i].to(k.dtype) for i in range(2))
        return dq, dk, dv, None if dsinks is None else dsinks.to(sinks.dtype), None


class ContextAttend:
    """What `parallelize_context` puts in the place of `attend`: attention over the ranks of a group.

    It takes the document borders of the whole batch. `traffic` counts the bytes of all layers.
    """

    def __init__(self, group: Any, mode: Mode, heads: tuple[int, int, int], keep_gathered: bool) -> None:
        self.group, self.mode, self.keep_gathered = group, mode, keep_gathered
        self.traffic = Traffic()
        self._align = query_alignment(*heads)

    def plan(self, cu_seqlens: Tensor) -> ContextPlan:
        """Return the plan for these documents; the last few are remembered."""
        size = dist.get_world_size(self.group)
        borders = cu_seqlens.to("cpu", torch.int32).numpy().tobytes()
        return _remembered_plan(borders, size, self._align, (("mode", self.mode),))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, cu_seqlens_k: Tensor | None = None
    ) -> Tensor:
        """(num_tokens, num_heads, head_dim) of this rank from its q, k, v and the borders of the whole batch."""
        if cu_seqlens_k is not None:
            raise ValueError("ContextAttend: cu_seqlens_k must be None, got borders; generate on one rank")
        return context_parallel_attention(
            q,
            k,
            v,
            cu_seqlens,
            self.group,
            plan=self.plan(cu_seqlens),
            keep_gathered=self.keep_gathered,
            traffic=self.traffic,
        )


def parallelize_context(
    model: nn.Module, group: Any = None, *, mode: Mode = "needed", keep_gathered: bool = False
) -> ContextAttend:
    """Replace attention in every layer of a herdkern model by attention over the ranks of `group`; return it.

    The model then takes this rank's tokens, the borders of the whole batch, and positions:

        attend = parallelize_context(model, group)
        plan, rank = attend.plan(cu_seqlens), torch.distributed.get_rank(group)
        hidden = model(plan.shard(tokens, rank), cu_seqlens, plan.positions_of(rank))
        loss = model.loss(hidden, plan.shard(targets, rank), reduction="sum") / num_targets_of_the_batch

    Targets are shifted before they are cut. Sum the gradients of all weights over the group.
    Raises: ValueError if the model has no attention of `herdkern.model`.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(
            f"parallelize_context: model must hold layers of herdkern.model, got {type(model).__name__} without any"
        )
    one = layers[0]
    heads = [proj.weight.shape[0] // one.head_dim for proj in (one.q_proj, one.k_proj)]
    attend = ContextAttend(group, mode, (heads[0], heads[1], one.head_dim), keep_gathered)
    for layer in layers:
        layer.attend = attend
    return attend
