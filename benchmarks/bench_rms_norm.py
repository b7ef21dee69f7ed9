"""RMSNorm, forward and backward, against plain torch, torch.nn.functional.rms_norm and torch.compile."""

import sys

import torch
from harness import Bench, Case, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import rms_norm, rms_norm_reference


def case(num_rows: int, dim: int, dtype: torch.dtype) -> Case:
    def setup() -> Steps:
        def functional(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (dim,), weight, 1e-5)

        inputs = [torch.randn(num_rows, dim).to(dtype), torch.randn(dim).to(dtype)]
        return Steps({"herdkern": rms_norm, "F.rms_norm": functional}, inputs, rms_norm_reference)

    return Case(
        name=f"{num_rows}x{dim} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        bytes=5 * num_rows * dim * dtype.itemsize,  # reads x, writes out; then reads dout and x, writes dx
        slow_peers=(COMPILED,),
    )


SIZES = [(4096, 256), (2048, 4096)]
BENCH = Bench("rms_norm", [case(*size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in SIZES])
test_rms_norm = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
