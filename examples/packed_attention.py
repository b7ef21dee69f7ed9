"""Documents end to end in one batch: no token sees another document, and nothing is padded.

Run: python examples/packed_attention.py
"""

import torch

from herdkern.ops import attention, rope, rope_table

torch.manual_seed(0)
lengths = [120, 1, 300, 79]
borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)  # (num_docs + 1,)
total = int(borders[-1])

q = torch.randn(total, 8, 64)  # (total_tokens, num_heads, head_dim)
k = torch.randn(total, 2, 64)  # two KV heads serve eight query heads
v = torch.randn(total, 2, 64)

cos, sin = rope_table(max(lengths), 64)
positions = torch.cat([torch.arange(length) for length in lengths])  # each document starts at 0
q, k = rope(q, cos, sin, positions), rope(k, cos, sin, positions)
together = attention(q, k, v, borders)

for number, (begin, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist())):
    alone = attention(q[begin:end], k[begin:end], v[begin:end], torch.tensor([0, end - begin], dtype=torch.int32))
    difference = (together[begin:end] - alone).abs().max()
    print(f"document {number}: {end - begin:3} tokens, alone and packed differ by {difference:.1e}")
    assert difference < 1e-5
