"""Documents -> tokenizer -> token shards -> sampler -> training -> held-out loss under the unigram baseline."""

import argparse
import inspect
import json
import textwrap

import numpy as np
import pytest

from herdkern.data.document import Document, write_documents
from herdkern.data.mix import TokenSampler
from herdkern.data.pack import PackConfig, TokenDataset, pack_documents
from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer
from herdkern.tokenizer import train_bpe
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig
from herdkern.train.evaluate import evaluate, token_counts, unigram_baseline
from herdkern.train.trainer import PackedBatches, Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Library source in 2 kB documents as train and held-out shards, and the tokenizer."""
    root = tmp_path_factory.mktemp("shards")
    pieces = textwrap.wrap(
        "".join(inspect.getsource(m) for m in (argparse, json, textwrap, inspect)), 2000, replace_whitespace=False
    )
    tokenizer = train_bpe(pieces, 512)
    tokenizer.save(root / "tokenizer")
    for name, part in (("train", [p for i, p in enumerate(pieces) if i % 8]), ("heldout", pieces[::8])):
        documents = [
            Document(id=f"{i:016x}", text=text, url="", source="code", lang="en", timestamp=0, record=f"{name}#{i}")
            for i, text in enumerate(part)
        ]
        write_documents(root / f"{name}.jsonl.zst", documents)
        pack_documents(root / "tokenizer", [root / f"{name}.jsonl.zst"], root / name, PackConfig())
    return root, tokenizer


def open_shards(folder):
    return TokenDataset(sorted(folder.glob("shard-*")) or [folder])


def test_training_beats_the_unigram_baseline(shards, tmp_path):
    root, tokenizer = shards
    train, held_out = open_shards(root / "train"), open_shards(root / "heldout")
    config = TrainConfig(
        steps=60,
        seq_len=128,
        batch_size=8,
        schedule=ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=5, anneal_steps=15),
        checkpoint=CheckpointConfig(every_steps=0),
        average_every_steps=3,
    )
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.n_vocab, dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_dim=208
        )
    )
    sampler = TokenSampler({"code": train}, {"code": 1}, config.seq_len, config.seed)
    trainer = Trainer(model, config, PackedBatches(sampler, config), tmp_path)
    trainer.fit()
    token_bytes = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)])
    token_bytes[[tokenizer.bos_id, tokenizer.eos_id]] = 0
    counts = [token_counts(d, tokenizer.n_vocab, leave_out=(tokenizer.bos_id,)) for d in (train, held_out)]
    unigram = unigram_baseline(*counts, token_bytes=token_bytes)
    ours = evaluate(model, held_out, 128, token_bytes=token_bytes)
    assert ours.num_bytes == unigram.num_bytes == held_out.text_bytes
    assert ours.num_tokens == unigram.num_tokens
    assert ours.bits_per_byte < 0.9 * unigram.bits_per_byte
    trainer.average.copy_to(model)
    assert evaluate(model, held_out, 128, token_bytes=token_bytes).bits_per_byte < 0.9 * unigram.bits_per_byte


def test_batches_hold_the_text_of_the_shards(shards):
    root, tokenizer = shards
    train = open_shards(root / "train")
    config = TrainConfig(seq_len=128, batch_size=4)
    sampler = TokenSampler({"code": train}, {"code": 1}, 128, 0)
    batch = PackedBatches(sampler, config).batch(5, 1)
    place = sampler.place(5)
    stream, _ = train.window(place.start, 129)
    assert batch.tokens.tolist() == stream[:-1].tolist()
    _, info = train.locate(place.start)
    assert info["source"] == "code"
    starts = batch.cu_seqlens[:-1].tolist()
    assert all(batch.tokens[s] == tokenizer.bos_id for s in starts[1:])
    assert not (batch.targets == tokenizer.bos_id).any()  # no document is predicted from the end of another
