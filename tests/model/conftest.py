"""A small model whose sizes are all different, so that a swapped one shows."""

import pytest

from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=97,
    dim=24,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    max_seq_len=128,
    init_std=0.2,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Of every test here."""


@pytest.fixture
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture
def small_model() -> Transformer:
    return Transformer(SMALL, seed=1)
