import errno
import os
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern.dedup import signature_file
from herdkern.dedup.minhash import signature_spec, signatures
from herdkern.dedup.signature_file import MAGIC, SignatureFile, bands_of, common_spec, write_signatures

SPEC = signature_spec(num_bands=3, rows_per_band=4)


def rows_of(num_docs, num_slots=12, dtype=np.uint32, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (num_docs, num_slots), dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(signature_file, "BLOCK_BYTES", 480)  # 10 rows of 12 uint32


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("sizes", [[], [0], [1], [9], [10], [11], [10, 10], [3, 0, 25, 1, 1], [100]], ids=str)
def test_what_was_written_is_read(tmp_path, small_blocks, dtype, sizes):
    batches = [rows_of(size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    path = tmp_path / "a.sig"
    assert write_signatures(path, SPEC, iter(batches)) == sum(sizes)
    wanted = np.concatenate([np.zeros((0, 12), dtype), *batches])
    with SignatureFile(path, SPEC) as file:
        assert (file.spec, file.num_docs, file.num_bands, file.rows_per_band, file.num_slots) == (
            SPEC,
            sum(sizes),
            3,
            4,
            12,
        )
        assert len(file) == sum(sizes)
        got = file.read(0, file.num_docs)
        np.testing.assert_array_equal(got, wanted)
        if sizes:
            assert got.dtype == dtype
        assert list(tmp_path.iterdir()) == [path]
        parts = list(file.batches(1))
        np.testing.assert_array_equal(np.concatenate([np.zeros((0, 12), got.dtype), *parts]), wanted)
        assert all(len(part) <= 10 for part in parts)
        file.check()


@given(st.lists(st.tuples(st.integers(0, 57), st.integers(0, 57)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_part_is_read(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("sig") / "a.sig"
    rows = rows_of(57)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signature_file, "BLOCK_BYTES", 480)
        write_signatures(path, SPEC, [rows])
        with SignatureFile(path) as file:
            for pair in parts:
                begin, end = sorted(pair)
                np.testing.assert_array_equal(file.read(begin, end), rows[begin:end])


def test_how_the_batches_are_cut_does_not_change_the_bytes(tmp_path, small_blocks):
    rows = rows_of(57)
    contents = set()
    for step in (1, 7, 10, 57):
        write_signatures(tmp_path / "a.sig", SPEC, (rows[i : i + step] for i in range(0, 57, step)))
        contents.add((tmp_path / "a.sig").read_bytes())
    assert len(contents) == 1


def test_rows_of_any_memory_order(tmp_path):
    rows = rows_of(20)
    write_signatures(tmp_path / "a.sig", SPEC, [np.asfortranarray(rows), rows[::-1], rows.astype(">u4")[:3]])
    with SignatureFile(tmp_path / "a.sig") as file:
        np.testing.assert_array_equal(file.read(0, 43), np.concatenate([rows, rows[::-1], rows[:3]]))


def test_real_signatures(tmp_path):
    signed = signatures(["one two three four five six", "", "and another text"], num_bands=3, rows_per_band=4)
    write_signatures(tmp_path / "a.sig", SPEC, [signed])
    with SignatureFile(tmp_path / "a.sig") as file:
        np.testing.assert_array_equal(file.read(0, 3), signed)


@pytest.fixture
def written(tmp_path, small_blocks):
    path = tmp_path / "a.sig"
    write_signatures(path, SPEC, [rows_of(35)])
    return path


def read_all(path):
    with SignatureFile(path) as file:
        file.read(0, file.num_docs)


def test_every_truncation_is_refused_by_name(written):
    whole = written.read_bytes()
    for size in range(len(whole)):
        written.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"SignatureFile: .*a\.sig (is damaged|must begin with)"):
            read_all(written)
    written.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"a\.sig is damaged: it has \d+ bytes, its header says"):
        read_all(written)


def test_every_flipped_byte_is_refused_by_name(written):
    whole = written.read_bytes()
    for place in range(len(whole)):
        written.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"SignatureFile: .*a\.sig (is damaged|must begin with)"):
            read_all(written)


def test_damage_is_found_where_it_lies_and_not_before(written):
    whole = bytearray(written.read_bytes())
    begin = whole.index(b"\n", len(MAGIC)) + 1
    whole[begin + 48 * 23] ^= 1  # in the third block, rows 20 to 29
    written.write_bytes(whole)
    with SignatureFile(written) as file:
        np.testing.assert_array_equal(file.read(0, 20), rows_of(35)[:20])
        np.testing.assert_array_equal(file.read(30, 35), rows_of(35)[30:])
        for part in [(19, 21), (25, 26), (20, 30), (0, 35)]:
            with pytest.raises(ValueError, match=r"a\.sig is damaged: rows 20 to 29 do not match; make it anew"):
                file.read(*part)
        with pytest.raises(ValueError, match="rows 20 to 29"):
            file.check()


def test_check_reads_again_what_was_good(written):
    with SignatureFile(written) as file:
        file.read(0, 35)
        with open(written, "r+b") as f:
            f.seek(file._begin + 5)
            f.write(b"!")
        with pytest.raises(ValueError, match="rows 0 to 9"):
            file.check()


def test_a_file_that_shrinks_while_open_is_an_error(written):
    with SignatureFile(written) as file:
        os.truncate(written, file._begin + 48 * 7 + 3)
        with pytest.raises(ValueError, match=r"a\.sig is damaged: it ends in row 7"):
            file.read(0, 35)


@pytest.mark.parametrize(
    "change",
    [
        {"num_docs": -1}, {"num_docs": 1e999}, {"num_docs": "x"}, {"block_docs": 0}, {"block_docs": 1 << 40},
        {"dtype": "float32"}, {"dtype": []}, {"spec": "no sizes"}, {"check": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_of_nonsense_is_refused(written, change):
    with SignatureFile(written) as file:
        fields = {"spec": SPEC, "dtype": "uint32", "num_docs": 35, "block_docs": 10, "check": 0} | change
        body = written.read_bytes()[file._begin :]
    written.write_bytes(MAGIC + signature_file._header_line(fields) + body)
    with pytest.raises(ValueError, match=r"a\.sig is damaged: its header: "):
        SignatureFile(written)


def test_deeply_nested_header(written):
    text = b"[" * 50000 + b"\n"
    written.write_bytes(MAGIC + f"{zlib.crc32(text):08x} ".encode() + text)
    with pytest.raises(ValueError, match=r"a\.sig is damaged: its header: "):
        SignatureFile(written)


def test_another_version_and_another_spec_are_refused(written, tmp_path):
    other = signature_spec(num_bands=3, rows_per_band=4, seed=2)
    with pytest.raises(ValueError, match=r"a\.sig must be of '.* seed=2', got '.* seed=1'; sign its documents anew"):
        SignatureFile(written, other)
    write_signatures(tmp_path / "b.sig", other, [])
    assert common_spec([written, written]) == SPEC
    with pytest.raises(ValueError, match=r"must not mix, got .* seed=1' in .*a\.sig and '.* seed=2' in .*b\.sig"):
        common_spec([written, tmp_path / "b.sig"])
    with pytest.raises(ValueError, match="at least one"):
        common_spec([])
    written.write_bytes(b"herdkern signatures 2\n" + written.read_bytes()[len(MAGIC) :])
    with pytest.raises(ValueError, match="must begin with b'herdkern signatures 1"):
        SignatureFile(written)


@pytest.mark.parametrize(
    "spec", ["", "num_bands=3", "num_bands=0 rows_per_band=4", "num_bands=3 rows_per_band=4\n", "num_bands=9999999 "
             "rows_per_band=9999999", "num_bands=3 num_bands=4 rows_per_band=1"],
)  # fmt: skip
def test_a_spec_without_sizes_is_refused(tmp_path, spec):
    with pytest.raises(ValueError, match="bands_of: spec must "):
        write_signatures(tmp_path / "a.sig", spec, [])
    assert bands_of("x num_bands=3 rows_per_band=4") == (3, 4)


def test_batches_of_another_kind_are_refused_and_leave_nothing(tmp_path):
    path = tmp_path / "a.sig"
    for batches, error, message in [
        ([rows_of(2, 13)], ValueError, r"must have shape \(num_docs, 12\), got \(2, 13\)"),
        ([rows_of(2)[0]], ValueError, r"must have shape \(num_docs, 12\), got \(12,\)"),
        ([rows_of(2).astype(np.float32)], TypeError, "must be uint32 or uint64, got float32"),
        ([rows_of(2), rows_of(2, dtype=np.uint64)], TypeError, "must be uint32, got uint64"),
    ]:
        with pytest.raises(error, match=f"write_signatures: batches {message}"):
            write_signatures(path, SPEC, batches)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_file(written):
    before = written.read_bytes()

    def source():
        yield rows_of(20)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_signatures(written, SPEC, source())
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_errors_of_the_disk_name_the_file(written, monkeypatch):
    with SignatureFile(written) as file:

        def fail(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=r"Input/output error: '.*a\.sig'"):
            file.read(0, 5)
    with pytest.raises(OSError, match=r"nowhere\.sig"):
        SignatureFile(written.parent / "nowhere.sig")
    with pytest.raises(ValueError, match=r"0 <=|must lie in order"):
        SignatureFile(written).read(5, 4)


def test_no_space_left(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=r"No space left: '.*a\.sig\.tmp'") as raised:
        write_signatures(tmp_path / "a.sig", SPEC, [rows_of(5)])
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
