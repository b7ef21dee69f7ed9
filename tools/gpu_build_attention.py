"""The launches of Triton attention that check_gpu_build.py compiles: each target with the tiles chosen for it."""

import functools
from typing import Any

TARGETS = (80, 90, 100, 120)


def launch(head_dim: int, dtype_name: str, options: tuple[int, int, float], sinks: bool, target: int) -> None:
    """Both passes for 32 query and 8 key heads, as a GPU of `target` would launch them."""
    import torch

    from herdkern.ops.triton import attention, attention_backward

    dtype = getattr(torch, dtype_name)
    q, k, v = (torch.empty(4096, heads, head_dim, dtype=dtype, requires_grad=True) for heads in (32, 8, 8))
    borders = torch.zeros(17, dtype=torch.int32)  # never read: the kernels do not run
    more = torch.empty(32) if sinks else None
    chosen = attention.target_of
    try:
        attention.target_of = attention_backward.target_of = lambda _: target
        out, _ = attention.forward(q, k, v, borders, borders, more, *options, head_dim**-0.5)
        out.backward(torch.empty_like(out))
    finally:
        attention.target_of = attention_backward.target_of = chosen


def attention_cases() -> list[dict[str, Any]]:
    """The arguments of Case: the name, the call, whether it is hot, and the one target that it is compiled for."""
    causal, everything = (-1, 0, 0.0), (1000, 0, 30.0)
    forms = [
        ("attention bf16 64", (64, "bfloat16", causal, False), True),
        ("attention bf16 128", (128, "bfloat16", causal, False), True),
        ("attention fp16 128", (128, "float16", causal, False), True),
        ("attention bf16 96 (padded)", (96, "bfloat16", causal, False), False),
        ("attention bf16 256", (256, "bfloat16", causal, False), False),
        ("attention bf16 128 window, softcap, sinks", (128, "bfloat16", everything, True), False),
        ("attention fp32 128", (128, "float32", causal, False), False),
    ]
    return [
        {"name": name, "call": functools.partial(launch, *form, target), "hot": hot, "targets": (target,)}
        for name, form, hot in forms
        for target in TARGETS
    ]
