"""Small deterministic pieces shared by the training tests: a dataset and a run on it."""

import pytest
from documents_in_memory import VOCAB, ArrayDataset

from herdkern.data.mix import TokenSampler
from herdkern.model.config import ModelConfig
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Of every test here."""


@pytest.fixture
def dataset() -> ArrayDataset:
    return ArrayDataset(num_docs=120, seed=1)


@pytest.fixture
def tiny_model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24, max_seq_len=64
    )


@pytest.fixture
def tiny_train_config() -> TrainConfig:
    return TrainConfig(
        steps=12,
        seq_len=32,
        batch_size=4,
        dtype="fp32",
        average_every_steps=2,
        schedule=ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=3, anneal_steps=6),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=2),
    )


@pytest.fixture
def sampler(dataset: ArrayDataset) -> TokenSampler:
    return TokenSampler({"a": dataset, "b": ArrayDataset(num_docs=40, seed=2)}, {"a": 3, "b": 1}, seq_len=32, seed=5)
