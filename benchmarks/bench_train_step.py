"""One training step of `micro` (forward, backward, clip, AdamW): ours, the same model in plain torch, and transformers.

The peers are what users write by hand: "torch" runs scaled_dot_product_attention document by document, F.rms_norm and
an unfused cross entropy; "transformers" gets the sequences as rows with a dense block-diagonal mask. All use torch's
fused AdamW and the same compute dtype; the check compares their losses and gradients with ours before any timing.

    python benchmarks/bench_train_step.py [--quick] [--json FILE]
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Bench, Case, pytest_cases
from torch import Tensor

from herdkern.model.config import micro
from herdkern.model.hf_weights import config_to_hf, hf_state
from herdkern.model.transformer import Transformer
from herdkern.train.batch import Batch, build_batch
from herdkern.train.config import OptimizerConfig
from herdkern.train.objective import Objective, next_token_loss
from herdkern.train.optimizer import build_adamw, clip_grad_norm

SEQ_LEN = 512
BATCH_SIZE = 8
VOCAB_SIZE = 8192
MEAN_DOCUMENT = 160  # tokens; documents of the demo corpus are of this order
CONFIG = micro(VOCAB_SIZE)


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(BATCH_SIZE):
        lengths = rng.geometric(1 / MEAN_DOCUMENT, size=SEQ_LEN)
        ends = np.cumsum(lengths)
        borders = np.concatenate([[0], ends[ends < SEQ_LEN + 1], [SEQ_LEN + 1]]).astype(np.int32)
        sequences.append((rng.integers(0, VOCAB_SIZE, SEQ_LEN + 1), borders))
    return build_batch(sequences)


def plain_hidden(model: Transformer, batch: Batch) -> Tensor:
    """The forward pass of `model` on its own weights with nothing but torch."""
    dtype = model.compute_dtype
    cos, sin = (
        t[batch.positions][:, None] for t in (model.rope_cos, model.rope_sin)
    )  # (total_tokens, 1, head_dim / 2)

    def rope(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        parts = (t.split(list(batch.document_lengths)) for t in (q, k, v))
        for q_doc, k_doc, v_doc in zip(*parts, strict=True):
            heads = (t.transpose(0, 1)[None] for t in (q_doc, k_doc, v_doc))  # (1, heads, length, head_dim)
            outs.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    def linear(x: Tensor, module: Any) -> Tensor:
        return F.linear(x, module.weight.to(dtype))

    def norm(x: Tensor, module: Any) -> Tensor:
        return F.rms_norm(x, (CONFIG.dim,), module.weight.to(dtype), CONFIG.norm_eps)

    x = F.embedding(batch.tokens, model.embed_tokens.weight).to(dtype)
    for block in model.layers:
        n = norm(x, block.input_layernorm)
        attention: Any = block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear(n, projection).unflatten(-1, (-1, CONFIG.head_dim)) for projection in projections)
        x = x + linear(attend(rope(q), rope(k), v).flatten(-2), attention.o_proj)
        n = norm(x, block.post_attention_layernorm)
        mlp: Any = block.mlp
        x = x + linear(F.silu(linear(n, mlp.gate_proj)) * linear(n, mlp.up_proj), mlp.down_proj)
    return norm(x, model.norm)


def plain_loss(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    logits = F.linear(plain_hidden(model, batch), model.lm_head.weight.to(model.compute_dtype)).float()
    return F.cross_entropy(logits, batch.targets, reduction="sum"), {}


def transformers_loss(hf: Any, dtype: torch.dtype) -> Objective:
    """An objective that runs the Hugging Face model `hf` on the sequences as rows, documents parted by a dense mask."""

    def objective(_model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        document = torch.repeat_interleave(torch.tensor(batch.document_lengths)).view(BATCH_SIZE, SEQ_LEN)
        mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # (BATCH_SIZE, 1, SEQ_LEN, SEQ_LEN)
        rows = batch.tokens.view(BATCH_SIZE, SEQ_LEN), batch.positions.view(BATCH_SIZE, SEQ_LEN)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = hf(rows[0], attention_mask=mask, position_ids=rows[1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets, reduction="sum"), {}

    return objective


def make_step(model: Any, objective: Objective, batch: Batch) -> Callable[[], float]:
    """A function that does one whole step and returns the loss; its attribute `gradients` is for the check."""
    optimizer = build_adamw(model, OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the same work, and every round starts from the same weights

    def step() -> float:
        loss, _ = objective(model, batch)
        (loss / batch.num_targets).backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() / batch.num_targets

    step.gradients = lambda: gradients(model, objective, batch)  # type: ignore[attr-defined]
    return step


def gradients(model: Any, objective: Objective, batch: Batch) -> dict[str, Tensor]:
    loss, _ = objective(model, batch)
    (loss / batch.num_targets).backward()
    named = hf_state(model) if isinstance(model, Transformer) else dict(model.named_parameters())
    found = {name: param.grad.clone() for name, param in named.items() if param.grad is not None}
    for param in model.parameters():
        param.grad = None
    return {"loss": loss.detach() / batch.num_targets, **found}


def setup(dtype: torch.dtype) -> Callable[[], dict[str, Callable[[], float]]]:
    def build() -> dict[str, Callable[[], float]]:
        batch = make_batch()
        ours = Transformer(CONFIG, compute_dtype=dtype, seed=0)
        steps = {
            "herdkern": make_step(ours, next_token_loss, batch),
            "torch": make_step(Transformer(CONFIG, compute_dtype=dtype, seed=0), plain_loss, batch),
        }
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            return steps
        hf = LlamaForCausalLM(LlamaConfig(**config_to_hf(CONFIG), attn_implementation="sdpa"))
        hf.load_state_dict({name: tensor.detach() for name, tensor in hf_state(ours).items()})
        steps["transformers"] = make_step(hf, transformers_loss(hf, dtype), batch)
        return steps

    return build


def check(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    def compare(steps: dict[str, Any]) -> None:
        want = steps["torch"].gradients()
        bound = 64 * torch.finfo(dtype).eps  # of a sum over thousands of tokens, relative to the norm of the tensor
        for name, step in steps.items():
            got = step.gradients()
            for key, tensor in want.items():
                error = float((got[key] - tensor).norm() / tensor.norm())
                assert error <= bound, f"{name}: {key} differs from plain torch by {error:.2e}, bound {bound:.2e}"

    return compare


def case(name: str, dtype: torch.dtype) -> Case:
    flops = CONFIG.train_flops(make_batch().document_lengths)
    kind = str(dtype).removeprefix("torch.")
    return Case(name=name, setup=setup(dtype), check=check(dtype), flops=flops, flops_dtype=kind)


BENCH = Bench("train_step", [case("micro fp32 8x512", torch.float32), case("micro bf16 8x512", torch.bfloat16)])
test_train_step = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
