"""Files that are either complete or absent: written under a `.tmp` name, synced, renamed; hashed for the journal."""

import concurrent.futures
import contextlib
import contextvars
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

TMP_SUFFIX = ".tmp"  # a file or folder that is not complete ends in it
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_THREADS = 8  # a journaling file system makes one commit of syncs that wait together
_PARTS = 1024  # of one call of writev (IOV_MAX)
Hashed = dict[Path, "FileRecord"]  # of files that were hashed while they were written
_sealed_later: "contextvars.ContextVar[Hashed | None]" = contextvars.ContextVar("herdkern_sealed_later", default=None)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What the journal keeps of one file: its name (relative to its task folder), size and SHA-256.

    stamp: when it was last written to, in ns, as it was hashed (of a folder the sum over its files; 0 if unknown). It
    says cheaply whether a file may have changed since; it is not in the journal, and equality does not ask for it.
    """

    name: str
    bytes: int
    sha256: str
    stamp: int = field(default=0, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes as 64 hex digits.

    Raises: OSError if the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        buffer = bytearray(1 << 18)  # stays in a cache
        view = memoryview(buffer)
        while num_bytes := f.readinto(buffer):
            digest.update(view[:num_bytes])
    return digest.hexdigest()


def sync(descriptor: int, path: Path) -> None:
    """fsync. Raises: OSError that names `path`."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        e.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (fsync of the directory)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sealed_later() -> Iterator[Hashed]:
    """In this block (and thread) `atomic_file` syncs nothing: who runs the block calls `seal_folder` after it, with
    what this gives.
    """
    hashed: Hashed = {}
    token = _sealed_later.set(hashed)
    try:
        yield hashed
    finally:
        _sealed_later.reset(token)


