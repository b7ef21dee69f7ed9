"""Files that are either complete or absent: written under a `.tmp` name, synced, renamed; hashed for the journal."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TMP_SUFFIX = ".tmp"  # a file or folder that is not complete ends in it


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the journal keeps of one file: its name (relative to its task folder), size and SHA-256."""

    name: str
    bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes as 64 hex digits.

    Raises: OSError if the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while num_bytes := f.readinto(buffer):
            digest.update(view[:num_bytes])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (fsync of the directory)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file opened for writing that appears at `path` only when the block ends without an exception.

    mode: "wb", or "w" for UTF-8 text with "\\n" line ends. An existing file at `path` stays as it is until then.
    Raises: ValueError for another mode; OSError if it cannot be written (nothing is left behind).
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_file: mode must be 'wb' or 'w', got {mode!r}")
    path = Path(path)
    tmp = path.with_name(path.name + TMP_SUFFIX)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(tmp, mode, **text) as f:  # type: ignore[call-overload]
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise
    sync_folder(path.parent)


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with sorted keys, completely or not at all.

    Raises: TypeError or ValueError if it is not JSON (NaN included); OSError if it cannot be written.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_file(path, "w") as f:
        f.write(text + "\n")


def read_json(path: Path | str) -> Any:
    """The value in a JSON file.

    Raises: OSError if it cannot be read; ValueError naming the file if it is not UTF-8 JSON.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except ValueError as e:
        raise ValueError(f"read_json: {path} must hold UTF-8 JSON, got {e}") from e


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, ordered by its relative path.

    Raises: ValueError if something there is neither a file nor a folder (a link, a socket).
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"files_below: {path} must be a plain file or folder; a stage may write nothing else")
        found += [Path(parent, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def describe(path: Path) -> FileRecord:
    """Name, size and hash of an input: a file, or a folder (then over the names, sizes and hashes of all files below).

    Raises: OSError if it is missing or cannot be read.
    """
    if not path.is_dir():
        return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))
    records = [
        FileRecord(name=file.relative_to(path).as_posix(), bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files_below(path)
    ]
    return FileRecord(name=path.name, bytes=sum(r.bytes for r in records), sha256=folder_sha256(records))


def folder_sha256(records: list[FileRecord]) -> str:
    """One SHA-256 for a folder from the records of its files (names relative to the folder)."""
    lines = "".join(f"{r.sha256} {r.bytes} {r.name}\n" for r in sorted(records, key=lambda r: r.name))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def seal_folder(folder: Path) -> list[FileRecord]:
    """Sync every file and folder below `folder` to disk; returns the records of its files.

    Raises: OSError if something cannot be synced; ValueError if it holds anything but files and folders.
    """
    records = []
    for path in files_below(folder):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        name = path.relative_to(folder).as_posix()
        records.append(FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256_file(path)))
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))
    return records


def remove_folder(folder: Path) -> None:
    """Delete a folder and all below it, or a file of that name; nothing happens if there is none."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; a folder that was there is set aside first and deleted after.

    At every moment `final` is the old folder, absent, or the new one: never a mixture.
    """
    aside = final.with_name(final.name + ".old" + TMP_SUFFIX)
    remove_folder(aside)
    if final.exists():
        os.rename(final, aside)
    os.rename(new, final)
    sync_folder(final.parent)
    remove_folder(aside)


def is_intact(folder: Path, records: list[FileRecord]) -> bool:
    """Whether `folder` holds exactly the files of `records`, with their sizes and hashes."""
    try:
        files = files_below(folder)
        if [f.relative_to(folder).as_posix() for f in files] != [r.name for r in records]:
            return False
        if any(f.stat().st_size != r.bytes for f, r in zip(files, records, strict=True)):
            return False
        return all(sha256_file(f) == r.sha256 for f, r in zip(files, records, strict=True))
    except (OSError, ValueError):
        return False
