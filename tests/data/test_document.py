import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import zstandard

from herdkern.data.document import (
    MAX_LINE_BYTES,
    BadRecordError,
    Document,
    clean_text,
    document_id,
    read_documents,
    write_documents,
)

DOCUMENTS = [
    Document(
        id=document_id(str(i)), text="line\n" * i + "тест 数学", url=f"http://h/{i}", source="web", record=f"w#{i}"
    )
    for i in range(50)
]


def collect(path, **options):
    bad = []
    return list(read_documents(path, on_bad=bad.append, **options)), bad


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.zst"])
def test_round_trip(tmp_path, name):
    assert write_documents(tmp_path / name, DOCUMENTS) == 50
    assert list(read_documents(tmp_path / name)) == DOCUMENTS
    assert os.listdir(tmp_path) == [name]


def test_same_documents_give_same_bytes(tmp_path):
    for name in ("a.jsonl.zst", "b.jsonl.zst"):
        write_documents(tmp_path / name, [Document(id="1", text="x", meta=dict(m)) for m in [{"b": 1, "a": 2}]])
    assert (tmp_path / "a.jsonl.zst").read_bytes() == (tmp_path / "b.jsonl.zst").read_bytes()


def test_foreign_lines_get_id_record_and_meta(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "hello", "score": 0.5, "url": "http://a/"}\n\n{"text": "again"}\n')
    first, second = read_documents(tmp_path / "x.jsonl")
    assert (first.text, first.url, first.record, first.meta) == ("hello", "http://a/", "x.jsonl#1", {"score": 0.5})
    assert second.record == "x.jsonl#3"
    assert first.id != second.id
    assert len(first.id) == 16


