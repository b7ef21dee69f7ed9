"""A dataset in memory with the interface of TokenDataset, and a small run on it, for tests in many processes."""

import numpy as np

from herdkern.data.mix import TokenSampler
from herdkern.model.config import ModelConfig
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig

VOCAB = 61
BOS, EOS = 59, 60


class ArrayDataset:
    """Documents in memory; each counts upwards from a random start."""

    def __init__(self, num_docs: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        docs = [
            np.concatenate([[BOS], (rng.integers(0, 50) + np.arange(rng.integers(3, 40))) % 50, [EOS]])
            for _ in range(num_docs)
        ]
        self.tokens = np.concatenate(docs).astype(np.int64)
        self.borders = np.concatenate([[0], np.cumsum([len(d) for d in docs])])
        self.num_tokens = len(self.tokens)
        self.num_docs = num_docs
        self.n_vocab = VOCAB
        self.bos_id, self.eos_id = BOS, EOS

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        inside = self.borders[(self.borders > start) & (self.borders < start + length)] - start
        return self.tokens[start : start + length], np.concatenate([[0], inside, [length]]).astype(np.int32)


def sampler_of(seq_len: int = 32) -> TokenSampler:
    """Three of four sequences from one dataset."""
    sources = {"a": ArrayDataset(num_docs=120, seed=1), "b": ArrayDataset(num_docs=40, seed=2)}
    return TokenSampler(sources, {"a": 3, "b": 1}, seq_len=seq_len, seed=5)


PARALLEL_MODEL = ModelConfig(
    vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24, max_seq_len=64
)
PARALLEL_RUN = TrainConfig(
    steps=10,
    seq_len=32,
    batch_size=4,
    micro_batch_size=1,
    dtype="fp32",
    average_every_steps=2,
    schedule=ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=3, anneal_steps=5),
    checkpoint=CheckpointConfig(every_steps=0, keep_last=20),
)
