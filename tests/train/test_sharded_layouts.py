"""Saved on one layout, loaded on another: the same bits, while training goes on during the write."""

import numpy as np
import pytest
import sharded_jobs
from ranks import Ranks

pytestmark = pytest.mark.distributed
FEW = [({"tp": 2, "dp": 2}, False), ({"pp": 2, "dp": 2}, True)]
MORE = [
    ({"pp": 2, "tp": 2, "num_chunks": 2}, False),
    ({"pp": 4}, True),
    ({"dp": 4, "dp_shard": 2}, False),
    ({"tp": 4}, False),
    ({"cp": 2, "tp": 2}, True),
]
LOADED = [{}, {"dp": 2}, {"dp": 3}, {"dp": 2, "tp": 2, "pp": 2}]


@pytest.fixture(scope="module")
def worlds():
    """Processes by their number."""
    started = {}

    def of(size):
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield of
    for ranks in started.values():
        ranks.close()


def world_size(sizes):
    return int(np.prod([size for axis, size in sizes.items() if axis in ("tp", "cp", "pp", "dp")] or [1]))


def joined(answers):
    return {key: value for answer in answers for key, value in answer.items()}


def name_of(case):
    sizes, tied = case
    return "-".join(f"{name}{size}" for name, size in sizes.items()) + "-tied" * tied


@pytest.mark.parametrize("saved", FEW, ids=name_of)
def test_any_layout_loads_the_same_bits(worlds, saved, tmp_path):
    check(worlds, saved, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("saved", MORE, ids=name_of)
def test_more_layouts_load_the_same_bits(worlds, saved, tmp_path):
    check(worlds, saved, tmp_path)


def check(worlds, saved, tmp_path):
    sizes, tied = saved
    expected = joined(worlds(world_size(sizes)).run(sharded_jobs.train_and_save, tmp_path, sizes, tied))
    for other in LOADED:
        answers = worlds(world_size(other)).run(sharded_jobs.load, tmp_path, other, tied)
        found = joined([tensors for tensors, _, _ in answers])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), key
        for rank, (_, state, rank_state) in enumerate(answers):
            assert state == {"step": 3}
            assert rank_state == ({"rng": rank} if world_size(other) == world_size(sizes) else None)
