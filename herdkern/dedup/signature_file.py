"""The file of MinHash signatures: written and read in blocks, with a fingerprint and checksums.

Line 1 names the format. Line 2 is the CRC-32 of a JSON header and the header itself, padded with spaces: the spec line
of `herdkern.dedup.minhash.signature_spec`, the sizes and the CRC-32 of the list of block checksums. Then come the
signatures, row by row, little endian, and the checksums of their blocks (CRC-32, uint32 each). Equal signatures of one
spec give equal bytes.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from herdkern.engine import atomic_file

MAGIC = b"herdkern signatures 1\n"
MAX_HEADER_BYTES = 1 << 16
BLOCK_BYTES = 1 << 18  # about: a block is whole rows
_DTYPES = {"uint32": "<u4", "uint64": "<u8"}
_NUMBERS = ("num_docs", "block_docs", "check")
_MAX_SLOTS = 1 << 20


def bands_of(spec: str) -> tuple[int, int]:
    """(num_bands, rows_per_band) of a spec line.

    Raises: ValueError if it is not one line that names both, at least 1.
    """
    found = [re.findall(rf"(?:^|[ ]){name}=(\d{{1,7}})(?=[ ]|$)", spec) for name in ("num_bands", "rows_per_band")]
    if "\n" in spec or any(len(values) != 1 or int(values[0]) < 1 for values in found):
        raise ValueError(
            f"bands_of: spec must be one line with num_bands=N and rows_per_band=N, got {spec[:200]!r}; make it with "
            "signature_spec()"
        )
    num_bands, rows_per_band = int(found[0][0]), int(found[1][0])
    if num_bands * rows_per_band > _MAX_SLOTS:
        raise ValueError(f"bands_of: spec must have at most {_MAX_SLOTS} slots, got {num_bands} x {rows_per_band}")
    return num_bands, rows_per_band


def _header_line(fields: dict[str, Any], size: int = 0) -> bytes:
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True).encode().ljust(size) + b"\n"
    return f"{zlib.crc32(text):08x} ".encode() + text


def _of_path(error: OSError, path: Path) -> OSError:
    """`error` with the path in it, which reads and writes of open files do not tell."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


class _BlockWriter:
    """Writes rows and keeps the checksum of every block of `block_bytes`."""

    def __init__(self, f: IO[bytes], block_bytes: int):
        self.f, self.block_bytes, self.checks = f, block_bytes, [0]
        self.room = block_bytes

    def write(self, rows: memoryview) -> None:
        while len(rows):
            if not self.room:
                self.checks.append(0)
                self.room = self.block_bytes
            piece = rows[: self.room]
            self.checks[-1] = zlib.crc32(piece, self.checks[-1])
            self.f.write(piece)
            self.room -= len(piece)
            rows = rows[len(piece) :]

    def check_list(self) -> bytes:
        """The checksums of the blocks so far; none of a file without rows."""
        used = self.checks if self.room < self.block_bytes or len(self.checks) > 1 else []
        return np.array(used, dtype="<u4").tobytes()


def _plain_rows(batch: NDArray[Any], num_slots: int, dtype: str | None) -> tuple[str, NDArray[Any]]:
    if batch.dtype.name not in _DTYPES or (dtype is not None and batch.dtype.name != dtype):
        wanted = dtype or "uint32 or uint64"
        raise TypeError(f"write_signatures: batches must be {wanted}, got {batch.dtype}; make them with signatures()")
    if batch.ndim != 2 or batch.shape[1] != num_slots:
        raise ValueError(f"write_signatures: batches must have shape (num_docs, {num_slots}), got {batch.shape}")
    return batch.dtype.name, np.ascontiguousarray(batch, dtype=_DTYPES[batch.dtype.name])


