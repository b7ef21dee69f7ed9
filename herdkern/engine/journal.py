"""RUN/journal.jsonl: one line per finished task, saying from what, with which configuration, and what came out.

Every line carries a checksum of itself and is on disk before its task counts. A torn last line (the machine stopped in
the middle of it) is cut off; a damaged line elsewhere is ignored, so its task simply runs again.
"""

import contextlib
import dataclasses
import enum
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from herdkern.engine.shards import FileRecord, sync_folder

logger = logging.getLogger(__name__)


def _plain(value: Any) -> Any:
    """`value` as JSON types with an unambiguous order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"__type__": type(value).__qualname__, **fields}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes):
        return {"__bytes__": value.hex()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=canonical_json)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        return _plain(value.item())
    raise TypeError(
        f"canonical_json: a configuration may hold numbers, strings, bytes, paths, enums, sequences, mappings and "
        f"dataclasses, got {type(value).__qualname__}"
    )


def canonical_json(value: Any) -> str:
    """`value` as JSON text with sorted keys and no spaces: equal values give equal text. Dataclasses carry their name.

    Raises: TypeError for a type that has no JSON form; ValueError for NaN and infinities.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_sha256(config: Any) -> str:
    """SHA-256 of `canonical_json(config)`: a path counts by its name, so list files that matter as inputs instead."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskKey:
    """Everything that decides whether a finished task may be used again."""

    stage: str
    task: str
    function: str
    config_sha256: str
    inputs: tuple[FileRecord, ...]

    def as_json(self) -> dict[str, Any]:
        """The key as the fields of a journal line."""
        return {
            "stage": self.stage,
            "task": self.task,
            "function": self.function,
            "config_sha256": self.config_sha256,
            "inputs": [record.as_json() for record in self.inputs],
        }


class Journal:
    """The journal of one run folder, read once and appended to by the process that holds the run's lock."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[tuple[str, str], dict[str, Any]] = {}  # (stage, task) -> its latest line
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete != len(data):
            logger.warning("%s: cut off an unfinished last line (%d bytes)", self.path, len(data) - complete)
            os.truncate(self.path, complete)
        for number, line in enumerate(data[:complete].splitlines(), start=1):
            entry = parse_line(line)
            if entry is None:
                logger.warning("%s: line %d is damaged and ignored; its task will run again", self.path, number)
            else:
                self.entries[entry["stage"], entry["task"]] = entry

    def find(self, key: TaskKey) -> dict[str, Any] | None:
        """The line of a finished task with exactly this key, or None."""
        entry = self.entries.get((key.stage, key.task))
        wanted = key.as_json()
        return entry if entry is not None and all(entry.get(name) == wanted[name] for name in wanted) else None

    def append(self, key: TaskKey, outputs: list[FileRecord], counters: dict[str, Any], seconds: float) -> None:
        """Add the line of a task whose outputs are already durable, and sync it.

        Raises: OSError if it cannot be written; the journal then is as it was before.
        """
        entry = {
            **key.as_json(),
            "outputs": [record.as_json() for record in outputs],
            "counters": counters,
            "seconds": round(seconds, 6),
        }
        line = format_line(entry)
        is_new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as f:
            size = f.tell()
            try:
                if f.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(f.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    f.truncate(size)
                raise
        if is_new:
            sync_folder(self.path.parent)
        self.entries[key.stage, key.task] = entry


def format_line(entry: dict[str, Any]) -> bytes:
    """One journal line: the entry as canonical JSON with a checksum of the rest in "check"."""
    check = hashlib.sha256(canonical_json(entry).encode()).hexdigest()[:16]
    return (canonical_json({**entry, "check": check}) + "\n").encode()


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The entry of a journal line, or None if the line is damaged."""
    try:
        entry = json.loads(line)
        check = entry.pop("check")
        intact = check == hashlib.sha256(canonical_json(entry).encode()).hexdigest()[:16]
        return entry if intact and {"stage", "task", "outputs", "counters"} <= entry.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def add_counters(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The sum of two counter trees: numbers are added, dicts merged, lists joined; of anything else the first stays."""
    merged = dict(total)
    for name, value in more.items():
        old = merged.get(name)
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(old, dict):
            merged[name] = add_counters(old, value)
        elif (isinstance(value, int | float) and isinstance(old, int | float)) or (
            isinstance(value, list) and isinstance(old, list)
        ):
            merged[name] = old + value  # type: ignore[operator]
    return merged


def sum_counters(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counters of a stage from those of its tasks, in task order."""
    total: dict[str, Any] = {}
    for part in parts:
        total = add_counters(total, part)
    return total


class RunLock:
    """Keeps a second process out of a run folder; freed by the system when the process ends, however it ends.

    Runs of one process share the lock and take turns stage by stage (`stage_lock`).
    """

    _held: ClassVar[dict[Path, "RunLock"]] = {}
    _guard = threading.Lock()

    def __init__(self, path: Path, descriptor: int):
        self.path = path
        self.descriptor = descriptor
        self.pid = os.getpid()
        self.users = 0
        self.stage_lock = threading.Lock()

    @classmethod
    def acquire(cls, run_dir: Path) -> "RunLock":
        """Take the lock of a run folder.

        Raises: RuntimeError naming the other process if one works in the folder; OSError if it is not writable.
        """
        path = run_dir.resolve() / ".lock"
        with cls._guard:
            lock = cls._held.get(path)
            if lock is None or lock.pid != os.getpid():  # a forked child must ask for itself
                lock = cls(path, cls._open(path, run_dir))
                cls._held[path] = lock
            lock.users += 1
            return lock

    @staticmethod
    def _open(path: Path, run_dir: Path) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            owner = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RuntimeError(
                f"Run: run_dir must be used by one process at a time, got {run_dir}, in which process {owner} is "
                f"working; wait for it, stop it, or choose another folder"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def release(self) -> None:
        """Give the lock back; the last user of this process frees it for others."""
        with self._guard:
            self.users -= 1
            if self.users == 0 and self.pid == os.getpid() and self._held.get(self.path) is self:
                del self._held[self.path]
                os.close(self.descriptor)
