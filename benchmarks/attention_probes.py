"""Small measurements of packed attention beside its speed: the first call, the work that the documents alone cause."""

import json
import statistics
import subprocess
import sys

import torch
from machine import wall
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
        for _ in range(5 if which == "ours" else 1):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        for name in runs[0] if runs else ():
            found[name] = round(1e3 * statistics.median(run[name] for run in runs), 1)
    return found


def mask_setup_ms(cu_seqlens: Tensor, dtype: torch.dtype) -> float:
    """Milliseconds that the documents add to forward and backward where no score is left to compute.

    The same tokens without keys and with narrow heads, in these documents less in a single one: the check of the
    borders, the list of tiles, more tiles to start. Each rises with the documents, not with head_dim.
    """
    tokens = int(cu_seqlens[-1])
    q, dout = (torch.zeros(tokens, 8, 8, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(0, 2, 8, dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(borders: Tensor) -> None:
        out = attention(*leaves, borders, cu_seqlens_k=torch.zeros_like(borders))
        torch.autograd.grad(out, leaves, dout)

    single = torch.tensor([0, tokens], dtype=torch.int32)
    added = [wall(lambda: call(cu_seqlens)) - wall(lambda: call(single)) for _ in range(21)]
    return max(0.0, 1e3 * statistics.median(added))
