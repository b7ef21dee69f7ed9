"""Stragglers, on synthetic arrivals: a late rank is found within 50 steps, nobody is named for chance."""

import json

import numpy as np
import pytest

from herdkern.parallel.flight_ring import RingWriter, read_rings
from herdkern.parallel.stragglers import StragglerWatch, late_rank, read_stragglers

STEP = 0.1


def lateness(rng, ranks, noise, slow=None, extra=0.0, steps=50):
    """Steps whose work takes STEP with lognormal noise (a long tail, as machines have), one rank slower by `extra`."""
    work = STEP * rng.lognormal(0.0, noise, (steps, ranks))
    if slow is not None:
        work[:, slow] *= 1 + extra
    return work - work.min(axis=1, keepdims=True)


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize(("noise", "least"), [(0.01, 100), (0.05, 100), (0.1, 85)])
def test_a_rank_that_is_slower_by_15_percent_is_found_within_50_steps(ranks, noise, least):
    rng = np.random.default_rng(1)
    found = [late_rank(lateness(rng, ranks, noise, slow=ranks - 1, extra=0.15), STEP) for _ in range(100)]
    assert sum(one is not None and one[0] == ranks - 1 for one in found) >= least
    assert np.mean([one[1] for one in found if one is not None]) == pytest.approx(0.15 * STEP, rel=0.25)


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_at_most_one_window_in_a_hundred_names_somebody_for_chance(ranks, noise):
    rng = np.random.default_rng(2)
    named = sum(late_rank(lateness(rng, ranks, noise), STEP) is not None for _ in range(1000))
    assert named <= 10


def test_a_steady_difference_of_microseconds_is_no_straggler():
    rng = np.random.default_rng(3)
    assert late_rank(lateness(rng, 4, 0.001, slow=2, extra=0.02), STEP) is None


def test_one_stall_is_no_straggler():
    rng = np.random.default_rng(4)
    table = lateness(rng, 4, 0.02)
    table[10:20, 1] += 10 * STEP
    assert late_rank(table, STEP) is None


def test_few_steps_or_ranks_name_nobody():
    late = np.tile([0.0, STEP], (50, 1))
    assert late_rank(late[:7], STEP) is None
    assert late_rank(late[:, 1:], STEP) is None
    assert late_rank(late, STEP)[0] == 1


def write_rings(folder, ranks, steps, slow, extra):
    """Rings of ranks with two collectives a step in one group; the slow rank is late at the second of them."""
    rng = np.random.default_rng(5)
    for rank in range(ranks):
        ring = RingWriter(folder / f"rank-{rank}.ring", rank, ranks)
        group = ring.name("group", "7", {"name": "7", "about": "dp", "ranks": list(range(ranks))})
        op = ring.name("op", "all_reduce", "all_reduce")
        for step in range(steps):
            ring.set_step(step)
            for half in (0, 1):
                late = (extra * STEP if rank == slow and half else 0.0) + rng.uniform(0, 0.01 * STEP)
                when = int(1e9 * (1000 + (step + half / 2) * STEP + late))
                ring.append((2 * step + half, step, group, op, 0, 0, -1, 2, 0, 1, 8, when, when + 1, 8, 0))


def test_the_watch_writes_a_line_for_each_window(tmp_path):
    write_rings(tmp_path / "rings", 3, 60, slow=1, extra=0.15)
    watch = StragglerWatch(tmp_path)
    (found,) = watch.look(read_rings(tmp_path / "rings"))
    assert (found.rank, found.group, found.step) == (1, "dp", 58)
    assert found.share == pytest.approx(0.15, abs=0.02)
    assert watch.look(read_rings(tmp_path / "rings")) == []  # nothing new
    assert read_stragglers(tmp_path) == [found]
    assert json.loads((tmp_path / "stragglers.jsonl").read_text())["time"] > 1e9
    write_rings(tmp_path / "rings", 3, 120, slow=None, extra=0.0)
    assert watch.look(read_rings(tmp_path / "rings")) == []


def test_a_window_that_is_not_full_yet(tmp_path):
    write_rings(tmp_path / "rings", 3, 40, slow=1, extra=0.5)
    assert StragglerWatch(tmp_path).look(read_rings(tmp_path / "rings")) == []
