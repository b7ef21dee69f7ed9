"""What line dedup keeps on disk between its stages: the keys of a shard's lines, and marks on the frequent ones.

All files are arrays of little-endian numbers without a header: the engine hashes what a stage wrote and refuses what
was changed since. They are read in pieces, so memory does not grow with a shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.arrays import read_array

CHUNK_KEYS = 1 << 19
CHUNK_DOCUMENTS = 1 << 12
DOCUMENT_ROW = np.dtype([("id_hash", "<u8"), ("lines", "<u4"), ("language", "<u4")])
MARK = np.dtype([("place", "<u8"), ("count", "<u8")])


def read_chunks(path: Path, dtype: Any, size: int = CHUNK_KEYS) -> Iterator[tuple[int, NDArray[Any]]]:
    """(number of the first, entries) of a file of `dtype`, at most `size` at a time."""
    begin = 0
    with open(path, "rb") as file:
        while len(entries := read_array(file, dtype, size)):
            yield begin, entries
            begin += len(entries)


def write_marks(path: Path, marks: Iterable[tuple[NDArray[np.int64], NDArray[np.uint64]]]) -> int:
    """Write (places, counts) of one shard in one partition, places ascending; returns how many there were."""
    total = 0
    with open(path, "wb") as file:
        for places, counts in marks:
            entries = np.zeros(len(places), MARK)
            entries["place"], entries["count"] = places, counts
            file.write(entries.tobytes())
            total += len(places)
    return total


def join_marks(path: Path, pieces: Sequence[Path]) -> None:
    """One file of marks from those of several passes, which are gone then."""
    if len(pieces) == 1:
        pieces[0].rename(path)
        return
    entries = np.concatenate([read_array(piece, MARK) for piece in pieces])
    path.write_bytes(entries[np.argsort(entries["place"])].tobytes())
    for piece in pieces:
        piece.unlink()


class _MarkReader:
    """Marks of one shard in one partition, taken in order."""

    def __init__(self, file: IO[bytes]):
        self.file, self.held, self.num_seen = file, np.zeros(0, MARK), 0

    def take(self, num_keys: int) -> NDArray[Any]:
        """The marks on the next num_keys keys, their places counted from the first of these."""
        end = self.num_seen + num_keys
        while not (len(self.held) and self.held["place"][-1] >= end):
            more = read_array(self.file, MARK, 4096)
            if not len(more):
                break
            self.held = np.concatenate([self.held, more])
        cut = int(np.searchsorted(self.held["place"], end))
        taken, self.held = self.held[:cut].copy(), self.held[cut:]
        taken["place"] -= np.uint64(self.num_seen)
        self.num_seen = end
        return taken


class ShardLines:
    """The keys of a shard's lines in order, as a context manager; with `marks`, also which of them are frequent.

    folder: of _make_keys.  marks: one file for each partition.
    """

    def __init__(self, folder: Path, marks: Sequence[Path] = ()):
        self.folder, self.marks = folder, marks

    def __enter__(self) -> "ShardLines":
        self.files: list[IO[bytes]] = []
        try:
            for path in (self.folder / "documents.bin", self.folder / "keys.bin", *self.marks):
                self.files.append(open(path, "rb"))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.readers = [_MarkReader(file) for file in self.files[2:]]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()

    def next_rows(self, num_documents: int) -> NDArray[Any]:
        """DOCUMENT_ROW of the next documents; fewer at the end."""
        return read_array(self.files[0], DOCUMENT_ROW, num_documents)

    def keys_of(self, rows: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(keys, begins) of the lines of the documents that next_rows gave last."""
        begins = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(rows["lines"], out=begins[1:])
        return read_array(self.files[1], "<u8", int(begins[-1])), begins

    def marks_of(
        self, rows: NDArray[Any], salts: NDArray[np.uint64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]:
        """(salted keys, begins, counts) of the lines of these documents; count 0 for a line that is not frequent."""
        keys, begins = self.keys_of(rows)
        salted, origins, parts = _text.partition_lines(keys, begins, salts, False, len(self.readers))
        by_line, counts = np.zeros(len(keys), np.uint64), np.zeros(len(keys), np.uint64)
        by_line[origins] = salted
        for reader, begin, end in zip(self.readers, parts[:-1], parts[1:], strict=True):
            marks = reader.take(int(end - begin))
            counts[origins[begin + marks["place"].astype(np.int64)]] = marks["count"]
        return by_line, begins, counts
