"""A small model, uneven micro-batches, and one process that takes them one by one: what a pipeline must equal."""

import dataclasses

import torch

from herdkern.documents import cu_seqlens_from_lengths, position_ids_from_cu_seqlens
from herdkern.model import ModelConfig, Transformer

IGNORE = -100
CONFIG = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=11,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_dim=48,
    max_seq_len=64,
    init_std=0.3,  # so that every layer matters
)


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    num_targets: int


def make_batches(num_microbatches, seed=0):
    """Micro-batches of 1 to 40 tokens in 1 to 4 documents; a third of the targets does not count."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_microbatches):
        num_docs = int(torch.randint(1, 5, (), generator=generator))
        lengths = torch.randint(1, 11, (num_docs,), generator=generator)
        cu_seqlens = cu_seqlens_from_lengths(lengths)
        total = int(cu_seqlens[-1])
        tokens = torch.randint(CONFIG.vocab_size, (total,), generator=generator)
        targets = torch.randint(CONFIG.vocab_size, (total,), generator=generator)
        targets[torch.rand(total, generator=generator) < 0.3] = IGNORE
        positions = position_ids_from_cu_seqlens(cu_seqlens)
        if not batches:
            targets[0] = 1  # so that a step has a target
        batches.append(Batch(tokens, targets, positions, cu_seqlens, int((targets != IGNORE).sum())))
    return batches


def make_model(tied=False, *, compute_dtype=torch.float32, **changes):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied, **changes)
    return Transformer(config, seed=1, compute_dtype=compute_dtype)


def one_process(model, batches, *, backward=True):
    """The loss of a step; gradients lie in `model`."""
    num_targets = sum(batch.num_targets for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        hidden = model(batch.tokens, batch.cu_seqlens, batch.positions)
        loss = model.loss(hidden, batch.targets, reduction="sum")
        if backward:
            (loss / num_targets).backward()
        total += loss.detach()
    return (total / num_targets).float()


def worst_difference(got, wanted):
    """The largest difference over the largest entry."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
