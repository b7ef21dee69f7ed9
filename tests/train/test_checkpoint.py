"""Checkpoints are complete or absent; damage is found and named; the newest intact one is taken."""

import errno
import json
import os

import pytest
import torch

from herdkern.train import checkpoint as module
from herdkern.train.checkpoint import (
    CorruptCheckpointError,
    checkpoint_folders,
    latest_checkpoint,
    load_checkpoint,
    manifest_sha256,
    save_checkpoint,
    verify_checkpoint,
)


def save(root, step, **kwargs):
    tensors = {
        "model": {"weight": torch.full((300, 1000), float(step))},
        "optimizer": {"step.weight": torch.tensor(1.0)},
    }
    return save_checkpoint(root, step, tensors=tensors, state={"step": step}, files={"config.json": {"a": 1}}, **kwargs)


def test_what_is_saved_is_loaded(tmp_path):
    folder = save(tmp_path, 7)
    loaded = load_checkpoint(folder)
    assert loaded.state == {"step": 7}
    assert torch.equal(loaded.tensors["model"]["weight"], torch.full((300, 1000), 7.0))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_steps_are_ordered_by_number_and_pruned(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep_last=3)
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step-9", "step-10", "step-11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-11"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11", "step-9"]


def test_what_is_written_behind_a_damaged_one_stays(tmp_path):
    """A run that went back writes the steps before the damaged one again."""
    (save(tmp_path, 30, keep_last=1) / "state.json").write_text("{}")
    for step in (10, 20):
        save(tmp_path, step, keep_last=1)
        with pytest.warns(UserWarning, match="passing over"):
            assert latest_checkpoint(tmp_path) == tmp_path / f"step-{step}"
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step-20", "step-30"]
    save(tmp_path, 30, keep_last=1)
    assert [p.name for p in checkpoint_folders(tmp_path)] == ["step-30"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-30"


def test_there_may_be_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_an_unfinished_one_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-2.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1"
    (tmp_path / "step-1.old.tmp").mkdir()
    save(tmp_path, 3)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]  # and the debris is gone


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip(f / "model.safetensors", 1_100_000),
            r"model\.safetensors is damaged between bytes 1048576 and 12",
        ),
        (lambda f: flip(f / "model.safetensors", 3), r"model\.safetensors is damaged between bytes 0 and 1048576"),
        (lambda f: flip(f / "state.json", 2), r"state\.json is damaged between bytes 0 and "),
        (lambda f: truncate(f / "optimizer.safetensors", 50), r"optimizer\.safetensors must have \d+ bytes, got 50"),
        (lambda f: (f / "optimizer.safetensors").unlink(), r"optimizer\.safetensors must be there"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json must be a checkpoint manifest"),
        (lambda f: truncate(f / "manifest.json", 100), r"manifest\.json must be a checkpoint manifest"),
        (lambda f: (f / "manifest.json").write_text('{"files": {}, "block_bytes": 1}'), r"must list state\.json"),
    ],
    ids=["block", "header", "state", "truncated", "missing", "no-manifest", "torn-manifest", "empty-manifest"],
)
def test_damage_is_named_and_passed_over(tmp_path, damage, message):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder)
    with pytest.raises(CorruptCheckpointError, match=message):
        verify_checkpoint(folder)
    with pytest.raises(CorruptCheckpointError, match=message):
        load_checkpoint(folder)
    with pytest.warns(UserWarning, match=message):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-1"


def change_manifest(folder, **changes):
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest["sha256"] = manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.json"])
def test_a_flipped_bit_of_a_text_is_found(tmp_path, name):
    path = save(tmp_path, 1) / name
    data = path.read_bytes()
    for i in range(0, len(data), 3):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        with pytest.raises(CorruptCheckpointError, match=name):
            verify_checkpoint(path.parent)
    path.write_bytes(data)
    verify_checkpoint(path.parent)


def test_a_manifest_from_before_it_had_a_checksum_is_read(tmp_path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(folder).state == {"step": 3}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha257": "0"}))
    with pytest.raises(CorruptCheckpointError, match="its own checksum differs"):
        load_checkpoint(folder)


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    folder = save(tmp_path / "root", 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (tmp_path / "root" / "outside").write_text("")
    change_manifest(folder, files={**files, "../outside": {"bytes": 0, "sha256": "", "block_crc32": []}})
    with pytest.raises(CorruptCheckpointError, match="outside must be there"):
        verify_checkpoint(folder)


def test_another_version_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    change_manifest(folder, version=99)
    with pytest.raises(ValueError, match="got version 99"):
        load_checkpoint(folder)


@pytest.mark.parametrize("call", ["fsync", "rename", "save_file"])
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch, call):
    save(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module if call == "save_file" else os, call, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert load_checkpoint(tmp_path / "step-1").state == {"step": 1}
