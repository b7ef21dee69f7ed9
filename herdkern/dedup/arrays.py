"""Reading arrays from files so that an error of the disk is an error."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def read_array(source: Path | str | IO[bytes], dtype: Any, count: int = -1) -> NDArray[Any]:
    """The next `count` entries of a file, fewer if it ends before; -1: all that are left. As np.fromfile, which however
    takes a failed read for the end of the file, or (of all that are left) returns memory that was never written.

    source: a path, or a file opened with "rb".
    Raises: OSError if it cannot be read; ValueError naming the file if it ends within an entry.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return read_array(file, dtype, count)
    dtype = np.dtype(dtype)
    left = os.fstat(source.fileno()).st_size - source.tell()
    num_bytes = left if count < 0 else min(left, count * dtype.itemsize)
    data = np.empty(num_bytes, np.uint8)
    view = data.data
    num_read = 0
    while num_read < num_bytes and (more := source.readinto(view[num_read:])):  # type: ignore[attr-defined]
        num_read += more
    if num_read % dtype.itemsize:
        raise ValueError(
            f"read_array: {source.name} must hold whole entries of {dtype.itemsize} bytes, got {num_read} bytes more "
            f"than at {source.tell() - num_read}; it is cut off or damaged"
        )
    return data[:num_read].view(dtype)


@dataclass(frozen=True)
class ArrayHeader:
    """What a .npy file says of its array; the values begin at byte `begin`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    begin: int


def array_header(path: Path | str) -> ArrayHeader:
    """The header of a .npy file. Raises: OSError if it cannot be read; ValueError naming the file if it has none."""
    with open(path, "rb") as file:
        try:
            major, _ = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
        except ValueError as error:
            raise ValueError(f"load_array: {path} must be an array as np.save writes it, got {error}") from error
        return ArrayHeader(shape, dtype, is_fortran, file.tell())


def load_array(path: Path | str, dtype: Any = None) -> NDArray[Any]:
    """The array in a .npy file, as np.load gives it, read by `read_array`.

    dtype: if given, the array must be of it and have one dimension.
    Raises: OSError if it cannot be read; ValueError naming the file if it holds anything else.
    """
    head = array_header(path)
    if dtype is not None and (head.dtype != np.dtype(dtype) or len(head.shape) != 1):
        raise ValueError(f"load_array: {path} must hold {np.dtype(dtype)}, got {head.dtype} of shape {head.shape}")
    count = int(np.prod(head.shape, dtype=np.int64))
    with open(path, "rb") as file:
        file.seek(head.begin)
        values = read_array(file, head.dtype, count)
    if len(values) != count:
        raise ValueError(f"load_array: {path} must hold {count} entries, got {len(values)}; it is cut off")
    return values.reshape(head.shape, order="F" if head.is_fortran else "C")


def rows_at(path: Path | str, rows: NDArray[np.int64], dtype: Any, width: int, begin: int = 0) -> NDArray[Any]:
    """Rows of a file of arrays of one width: (len(rows), width), read by `read_array`, neighbours at once.

    rows: numbers, ascending.  begin: byte of the file at which row 0 begins.
    Raises: OSError if it cannot be read; ValueError naming the file if it ends before.
    """
    found = np.empty((len(rows), width), dtype)
    done = 0
    with open(path, "rb") as file:
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []:
            file.seek(begin + int(run[0]) * width * found.dtype.itemsize)
            values = read_array(file, dtype, len(run) * width)
            if len(values) != len(run) * width:
                raise ValueError(f"rows_at: {path} must hold row {int(run[-1])}, but it ends before; it is cut off")
            found[done : done + len(run)] = values.reshape(len(run), width)
            done += len(run)
    return found
