"""The memory estimate against the bytes of the tensors that live on real ranks of gloo groups while they train."""

import dataclasses

import numpy as np
import pytest
import torch
from live_bytes import peak_bytes

from herdkern.model import Transformer
from herdkern.model.config import nano
from herdkern.optim import AdamW
from herdkern.parallel import ParallelConfig, ParallelModel
from herdkern.parallel.data import local
from herdkern.parallel.layout import Layout
from herdkern.parallel.memory_estimate import estimate_memory
from herdkern.train.batch import build_batch
from herdkern.train.recompute import recompute_activations

pytestmark = pytest.mark.distributed
DEEP = dataclasses.replace(nano(512), max_seq_len=1024, num_layers=6)
FOUR_HEADS = dataclasses.replace(DEEP, num_heads=4, num_kv_heads=4, head_dim=16)
SMALL = dataclasses.replace(DEEP, num_layers=2)
TIED = dataclasses.replace(DEEP, tied_embeddings=True)
WIDE_VOCABULARY = dataclasses.replace(nano(6000), max_seq_len=1024)

FEW = {
    "dp2": (SMALL, {"dp": 2}, {"dtype": "fp32", "num_microbatches": 2}),
    "tp2": (SMALL, {"tp": 2}, {}),
    "cp2": (SMALL, {"cp": 2}, {"micro_batch_tokens": 1024}),
}
MANY = {
    "dp2-recompute-swiglu": (DEEP, {"dp": 2}, {"num_microbatches": 2, "recompute": "swiglu"}),
    "tp2-accumulate": (DEEP, {"tp": 2}, {"dtype": "fp32", "num_microbatches": 2}),
    "tp2-wide-vocabulary": (WIDE_VOCABULARY, {"tp": 2}, {"micro_batch_tokens": 128}),
    "tp2-tied-recompute-block": (TIED, {"tp": 2}, {"recompute": "block"}),
    "cp2-fp32-accumulate": (DEEP, {"cp": 2}, {"micro_batch_tokens": 1024, "dtype": "fp32", "num_microbatches": 2}),
    "pp2-tied": (TIED, {"pp": 2}, {"num_microbatches": 4}),
    "dp4": (DEEP, {"dp": 4}, {"num_microbatches": 2}),
    "dp4-tied-fp32": (TIED, {"dp": 4}, {"dtype": "fp32"}),
    "dp4-in-pairs": (DEEP, {"dp": 4, "dp_shard": 2}, {"num_microbatches": 2}),
    "dp4-copies": (DEEP, {"dp": 4, "dp_shard": 1}, {}),
    "dp4-copies-fp32": (DEEP, {"dp": 4, "dp_shard": 1}, {"dtype": "fp32"}),
    "tp4": (FOUR_HEADS, {"tp": 4}, {}),
    "cp4": (DEEP, {"cp": 4}, {"micro_batch_tokens": 1024}),
    "tp2-dp2": (DEEP, {"tp": 2, "dp": 2}, {"num_microbatches": 2}),
    "tp2-cp2": (DEEP, {"tp": 2, "cp": 2}, {"micro_batch_tokens": 1024}),
    "cp2-dp2": (TIED, {"cp": 2, "dp": 2}, {"micro_batch_tokens": 1024}),
    "cp2-pp2": (DEEP, {"cp": 2, "pp": 2}, {"micro_batch_tokens": 1024, "num_microbatches": 4}),
    "tp2-pp2-two-chunks": (DEEP, {"tp": 2, "pp": 2, "num_chunks": 2}, {"num_microbatches": 3}),
    "pp2-dp2-recompute-block": (DEEP, {"pp": 2, "dp": 2}, {"num_microbatches": 4, "recompute": "block"}),
    "tp2-pp2-dp2": (DEEP, {"tp": 2, "pp": 2, "dp": 2}, {"num_microbatches": 4}),
    "tp2-cp2-dp2": (DEEP, {"tp": 2, "cp": 2, "dp": 2}, {"micro_batch_tokens": 1024}),
}


def layout_of(axes, settings):
    return Layout(ParallelConfig(**axes), **{"micro_batch_tokens": 256, **settings})


def measured_bytes(rank, config, layout):
    """(bytes that live all the time, the most that a step adds to them)."""
    model = Transformer(config, compute_dtype=torch.bfloat16 if layout.dtype == "bf16" else torch.float32)
    recompute_activations(model, layout.recompute)
    parallel = ParallelModel(model, layout.axes)
    tables = list(model.buffers())
    del model  # the parts of other ranks go
    params = parallel.parameters()
    parts = [torch.nn.Parameter(local(param.detach())) for param in params]  # of the same memory
    optimizer = AdamW(parts)
    rng, tokens = np.random.default_rng(layout.axes.place(rank)["dp"]), layout.micro_batch_tokens
    borders = np.array([0, tokens + 1], np.int32)  # one document: context ranks have equal shares of it
    batches = [
        build_batch([(rng.integers(0, config.vocab_size, tokens + 1), borders)]) for _ in range(layout.num_microbatches)
    ]

    def step():
        parallel.step(batches)
        for part, param in zip(parts, params, strict=True):
            part.grad, param.grad = local(param.grad), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # moments exist from the second step on
    moments = [t for part in parts for t in optimizer.state[part].values() if t.ndim]
    ids = [t for batch in batches for t in (batch.tokens, batch.targets, batch.positions)]
    static = [*parts, *moments, *ids, *tables]
    return sum(t.numel() * t.element_size() for t in static), peak_bytes(step)


def differences(config, layout, found):
    """(estimate / measured - 1) in all and of what a step adds, for the fullest rank of each place in the pipeline.

    found: what `measured_bytes` returned on each rank.
    """
    fullest = {}
    for rank, (static, step) in enumerate(found):
        pp = layout.axes.place(rank)["pp"]
        fullest[pp] = max(fullest.get(pp, (0, 0)), (static, step), key=sum)
    for pp, (static, step) in fullest.items():
        (estimate,) = estimate_memory(config, layout, [pp])
        yield estimate.in_tensors / (static + step) - 1, (estimate.in_tensors - static) / step - 1


def check(worlds, case):
    config, layout = case[0], layout_of(*case[1:])
    found = worlds(layout.world_size).run(measured_bytes, config, layout)
    for in_all, of_step in differences(config, layout, found):
        assert abs(in_all) <= 0.1
        assert abs(of_step) <= 0.1


@pytest.mark.parametrize("name", FEW)
def test_estimate_is_within_a_tenth_of_the_measured_peak(worlds, name):
    check(worlds, FEW[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MANY)
def test_estimate_of_every_kind_of_layout(worlds, name):
    check(worlds, MANY[name])
