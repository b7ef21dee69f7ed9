"""The file of a rank's flight recorder: a ring of fixed records in shared memory, readable after any kind of death.

Layout: header, table of names (groups, operations, places; JSON lines), then `slots` records. The writer fills a record
before its collective starts, so that a rank that the collective aborts has said what it was about to do.
Source: Llama 3 section 3.3.4 (a ring buffer of metadata, stack traces and durations).
"""

import hashlib
import json
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SLOTS = 1 << 14
MAGIC = b"hkflight"
_HEADER = struct.Struct("<8sIIQqII")  # magic, slots, bytes of names, records so far, step, rank, world size
_STEP_AT, _COUNT_AT, _NAMES_AT = 24, 16, 12
HEADER_BYTES = 64
NAMES_BYTES = 1 << 18
RECORD = struct.Struct("<QIiHHHHiBBHqqqQq")
RECORD_TYPE = np.dtype(
    [
        ("id", "<u8"),  # 1, 2, ...: 0 is an empty slot
        ("seq", "<u4"),  # of its group (of its pair of ranks, direction and tag where there is a peer): 0, 1, ...
        ("step", "<i4"),
        ("group", "<u2"),
        ("op", "<u2"),
        ("place", "<u2"),
        ("dtype", "<u2"),
        ("peer", "<i4"),  # rank in the group, -1: all of it
        ("state", "u1"),
        ("free", "u1"),  # 1: ranks may give sizes of their own
        ("ndim", "<u2"),
        ("numel", "<i8"),
        ("enqueued", "<i8"),  # ns since 1970
        ("ended", "<i8"),  # 0: not yet
        ("shape", "<u8"),  # the first four sizes, 16 bits each, at most 65535
        ("tag", "<i8"),  # of a transfer between two ranks
    ]
)
STARTED, WAITING, ENDED = 0, 1, 2
STATE_AT, ENDED_AT = RECORD_TYPE.fields["state"][1], RECORD_TYPE.fields["ended"][1]  # type: ignore[index]
assert RECORD.size == RECORD_TYPE.itemsize


def ring_folder(run_dir: Path | str) -> Path:
    """Where the ranks of a run on this machine keep their rings: shared memory, so that no disk waits."""
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() else Path(tempfile.gettempdir())
    digest = hashlib.sha256(os.fspath(Path(run_dir).resolve()).encode()).hexdigest()[:16]
    return base / f"herdkern-{os.getuid()}-{digest}"


class RingWriter:
    """Appends records to a fresh ring at `path`, which appears whole. One thread at a time (the interpreter's lock).

    Raises: OSError if there is no room for it: later, a page that cannot be had would end the process (SIGBUS).
    """

    def __init__(self, path: Path, rank: int, world_size: int, slots: int = SLOTS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = HEADER_BYTES + NAMES_BYTES + slots * RECORD.size
        tmp = path.with_name(path.name + ".tmp")
        try:
            with open(tmp, "w+b") as f:
                os.posix_fallocate(f.fileno(), 0, size)
                self._map = mmap.mmap(f.fileno(), size)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
        _HEADER.pack_into(self._map, 0, MAGIC, slots, 0, 0, -1, rank, world_size)
        os.replace(tmp, path)
        self.path, self.slots, self.step = path, slots, -1
        self._count = self._names_end = 0
        self._ids: dict[str, int] = {}

    def set_step(self, step: int) -> None:
        """Records from here on belong to `step`."""
        self.step = step
        struct.pack_into("<q", self._map, _STEP_AT, step)

    def name(self, kind: str, key: str, value: Any) -> int:
        """The number of a name, told to readers when it is new; 0 for all names once the table is full."""
        number = self._ids.get(kind + key)
        if number is None:
            number = len(self._ids) + 1
            line = (json.dumps([number, kind, value]) + "\n").encode()
            if self._names_end + len(line) > NAMES_BYTES or number > 65535:
                return 0
            at = HEADER_BYTES + self._names_end
            self._map[at : at + len(line)] = line
            self._names_end += len(line)
            struct.pack_into("<I", self._map, _NAMES_AT, self._names_end)
            self._ids[kind + key] = number
        return number

    def append(self, fields: tuple[Any, ...]) -> int:
        """Add a record (all fields of RECORD_TYPE but id); returns where it is, for `mark`."""
        self._count = count = self._count + 1
        at = HEADER_BYTES + NAMES_BYTES + (count - 1) % self.slots * RECORD.size
        RECORD.pack_into(self._map, at, count, *fields)
        struct.pack_into("<Q", self._map, _COUNT_AT, count)
        return at

    def mark(self, at: int, state: int, ended: int) -> None:
        """The record at `at` is waited for or has ended."""
        self._map[at + STATE_AT] = state
        if ended:
            struct.pack_into("<q", self._map, at + ENDED_AT, ended)


@dataclass(frozen=True, kw_only=True)
class Ring:
    """What a rank has recorded: the newest records, oldest first, and the names that they refer to."""

    rank: int
    world_size: int
    step: int
    records: np.ndarray
    names: dict[int, Any]

    def name(self, number: int) -> Any:
        """The name with that number; "?" if the table was full."""
        return self.names.get(int(number), "?")


def read_ring(path: Path | str) -> Ring:
    """The ring in a file, of a rank that lives, stands still or is dead.

    Raises: ValueError if it is not a ring or is cut off; OSError if it cannot be read.
    """
    data = Path(path).read_bytes()
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise ValueError(f"read_ring: path must be a flight recorder's ring, got {path}")
    _, slots, names_end, count, step, rank, world_size = _HEADER.unpack_from(data)
    start = HEADER_BYTES + NAMES_BYTES
    if len(data) < start + slots * RECORD.size:
        raise ValueError(
            f"read_ring: path must be whole, got {len(data)} bytes of {start + slots * RECORD.size}: {path}"
        )
    records = np.frombuffer(data, dtype=RECORD_TYPE, count=slots, offset=start)
    ids = np.arange(max(0, count - slots), count, dtype=np.uint64)
    records = records[(ids % slots).astype(np.int64)]
    records = records[records["id"] == ids + 1]  # one that is just being overwritten is left out
    lines = data[HEADER_BYTES : HEADER_BYTES + names_end].splitlines()
    names = {number: value for number, _, value in map(json.loads, lines)}
    return Ring(rank=rank, world_size=world_size, step=step, records=records, names=names)


def read_rings(folder: Path | str) -> dict[int, Ring]:
    """The rings in a folder by rank; files that are none are left out."""
    rings = {}
    for path in sorted(Path(folder).glob("rank-*.ring")):
        try:
            ring = read_ring(path)
        except (OSError, ValueError):
            continue
        rings[ring.rank] = ring
    return rings
