"""Sampling with a KV cache: ragged prompts in one batch, each row as if it were alone.

Every row draws from a random generator of its own, so a row does not depend on its neighbours. Finished rows give
their place in the cache back.  Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herdkern.model.layers import KVCache
from herdkern.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How to continue prompts. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"GenerateConfig: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(
                f"GenerateConfig: temperature and top_k must not be negative, got {self.temperature} and {self.top_k}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"GenerateConfig: top_p must be above 0 and at most 1, got {self.top_p}")


@torch.no_grad()
def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], config: GenerateConfig | None = None
) -> list[list[int]]:
    """The continuation of each prompt, prompt and stop token left out.

    prompts: token ids, each at least one; put the begin-of-text token there yourself.
    Raises: ValueError if a prompt is empty or does not fit the model's max_seq_len with its continuation.
    """
    config = config or GenerateConfig()
    capacity = max((len(p) for p in prompts), default=1) + config.max_new_tokens
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {row} must have at least one token, got none; start it with bos_id")
    if capacity > model.config.max_seq_len:
        raise ValueError(
            f"generate: prompt and continuation must fit max_seq_len={model.config.max_seq_len}, got {capacity}; "
            "shorten the prompts or lower max_new_tokens"
        )
    device = model.embed_tokens.weight.device
    cache = KVCache(model.config, len(prompts), capacity, dtype=model.compute_dtype, device=device)
    generators = [torch.Generator().manual_seed(config.seed) for _ in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    fresh: list[Sequence[int]] = list(prompts)  # what each row feeds next; empty once it has ended
    for _ in range(config.max_new_tokens):
        active = [row for row, tokens in enumerate(fresh) if tokens]
        if not active:
            break
        positions = cache.begin([len(tokens) for tokens in fresh])
        tokens = torch.tensor([t for row in active for t in fresh[row]], dtype=torch.int64, device=device)
        hidden = model(tokens, cache.cu_seqlens_q, positions, cache=cache)  # (new tokens, dim)
        last = torch.tensor([len(fresh[row]) for row in active]).cumsum(0) - 1
        logits = model.logits(hidden[last.to(device)]).cpu()  # (active, vocab_size)
        for row, row_logits in zip(active, logits, strict=True):
            token = sample(row_logits, config, generators[row])
            ended = token in config.stop_tokens
            fresh[row] = () if ended else (token,)
            if ended:
                cache.end(row)
            else:
                outputs[row].append(token)
    return outputs


def sample(logits: Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """One token id drawn from logits: (vocab_size,) fp32; greedy ties go to the lowest id."""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if 0 < config.top_k < logits.numel():
        kept, ids = logits.topk(config.top_k)
    else:
        kept, ids = logits.sort(descending=True, stable=True)
    probs = kept.softmax(-1)
    if config.top_p < 1:
        before = probs.cumsum(-1) - probs  # what is kept ahead of each token; the first is always kept
        probs = torch.where(before < config.top_p, probs, 0.0)
    return int(ids[torch.multinomial(probs, 1, generator=generator)])
