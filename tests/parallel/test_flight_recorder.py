"""The flight recorder on real gloo ranks: what is noted, what is left when a rank dies, and who is named."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, Ranks
from torch.distributed import _functional_collectives as functional

from herdkern.parallel.flight_recorder import FlightRecorder
from herdkern.parallel.flight_ring import ENDED, WAITING, read_ring, read_rings, ring_folder
from herdkern.parallel.flight_verdict import judge
from herdkern.parallel.heartbeat import Heartbeat, read_beats

pytestmark = pytest.mark.distributed
RECORDERS = []


def start(rank, folder, slots=1 << 10):
    RECORDERS[:] = [FlightRecorder(folder / f"rank-{rank}.ring", rank, dist.get_world_size(), slots)]
    RECORDERS[0].start()


def step(number):
    RECORDERS[0].ring.set_step(number)


def every_kind(rank, folder):
    start(rank, folder)
    size = dist.get_world_size()
    x, whole = torch.ones(6), torch.zeros(6 * size)
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    dist.all_gather_into_tensor(whole, x)
    dist.reduce_scatter_tensor(x, whole)
    dist.all_to_all_single(torch.zeros(2 * size), torch.ones(2 * size))
    dist.all_gather([torch.zeros(6) for _ in range(size)], x)
    dist.barrier()
    work = dist.all_reduce(torch.ones(3, dtype=torch.float64), async_op=True)
    work.wait()
    functional.wait_tensor(functional.all_reduce(x, "sum", dist.group.WORLD))
    if rank == 0:
        dist.send(x, 1, tag=5)
    elif rank == 1:
        dist.recv(x, 0, tag=5)
    RECORDERS[0].stop()
    dist.all_reduce(x)  # as if there had been no recorder


def test_every_kind_of_call_is_noted_with_its_place_and_end(tmp_path):
    with Ranks(2) as ranks:
        ranks.run(every_kind, tmp_path)
    rings = read_rings(tmp_path)
    for rank, ring in rings.items():
        ops = [ring.name(n) for n in ring.records["op"]]
        assert ops == [
            *("all_reduce", "broadcast", "all_gather_single", "reduce_scatter_single", "all_to_all_single"),
            *("all_gather", "barrier", "all_reduce", "all_reduce", ["send", "recv"][rank]),
        ]
        assert ring.records["numel"].tolist() == [6, 6, 6, 6, 4, 6, 0, 3, 6, 6]
        assert ring.records["seq"].tolist() == [*range(9), 0]
        assert set(ring.records["state"].tolist()) == {ENDED}
        assert (ring.records["ended"] >= ring.records["enqueued"]).all()
        places = {str(ring.name(n)) for n in ring.records["place"]}
        assert all(p.startswith(f"{__file__}:") and p.endswith(" in every_kind") for p in places)
        assert len(places) == 10
        assert ring.name(ring.records["dtype"][7]) == "float64"
    assert judge(rings).kind == "none"


def heartbeat_without_room(rank, folder):
    room, os.posix_fallocate = os.posix_fallocate, full
    try:
        with pytest.warns(UserWarning, match=f"no flight recorder for rank {rank}: .*No space left"):
            Heartbeat(folder, rank).beat(step=1, phase="step")
        return [path.name for path in ring_folder(folder).iterdir()], step_of(folder, rank)
    finally:
        os.posix_fallocate = room


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def step_of(folder, rank):
    return read_beats(folder)[rank].step


def heartbeat_to_the_end(rank, folder):
    heartbeat = Heartbeat(folder, rank)
    dist.barrier()
    noted = read_ring(ring_folder(folder) / f"rank-{rank}.ring").records["op"].size
    heartbeat.close()
    dist.barrier()  # not noted
    return noted, ring_folder(folder).exists()


def test_no_room_is_no_reason_to_stop_and_the_end_of_a_run_leaves_none_used(tmp_path):
    with Ranks(2) as ranks:
        assert ranks.run(heartbeat_without_room, tmp_path / "full") == [([], 1)] * 2
        assert ranks.run(heartbeat_to_the_end, tmp_path / "run") == [(1, False)] * 2
    ring_folder(tmp_path / "full").rmdir()


def test_a_ring_keeps_the_newest(tmp_path):
    with Ranks(1) as ranks:
        ranks.run(many, tmp_path)
    ring = read_ring(tmp_path / "rank-0.ring")
    assert ring.records["seq"].tolist() == list(range(100 - 32, 100))


def many(rank, folder):
    start(rank, folder, slots=32)
    for _ in range(100):
        dist.all_reduce(torch.ones(1))


def training(rank, fault, size):
    """Three collectives a step, one of them at fault in step 3 (or in the first)."""
    for number in range(5):
        step(number)
        now = number == 3
        if not (now and fault == "skip" and rank == size - 1):
            dist.all_reduce(torch.ones(8192))
        odd = 4096 if now and fault == "size" and rank == 1 else 8192
        dist.all_reduce(torch.ones(odd))
        if now and fault == "extra" and rank == 1:
            dist.all_reduce(torch.ones(7))
        if now and fault == "sleep" and rank == 1:
            time.sleep(30)
        if now and fault == "kill" and rank == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()
        for _ in range(2):
            if now and fault == "skip the same" and rank == size - 1:
                now = False
                continue
            dist.all_reduce(torch.ones(16))


def stuck(size, folder, function, *args):
    """The rings of ranks that run `function` and come to no end: read when nothing has moved for a second."""
    with Ranks(size) as ranks, ThreadPoolExecutor(1) as pool:
        end = pool.submit(ranks.run, function, folder, *args)
        until, before, still = time.monotonic() + 45, None, 0
        while still < 4 and time.monotonic() < until:
            time.sleep(0.25)
            rings = read_rings(folder)
            now = [(ring.step, len(ring.records)) for ring in rings.values()]
            still = still + 1 if len(now) == size and now == before and all(n for _, n in now) else 0
            before = now
        for process in ranks.processes:
            process.kill()
        with pytest.raises(RankFailure):
            end.result()
        return read_rings(folder)


def faulty(rank, folder, fault):
    start(rank, folder)
    training(rank, fault, dist.get_world_size())


CASES = {
    "skip": ("skipped", lambda size: size - 1),
    "size": ("size", lambda size: 1),
    "extra": ("extra", lambda size: 1),
    "sleep": ("absent", lambda size: 1),
    "skip the same": ("skipped", lambda size: size - 1),
}


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        pytest.param(fault, size, marks=[] if size == 3 and fault in ("skip", "size") else pytest.mark.full)
        for fault in CASES
        for size in (2, 3, 4)
    ],
)
def test_the_rank_at_fault_is_named(tmp_path, fault, size):
    kind, culprit = CASES[fault]
    verdict = judge(stuck(size, tmp_path, faulty, fault))
    assert (verdict.kind, verdict.ranks) == (kind, (culprit(size),)), verdict.line
    assert __file__ in verdict.line
    assert "\n" not in verdict.line


@pytest.mark.full
def test_a_killed_rank_leaves_its_ring(tmp_path):
    rings = stuck(3, tmp_path, faulty, "kill")
    assert rings[1].step == 3
    assert rings[1].name(rings[1].records["op"][-1]) == "all_reduce"
    verdict = judge(rings, {1: "was killed by SIGKILL"})
    assert verdict.ranks == (1,)
    assert verdict.line.startswith("rank 1 was killed by SIGKILL; ")


def one_sided(rank, folder):
    start(rank, folder)
    dist.barrier()
    if rank == 0:
        dist.recv(torch.zeros(5), 1, tag=3)
    time.sleep(30)


@pytest.mark.full
def test_a_transfer_that_nobody_sends(tmp_path):
    rings = stuck(2, tmp_path, one_sided)
    assert rings[0].records["state"].tolist() == [ENDED, WAITING]
    verdict = judge(rings)
    assert (verdict.kind, verdict.ranks) == ("unsent", (1,)), verdict.line
