"""A Hugging Face Llama on herdkern's kernels: patched, trained, unpatched, and what each step cost.

Run: python examples/patch_hugging_face_llama.py
"""

import copy
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import herdkern

config = LlamaConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).train()
plain = copy.deepcopy(model)
ids = torch.randint(config.vocab_size, (2, 256))


def train(model, steps=4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        out = model(input_ids=ids, labels=ids)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return losses, (time.perf_counter() - start) / steps, out.logits


expected, plain_s, logits = train(plain)
print(f"plain:   losses {expected[0]:.4f} to {expected[-1]:.4f}, {plain_s * 1e3:.0f} ms a step, logits {logits.shape}")

with herdkern.patch(model) as patch:
    print(patch)
    losses, patched_s, logits = train(model)
print(f"patched: losses {losses[0]:.4f} to {losses[-1]:.4f}, {patched_s * 1e3:.0f} ms a step, logits {logits}")

assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-4
assert not any("forward" in vars(module) for module in model.modules())  # the block has ended: nothing is left
tokens = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
assert tokens.shape == (1, 12)
