"""Held-out loss in nats per token and bits per byte, and the unigram baseline that a model has to beat."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from herdkern.data.mix import TokenSource
from herdkern.model.transformer import Transformer
from herdkern.train.batch import IGNORE, build_batch

COUNT_WINDOW = 1 << 20  # tokens read at once when counting


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out result: `nats_per_token` over `num_tokens` predicted tokens, which stand for `num_bytes` of text."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


@torch.no_grad()
def evaluate(
    model: Transformer,
    dataset: TokenSource,
    seq_len: int,
    *,
    token_bytes: NDArray[np.integer],
    batch_size: int = 8,
    max_tokens: int = 0,
) -> HeldOut:
    """The loss of `model` on `dataset`, each token predicted once inside consecutive windows of seq_len.

    token_bytes: (n_vocab,), the bytes of text each token stands for (0 for special tokens).  max_tokens: only the
    first so many; 0 means all. The first token of a document is not predicted, as in training; its last one (end of
    text) is.
    Raises: ValueError if there is nothing to predict.
    """
    last = dataset.num_tokens - 1
    end = min(last, max_tokens) if max_tokens else last
    if end < 1:
        raise ValueError(f"evaluate: dataset must have at least 2 tokens, got {dataset.num_tokens}")
    device = model.embed_tokens.weight.device
    nats, num_tokens, num_bytes = 0.0, 0, 0
    starts = range(0, end, seq_len)
    for i in range(0, len(starts), batch_size):
        windows = [dataset.window(s, min(seq_len, end - s) + 1) for s in starts[i : i + batch_size]]
        batch = build_batch(windows, device=device)
        loss = model.loss(model(batch.tokens, batch.cu_seqlens, batch.positions), batch.targets, reduction="sum")
        nats += float(loss)
        num_tokens += batch.num_targets
        counted = batch.targets[batch.targets != IGNORE].cpu().numpy()
        num_bytes += int(token_bytes[counted].sum())
    return _held_out(nats, num_tokens, num_bytes)


def token_counts(dataset: TokenSource, n_vocab: int, *, leave_out: tuple[int, ...] = ()) -> NDArray[np.int64]:
    """How often each token occurs, (n_vocab,) int64, with 0 for those of `leave_out` (give the begin-of-text token)."""
    counts = np.zeros(n_vocab, np.int64)
    for start in range(0, dataset.num_tokens, COUNT_WINDOW):
        tokens, _ = dataset.window(start, min(COUNT_WINDOW, dataset.num_tokens - start))
        counts += np.bincount(tokens, minlength=n_vocab)
    counts[list(leave_out)] = 0
    return counts


def unigram_baseline(
    train_counts: NDArray[np.int64], heldout_counts: NDArray[np.int64], *, token_bytes: NDArray[np.integer]
) -> HeldOut:
    """The held-out loss of a model without context: p(token) = (count + 1) / (all + n_vocab) from training counts.

    train_counts, heldout_counts, token_bytes: (n_vocab,).  Raises: ValueError if the lengths differ or nothing is
    held out.
    """
    if not len(train_counts) == len(heldout_counts) == len(token_bytes):
        raise ValueError(
            "unigram_baseline: counts and token_bytes must have one entry per token, "
            f"got {len(train_counts)}, {len(heldout_counts)}, {len(token_bytes)}"
        )
    log_probs = np.log(train_counts + 1.0) - math.log(float(train_counts.sum()) + len(train_counts))
    nats = -float((heldout_counts * log_probs).sum())
    return _held_out(nats, int(heldout_counts.sum()), int((heldout_counts * token_bytes).sum()))


def _held_out(nats: float, num_tokens: int, num_bytes: int) -> HeldOut:
    if num_tokens == 0 or num_bytes == 0:
        raise ValueError(f"evaluate: held-out text must not be empty, got {num_tokens} tokens and {num_bytes} bytes")
    return HeldOut(
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )
