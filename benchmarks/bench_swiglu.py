"""SwiGLU, forward and backward, against plain torch (silu in fp32), torch's silu in the dtype, and torch.compile."""

import sys

import torch
from harness import Bench, Case, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import swiglu, swiglu_reference


def functional(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def case(num_rows: int, dim: int, dtype: torch.dtype) -> Case:
    def setup() -> Steps:
        inputs = [torch.randn(num_rows, dim).to(dtype) for _ in range(2)]
        return Steps({"herdkern": swiglu, "F.silu * up": functional}, inputs, swiglu_reference)

    return Case(
        name=f"{num_rows}x{dim} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        bytes=8 * num_rows * dim * dtype.itemsize,  # reads 2, writes 1; then reads 3, writes 2
        slow_peers=(COMPILED,),
    )


SIZES = [(4096, 688), (1024, 8192)]
BENCH = Bench("swiglu", [case(*size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in SIZES])
test_swiglu = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
