import os
import resource
from pathlib import Path

import pytest

from herdkern.engine import atomic_file, read_json, sha256_file, shards, write_json_atomic
from herdkern.engine.shards import describe, replace_folder, seal_folder, sealed_later, verified


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(b"\0" * (3 << 20))
    import hashlib

    assert sha256_file(tmp_path / "big") == hashlib.sha256(b"\0" * (3 << 20)).hexdigest()


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "out.bin"
    with atomic_file(path) as f:
        f.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_file(path, "w") as f:
        f.write(b"bytes into a text file")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    (tmp_path / "out.bin.tmp").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    with pytest.raises(OSError, match="No space left on device"), atomic_file(path) as f:
        f.write(b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]


def test_a_file_size_limit_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), atomic_file(path) as f:
            f.write(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "x") as f:
        f.write(b"")


def test_other_modes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mode must be 'wb' or 'w', got 'a'"), atomic_file(tmp_path / "x", "a"):
        pass


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None, "é\n"], "a": {"x": True}}
    write_json_atomic(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text().startswith('{\n  "a"')


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_what_is_no_json_is_refused_and_the_old_file_stays(tmp_path, value):
    write_json_atomic(tmp_path / "x.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json_atomic(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff{}", b"{'a': 1}"])
def test_a_bad_json_file_is_named(tmp_path, data):
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"read_json: .*bad\.json must hold UTF-8 JSON"):
        read_json(tmp_path / "bad.json")


def make_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "sub" / "b").write_text("22")
    return folder


def test_a_sealed_folder_is_intact_until_it_changes(tmp_path):
    folder = make_folder(tmp_path / "f")
    records = seal_folder(folder)
    assert [(r.name, r.bytes) for r in records] == [("a", 1), ("sub/b", 2)]
    assert verified(folder, records) == records
    (folder / "sub" / "b").write_text("2x")
    assert verified(folder, records) is None
    (folder / "sub" / "b").write_text("22")
    assert verified(folder, records) == records
    (folder / "c").write_text("")
    assert verified(folder, records) is None
    assert verified(tmp_path / "gone", records) is None


@pytest.mark.parametrize("written", [3, 100, 1 << 20])  # by one call of the system, at most
def test_what_is_hashed_while_it_is_written_is_not_read_again(tmp_path, monkeypatch, written):
    calls = []

    def writev(descriptor, parts):
        calls.append(len(parts))
        return os.write(descriptor, b"".join(parts)[:written])

    def refuse(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(shards.os, "writev", writev)
    parts = [b"x" * 50, b"", memoryview(b"yz"), *([b"ab"] * 2500)]
    with sealed_later() as hashed:
        for name in ("a", "changed"):
            with atomic_file(tmp_path / name, hashed=True) as f:
                f.write(b"first")
                f.writelines(parts)
                f.write(b"")
    (tmp_path / "changed").write_bytes(b"later")
    wanted = describe(tmp_path / "a")
    monkeypatch.setattr(shards, "sha256_file", lambda path: refuse(path) if path.name == "a" else sha256_file(path))
    found = {record.name: record for record in seal_folder(tmp_path, hashed)}
    assert (tmp_path / "a").read_bytes() == b"first" + b"".join(parts)
    assert max(calls) <= 1024
    assert found["a"] == wanted
    assert found["a"].stamp == wanted.stamp
    assert found["changed"].sha256 == sha256_file(tmp_path / "changed")


def test_a_folder_is_described_by_names_and_bytes(tmp_path):
    first = describe(make_folder(tmp_path / "x" / "f"))
    assert first == describe(make_folder(tmp_path / "y" / "f"))
    assert first.bytes == 3
    (tmp_path / "y/f/a").rename(tmp_path / "y/f/c")
    assert first.sha256 != describe(tmp_path / "y/f").sha256


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    old, new = make_folder(tmp_path / "f"), tmp_path / "new"
    new.mkdir()
    (new / "only").write_text("x")
    replace_folder(new, old)
    assert os.listdir(old) == ["only"]
    assert os.listdir(tmp_path) == ["f"]