class HashedFile(io.FileIO):
    """A new file without a buffer whose bytes are hashed as they are written; for large pieces."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()

    def write(self, data: "Buffer") -> int:
        """Write all of `data`. Raises: OSError."""
        self.writelines([data])
        return memoryview(data).nbytes

    def writelines(self, parts: "Iterable[Buffer]") -> None:
        """Write all of the parts, many in one call of the system. Raises: OSError."""
        left = [view for part in parts if (view := memoryview(part)).nbytes]
        for view in left:
            self.digest.update(view)
        first = 0
        while first < len(left):
            written = os.writev(self.fileno(), left[first : first + _PARTS])
            while written and written >= left[first].nbytes:
                written -= left[first].nbytes
                first += 1
            if written:
                left[first] = left[first][written:]


@contextlib.contextmanager
def atomic_file(path: Path | str, mode: str = "wb", *, hashed: bool = False) -> Iterator[IO[Any]]:
    """A file opened for writing that appears at `path` only when the block ends without an exception.

    mode: "wb", or "w" for UTF-8 text with "\\n" line ends. An existing file at `path` stays as it is until then.
    hashed: give a HashedFile, so that `seal_folder` need not read what was written (mode "wb").
    Raises: ValueError for another mode; OSError if it cannot be written (nothing is left behind).
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"atomic_file: mode must be 'wb' or 'w', got {mode!r}")
    path = Path(path)
    tmp = path.with_name(path.name + TMP_SUFFIX)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with HashedFile(tmp) if hashed else open(tmp, mode, **text) as f:  # type: ignore[call-overload]
            yield f
            f.flush()
            if (known := _sealed_later.get()) is None:
                sync(f.fileno(), tmp)
            elif hashed:
                status = os.fstat(f.fileno())
                record = FileRecord(name=path.name, bytes=status.st_size, sha256=f.digest.hexdigest())
                known[path] = replace(record, stamp=status.st_mtime_ns)
        os.replace(tmp, path)
    except BaseException as e:
        if isinstance(e, OSError) and e.filename is None and e.errno in _OF_WRITING:
            e.filename = str(tmp)  # write(2) does not say to what
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise
    if _sealed_later.get() is None:
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

    Raises: ValueError if something there is neither a file nor a folder (a link, a socket); OSError if a folder cannot
    be read.
    """

    def refuse(error: OSError) -> None:
        raise error  # os.walk alone would leave out what it cannot read

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"files_below: {path} must be a plain file or folder; a stage may write nothing else")
        found += [Path(parent, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _describe_file(path: Path, name: str, known: FileRecord | None = None) -> FileRecord:
    status = path.stat()  # before it is read: whoever writes to it meanwhile changes the stamp
    if known is not None and (known.bytes, known.stamp) == (status.st_size, status.st_mtime_ns):
        return replace(known, name=name)
    return FileRecord(name=name, bytes=status.st_size, sha256=sha256_file(path), stamp=status.st_mtime_ns)


def describe(path: Path) -> FileRecord:
    """Name, size and hash of an input: a file, or a folder (then over the names, sizes and hashes of all files below).

    Raises: OSError if it is missing or cannot be read; ValueError if a folder holds anything but files and folders.
    """
    if not path.is_dir():
        return _describe_file(path, path.name)
    records = [_describe_file(file, file.relative_to(path).as_posix()) for file in files_below(path)]
    return folder_record(path.name, records)


def folder_record(name: str, records: list[FileRecord]) -> FileRecord:
    """The record of a folder from those of its files (names relative to the folder)."""
    lines = "".join(f"{r.sha256} {r.bytes} {r.name}\n" for r in sorted(records, key=lambda r: r.name))
    digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
    size, stamp = sum(r.bytes for r in records), sum(r.stamp for r in records)
    return FileRecord(name=name, bytes=size, sha256=digest, stamp=stamp)


def is_as_recorded(path: Path, record: FileRecord) -> bool:
    """Whether an input still is what `record` says: by size and stamp, and where they differ by its hash.

    A file system that changes bytes without a trace in the stamp is found out only by hashing, when a run is resumed.
    """
    try:
        files = files_below(path) if path.is_dir() else [path]
        statuses = [file.stat() for file in files]
        if (sum(s.st_size for s in statuses), sum(s.st_mtime_ns for s in statuses)) == (record.bytes, record.stamp):
            return True
        return describe(path) == record
    except (OSError, ValueError):
        return False


def seal_folder(folder: Path, hashed: Hashed | None = None) -> list[FileRecord]:
    """Sync every file and folder below `folder` to disk; returns the records of its files.

    hashed: of files that need not be read again, unless they were written to since (`sealed_later`).
    Raises: OSError if something cannot be synced; ValueError if it holds anything but files and folders.
    """
    files = files_below(folder)
    with concurrent.futures.ThreadPoolExecutor(_SYNC_THREADS) as pool:  # they wait for the disk while this one hashes
        synced = [pool.submit(_sync_file, path) for path in files]
        known = hashed or {}
        records = [_describe_file(path, path.relative_to(folder).as_posix(), known.get(path)) for path in files]
        for future in synced:
            future.result()
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))
    return records


def _sync_file(path: Path) -> None:
    with open(path, "rb", buffering=0) as f:
        sync(f.fileno(), path)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all below it, or a file of that name; nothing happens if there is none."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; a folder that was there is set aside first and deleted after.

    At every moment `final` is the old folder, absent, or the new one: never a mixture.
    Raises: OSError if it cannot be done; the old folder is then where it was.
    """
    aside = final.with_name(final.name + ".old" + TMP_SUFFIX)
    remove_folder(aside)
    had_one = final.exists()
    if had_one:
        os.rename(final, aside)
    try:
        os.rename(new, final)
    except OSError:
        if had_one:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    remove_folder(aside)


def verified(folder: Path, records: list[FileRecord]) -> list[FileRecord] | None:
    """`records` with their stamps if `folder` holds exactly these files with these sizes and hashes, else None."""
    try:
        files = files_below(folder)
        if [f.relative_to(folder).as_posix() for f in files] != [r.name for r in records]:
            return None
        if any(f.stat().st_size != r.bytes for f, r in zip(files, records, strict=True)):
            return None
        found = [_describe_file(f, r.name) for f, r in zip(files, records, strict=True)]
        return found if found == records else None
    except (OSError, ValueError):
        return None
