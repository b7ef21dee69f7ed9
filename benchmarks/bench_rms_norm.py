"""RMSNorm, forward and backward, against plain torch (Llama's formula), torch.nn.functional.rms_norm and torch.compile.

With fresh outputs, as malloc serves them by default, and with outputs in memory that was there before: page faults of
large fresh outputs cost more than the kernels.
"""

import sys

import torch
from harness import Bench, Case, fresh_and_reused, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import rms_norm, rms_norm_reference


def case(num_rows: int, dim: int, dtype: torch.dtype) -> Case:
    def setup() -> Steps:
        def functional(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (dim,), weight, 1e-5)

        inputs = [torch.randn(num_rows, dim).to(dtype), torch.randn(dim).to(dtype)]
        checked = [inputs[0][:256], inputs[1]]
        return Steps({"herdkern": rms_norm, "F.rms_norm": functional}, inputs, rms_norm_reference, checked=checked)

    return Case(
        name=f"{num_rows}x{dim} {str(dtype)[6:]}",
        setup=setup,
        check=same_results,
        bytes=5 * num_rows * dim * dtype.itemsize,  # reads x, writes out; then reads dout and x, writes dx
        slow_peers=(COMPILED,),
        memory_apart=True,
        is_large=dim > 4096,
    )


SIZES = [(4096, 4096), (4096, 14336)]
CASES = [case(*size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in SIZES]
BENCH = Bench("rms_norm", [kind for case in CASES for kind in fresh_and_reused(case)], seconds=12)
test_rms_norm = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
