"""A Hugging Face Llama trained on packed documents, on a CPU, and the proof that they do not see each other.

Run: python examples/packed_hugging_face_llama.py
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import herdkern
from herdkern.documents import cu_seqlens_from_lengths, position_ids_from_cu_seqlens
from herdkern.integrations.transformers import register

register()
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, attn_implementation="herdkern")

text = ["to be or not to be, that is the question", "all the world's a stage", "brevity is the soul of wit"]
documents = [torch.tensor(list(line.encode())) for line in text]
ids = torch.cat(documents)[None]  # (1, total_tokens): no padding
borders = cu_seqlens_from_lengths([len(document) for document in documents])
positions = position_ids_from_cu_seqlens(borders)[None]  # each document starts at 0
labels = ids.masked_fill(positions == 0, -100)  # no document predicts the next one's first token

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in range(40):
    loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step + 1:2}: loss {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

report = herdkern.assert_no_leak(model, require_nan_contained=True)
print(f"no leak between {report.documents} documents; packed and alone differ by {report.alone_difference:.1e}")
