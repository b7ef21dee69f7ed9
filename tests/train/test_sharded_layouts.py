"""Saved on one layout, loaded on another: the same bits, while training goes on during the write."""

import numpy as np
import pytest
import sharded_jobs
from pipeline_cases import make_model

from herdkern.model.hf_weights import config_to_hf, hf_state
from herdkern.train import load_checkpoint, verify_checkpoint
from herdkern.train.checkpoint import save_checkpoint

pytestmark = pytest.mark.distributed
FEW = [
    (({"tp": 2, "dp": 2}, False), [{}, {"dp": 2}, {"dp": 3}, {"dp": 2, "tp": 2, "pp": 2}]),
    (({"pp": 2, "dp": 2}, True), [{}, {"dp": 3}]),
]
SAVED = [
    ({"tp": 2, "dp": 2}, True),
    ({"pp": 2, "dp": 2}, False),
    ({"pp": 2, "tp": 2, "num_chunks": 2}, False),
    ({"pp": 4}, True),
    ({"dp": 4, "dp_shard": 2}, False),
    ({"dp": 4, "dp_shard": 1}, True),
    ({"tp": 4}, False),
    ({"cp": 2, "tp": 2}, True),
    ({"cp": 2, "pp": 2}, False),
    ({"dp": 3}, False),
]
LOADED = [{}, {"dp": 2}, {"pp": 2}, {"dp": 3}, {"tp": 4}, {"dp": 4, "dp_shard": 2}, {"dp": 2, "tp": 2, "pp": 2}]
SECONDS = 250  # many ranks on few cores


def world_size(sizes):
    return int(np.prod([size for axis, size in sizes.items() if axis in ("tp", "cp", "pp", "dp")] or [1]))


def joined(answers):
    return {key: value for answer in answers for key, value in answer.items()}


def name_of(case):
    sizes, tied = case
    return "-".join(f"{name}{size}" for name, size in sizes.items()) + "-tied" * tied


@pytest.mark.parametrize(("saved", "loaded"), FEW, ids=[name_of(case) for case, _ in FEW])
def test_any_layout_loads_the_same_bits(worlds, saved, loaded, tmp_path):
    check(worlds, saved, loaded, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("saved", SAVED, ids=name_of)
def test_every_layout_loads_the_same_bits(worlds, saved, tmp_path):
    check(worlds, saved, LOADED, tmp_path)


def check(worlds, saved, loaded, root):
    sizes, tied = saved
    answers = worlds(world_size(sizes)).run(sharded_jobs.train_and_save, root, sizes, tied, seconds=SECONDS)
    expected = joined(answers)
    for other in loaded:
        answers = worlds(world_size(other)).run(sharded_jobs.load, root, other, tied, seconds=SECONDS)
        found = joined([tensors for tensors, _, _ in answers])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), key
        for rank, (_, state, rank_state) in enumerate(answers):
            assert state == {"step": 3}
            assert rank_state == ({"rng": rank} if world_size(other) == world_size(sizes) else None)
    one = load_checkpoint(root / "step-3")  # as a run of one process resumes
    for key, value in expected.items():
        stem, _, name = key.partition(".")
        if stem == "model" and not name.startswith("lm_head."):
            name = f"model.{name}"
        assert np.array_equal(one.tensors[stem][name].numpy(), value), key


def test_ranks_load_the_checkpoint_of_one(worlds, tmp_path):
    model = make_model(**sharded_jobs.SHAPE)
    moments = {
        f"{key}.{name}": (param if key != "step" else param.sum()).detach() * 3
        for name, param in model.named_parameters()
        for key in sharded_jobs.MOMENTS
    }
    tensors = {"model": hf_state(model), "optimizer": moments}
    folder = save_checkpoint(
        tmp_path, 5, tensors=tensors, state={"step": 5}, files={"config.json": config_to_hf(model.config)}
    )
    verify_checkpoint(folder)
    answers = worlds(2).run(sharded_jobs.load, tmp_path, {"tp": 2}, False, seconds=SECONDS)
    found = joined([got for got, _, _ in answers])
    for name, param in model.named_parameters():
        assert np.array_equal(found[f"model.{name}"], param.detach().numpy())
    for key, value in moments.items():
        assert np.array_equal(found[f"optimizer.{key}"], value.numpy()), key
    assert [(state, own) for _, state, own in answers] == [({"step": 5}, None)] * 2
