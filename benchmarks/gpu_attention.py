"""Packed attention on a GPU beside its peers: the batches, the implementations, what must hold before a time counts.

Peers: SDPA of cuDNN and of flash (one document alone: they have no document mask), FlexAttention with its mask made
once and with its mask made in each call, varlen_attn. Part of benchmarks/gpu_ops.py.
"""

import dataclasses
import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from herdkern.ops import attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ops"))  # the bound that the tests keep
import attention_cases as tests

Function = Callable[..., Any]
BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Batch:
    """A packed batch: q (tokens, num_heads, head_dim), k and v (tokens, num_kv_heads, head_dim), and its documents."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def flops(self) -> float:
        """Of a causal forward pass, counting pairs that see each other; a backward pass takes 2.5 times that."""
        return 4.0 * self.q.shape[2] * self.q.shape[1] * sum(n * (n + 1) / 2 for n in self.lengths)


def layouts(tokens: int) -> dict[str, tuple[int, ...]]:
    """Lengths of documents that fill `tokens`: one, 16 by Zipf, a mix like web pages, 128 short ones."""
    rng = random.Random(0)
    shares = {
        "one": [1.0],
        "zipf16": [1 / (i + 1) for i in range(16)],
        "web": [rng.lognormvariate(0.0, 1.0) for _ in range(max(tokens // 600, 2))],
        "short128": [rng.lognormvariate(0.0, 0.5) for _ in range(128)],
    }
    found = {}
    for name, parts in shares.items():
        parts = parts[: max(tokens // 4, 1)]
        lengths = [int(tokens * part / sum(parts)) for part in parts]
        lengths[0] += tokens - sum(lengths)
        found[name] = tuple(lengths)
    return found


def batch_of(name: str, lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Batch:
    """Random numbers, on the default device."""
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, n, head_dim, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Batch(name, q, k, v, cu_seqlens, lengths)


def implementations(batch: Batch, ours: list[str], compiles: bool) -> dict[str, Function]:
    """Functions of q, k, v for one batch: ours, one for each backend, and the peers that have its mask."""
    found: dict[str, Function] = {
        f"herdkern {backend}": functools.partial(attention, cu_seqlens=batch.cu_seqlens, backend=backend)
        for backend in ours
    }
    if len(batch.lengths) == 1:
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION") if compiles else ("MATH",):
            found[f"SDPA {name.partition('_')[0].lower()}"] = functools.partial(sdpa, name)
    found["varlen_attn"] = functools.partial(varlen, batch.cu_seqlens, max(batch.lengths))
    found["FlexAttention"] = flex(batch, compiles, keeps_mask=True)
    found["FlexAttention with its mask"] = flex(batch, compiles, keeps_mask=False)
    return found


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of one document by one of torch's backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def varlen(cu_seqlens: Tensor, max_seqlen: int, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Return torch.nn.attention.varlen's answer; causal is spelled in two ways, and old ones need a head for each."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def flex(batch: Batch, compiles: bool, keeps_mask: bool) -> Function:
    """Return FlexAttention with a document mask, as a function of q, k, v; compiled, as its manual asks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, tokens = torch.tensor(batch.lengths), len(batch.q)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    make_mask, attend = create_block_mask, flex_attention
    if compiles:
        make_mask, attend = torch.compile(make_mask), torch.compile(attend, dynamic=False)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    make = functools.partial(make_mask, visible, None, None, tokens, tokens, device=str(batch.q.device))
    kept: list[Any] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keeps_mask and not kept:
            kept.append(make())
        mask = kept[0] if keeps_mask else make()
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def checks(backend: str, tiny: bool) -> dict[str, Callable[[], None]]:
    """What must hold of a backend of ours before it is timed; each raises AssertionError if it does not."""
    lengths, head_dim, runs = ([3, 0, 9], 16, 2) if tiny else ([1, 300, 0, 64, 700], 128, 20)
    heads = (2, 1) if tiny else (8, 2)
    dtype = torch.float16 if tiny else BF16  # Triton's interpreter multiplies the bits of bfloat16
    device = torch.get_default_device()
    with torch.device("cpu"):
        batch = tests.packed(lengths, dtype, heads, head_dim, sinks=True)
    tensors = {name: x.to(device) for name, x in vars(batch).items() if x is not None}
    batch = dataclasses.replace(batch, **tensors)
    op = functools.partial(tests.attention_with_lse, backend=backend)

    def bound() -> None:
        for options in ({}, {"causal": False, "window_size": (100, 20), "softcap": 5.0}):
            factors = dtype if backend != "reference" else None
            tests.assert_bound(batch, batch.run(op, **options), op, factors, **options)

    def leak() -> None:
        rows, _ = batch.documents()[2]
        other = dataclasses.replace(batch, **{name: tensors[name].clone() for name in ("q", "k", "v", "dout")})
        for name in ("q", "k", "v", "dout"):
            getattr(other, name)[rows] = float("nan")
        for x, y in zip(batch.run(op)[:5], other.run(op)[:5], strict=True):
            x, y = (z.T if z.dim() == 2 else z for z in (x, y))
            assert torch.equal(x[: rows.start], y[: rows.start])
            assert torch.equal(x[rows.stop :], y[rows.stop :])

    def determinism() -> None:
        first = batch.run(op)
        for _ in range(runs - 1):
            for x, y in zip(first, batch.run(op), strict=True):
                assert torch.equal(x, y)

    def opcheck() -> None:
        if backend == "reference":
            return
        name = "triton_attention_forward" if backend == "triton" else "attention_forward"
        leaves = [x.clone().requires_grad_() for x in (batch.q, batch.k, batch.v)]
        options = batch.cu_seqlens, batch.cu_seqlens, None, -1, 0, 0.0, 0.1
        torch.library.opcheck(getattr(torch.ops.herdkern, name).default, (*leaves, *options))

    def one_graph() -> None:
        if backend == "reference":
            return
        whole = torch.compile(op, fullgraph=True, backend="aot_eager" if tiny else "inductor")
        for x, y in zip(batch.run(whole), batch.run(op), strict=True):
            assert torch.equal(x, y)

    return {
        "bound of fp64": bound,
        "no leak between documents": leak,
        f"the same bits {runs} times": determinism,
        "opcheck": opcheck,
        "compiles as one graph": one_graph,
        "captured graph with other documents": lambda: other_documents(batch, op, backend),
    }


def other_documents(batch: Any, op: Function, backend: str) -> None:
    """Forward and backward in a captured CUDA graph, replayed after the borders have changed in place."""
    leaves = batch.leaves()
    borders = batch.cu_seqlens.clone()

    def step() -> list[Tensor]:
        out, lse = op(cu_seqlens=borders, **leaves)
        return [out, lse, *torch.autograd.grad(out, list(leaves.values()), batch.dout)]

    replay: Callable[[], Any] = step
    captured: list[Tensor] = []
    if batch.q.is_cuda and backend != "reference":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        replay = graph.replay
    for cut in (1, len(batch.q) // 2, len(batch.q)):
        borders[1:-1] = cut
        replayed = replay()
        for x, y in zip(captured or replayed, step(), strict=True):
            assert torch.equal(x, y)
