"""Packed attention with a document mask, forward and backward, against what torch offers on a CPU.

The peers: SDPA per document in a loop (two ways to group heads), SDPA with a dense mask, and FlexAttention, which has
no backward on a CPU: only its forward is shown. Masks are built once for a layout, and that time, as the time to
compile, is reported apart. A case is named
<dtype>-<layout>-T<tokens>-D<head_dim>; 8 query heads share 2 key-value heads. Layouts: 16 documents of Zipf's law, 128
short documents, one document.

`python benchmarks/bench_attention.py --json benchmarks/results/attention.json` takes about 14 minutes on two cores and
draws attention.svg beside the report.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import attention_picture
import attention_probes
import torch
from harness import Bench, Case, pytest_cases, reason
from machine import Limits, clock, wall
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from herdkern.ops import attention, attention_reference
from herdkern.ops.backend import active_isa
from herdkern.ops.paged_attention import paged_attention

LOOP, EXPANDED, DENSE = "SDPA per document", "SDPA per document, k and v expanded", "SDPA, dense mask"
FLEX = "FlexAttention, forward only"
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Tensor], Tensor]  # q, k, v, lengths, cu_seqlens -> out


def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
    return attention(q, k, v, cu_seqlens)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
    return attention_reference(q, k, v, cu_seqlens)


def batched(*packed: Tensor) -> list[Tensor]:
    """(tokens, heads, head_dim) -> (1, heads, tokens, head_dim)."""
    return [x.transpose(0, 1)[None] for x in packed]


def per_document(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
    """The best that torch has: split, not slices, whose backward fills a whole gradient per document."""
    lengths, grouped = list(lengths), q.shape[1] != k.shape[1]
    outs = [
        scaled_dot_product_attention(*batched(*doc), is_causal=True, enable_gqa=grouped)[0].transpose(0, 1)
        for doc in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(outs)


def per_document_expanded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return per_document(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), lengths, cu_seqlens)


def document_of(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


class Dense:
    """SDPA with a mask of (tokens, tokens), built once for a layout: the layers of a model share it."""

    def __init__(self) -> None:
        self.masks: dict[Sequence[int], Tensor] = {}
        self.mask_ms = 0.0  # of the largest layout

    def mask(self, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What is added to the scores; of the inputs' type, as a mask of bool is turned into one in every call."""
        if lengths not in self.masks:
            self.mask_ms = max(self.mask_ms, 1e3 * wall(lambda: self.build(lengths, dtype)))
        return self.masks[lengths]

    def build(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        doc = document_of(lengths)
        hidden = (doc[:, None] == doc).tril_().logical_not_()
        self.masks[lengths] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
        mask = self.mask(lengths, q.dtype)
        return scaled_dot_product_attention(*batched(q, k, v), attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class Flex:
    """FlexAttention, compiled for one layout: a graph for any layout fails to compile on a CPU (torch 2.13)."""

    def __init__(self) -> None:
        self.block_mask: Any = None
        self.mask_ms = self.first_call_ms = math.nan  # the first call holds the compilation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
        with torch.no_grad():
            q, k, v = (x.detach().contiguous() for x in batched(q, k, v))
            if self.block_mask is None:
                self.mask_ms = 1e3 * wall(lambda: self.build_mask(lengths))
                self.first_call_ms = 1e3 * wall(lambda: self.run(q, k, v))
            return self.run(q, k, v)

    def build_mask(self, lengths: Sequence[int]) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        doc = document_of(lengths)
        self.compiled = torch.compile(flex_attention, dynamic=False)
        self.block_mask = create_block_mask(
            lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j), None, None, len(doc), len(doc), device="cpu"
        )

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.compiled(q, k, v, block_mask=self.block_mask, enable_gqa=True)[0].transpose(0, 1)


@dataclass(frozen=True)
class Layout:
    """Documents and heads of one case."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def flops(self, products: int) -> float:
        """Of the pairs that the mask leaves: two products forward, five backward."""
        return products * 2 * self.head_dim * self.num_heads * sum(n * (n + 1) // 2 for n in self.lengths)

    def least_bytes(self, dtype: torch.dtype) -> int:
        """Of q, k, v, dout, their gradients dq, dk, dv, and lse."""
        tokens = sum(self.lengths)
        elements = tokens * self.head_dim * (3 * self.num_heads + 4 * self.num_kv_heads)
        return elements * dtype.itemsize + 4 * tokens * self.num_heads


class Call:
    """One implementation on one batch; `laps` holds what the forward part took."""

    def __init__(self, attend: Attend, layout: Layout, dtype: torch.dtype, backward: bool = True) -> None:
        self.attend, self.layout, self.dtype, self.backward = attend, layout, dtype, backward
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(layout.lengths)], dtype=torch.int32)
        self.laps: dict[str, list[float]] = {"forward": []}

    @functools.cached_property
    def inputs(self) -> list[Tensor]:
        """[q, k, v, dout]."""
        layout, generator = self.layout, torch.Generator().manual_seed(0)
        heads = (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads, layout.num_heads)
        some = [torch.randn(sum(layout.lengths), n, layout.head_dim, generator=generator).to(self.dtype) for n in heads]
        for x in some[:3]:
            x.requires_grad_(self.backward)
        return some

    def __call__(self) -> list[Tensor]:
        """[out] or [out, dq, dk, dv]."""
        *leaves, dout = self.inputs
        start = clock.now()
        out = self.attend(*leaves, self.layout.lengths, self.cu_seqlens)
        self.laps["forward"].append(clock.now() - start)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)] if self.backward else [out]

    def warm_up(self) -> None:
        """A call on a few tokens, or this one where a compilation must come first; inputs and masks exist then."""
        assert self.inputs
        if isinstance(self.attend, Dense):
            self.attend.mask(self.layout.lengths, self.dtype)
        layout = Layout("small", (40, 20), self.layout.num_heads, self.layout.num_kv_heads, self.layout.head_dim)
        if isinstance(self.attend, Flex):
            self()
        else:
            Call(self.attend, layout, self.dtype, self.backward)()


def check(calls: dict[str, Call]) -> dict[str, str]:
    """Raises AssertionError where ours is wrong; returns the peers that are, or that raise, and why.

    All on a smaller batch against the reference in fp64, with one document of several chunks of keys and tiles of rows;
    a peer may round more often than ours. Then ours in the very shape that is timed, against the loop.
    """
    some, failed = calls["herdkern"], {}
    lengths = (*(min(n, 40) for n in some.layout.lengths[:3]), 700)
    small = Layout("check", lengths, some.layout.num_heads, some.layout.num_kv_heads, some.layout.head_dim)
    golden = Call(reference, small, some.dtype)
    for x in golden.inputs:
        x.data = x.data.double()
    expected = golden()
    for name, call in calls.items():
        if name == FLEX:
            continue  # a compilation per layout: compared below
        try:
            compare(Call(call.attend, small, call.dtype)(), expected, 8 if name == "herdkern" else 64)
        except Exception as error:
            if name == "herdkern":
                raise
            failed[name] = reason(error)
    got = some()
    if LOOP not in failed:
        compare_rows(got, calls[LOOP]())
    for name in (DENSE, FLEX):
        if name in calls and name not in failed:
            try:
                calls[name].warm_up()  # the mask is there, the compilation done
                if name == FLEX:
                    compare_rows(got[:1], calls[FLEX]())
            except Exception as error:
                failed[name] = reason(error)
    return failed


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], steps: int) -> None:
    """No element may be further off than `steps` steps of the type at the largest value."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        allowed = steps * torch.finfo(x.dtype).eps * max(1.0, y.abs().max().item())
        off = (x - y).abs().max().item()
        assert off <= allowed, f"{name} is off by {off:.3g}, allowed {allowed:.3g}"


def compare_rows(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each row of a token and head may be off by a share of its length and of the rows' usual length.

    A wrong tile is a wrong row, whatever the number of tokens; rows may cancel to almost nothing, hence the second.
    """
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=False):
        length = y.float().norm(dim=-1)
        off = ((x.float() - y.float()).norm(dim=-1) / (length + length.square().mean().sqrt())).max().item()
        allowed = ROW_ERROR[x.dtype]
        assert off <= allowed, f"{name} of the timed shape is off by {off:.3g} of a row, allowed {allowed:.3g}"


def extra(calls: dict[str, Call], result: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """What is known of the parts: forward alone, the backward's rate, the share of the mask's set-up, memory."""
    call = calls["herdkern"]
    forward_ms = result["forward_ms"]
    backward = call.layout.flops(5) / (result["herdkern"] - forward_ms["herdkern"]) / 1e6
    peers = [t for name, t in forward_ms.items() if name != "herdkern"]
    more: dict[str, Any] = {
        "forward_ratio": round(min(peers) / forward_ms["herdkern"], 3),
        "forward_gflop_per_s": round(call.layout.flops(2) / forward_ms["herdkern"] / 1e6, 2),
        "backward_gflop_per_s": round(backward, 2),
        "backward_per_gemm": round(backward / limits.gemm_gflop_per_s(str(call.dtype)[6:]), 3),  # again in summarise
    }
    dense = calls[DENSE].attend if DENSE in calls else None
    if isinstance(dense, Dense):
        more["dense_ratio"] = round(result[DENSE] / result["herdkern"], 3)
        more["dense_mask_ms"] = round(dense.mask_ms, 1)
    if "herdkern" in result["peak_mib"]:
        more["memory_ratio"] = round(result["peak_mib"]["herdkern"] * 2**20 / call.layout.least_bytes(call.dtype), 3)
    setup_ms = attention_probes.mask_setup_ms(call.cu_seqlens, call.dtype)
    cpu_ms = result.get("cpu_ms_1_thread", {}).get("herdkern", result["herdkern"] * limits.threads)
    more["mask_setup_share"] = round(setup_ms / cpu_ms, 5)
    flex = calls[FLEX].attend if FLEX in calls else None
    if isinstance(flex, Flex):
        more["flex_mask_ms"], more["flex_first_call_ms"] = round(flex.mask_ms, 1), round(flex.first_call_ms, 1)
    return more


def case(dtype: torch.dtype, layout: Layout) -> Case:
    tokens = sum(layout.lengths)

    def setup() -> dict[str, Call]:
        peers: dict[str, Attend] = {"herdkern": ours, LOOP: per_document, EXPANDED: per_document_expanded}
        # 8k tokens take 5 s and more; a minute where torch has no instructions for bf16
        emulated = dtype == torch.bfloat16 and active_isa() in ("baseline", "avx2")
        if tokens <= (8192 if layout.head_dim == 128 and not emulated else 2048):
            peers[DENSE] = Dense()
        calls = {name: Call(attend, layout, dtype) for name, attend in peers.items()}
        if tokens <= (2048 if layout.name == "one" else 8192) and layout.head_dim == 128:  # compiles for 10 s
            calls[FLEX] = Call(Flex(), layout, dtype, backward=False)
        return calls

    return Case(
        name=f"{SHORT_NAMES[dtype]}-{layout.name}-T{tokens}-D{layout.head_dim}",
        setup=setup,
        check=check,
        flops=layout.flops(7),
        flops_dtype=str(dtype)[6:],
        flops_limit="peak",
        slow_peers=(DENSE, FLEX),
        aside=(FLEX,),
        is_large=tokens > (8192 if layout.name == "short" else 2048),
        memory_apart=True,
        extra=extra,
    )


def decode_case(dtype: torch.dtype, num_docs: int, num_keys: int, head_dim: int) -> Case:
    """Generation: one query a document against its keys in scattered pages of 64; torch's cache is contiguous."""
    page = 64

    def setup() -> dict[str, Callable[[], Tensor]]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(num_docs, 8, head_dim, generator=generator).to(dtype)
        pages = num_docs * num_keys // page
        cache = [torch.randn(pages, page, 2, head_dim, generator=generator).to(dtype) for _ in range(2)]
        table = torch.randperm(pages, generator=generator).to(torch.int32).view(num_docs, -1)
        borders = torch.arange(num_docs + 1, dtype=torch.int32)
        seqlens_k = torch.full((num_docs,), num_keys, dtype=torch.int32)
        k, v = (x[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for x in cache)  # (docs, 2, keys, head_dim)
        many_k, many_v = (x.repeat_interleave(4, 1) for x in (k, v))
        return {
            "herdkern": lambda: paged_attention(q, *cache, table, borders, seqlens_k),
            "SDPA, contiguous": lambda: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0],
            "SDPA, contiguous, k and v expanded": lambda: scaled_dot_product_attention(q[:, :, None], many_k, many_v)[
                :, :, 0
            ],
        }

    def same(functions: dict[str, Callable[[], Tensor]]) -> None:
        expected = functions["SDPA, contiguous"]()
        for function in functions.values():
            torch.testing.assert_close(function(), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)

    return Case(
        name=f"decode-{SHORT_NAMES[dtype]}-B{num_docs}-K{num_keys}-D{head_dim}",
        setup=setup,
        check=same,
        bytes=2 * num_docs * num_keys * 2 * head_dim * dtype.itemsize,
    )


def zipf(total: int, num_docs: int) -> tuple[int, ...]:
    """Lengths as of Zipf's law: document i in proportion to 1 / (i + 1)."""
    weights = [1 / (i + 1) for i in range(num_docs)]
    lengths = [int(total * w / sum(weights)) for w in weights]
    return (lengths[0] + total - sum(lengths), *lengths[1:])


def short(total: int, num_docs: int) -> tuple[int, ...]:
    """Lengths around the mean, the shortest a few tokens long."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(num_docs).log_normal_(0.0, 0.7, generator=generator).tolist()
    lengths = [max(1, int(total * w / sum(weights))) for w in weights]
    return (lengths[0] + total - sum(lengths), *lengths[1:])


def summarise(report: dict[str, Any], quick: bool) -> None:
    """Adds what a fresh process takes for its first call; shares of GEMM are of its best rate in the whole run."""
    for case in report["cases"]:
        if "backward_per_gemm" in case:
            dtype = attention_picture.DTYPES[case["case"].split("-")[0]]
            gemm = report["machine"]["limits"][f"gemm_{dtype}_gflop_per_s"]
            case["backward_per_gemm"] = round(case["backward_gflop_per_s"] / gemm, 3)
    first = attention_probes.first_calls(report["machine"]["threads"], with_flex=not quick)
    report["first_call_ms"] = first
    print("\nfirst call in a fresh process: " + ", ".join(f"{name} {took:g} ms" for name, took in first.items()))


ROW_ERROR = {torch.float32: 3e-5, torch.bfloat16: 0.1}  # four times what is seen; a wrong tile gives about 1
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DOCUMENTS = [
    *(("zipf", zipf(tokens, 16)) for tokens in (2048, 8192, 16384)),
    *(("short", short(tokens, 128)) for tokens in (8192, 16384)),
    *(("one", (tokens,)) for tokens in (2048, 8192)),
]
BENCH = Bench(
    "attention",
    [
        case(dtype, Layout(name, lengths, 8, 2, head_dim))
        for dtype in SHORT_NAMES
        for head_dim in (64, 128)
        for name, lengths in DOCUMENTS
    ]
    + [decode_case(dtype, 16, 4096, 128) for dtype in SHORT_NAMES],
    seconds=6,
    one_thread=True,
    summarise=summarise,
    after=attention_picture.draw,
)
test_attention = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
