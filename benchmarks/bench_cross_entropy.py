"""Linear cross entropy, forward and backward, against plain torch, torch's own forms and torch.compile.

"torch plain" computes in fp32 whatever the dtype; "F.linear + F.cross_entropy" multiplies in the dtype and takes the
softmax in fp32, as training loops do; "F.linear_cross_entropy" is torch's form that holds all logits, "... chunked" the
same with the chunks that torch chooses, both where this torch has them. Inputs fit the vocabularies of Llama 2 (32k)
and Llama 3 (128k); tokens and dim are few, so that a run ends in minutes. Memory is measured apart: what a call adds at
its peak, and that less the gradients that it returns (`beyond_gradients_mib`).
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Bench, Case, pytest_cases
from machine import Limits
from op_cases import COMPILED, Step, Steps, same_results

from herdkern.ops import linear_cross_entropy, linear_cross_entropy_reference

CHUNKED = "F.linear_cross_entropy chunked"


def case(num_tokens: int, dim: int, vocab_size: int, dtype: torch.dtype) -> Case:
    def setup() -> Steps:
        targets = torch.randint(0, vocab_size, (num_tokens,))

        def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(hidden, weight, targets[: len(hidden)])

        def reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy_reference(hidden, weight, targets[: len(hidden)])

        def functional(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets[: len(hidden)])

        def fused(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.linear_cross_entropy(hidden, weight, targets[: len(hidden)])

        def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(hidden, weight, targets[: len(hidden)], options=options)

        implementations = {OURS: ours, "F.linear + F.cross_entropy": functional}
        if hasattr(F, "linear_cross_entropy"):
            implementations |= {"F.linear_cross_entropy": fused, CHUNKED: chunked}
        hidden = torch.randn(num_tokens, dim).to(dtype)
        inputs = [hidden, (torch.randn(vocab_size, dim) * dim**-0.5).to(dtype)]
        steps = Steps(implementations, inputs, reference, checked=[hidden[:64], inputs[1]])
        for step in steps.values():
            step.warm_up = warm_up(step)  # type: ignore[attr-defined]
        return steps

    def beyond_gradients(_: Any, result: dict[str, Any], limits: Limits) -> dict[str, Any]:
        gradients = (num_tokens + vocab_size) * dim * dtype.itemsize / 2**20
        return {"beyond_gradients_mib": {name: round(p - gradients, 1) for name, p in result["peak_mib"].items()}}

    return Case(
        name=f"{num_tokens}x{dim}x{vocab_size} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        flops=6 * num_tokens * dim * vocab_size,
        flops_dtype=str(dtype)[6:],
        slow_peers=(COMPILED, CHUNKED, "torch plain"),
        memory_apart=True,
        is_large=vocab_size > 100_000,
        extra=beyond_gradients,
    )


def warm_up(step: Step) -> Any:
    """A call on a few rows, so that what a library sets up once is not counted as memory of the call."""
    few = [x.detach()[:64] for x in step.leaves]

    def run() -> None:
        hidden, weight = few
        torch.nn.functional.linear(hidden, weight).float().logsumexp(1)

    return run


SIZES = [(1024, 1024, 32768), (1024, 512, 131072)]
BENCH = Bench(
    "cross_entropy",
    [case(*s, dtype) for dtype in (torch.float32, torch.bfloat16) for s in SIZES],
    seconds=24,
    one_thread=True,
)
test_cross_entropy = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
