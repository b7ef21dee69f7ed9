"""The layout of ranks is the formula of the paper, as tables and as a DeviceMesh."""

import itertools
import time
from datetime import timedelta

import pytest
from ranks import SECONDS, RankFailure, Ranks

from herdkern.parallel import ParallelConfig


def layouts(most):
    for tp, cp, pp, dp in itertools.product(range(1, most + 1), repeat=4):
        if tp * cp * pp * dp <= most:
            yield ParallelConfig(tp=tp, cp=cp, pp=pp, dp=dp)


@pytest.mark.parametrize("most", [16, pytest.param(64, marks=pytest.mark.full)])
def test_ranks_and_groups_of_every_layout(most):
    for config in layouts(most):
        places = itertools.product(range(config.dp), range(config.pp), range(config.cp), range(config.tp))
        tables = {axes: {} for axes in (("tp",), ("cp",), ("pp",), ("dp",), ("dp", "cp"))}
        for rank, (dp, pp, cp, tp) in enumerate(places):
            assert rank == tp + config.tp * (cp + config.cp * (pp + config.pp * dp))
            place = {"dp": dp, "pp": pp, "cp": cp, "tp": tp}
            assert config.place(rank) == place
            assert config.rank(**place) == rank
            for axes, table in tables.items():
                table.setdefault(tuple(at for axis, at in place.items() if axis not in axes), []).append(rank)
        for axes, table in tables.items():
            assert config.groups(*axes) == [tuple(group) for group in table.values()]


def test_sixteen_ranks_of_the_paper():
    config = ParallelConfig(tp=2, cp=2, pp=2, dp=2)
    assert [config.groups(axis)[0] for axis in ("tp", "cp", "pp", "dp")] == [(0, 1), (0, 2), (0, 4), (0, 8)]
    assert config.groups("dp", "cp")[0] == (0, 2, 8, 10)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="ParallelConfig: cp must be at least 1, got 0"):
        ParallelConfig(cp=0)
    with pytest.raises(ValueError, match=r"dp_shard must be 0 \(all\) or divide dp=6, got 4"):
        ParallelConfig(dp=6, dp_shard=4)
    with pytest.raises(ValueError, match=r"microbatches_in_flight must be 0 \(chosen\) or more, got -1"):
        ParallelConfig(microbatches_in_flight=-1)
    with pytest.raises(ValueError, match=r"num_chunks must be 1 without a pipeline \(pp=1\), got 2"):
        ParallelConfig(num_chunks=2)
    config = ParallelConfig(tp=2, cp=3, pp=5, dp=7)
    message = r"tp=2 \* cp=3 \* pp=5 \* dp=7 = 210 must be the number of ranks, got 8; change one of the four"
    with pytest.raises(ValueError, match=message):
        config.check_world_size(8)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 210\), got 210"):
        config.place(210)
    with pytest.raises(ValueError, match=r"pp must lie in \[0, 5\), got 5"):
        config.rank(pp=5)
    with pytest.raises(ValueError, match="axes must be some of dp, pp, cp, tp, got ep"):
        config.groups("ep")
    assert config.num_shards == 7
    assert ParallelConfig(dp=6, dp_shard=3).num_shards == 3


def groups_of_mesh(rank, config):
    import torch.distributed as dist

    mesh = config.mesh()
    return {axis: tuple(dist.get_process_group_ranks(mesh.get_group(axis))) for axis in mesh.mesh_dim_names}


def waits_of_meshes(rank, config):
    import torch.distributed as dist

    from herdkern.parallel.group_timeout import timeout_of

    before = timeout_of(dist.new_group(list(range(dist.get_world_size()))))
    meshes = [config.mesh(), config.state_mesh()]
    waits = {timeout_of(mesh.get_group(axis)) for mesh in meshes for axis in mesh.mesh_dim_names}
    return before, waits, timeout_of(dist.new_group(list(range(dist.get_world_size()))))


def mesh_without_rank_1(rank, config):
    import torch.distributed as dist

    if rank == 1:
        time.sleep(SECONDS)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    config.mesh()


@pytest.mark.distributed
def test_groups_of_a_mesh_wait_as_long_as_the_run():
    """torch gives new groups 30 minutes; also while they are made, if a rank never comes."""
    config = ParallelConfig(pp=2, dp=2)
    with Ranks(4) as ranks:
        for before, waits, behind in ranks.run(waits_of_meshes, config):
            assert waits == {timedelta(seconds=SECONDS)}
            assert before == behind == timedelta(minutes=30)
        with pytest.raises(RankFailure) as failed:
            ranks.run(mesh_without_rank_1, config, seconds=30, lost=(1,))
        assert sorted(failed.value.said) == [0, 2, 3]
        assert all("RuntimeError" in said for said in failed.value.said.values())


@pytest.mark.distributed
def test_mesh_has_the_groups_of_the_table():
    with Ranks(4) as ranks:
        for config in (ParallelConfig(tp=2, pp=2), ParallelConfig(cp=2, dp=2), ParallelConfig(dp=4)):
            for rank, groups in enumerate(ranks.run(groups_of_mesh, config)):
                assert list(groups) == ["dp", "pp", "cp", "tp"]
                for axis, group in groups.items():
                    assert rank in group
                    assert group in config.groups(axis)
        with pytest.raises(RankFailure, match=r"pp=3 \* dp=1 = 3 must be the number of ranks, got 4"):
            ranks.run(groups_of_mesh, ParallelConfig(pp=3))
