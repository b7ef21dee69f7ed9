"""Held-out figures against sums done by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from herdkern.model.transformer import Transformer
from herdkern.train.evaluate import evaluate, token_counts, unigram_baseline

TOKEN_BYTES = np.concatenate([np.arange(59) % 5 + 1, [0, 0]])


def test_evaluate_counts_every_target_once(dataset, tiny_model_config):
    model = Transformer(tiny_model_config, seed=1)
    result = evaluate(model, dataset, 32, token_bytes=TOKEN_BYTES, batch_size=3)
    nats, count, num_bytes = 0.0, 0, 0
    tokens = torch.from_numpy(dataset.tokens)
    cuts = sorted({*range(0, dataset.num_tokens, 32), *dataset.borders[:-1].tolist(), dataset.num_tokens})
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            last = (
                end if end in dataset.borders else end + 1
            )  # a target may lie behind a window, never behind a document
            part = tokens[begin:last]
            if len(part) > 1:
                logits = model.logits(model(part[:-1], torch.tensor([0, len(part) - 1], dtype=torch.int32)))
                nats += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
                count += len(part) - 1
                num_bytes += int(TOKEN_BYTES[part[1:]].sum())
    assert (result.num_tokens, result.num_bytes) == (count, num_bytes)
    assert count == dataset.num_tokens - dataset.num_docs
    assert result.nats_per_token == pytest.approx(nats / count, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_every_byte_of_text_is_counted(dataset, tiny_model_config):
    """Only the first token of a document is not predicted, and it stands for no text."""
    result = evaluate(Transformer(tiny_model_config), dataset, 17, token_bytes=TOKEN_BYTES)
    assert result.num_bytes == TOKEN_BYTES[dataset.tokens].sum()


def test_max_tokens_cuts(dataset, tiny_model_config):
    result = evaluate(Transformer(tiny_model_config), dataset, 32, token_bytes=TOKEN_BYTES, max_tokens=100)
    assert 80 < result.num_tokens <= 100


def test_unigram_baseline_by_hand(dataset):
    train = np.array([3, 0, 1])
    held_out = np.array([1, 1, 0])
    result = unigram_baseline(train, held_out, token_bytes=np.array([2, 4, 1]))
    assert result.nats_per_token == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(-(math.log2(4 / 7) + math.log2(1 / 7)) / 6, rel=1e-12)


def test_token_counts(dataset):
    counts = token_counts(dataset, dataset.n_vocab, leave_out=(dataset.bos_id,))
    assert counts[dataset.bos_id] == 0
    assert counts[dataset.eos_id] == dataset.num_docs
    assert counts.sum() == dataset.num_tokens - dataset.num_docs


def test_nothing_to_predict_is_an_error(tiny_model_config):
    class One:
        num_tokens = 1

    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate(Transformer(tiny_model_config), One(), 8, token_bytes=TOKEN_BYTES)
    with pytest.raises(ValueError, match="one entry per token, got 2, 3, 3"):
        unigram_baseline(np.zeros(2, int), np.zeros(3, int), token_bytes=np.zeros(3, int))
    with pytest.raises(ValueError, match="must not be empty"):
        unigram_baseline(np.zeros(3, int), np.zeros(3, int), token_bytes=np.zeros(3, int))
