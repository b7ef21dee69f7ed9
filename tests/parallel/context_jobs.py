"""What ranks run in tests of context parallelism: one case of attention or of a model, its results as numpy arrays."""

import dataclasses
import functools

import numpy as np
import torch
import torch.distributed as dist

from herdkern.model import ModelConfig, Transformer
from herdkern.ops import attention
from herdkern.parallel import ContextPlan, Traffic, context_parallel_attention, parallelize_context, query_alignment
from herdkern.parallel.context_exchange import GATHER, SCATTER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Attention over documents of these lengths; tensors follow from the seed."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int, int] = (4, 2, 16)  # num_heads, num_kv_heads, head_dim
    dtype: torch.dtype = torch.float32
    mode: str = "needed"
    causal: bool = True
    window: int = -1
    softcap: float = 0.0
    sinks: bool = False
    keep: bool = False
    align: int | None = None
    seed: int = 0

    def cu_seqlens(self):
        return torch.tensor(np.concatenate([[0], np.cumsum(self.lengths)]), dtype=torch.int32)

    def plan(self, size):
        align = self.align or query_alignment(*self.heads, window=self.window >= 0)
        return ContextPlan.make(
            self.cu_seqlens(), size, mode=self.mode, causal=self.causal, window_left=self.window, align=align
        )

    def options(self):
        return {"causal": self.causal, "window_size": (self.window, -1), "softcap": self.softcap}

    def tensors(self):
        """q, k, v, dout of the whole batch, and sinks or None."""
        heads, kv_heads, head_dim = self.heads
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(sum(self.lengths), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
        q, k, v, dout = (torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes)
        return q, k, v, dout, torch.randn(heads, generator=generator) if self.sinks else None


@functools.cache
def group_of(size):
    """The first `size` ranks; all ranks ask for it at the same time."""
    return dist.new_group(list(range(size)))


def numbers(x):
    return None if x is None else x.detach().float().numpy() if x.dtype != torch.float64 else x.detach().numpy()


def one_rank(case, dtype=None):
    """out, dq, dk, dv, dsinks of the whole batch, computed by `attention` at once."""
    q, k, v, dout, sinks = case.tensors()
    inputs = [None if x is None else x.to(dtype or x.dtype).requires_grad_() for x in (q, k, v, sinks)]
    backend = "reference" if dtype == torch.float64 else "auto"
    out = attention(*inputs[:3], case.cu_seqlens(), sinks=inputs[3], backend=backend, **case.options())
    out.backward(dout.to(out.dtype))
    return [numbers(out), *(None if x is None else numbers(x.grad) for x in inputs)]


@dataclasses.dataclass(frozen=True)
class Poison:
    """Makes keys, values and incoming gradients of every other document `value`."""

    document: int
    lengths: tuple[int, ...]
    value: float

    def __call__(self, q, k, v, dout, sinks):
        begin = sum(self.lengths[: self.document])
        for x in (k, v, dout):
            x[:begin] = self.value
            x[begin + self.lengths[self.document] :] = self.value


def attend(rank, size, case, change=None):
    """What `rank` of `size` computes, (out, dq, dk, dv, dsinks), and the bytes that it says and that were seen."""
    group = group_of(size)
    if rank >= size:
        return None
    plan = case.plan(size)
    tensors = case.tensors()
    if change is not None:
        change(*tensors)
    *inputs, dout = (plan.shard(x, rank) for x in tensors[:4])
    inputs = [x.requires_grad_() for x in inputs]
    sinks = None if tensors[4] is None else tensors[4].requires_grad_()
    said = Traffic()
    with watched(group) as seen:
        out = context_parallel_attention(
            *inputs,
            case.cu_seqlens(),
            group,
            plan=plan,
            sinks=sinks,
            keep_gathered=case.keep,
            traffic=said,
            **case.options(),
        )
        forward = seen.bytes[:]
        out.backward(dout)
    seen_traffic = Traffic(*forward, *(a - b for a, b in zip(seen.bytes, forward, strict=True)))
    results = [numbers(out), *(numbers(x.grad) for x in inputs), None if sinks is None else numbers(sinks.grad)]
    return results, said, seen_traffic


class watched:
    """Counts what collectives send to and receive from other ranks, at torch's own door."""

    NAMES = ("all_to_all_single", GATHER, SCATTER)

    def __init__(self, group):
        self.rank, self.size, self.bytes = dist.get_rank(group), dist.get_world_size(group), [0, 0]

    def __enter__(self):
        self.kept = [getattr(dist, name) for name in self.NAMES]
        for name, function in zip(self.NAMES, self.kept, strict=True):
            setattr(dist, name, functools.partial(self.called, name, function))
        return self

    def __exit__(self, *_):
        for name, function in zip(self.NAMES, self.kept, strict=True):
            setattr(dist, name, function)

    def called(self, name, function, output, given, *splits, **how):
        if name == "all_to_all_single":
            out_splits, in_splits = splits
            assert out_splits[self.rank] == in_splits[self.rank] == 0  # nothing travels to itself
            row = output.new_empty(1, *output.shape[1:]).nbytes
            sent, received = sum(in_splits) * row, sum(out_splits) * row
        elif name == GATHER:
            sent, received = (self.size - 1) * given.nbytes, output.nbytes - given.nbytes
        else:
            sent, received = given.nbytes - output.nbytes, (self.size - 1) * output.nbytes
        self.bytes[0] += sent
        self.bytes[1] += received
        return function(output, given, *splits, **how)


def together(case, answers):
    """out, dq, dk, dv of the whole batch in its order, and the sum of dsinks, from what the ranks returned."""
    found = [results for results, *_ in answers]
    plan = case.plan(len(found))
    whole = [plan.unshard([torch.from_numpy(results[i]) for results in found]).numpy() for i in range(4)]
    return [*whole, None if found[0][4] is None else sum(results[4] for results in found)]


def random_case(seed):
    """Documents of all sizes, and heads and options in any combination."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 2, 31, 32, 33, 64, 127, 128, 129, 300, 511, 700], size=rng.integers(1, 12))
    causal = bool(rng.random() < 0.85)
    group = int(rng.choice([1, 2, 3, 4, 5, 8, 16]))
    kv_heads = int(rng.choice([1, 2]))
    return Case(
        name=f"random_{seed}",
        lengths=tuple(map(int, lengths)),
        heads=(group * kv_heads, kv_heads, int(rng.choice([8, 16, 33, 64, 136]))),
        mode="allgather" if seed % 2 else "needed",
        causal=causal,
        window=int(rng.choice([-1, -1, 0, 1, 40, 127, 128, 400])) if causal else -1,
        softcap=float(rng.choice([0.0, 0.0, 2.0])),
        sinks=bool(rng.random() < 0.3),
        keep=bool(rng.random() < 0.5),
        seed=seed,
    )


def expected_traffic(case, size, rank):
    _, num_kv_heads, head_dim = case.heads
    return case.plan(size).bytes_of(
        rank, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=case.dtype, keep_gathered=case.keep
    )


CONFIG = ModelConfig(
    vocab_size=97, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=96, max_seq_len=4096
)


def model_inputs(lengths):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(CONFIG.vocab_size, (sum(lengths),), generator=generator)
    targets = torch.randint(CONFIG.vocab_size, (sum(lengths),), generator=generator)
    targets[torch.rand(sum(lengths), generator=generator) < 0.1] = -100
    return tokens, targets, torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)


def model_loss(lengths):
    """Loss and gradients of the whole model on one rank."""
    model = Transformer(CONFIG, seed=1)
    tokens, targets, cu_seqlens = model_inputs(lengths)
    loss = model.loss(model(tokens, cu_seqlens), targets, reduction="sum") / (targets >= 0).sum()
    loss.backward()
    return float(loss.detach()), {name: numbers(weight.grad) for name, weight in model.named_parameters()}


def model_loss_on_ranks(rank, size, lengths, mode, keep):
    group = group_of(size)
    if rank >= size:
        return None
    model = Transformer(CONFIG, seed=1)
    tokens, targets, cu_seqlens = model_inputs(lengths)
    attend = parallelize_context(model, group, mode=mode, keep_gathered=keep)
    plan = attend.plan(cu_seqlens)
    hidden = model(plan.shard(tokens, rank), cu_seqlens, plan.positions_of(rank))
    loss = model.loss(hidden, plan.shard(targets, rank), reduction="sum") / (targets >= 0).sum()
    loss.backward()
    dist.all_reduce(loss.detach_(), group=group)
    for weight in model.parameters():
        dist.all_reduce(weight.grad, group=group)
    gradients = {name: numbers(weight.grad) for name, weight in model.named_parameters()}
    return float(loss), gradients, attend.traffic


def error_of(rank, changes):
    """What context_parallel_attention says on 2 ranks when these arguments are wrong."""
    changes = dict(changes)
    group = group_of(2)
    if rank >= 2:
        return None
    borders = torch.tensor(changes.pop("cu_seqlens", [0, 100, 300]), dtype=changes.pop("dtype", torch.int32))
    tokens = changes.pop("tokens", int(ContextPlan.make([0, 100, 300], 2, align=32).num_tokens[rank]))
    q, k = torch.zeros(tokens, 4, 16), torch.zeros(tokens, 2, 16)
    try:
        context_parallel_attention(q, k, k, borders, group, **changes)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")
