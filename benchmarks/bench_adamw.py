"""One AdamW update with and without the clip by the global norm, against torch's fused, foreach and plain AdamW."""

import sys
from collections.abc import Callable

import torch
from harness import OURS, Bench, Case, fresh_and_reused, pytest_cases
from torch import nn

from herdkern.optim import AdamW

LARGE = [(4096, 4096)]
MODEL = [(512, 512), (1408, 512), (512, 1408), (512,)] * 12 + [(8192, 512)]  # the parameters of a small model
MAX_NORM = 1.0
BETAS, LR = (0.9, 0.95), 3e-4


class Update:
    """Steps of one optimizer on parameters of its own; the gradients stay the same."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], shapes: list, dtype: torch.dtype, *, clip: bool
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]
        self.optimizer, self.clip = make(self.params, lr=LR, betas=BETAS, weight_decay=0.1), clip
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=draw).to(dtype)
        self()  # the state exists before memory is measured

    def __call__(self) -> None:
        if self.clip:  # writes the gradients: from the second call on by a factor of 1
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()


def same_results(updates: dict[str, Update]) -> None:
    """Three updates from one start: fp32 parameters as fp64 has them, to the rounding of the update."""
    shapes = [(65, 33), (7,)]
    found = {}
    for name, update in updates.items():
        kind = type(update.optimizer)
        options = {k: update.optimizer.defaults[k] for k in ("fused", "foreach")}
        options |= {"max_grad_norm": update.optimizer.max_grad_norm} if kind is AdamW else {}
        small = Update(
            lambda p, kind=kind, options=options, **o: kind(p, **o, **options), shapes, torch.float32, clip=update.clip
        )
        for _ in range(2):
            small()
        found[name] = small.params
    clips = {name: update.clip or getattr(update.optimizer, "max_grad_norm", 0) > 0 for name, update in updates.items()}
    for name, params in found.items():
        if clips[name] == clips[OURS]:
            for p, q in zip(found[OURS], params, strict=True):
                off = (p - q).abs().max().item()
                assert off <= 1e-5, f"{name}: differs from ours by {off:.1e}"


def torch_adamw(**options: bool) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **more: torch.optim.AdamW(params, **options, **more)


def case(name: str, shapes: list, dtype: torch.dtype, *, clip: bool) -> Case:
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def ours(params: list[nn.Parameter], **options: object) -> AdamW:
        return AdamW(params, max_grad_norm=MAX_NORM if clip else 0.0, master_weights=True, **options)

    def setup() -> dict[str, Update]:
        updates = {OURS: Update(ours, shapes, dtype, clip=False)}
        for kind, options in (
            ("fused", {"fused": True}),
            ("foreach", {"foreach": True}),
            ("plain", {"foreach": False}),
        ):
            updates[f"torch {kind}"] = Update(torch_adamw(**options), shapes, dtype, clip=clip)
        return updates

    # fp32 reads w, g, m, v and writes w, m, v; 16 bits: reads g, master, m, v and writes all but g; the norm reads g
    per_element = 28 + (dtype.itemsize if clip else 0)
    return Case(
        name=f"{name} {str(dtype)[6:]}{' clip' if clip else ''}",
        setup=setup,
        check=same_results,
        bytes=per_element * count,
        memory_apart=True,
    )


KINDS = [("4096x4096", LARGE), ("49 tensors, 24M", MODEL)]
CASES = [
    case(name, shapes, dtype, clip=clip)
    for name, shapes in KINDS
    for dtype in (torch.float32, torch.bfloat16)
    for clip in (False, True)
]
REUSED = fresh_and_reused(CASES[1])[1:]  # huge pages
BENCH = Bench("adamw", [*CASES, *REUSED], seconds=8, one_thread=True)
test_adamw = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
