"""One training step (forward, backward, clip, AdamW) on packed documents: ours and what users write by hand.

"torch" runs scaled_dot_product_attention document by document, F.rms_norm and a cross entropy of all logits;
"torch.compile" is that compiled around the attention loop; "transformers" is its Llama with SDPA under autocast, the
sequences as rows with a dense block-diagonal mask (one row of all tokens with position_ids, from which it makes that
mask itself, would have four times the scores). The peers use torch's fused AdamW and clip. All have the same
fp32 weights and compute dtype; the check compares losses and gradients before any timing. `mini` sees 8k tokens in
sequences of 2048, documents of a web crawl's lengths (log-normal, median 400 tokens); `micro` is the quick form.

Memory is what the first step adds to the weights, at its peak: gradients, moments, activations. The report holds where
the time of one step goes ("parts", shares by torch's profiler); the picture shows it.

    python benchmarks/bench_train_step.py [--quick] [--json FILE]
"""

import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import train_step_peers as peers
import train_step_picture
from harness import OURS, Bench, Case, fresh_and_reused, pytest_cases
from op_cases import COMPILED
from torch import Tensor

from herdkern.model.config import ModelConfig, micro, mini
from herdkern.model.hf_weights import hf_state
from herdkern.model.transformer import Transformer
from herdkern.train.batch import Batch, build_batch
from herdkern.train.config import OptimizerConfig
from herdkern.train.objective import Objective, next_token_loss
from herdkern.train.optimizer import build_adamw

VOCAB_SIZE = 8000  # not the number of tokens: shapes tell the loss in a profile
MEDIAN_DOCUMENT = 400  # tokens
PLAIN, TRANSFORMERS = "torch", "transformers"


def make_batch(batch_size: int, seq_len: int) -> Batch:
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(batch_size):
        ends = np.cumsum(np.ceil(rng.lognormal(np.log(MEDIAN_DOCUMENT), 1.0, size=seq_len)).astype(np.int64))
        borders = np.concatenate([[0], ends[ends < seq_len + 1], [seq_len + 1]]).astype(np.int32)
        sequences.append((rng.integers(0, VOCAB_SIZE, seq_len + 1), borders))
    return build_batch(sequences)


class Step:
    """A whole step of one implementation on one batch, built at the first use: a process may fork before."""

    def __init__(self, build: Callable[[], tuple[Any, Objective]], batch: Batch) -> None:
        self.build, self.batch = build, batch

    @functools.cached_property
    def state(self) -> tuple[Any, Objective, torch.optim.Optimizer]:
        model, objective = self.build()
        ours = objective is next_token_loss
        optimizer = build_adamw(model, OptimizerConfig()) if ours else peers.fused_adamw(model, OptimizerConfig())
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work, and every round starts from the same weights
        return model, objective, optimizer

    def __call__(self) -> float:
        model, objective, optimizer = self.state
        loss, _ = objective(model, self.batch)
        (loss / self.batch.num_targets).backward()
        if objective is not next_token_loss:  # our optimizer clips
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() / self.batch.num_targets

    def gradients(self) -> dict[str, Tensor]:
        """The mean loss, and the gradients by Hugging Face's names."""
        model, objective, _ = self.state
        loss, _ = objective(model, self.batch)
        (loss / self.batch.num_targets).backward()
        named = hf_state(model) if isinstance(model, Transformer) else dict(model.named_parameters())
        found = {name: param.grad.clone() for name, param in named.items() if param.grad is not None}
        for param in model.parameters():
            param.grad = None
        return {"loss": loss.detach() / self.batch.num_targets, **found}

    def warm_up(self) -> None:
        """Before memory is measured: the weights are there, and what is compiled is compiled."""
        if self.state[1] not in (next_token_loss, peers.plain_loss):
            self.gradients()


