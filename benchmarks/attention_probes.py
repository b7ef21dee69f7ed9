"""Small measurements of packed attention beside its speed: the first call, the work that the documents alone cause."""

import json
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from herdkern.ops import attention

# Forward and backward of 16 documents in a process that has only imported: what starts late, starts here. torch's own
# autograd goes first on a single number: it imports sympy when it is given its first gradient (0.3 s).
FIRST_CALL = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from herdkern.ops import attention
q, dout = torch.randn(2, 1024, 8, 64)
k, v = torch.randn(2, 1024, 2, 64)
borders = torch.arange(0, 1025, 64, dtype=torch.int32)
one = torch.ones(1, requires_grad=True)
torch.autograd.grad(one * 2, one, torch.ones(1))
took = {}
if sys.argv[2] == "flex":
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    doc = torch.arange(1024) // 64
    start = time.perf_counter()
    mask = create_block_mask(lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j), None, None, 1024, 1024, device="cpu")
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask, enable_gqa=True)
    took["FlexAttention, forward only"] = time.perf_counter() - start
else:
    for x in (q, k, v):
        x.requires_grad_()
    for name in ("herdkern", "herdkern, second call"):
        start = time.perf_counter()
        torch.autograd.grad(attention(q, k, v, borders), (q, k, v), dout)
        took[name] = time.perf_counter() - start
print(json.dumps(took))
"""


def first_calls(threads: int, *, with_flex: bool) -> dict[str, float]:
    """Milliseconds of the first attention call of a process by implementation; imports are not counted."""
    found: dict[str, float] = {}
    for which in ("ours", "flex") if with_flex else ("ours",):
        command = [sys.executable, "-c", FIRST_CALL, str(threads), which]
        runs = []
        for _ in range(3 if which == "ours" else 1):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        for name in runs[0] if runs else ():
            found[name] = round(1e3 * statistics.median(run[name] for run in runs), 1)
    return found


def mask_setup_ms(cu_seqlens: Tensor, dtype: torch.dtype) -> float:
    """Milliseconds of CPU time at one thread that the documents add to forward and backward, no score left to compute.

    The same tokens with narrow heads and one key a document, which its last query alone sees, in these documents less
    in a single one: the check of the borders, the lists of tiles and chunks and their order, and starting more of them.
    It rises with the documents, not with head_dim.
    """
    tokens = int(cu_seqlens[-1])
    q = torch.zeros(tokens, 8, 8, dtype=dtype, requires_grad=True)
    dout = torch.zeros_like(q)

    def call(borders: Tensor) -> float:
        k, v = (torch.zeros(len(borders) - 1, 2, 8, dtype=dtype, requires_grad=True) for _ in range(2))
        keys = torch.arange(len(borders), dtype=torch.int32)
        start = time.process_time()
        torch.autograd.grad(attention(q, k, v, borders, cu_seqlens_k=keys), (q, k, v), dout)
        return time.process_time() - start

    single = torch.tensor([0, tokens], dtype=torch.int32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        added = [call(cu_seqlens) - call(single) for _ in range(21)]
    finally:
        torch.set_num_threads(threads)
    return max(0.0, 1e3 * statistics.median(added))