def write_signatures(path: Path | str, spec: str, batches: Iterable[NDArray[Any]]) -> int:
    """Write signatures to `path`, whole or not at all, and return the number of documents.

    spec: the line of `signature_spec`.  batches: uint32 or uint64 (num_docs, num_bands * rows_per_band) each, all of
    one dtype; one is held at a time.
    Raises: ValueError for a spec without sizes or batches of another shape; TypeError for another dtype; OSError naming
    the path if it cannot be written, and what `batches` raises.
    """
    path = Path(path)
    num_bands, rows_per_band = bands_of(spec)
    num_slots = num_bands * rows_per_band
    fields: dict[str, Any] = {"spec": spec, "dtype": "uint64"} | dict.fromkeys(_NUMBERS, 1 << 62)
    size = len(_header_line(fields)) - 10  # of the JSON text, with room for all numbers
    dtype: str | None = None
    num_docs = 0
    source = iter(batches)
    try:
        with atomic_file(path) as f:
            f.write(MAGIC + _header_line(fields, size))
            first = next(source, np.zeros((0, num_slots), np.uint32))
            dtype, rows = _plain_rows(first, num_slots, None)
            block_docs = max(1, BLOCK_BYTES // (num_slots * rows.itemsize))
            writer = _BlockWriter(f, block_docs * num_slots * rows.itemsize)
            while True:
                num_docs += len(rows)
                writer.write(rows.view(np.uint8).reshape(-1).data)
                batch = next(source, None)
                if batch is None:
                    break
                _, rows = _plain_rows(batch, num_slots, dtype)
            checks = writer.check_list()
            f.write(checks)
            numbers = {"num_docs": num_docs, "block_docs": block_docs, "check": zlib.crc32(checks)}
            f.seek(len(MAGIC))
            f.write(_header_line({"spec": spec, "dtype": dtype} | numbers, size))
    except OSError as e:
        raise _of_path(e, path) from e
    return num_docs


class SignatureFile:
    """An open signature file. Rows come from the disk as they are asked for; a block is verified when it is first used.

    spec: if given, the file must be of it.  Use it in a `with` block or call `close`. Reads may run on several threads.
    Raises: OSError naming the path; ValueError naming the path if it is no signature file, of another version or spec,
    cut off or damaged.
    """

    path: Path
    spec: str
    dtype: np.dtype[Any]  # uint32 or uint64
    num_docs: int
    num_bands: int
    rows_per_band: int
    num_slots: int

    def __init__(self, path: Path | str, spec: str | None = None):
        self.path = Path(path)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (lives as long as this object)
        try:
            self._read_header()
            if spec is not None and self.spec != spec:
                raise ValueError(
                    f"SignatureFile: {self.path} must be of {spec!r}, got {self.spec!r}; sign its documents anew"
                )
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        magic = self._pread(len(MAGIC), 0)
        if magic != MAGIC:
            raise ValueError(f"SignatureFile: {self.path} must begin with {MAGIC!r}, got {magic!r}")
        line, newline, _ = self._pread(MAX_HEADER_BYTES, len(MAGIC)).partition(b"\n")
        digits, _, text = (line + newline).partition(b" ")
        try:
            if digits != f"{zlib.crc32(text):08x}".encode() or not newline:
                raise ValueError("it does not match its checksum")
            values = json.loads(text)
            self.spec = str(values["spec"])
            self.num_bands, self.rows_per_band = bands_of(self.spec)
            self.dtype = np.dtype(_DTYPES[values["dtype"]])
            self.num_docs, self._block_docs, check = (int(values[name]) for name in _NUMBERS)
            if self.num_docs < 0 or not 1 <= self._block_docs <= BLOCK_BYTES:
                raise ValueError(f"it has {self.num_docs} documents in blocks of {self._block_docs}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            raise ValueError(f"SignatureFile: {self.path} is damaged: its header: {e}; make it anew") from e
        self.num_slots = self.num_bands * self.rows_per_band
        self._row_bytes = self.num_slots * self.dtype.itemsize
        self._begin = len(MAGIC) + len(line) + 1
        num_blocks = -(-self.num_docs // self._block_docs)
        end = self._begin + self.num_docs * self._row_bytes
        expected, size = end + 4 * num_blocks, os.fstat(self._file.fileno()).st_size
        if size != expected:
            self._damaged(f"it has {size} bytes, its header says {expected}")
        checks = self._pread(4 * num_blocks, end)
        if zlib.crc32(checks) != check:
            self._damaged("its list of checksums does not match the header")
        self._checks = np.frombuffer(checks, dtype="<u4")
        self._is_good = np.zeros(num_blocks, dtype=bool)

    def _damaged(self, what: str) -> None:
        raise ValueError(f"SignatureFile: {self.path} is damaged: {what}; make it anew")

    def _pread(self, num_bytes: int, offset: int) -> bytes:
        parts = []
        try:
            while num_bytes and (part := os.pread(self._file.fileno(), min(num_bytes, 1 << 30), offset)):
                parts.append(part)
                num_bytes -= len(part)
                offset += len(part)
        except OSError as e:
            raise _of_path(e, self.path) from e
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self, rows: NDArray[Any], first: int) -> None:
        """Read rows [first, first + len(rows)) into `rows`."""
        view, offset = rows.view(np.uint8).reshape(-1).data, self._begin + first * self._row_bytes
        while len(view):
            try:
                got = os.preadv(self._file.fileno(), [view[: 1 << 30]], offset)
            except OSError as e:
                raise _of_path(e, self.path) from e
            if not got:
                self._damaged(f"it ends in row {(offset - self._begin) // self._row_bytes}")
            view, offset = view[got:], offset + got

    def _verify(self, block: int, rows: NDArray[Any]) -> None:
        if zlib.crc32(rows.view(np.uint8).reshape(-1).data) != self._checks[block]:
            first = block * self._block_docs
            self._damaged(f"rows {first} to {min(first + self._block_docs, self.num_docs) - 1} do not match")
        self._is_good[block] = True

    def _read_block(self, block: int) -> NDArray[Any]:
        first = block * self._block_docs
        rows = np.empty((min(self._block_docs, self.num_docs - first), self.num_slots), dtype=self.dtype)
        self._fill(rows, first)
        self._verify(block, rows)
        return rows

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Rows [begin, end): uint32 or uint64 (end - begin, num_slots), an array of its own.

        Raises: ValueError unless 0 <= begin <= end <= num_docs, or if they are damaged; OSError.
        """
        if not 0 <= begin <= end <= self.num_docs:
            raise ValueError(f"read: begin and end must lie in order in [0, {self.num_docs}], got {begin} and {end}")
        rows = np.empty((end - begin, self.num_slots), dtype=self.dtype)
        if begin == end:
            return rows
        self._fill(rows, begin)
        size = self._block_docs
        for block in range(begin // size, -(-end // size)):
            if self._is_good[block]:
                continue
            first, last = block * size, min((block + 1) * size, self.num_docs)
            if begin <= first and last <= end:
                self._verify(block, rows[first - begin : last - begin])
                continue
            inside = slice(max(first, begin) - first, min(last, end) - first)
            rows[max(first - begin, 0) : last - begin] = self._read_block(block)[inside]
        return rows

    def batches(self, max_bytes: int = 16 << 20) -> Iterator[NDArray[Any]]:
        """All rows in order, arrays of about `max_bytes` (one block at least). Raises: as `read`."""
        step = max(1, max_bytes // (self._block_docs * self._row_bytes)) * self._block_docs
        for begin in range(0, self.num_docs, step):
            yield self.read(begin, min(begin + step, self.num_docs))

    def check(self) -> None:
        """Compare every block with its checksum, also those that were read before. Raises: ValueError, OSError."""
        for block in range(len(self._checks)):
            self._read_block(block)

    def close(self) -> None:
        """Close the file; reads fail from then on."""
        self._file.close()

    def __len__(self) -> int:
        return self.num_docs

    def __enter__(self) -> "SignatureFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def common_spec(paths: Sequence[Path | str]) -> str:
    """The spec that all these signature files have.

    Raises: ValueError naming two files of different specs, or for no file; OSError and ValueError as SignatureFile.
    """
    if not paths:
        raise ValueError("common_spec: paths must name at least one signature file, got none")
    with SignatureFile(paths[0]) as first:
        spec = first.spec
    for path in paths[1:]:
        with SignatureFile(path) as other:
            if other.spec != spec:
                raise ValueError(
                    f"common_spec: signatures of different specs must not mix, got {spec!r} in {paths[0]} and "
                    f"{other.spec!r} in {path}; sign one of them anew"
                )
    return spec