def setup(config: ModelConfig, dtype: torch.dtype, batch_size: int, seq_len: int) -> Callable[[], dict[str, Step]]:
    def model() -> Transformer:
        return Transformer(config, compute_dtype=dtype, seed=0)

    def compiled() -> tuple[Any, Objective]:
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True  # names in the profile
        torch._dynamo.reset()  # shapes of an earlier case count against its limit of recompilations
        return model(), torch.compile(peers.plain_loss)

    def transformers() -> tuple[Any, Objective]:
        hf = peers.transformers_model(config, hf_state(model()))
        return hf, peers.transformers_loss(hf, dtype, seq_len)

    builders: dict[str, Callable[[], tuple[Any, Objective]]] = {
        OURS: lambda: (model(), next_token_loss),
        PLAIN: lambda: (model(), peers.plain_loss),
        COMPILED: compiled,
        TRANSFORMERS: transformers,
    }
    return lambda: {name: Step(build, make_batch(batch_size, seq_len)) for name, build in builders.items()}


def check(dtype: torch.dtype) -> Callable[[dict[str, Step]], dict[str, str]]:
    def compare(steps: dict[str, Step]) -> dict[str, str]:
        want = steps[PLAIN].gradients()
        bound = 64 * torch.finfo(dtype).eps  # of a sum over thousands of tokens, relative to the norm of the tensor
        failed = {}
        for name, step in steps.items():
            try:
                got = step.gradients()
            except ImportError as error:
                failed[name] = f"failed: {error}"
                continue
            for key, tensor in want.items():
                error = float((got[key] - tensor).norm() / tensor.norm())
                assert error <= bound, f"{name}: {key} differs from plain torch by {error:.2e}, bound {bound:.2e}"
        return failed

    return compare


def parts(steps: dict[str, Step], result: dict[str, Any], _limits: Any) -> dict[str, Any]:
    """Tokens per second of each, and the shares of one step."""
    tokens = next(iter(steps.values())).batch.tokens.numel()
    return {
        "tokens_per_s": {name: round(1e3 * tokens / result[name], 1) for name in steps},
        "parts": {
            name: {k: round(v, 4) for k, v in train_step_picture.parts_of_step(step, VOCAB_SIZE).items()}
            for name, step in steps.items()
        },
    }


def case(config: ModelConfig, dtype: torch.dtype, batch_size: int, seq_len: int) -> Case:
    lengths = make_batch(batch_size, seq_len).document_lengths
    kind = str(dtype).removeprefix("torch.")
    large = config.dim > micro().dim
    return Case(
        name=f"{'mini' if large else 'micro'} {'bf16' if kind == 'bfloat16' else 'fp32'} {batch_size}x{seq_len}",
        setup=setup(config, dtype, batch_size, seq_len),
        check=check(dtype),
        flops=config.train_flops(lengths),
        flops_dtype=kind,
        slow_peers=() if large else (COMPILED,),
        is_large=large,
        memory_apart=True,
        extra=parts if large else None,
    )


def summarise(report: dict[str, Any], _quick: bool) -> None:
    """Ours as it trains, memory reused, against each peer as its user has it, with what malloc does by default."""
    by_name = {case["case"]: case for case in report["cases"]}
    for name, fresh in by_name.items():
        reused = by_name.get(f"{name} reused")
        if reused:
            rivals = {peer: fresh[peer] for peer in fresh["spread"] if peer != OURS}
            report["ratio_as_used"] = {peer: round(time / reused[OURS], 3) for peer, time in rivals.items()}
            print(f"\n{name}: ours with memory reused against peers without: {report['ratio_as_used']}")
            print(f"median of them {statistics.median(report['ratio_as_used'].values()):.2f}")


BENCH = Bench(
    "train_step",
    [
        case(micro(VOCAB_SIZE), torch.float32, 8, 512),
        case(micro(VOCAB_SIZE), torch.bfloat16, 8, 512),
        *fresh_and_reused(case(mini(VOCAB_SIZE), torch.bfloat16, 4, 2048)),
    ],
    seconds=40,
    summarise=summarise,
    after=train_step_picture.draw,
)
test_train_step = pytest_cases(BENCH)

if __name__ == "__main__":
    sys.exit(BENCH.main())
