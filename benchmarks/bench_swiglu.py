"""SwiGLU, forward and backward, against plain torch (silu in fp32), torch's silu in the dtype, and torch.compile.

With fresh outputs, as malloc serves them by default, and with outputs in memory that was there before: page faults of
large fresh outputs cost more than the kernels. "packed" is one tensor [gate | up], whose gradient is one tensor too.
"""

import sys

import torch
from harness import Bench, Case, fresh_and_reused, pytest_cases
from op_cases import COMPILED, Steps, same_results

from herdkern.ops import swiglu, swiglu_reference


def functional(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def case(num_rows: int, dim: int, dtype: torch.dtype, packed: bool = False) -> Case:
    def setup() -> Steps:
        inputs = [torch.randn(num_rows, 2 * dim if packed else dim).to(dtype) for _ in range(1 if packed else 2)]
        checked = [x[:256] for x in inputs]
        functions = {"herdkern": swiglu, "F.silu * up": functional}
        return Steps(functions, inputs, swiglu_reference, checked=checked)

    return Case(
        name=f"{num_rows}x{dim} {str(dtype)[6:]}" + " packed" * packed,
        setup=setup,
        check=same_results,
        bytes=8 * num_rows * dim * dtype.itemsize,  # reads 2, writes 1; then reads 3, writes 2
        slow_peers=(COMPILED,),
        memory_apart=True,
        is_large=dim > 4096,
    )


SIZES = [(4096, 4096), (4096, 14336)]
CASES = [case(*size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in SIZES]
CASES.append(case(4096, 14336, torch.bfloat16, packed=True))
BENCH = Bench("swiglu", [kind for case in CASES for kind in fresh_and_reused(case)], seconds=12)
test_swiglu = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
