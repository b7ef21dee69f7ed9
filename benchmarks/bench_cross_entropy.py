"""Linear cross entropy, forward and backward, against plain torch, torch's own fused form and torch.compile.

"torch plain" computes in fp32 whatever the dtype; "F.linear + F.cross_entropy" multiplies in the dtype and takes the
softmax in fp32, as training loops do; "F.linear_cross_entropy" is torch's fused form where this torch has it.
"""

import sys

import torch
import torch.nn.functional as F
from harness import Bench, Case, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import linear_cross_entropy, linear_cross_entropy_reference


def case(num_tokens: int, dim: int, vocab_size: int, dtype: torch.dtype) -> Case:
    def setup() -> Steps:
        targets = torch.randint(0, vocab_size, (num_tokens,))

        def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(x, weight, targets[: len(x)])

        def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy_reference(x, weight, targets[: len(x)])

        def functional(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets[: len(x)])

        def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.linear_cross_entropy(x, weight, targets[: len(x)])

        implementations = {"herdkern": ours, "F.linear + F.cross_entropy": functional}
        if hasattr(F, "linear_cross_entropy"):
            implementations["F.linear_cross_entropy"] = fused
        inputs = [torch.randn(num_tokens, dim).to(dtype), (torch.randn(vocab_size, dim) * dim**-0.5).to(dtype)]
        return Steps(implementations, inputs, reference, checked=[inputs[0][:256], inputs[1]])

    return Case(
        name=f"{num_tokens}x{dim}x{vocab_size} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        flops=6 * num_tokens * dim * vocab_size,
        flops_dtype=str(dtype)[6:],
        slow_peers=(COMPILED,),
    )


SIZES = [(2048, 256, 4096), (1024, 512, 16384)]
BENCH = Bench("cross_entropy", [case(*s, dtype) for dtype in (torch.float32, torch.bfloat16) for s in SIZES])
test_cross_entropy = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
