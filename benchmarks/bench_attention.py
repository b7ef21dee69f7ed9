"""Packed attention with a document mask against what torch offers on a CPU.

The peers: SDPA per document in a loop, SDPA with a dense mask, FlexAttention (forward only, all it has on a
CPU, and only in the full run) and the plain reference.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Bench, Case, pytest_cases
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from herdkern.ops import attention, attention_reference

DENSE, FLEX, REFERENCE = "SDPA, dense mask", "FlexAttention", "plain reference"
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


def dense_mask(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
    doc = document_of(lengths)
    mask = (doc[:, None] == doc).tril()
    return scaled_dot_product_attention(*batched(q, k, v), attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class Flex:
    """FlexAttention, compiled; its block mask is built once per layout and not timed."""

    def __init__(self) -> None:
        self.masks: dict[tuple[int, ...], Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], cu_seqlens: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        key, doc = tuple(lengths), document_of(lengths)
        if key not in self.masks:
            self.compiled = torch.compile(flex_attention)
            self.masks[key] = create_block_mask(
                lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j), None, None, len(doc), len(doc), device="cpu"
            )
        with torch.no_grad():
            q, k, v = (x.detach().contiguous() for x in batched(q, k, v))
            return self.compiled(q, k, v, block_mask=self.masks[key], enable_gqa=True)[0].transpose(0, 1)


@dataclass(frozen=True)
class Layout:
    """Documents and heads of one case."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def flops(self, backward: bool) -> float:
        """Of the pairs that the mask leaves: two products forward, five backward."""
        pairs = sum(n * (n + 1) // 2 for n in self.lengths)
        return (7 if backward else 2) * 2 * self.head_dim * self.num_heads * pairs


class Call:
    """One implementation on one batch."""

    def __init__(self, attend: Attend, layout: Layout, dtype: torch.dtype, backward: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        total, heads = (
            sum(layout.lengths),
            (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads, layout.num_heads),
        )
        *self.inputs, self.dout = (torch.randn(total, n, layout.head_dim, generator=generator).to(dtype) for n in heads)
        self.attend, self.layout, self.dtype, self.backward = attend, layout, dtype, backward
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(layout.lengths)], dtype=torch.int32)
        for x in self.inputs:
            x.requires_grad_(backward)

    def __call__(self) -> list[Tensor]:
        """[out] or [out, dq, dk, dv]."""
        out = self.attend(*self.inputs, self.layout.lengths, self.cu_seqlens)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.dout)] if self.backward else [out]


def check(calls: dict[str, Call]) -> None:
    """All on a smaller batch of the same kind, against the reference in fp64: a peer may round more often than ours."""
    some = calls["herdkern"]
    lengths = (*(min(n, 40) for n in some.layout.lengths[:3]), 150)
    small = Layout("check", lengths, some.layout.num_heads, some.layout.num_kv_heads, some.layout.head_dim)
    golden = Call(reference, small, some.dtype, some.backward)
    for x in golden.inputs:
        x.data = x.data.double()
    golden.dout = golden.dout.double()
    expected = golden()
    for name, call in calls.items():
        if name == FLEX:
            continue  # a compilation per layout; compared in the case's own shape below
        for got, gold in zip(Call(call.attend, small, call.dtype, call.backward)(), expected, strict=True):
            steps = 8 if name == "herdkern" else 64
            allowed = steps * torch.finfo(call.dtype).eps * max(1.0, gold.abs().max().item())
            assert (got - gold).abs().max().item() <= allowed, name
    if FLEX in calls:
        torch.testing.assert_close(calls[FLEX]()[0], some()[0], atol=0.05, rtol=0.05)


def case(layout: Layout, dtype: torch.dtype, backward: bool) -> Case:
    def setup() -> dict[str, Callable[[], Any]]:
        peers: dict[str, Attend] = {"herdkern": ours, "SDPA per document": per_document}
        if layout.num_heads != layout.num_kv_heads:
            peers["SDPA per document, k and v expanded"] = per_document_expanded
        if sum(layout.lengths) <= 2048:
            peers |= {DENSE: dense_mask, REFERENCE: reference}
        if not backward:
            peers[FLEX] = Flex()
        return {name: Call(attend, layout, dtype, backward) for name, attend in peers.items()}

    return Case(
        name=f"{layout.name} {str(dtype)[6:]} {'forward+backward' if backward else 'forward'}",
        setup=setup,
        check=check,
        flops=layout.flops(backward),
        flops_dtype=str(dtype)[6:],
        slow_peers=(DENSE, FLEX, REFERENCE, "SDPA per document, k and v expanded"),
    )


def skewed(total: int, num_docs: int) -> tuple[int, ...]:
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


LAYOUTS = [
    Layout("2k of 16 documents, D64", skewed(2048, 16), 8, 2, 64),
    Layout("2k of 16 documents, D128", skewed(2048, 16), 8, 2, 128),
    Layout("8k of 16 documents, D64", skewed(8192, 16), 8, 2, 64),
    Layout("8k of 128 short documents, D64", short(8192, 128), 8, 2, 64),
    Layout("2k of one document, D64", (2048,), 8, 2, 64),
    Layout("2k of 4 documents, 6 heads, D32", (700, 100, 300, 948), 6, 6, 32),
]
BENCH = Bench(
    "attention",
    [
        case(layout, d, backward)
        for layout in LAYOUTS
        for d in (torch.float32, torch.bfloat16)
        for backward in (False, True)
    ],
)
test_attention = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
