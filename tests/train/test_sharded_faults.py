"""Sharded checkpoints are complete or absent: failing writes, killed ranks, damaged files, on all ranks alike."""

import json
import random
import shutil
import time

import pytest
import sharded_jobs
import torch
import torch.distributed.checkpoint as dcp
from ranks import RankFailure, Ranks
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from herdkern.train import CorruptCheckpointError, latest_checkpoint, load_checkpoint, verify_checkpoint
from herdkern.train.checkpoint import checkpoint_folders

pytestmark = pytest.mark.distributed
SHARD, OTHER = "shard-00001-of-00002.safetensors", "shard-00000-of-00002.safetensors"


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def saved(two, tmp_path_factory):
    """Two good checkpoints of two ranks."""
    root = tmp_path_factory.mktemp("saved")
    two.run(sharded_jobs.save_steps, root, [1, 2])
    return root


def flip(path, offset, mask=1):
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= mask
    path.write_bytes(data)


DAMAGES = {
    "bit": (lambda f: flip(f / SHARD, 3000), f"{SHARD} is damaged between bytes 0 and"),
    "header": (lambda f: flip(f / OTHER, 20), f"{OTHER} is damaged between bytes 0 and"),
    "torn": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:100]), f"{SHARD} must have .* got 100"),
    "grown": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"a"), f"{SHARD} must have"),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD} must be there"),
    "older": (lambda f: shutil.copy(f.parent / "step-1" / SHARD, f), f"{SHARD} is damaged"),
    "swapped": (lambda f: shutil.copy(f / OTHER, f / SHARD), f"{SHARD} (is damaged|must have)"),
    "foreign": (lambda f: shutil.copy(f / OTHER, f / "x.safetensors"), r"x\.safetensors must not be there"),
    "random state": (lambda f: flip(f / "rank-00001-of-00002.json", 3), r"rank-00001-of-00002\.json is damaged"),
    "state": (lambda f: flip(f / "state.json", 5), r"state\.json is damaged"),
    "manifest": (lambda f: forge(f, ranks=3), r"manifest\.json is damaged \(its own checksum differs\)"),
    "torn manifest": (lambda f: (f / "manifest.json").write_bytes(b'{"files'), "must be a checkpoint manifest"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "must be a checkpoint manifest"),
}


def forge(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(saved, tmp_path, damage):
    root = shutil.copytree(saved, tmp_path / "root")
    break_it, message = DAMAGES[damage]
    break_it(root / "step-2")
    with pytest.raises(CorruptCheckpointError, match=message):
        verify_checkpoint(root / "step-2")
    with pytest.warns(UserWarning, match=message):
        assert latest_checkpoint(root) == root / "step-1"
    assert load_checkpoint(root / "step-1").state == {"step": 1}


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_pass_over_what_one_has_found(two, saved, tmp_path, rank):
    root = shutil.copytree(saved, tmp_path / "root")
    manifest = json.loads((root / "step-2" / "manifest.json").read_text())
    order = sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["bytes"], name))
    flip(root / "step-2" / order[rank], 3)  # which that rank looks at
    assert two.run(sharded_jobs.latest, root) == [root / "step-1"] * 2
    assert two.run(sharded_jobs.load_rows, root / "step-1") == [1, 1]
    said = two.run(sharded_jobs.load_rows, root / "step-2")
    assert said[0] == said[1]
    assert f"{order[rank]} is damaged" in said[0]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(60))
def test_sixty_corruptions(saved, tmp_path, seed):
    rng = random.Random(seed)
    root = shutil.copytree(saved, tmp_path / "root")
    path = rng.choice(sorted((root / "step-2").iterdir()))
    data = path.read_bytes()
    at = rng.randrange(len(data))
    length = min(rng.choice([1, 7, 512]), len(data) - at)
    broken = [
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        data[:at] + bytes(b ^ 0xFF for b in data[at : at + length]) + data[at + length :],
        data[:at],
        data[:at] + data[at + length :],
        data[:at] + rng.randbytes(length) + data[at:],
        b"",
    ][seed % 6]
    path.write_bytes(broken)
    with pytest.raises(CorruptCheckpointError):
        verify_checkpoint(root / "step-2")
    with pytest.warns(UserWarning, match="passing over"):
        assert latest_checkpoint(root) == root / "step-1"


