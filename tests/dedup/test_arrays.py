import os
import subprocess
import sys

import fault_injector
import numpy as np
import pytest

from herdkern.dedup.arrays import array_header, load_array, read_array, rows_at

PAIR = np.dtype([("place", "<u4"), ("count", "<u8")])


@pytest.mark.parametrize("dtype", [np.dtype("<u8"), np.dtype(np.uint8), PAIR])
@pytest.mark.parametrize("count", [-1, 0, 1, 7, 1000, 5000])
def test_as_fromfile_where_nothing_fails(tmp_path, dtype, count):
    path = tmp_path / "a"
    path.write_bytes(np.random.default_rng(0).bytes(1000 * dtype.itemsize))
    np.testing.assert_array_equal(read_array(path, dtype, count), np.fromfile(path, dtype, count))
    with open(path, "rb") as ours, open(path, "rb") as theirs:
        for _ in range(3):
            np.testing.assert_array_equal(read_array(ours, dtype, count), np.fromfile(theirs, dtype, count))
            assert ours.tell() == theirs.tell()


def test_an_empty_file_is_an_empty_array(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert read_array(tmp_path / "a", PAIR).shape == (0,)


def test_a_cut_entry_is_named(tmp_path):
    (tmp_path / "cut.bin").write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match=r"read_array: .*cut.bin must hold whole entries of 12 bytes"):
        read_array(tmp_path / "cut.bin", PAIR)


@pytest.mark.parametrize("rows", [[], [0], [9], [0, 1, 2, 5, 6, 9], range(10)])
def test_rows_are_those_that_were_saved(tmp_path, rows):
    values = np.random.default_rng(1).random((10, 3), np.float32)
    np.save(tmp_path / "v.npy", values)
    head = array_header(tmp_path / "v.npy")
    assert (head.shape, head.dtype, head.is_fortran) == ((10, 3), np.float32, False)
    found = rows_at(tmp_path / "v.npy", np.array(rows, np.int64), np.float32, 3, head.begin)
    np.testing.assert_array_equal(found, values[list(rows)])


def test_rows_behind_the_end_and_what_is_no_array_are_named(tmp_path):
    (tmp_path / "v").write_bytes(bytes(4 * 3 * 5))
    with pytest.raises(ValueError, match=r"rows_at: .*v must hold row 5, but it ends before"):
        rows_at(tmp_path / "v", np.array([0, 4, 5]), np.float32, 3)
    with pytest.raises(ValueError, match=r"load_array: .*v must be an array as np.save writes it"):
        array_header(tmp_path / "v")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"it holds Python objects"):
        load_array(tmp_path / "objects.npy")


CODE = """
import errno, os, sys
import fault_injector as fi
import numpy as np
from pathlib import Path
from herdkern.dedup.arrays import array_header, load_array, read_array, rows_at
faults, path = fi.Faults(os.environ[fi.CONTROL]), Path(sys.argv[1])
np.arange(100_000).tofile(path)
for count in (-1, 1000):
    for read in (read_array, np.fromfile):
        faults.arm(path.parent, fi.READ, action=fi.FAIL, error=errno.EIO, nth=1)
        try:
            found = read(path, np.int64, count)
            outcome = "right" if np.array_equal(found, np.arange(len(found))) and len(found) else "wrong"
        except OSError as e:
            outcome = errno.errorcode[e.errno]
        print(count, read.__name__, outcome, faults.hits)
        faults.disarm()
"""


@pytest.mark.skipif(bool(fault_injector.why_not()), reason=fault_injector.why_not() or "possible")
def test_a_read_that_fails_is_an_error(tmp_path):
    environment = {**os.environ, **fault_injector.build(tmp_path)}
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", CODE, str(tmp_path / "work" / "a")]
    found = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.splitlines()
    assert [line for line in found if "read_array" in line] == ["-1 read_array EIO 1", "1000 read_array EIO 1"]