def test_gzip_members_and_bom(tmp_path):
    lines = [json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(5)]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(b"\xef\xbb\xbf" * (i == 0) + line) for i, line in enumerate(lines)))
    assert [d.text for d in read_documents(path)] == [f"t{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"text": "\xff\xfe"}', "invalid_utf8"),
        (b'{"text": 5}', "no_text"),
        (b"[1]", "no_text"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "line_too_long"),
    ],
)
def test_bad_line_is_named_and_survived(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}')
    documents, bad = collect(path, max_line_bytes=4000 if reason == "line_too_long" else 1 << 20)
    assert [d.text for d in documents] == ["one", "three"]
    assert [(b.reason, b.record) for b in bad] == [(reason, "x.jsonl#2")]
    with pytest.raises(BadRecordError, match=r"x\.jsonl.*line 2"):
        list(read_documents(path, max_line_bytes=4000 if reason == "line_too_long" else 1 << 20))


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d\\ude00b\\ud800c"}')
    (document,) = read_documents(tmp_path / "x.jsonl")
    assert document.text == "a😀b\ufffdc" == clean_text("a\ud83d\ude00b\ud800c")


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress], ids=["gzip", "zstd"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_stream_keeps_what_came_before(tmp_path, compress, damage):
    rows = b"".join(json.dumps({"text": os.urandom(300).hex()}).encode() + b"\n" for _ in range(2000))
    data = bytearray(compress(rows))
    if damage == "truncated":
        del data[len(data) * 2 // 3 :]
    else:
        data[len(data) * 2 // 3] ^= 0xFF
    path = tmp_path / ("x.jsonl.gz" if data[:2] == b"\x1f\x8b" else "x.jsonl.zst")
    path.write_bytes(data)
    documents, bad = collect(path)
    assert any(b.reason.startswith(("truncated_", "corrupt_")) for b in bad)
    assert f"{path}" in bad[-1].detail
    if damage == "truncated":
        assert 500 < len(documents) < 2000
        assert [d.text for d in documents] == [json.loads(line)["text"] for line in rows.splitlines()[: len(documents)]]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_empty_file_has_no_documents(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(b"")
    assert collect(tmp_path / f"x{suffix}") == ([], [])


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        list(read_documents(tmp_path / "x.doc"))


def test_text_file_is_cut_at_blank_lines(tmp_path):
    text = "\n".join(f"paragraph {i} " + "word " * 2000 + "\n" for i in range(300))
    (tmp_path / "x.txt").write_text(text)
    documents = list(read_documents(tmp_path / "x.txt"))
    assert len(documents) > 1
    assert "\n\n".join(d.text for d in documents) == text.rstrip("\n")
    offset = int(documents[1].record.partition("#")[2])
    assert text.encode()[offset:].startswith(documents[1].text[:50].encode())


def test_text_file_with_bad_bytes(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"good\n\xff\xfe bad\nalso good\n")
    documents, bad = collect(tmp_path / "x.txt")
    assert [d.text for d in documents] == ["good\nalso good"]
    assert [b.reason for b in bad] == ["invalid_utf8"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    documents, bad = collect(tmp_path / "x.parquet")
    assert [(d.text, d.record, d.meta) for d in documents] == [
        ("a", "x.parquet#0", {"n": 1}),
        ("c", "x.parquet#2", {"n": 3}),
    ]
    assert [(b.record, b.reason) for b in bad] == [("x.parquet#1", "no_text")]
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "y.parquet").write_bytes(data[: len(data) // 2])
    assert [b.reason for b in collect(tmp_path / "y.parquet")[1]] == ["corrupt_parquet"]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"herdkern\[parquet\]"):
        list(read_documents(tmp_path / "x.parquet"))


READ_WITH_LITTLE_MEMORY = r"""
import re, sys
from pathlib import Path
from herdkern.data.document import read_documents
bad = []
texts = [d.text for d in read_documents(sys.argv[1], on_bad=bad.append, max_line_bytes=1 << 20)]
peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
print(texts, [b.reason for b in bad], peak < 120 << 10)
"""


@pytest.mark.parametrize("kind", ["line", "gzip bomb", "zstd bomb"])
def test_200_mb_single_line_and_bombs_stay_small(tmp_path, kind):
    path = tmp_path / {"line": "x.jsonl", "gzip bomb": "x.jsonl.gz", "zstd bomb": "x.jsonl.zst"}[kind]
    block = b" " * (1 << 20)
    if kind == "zstd bomb":
        compressor = zstandard.ZstdCompressor(level=3).compressobj()
        data = compressor.compress(b'{"text": "first"}\n') + b"".join(compressor.compress(block) for _ in range(200))
        path.write_bytes(data + compressor.flush())
    else:
        with (open if kind == "line" else gzip.open)(path, "wb") as file:
            file.write(b'{"text": "first"}\n')
            for _ in range(200):
                file.write(block)
            file.write(b'\n{"text": "last"}\n')
    run = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(path)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    assert (
        printed
        == {
            "line": "['first', 'last'] ['line_too_long'] True",
            "gzip bomb": "['first'] ['decompression_bomb'] True",
            "zstd bomb": "['first'] ['decompression_bomb'] True",
        }[kind]
    )


def test_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    write_documents(path, DOCUMENTS)
    before = path.read_bytes()

    def documents():
        yield DOCUMENTS[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_documents(path, documents())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.jsonl.zst"]


WRITE_TO_A_FULL_DISK = """
import resource, signal, sys
from herdkern.data.document import Document, write_documents
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import random
rng = random.Random(0)
try:
    write_documents(sys.argv[1], [Document(id=str(i), text=rng.randbytes(2000).hex()) for i in range(500)])
except OSError as error:
    print("OSError", error.errno)
"""


def test_full_disk_raises_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    write_documents(path, DOCUMENTS)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TO_A_FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("OSError")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.jsonl.zst"]


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_documents(tmp_path / "file" / "d.jsonl.zst", DOCUMENTS)


def test_reading_needs_no_torch():
    code = "import sys, herdkern.data.document; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    "fields",
    [
        '"score": NaN', '"meta": {"a": [Infinity], "b": 1}', '"title": "\\ud800"', '"lang": "\\ud800"',
        '"id": "\\ud800"', '"meta": {"\\ud800": 1}', '"timestamp": 100000000000000000000', '"timestamp": true',
    ],
)  # fmt: skip
def test_what_can_be_read_can_be_written(tmp_path, fields):
    (tmp_path / "x.jsonl").write_text('{"text": "words", "kept": 5, ' + fields + "}\n")
    (document,) = read_documents(tmp_path / "x.jsonl")
    assert (document.text, document.meta.get("kept")) == ("words", 5)
    assert abs(document.timestamp) < 1 << 53
    assert not isinstance(document.timestamp, bool)
    write_documents(tmp_path / "y.jsonl.zst", [document])
    (again,) = read_documents(tmp_path / "y.jsonl.zst")
    assert replace(again, record=document.record) == document


def test_the_largest_text_of_a_stage_is_read_by_the_next(tmp_path):
    """A thousandfold expansion and a line beyond MAX_LINE_BYTES: refused from others, not from ourselves."""
    document = Document(id="0" * 16, text='"' * (MAX_LINE_BYTES * 5 // 8))
    write_documents(tmp_path / "x.jsonl.zst", [document, replace(document, text="next")])
    assert [len(d.text) for d in read_documents(tmp_path / "x.jsonl.zst")] == [len(document.text), 4]
    bad = []
    assert list(read_documents(tmp_path / "x.jsonl.zst", on_bad=bad.append)) == []
    assert [b.reason for b in bad] == ["decompression_bomb"]