def test_nothing_on_disk_is_a_pickle_and_torch_reads_the_shards(saved):
    folder = saved / "step-2"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "rank-00000-of-00002.json",
        "rank-00001-of-00002.json",
        OTHER,
        SHARD,
        "state.json",
    ]
    found = {"model.a": torch.zeros(6, 5), "model.b": torch.zeros(700)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(found["model.a"], torch.full((6, 5), 2.0))
    assert torch.equal(found["model.b"], torch.full((700,), 2.0))


@pytest.mark.parametrize(("who", "limit"), [(1, 2000), (0, 1100)], ids=["other", "first"])
def test_a_write_that_fails_on_one_rank_fails_on_all(two, tmp_path, who, limit):
    said = two.run(sharded_jobs.save_with_small_files, tmp_path, who, limit)
    assert said[0] == said[1]
    before, failed, after = said[0]
    assert (before, after) == ("", "")
    assert f"step-2 failed on 1 of 2 ranks; rank {who}" in failed
    assert "File too large" in failed
    assert str(tmp_path / "step-2.tmp") in failed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]
    verify_checkpoint(tmp_path / "step-1")
    verify_checkpoint(tmp_path / "step-3")


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Ranks(2) as ranks, pytest.raises(RankFailure) as failure:
        ranks.run(sharded_jobs.save_steps, tmp_path / "file" / "root", [1])
    for rank in range(2):
        assert "OSError: Saver" in failure.value.said[rank]
        assert "Not a directory" in failure.value.said[rank]
        assert str(tmp_path / "file" / "root") in failure.value.said[rank]


def test_what_one_rank_gives_wrongly_is_told_to_all(two, tmp_path):
    said = two.run(sharded_jobs.wrong_calls, tmp_path)
    assert said[0] == said[1]
    bad_json, bad_stem, missing = said[0]
    assert "rank 1: rank-00001-of-00002.json must be JSON, got Out of range float values" in bad_json
    assert "a stem must be a word without dots, got 'a.b'" in bad_stem
    assert "model.a" in missing
    assert "invalid fill" in missing
    verify_checkpoint(tmp_path / "step-1")


def test_tensors_are_not_sent(two, tmp_path):
    assert all(0 < size < 10_000 for size in two.run(sharded_jobs.bytes_sent, tmp_path))
    assert (tmp_path / "step-2" / SHARD).stat().st_size > 2_000_000


def test_the_newest_stay(two, tmp_path):
    (tmp_path / "step-9.tmp").mkdir()  # what a kill left
    for keep_last, steps in ((3, [1, 2, 3, 4]), (1, [5])):
        two.run(run_keeping, tmp_path, steps, keep_last)
        assert [p.name for p in checkpoint_folders(tmp_path)] == [f"step-{n}" for n in steps[-keep_last:]]
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]


def run_keeping(rank, root, steps, keep_last):
    sharded_jobs.save_steps(rank, root, steps, keep_last=keep_last, background=False)


POINTS = {
    "shard": (1, "sync", 1),  # phase 1: written, not synced
    "before manifest": (0, "_check_visible", 1),
    "before rename": (0, "replace_folder", 1),
    "after rename": (0, "prune_checkpoints", 2),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_rank_leaves_the_checkpoint_before(two, tmp_path, point):
    who, where, newest = POINTS[point]
    with Ranks(2) as ranks:
        with pytest.raises(RankFailure) as failure:
            ranks.run(sharded_jobs.die_at, tmp_path, who, where, [1, 2])
        assert list(failure.value.said) == [who]  # the other was told by `wait`
    assert latest_checkpoint(tmp_path) == tmp_path / f"step-{newest}"
    assert two.run(sharded_jobs.latest, tmp_path) == [tmp_path / f"step-{newest}"] * 2
    two.run(sharded_jobs.save_steps, tmp_path, [3])
    assert [p.name for p in checkpoint_folders(tmp_path)] == [f"step-{newest}", "step-3"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.full
@pytest.mark.parametrize("piece", range(10))
def test_a_hundred_kills(tmp_path, piece):
    """Ten kills of a rank at any time, each after a resume from what the one before left."""
    rng = random.Random(piece)
    saved = 0
    for _ in range(10):
        with Ranks(2) as ranks:
            started = time.time()
            for connection in ranks.connections:
                connection.send((sharded_jobs.go_on, (tmp_path, started + 100)))
            while not newer(tmp_path, saved) and time.time() < started + 60:
                time.sleep(0.01)  # until this life has saved something
            time.sleep(rng.random() * 0.05)
            ranks.processes[rng.randrange(2)].kill()
        folder = latest_checkpoint(tmp_path)
        known = max((int(path.read_text() or 0) for path in tmp_path.glob("saved-*")), default=0)
        step = load_checkpoint(folder).state["step"]
        assert step >= max(known, saved + 1)
        saved = step
    with Ranks(3) as ranks:  # and on another number of ranks
        assert ranks.run(sharded_jobs.latest, tmp_path) == [folder] * 3


def newer(root, step):
    return any(int(path.name.removeprefix("step-")) > step for path in checkpoint_folders(root))
