import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from herdkern.data.document import BadRecordError, Document
from herdkern.data.sources import RawPage, expand_inputs, group_inputs, read_records
from herdkern.data.warc import WarcWriter

HTML = b"<html><body><p>page %d</p></body></html>"


def http(body, *headers, status="200 OK"):
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def write_warc(path, responses):
    with WarcWriter(path, date="2024-05-06T07:08:09Z", software="test") as warc:
        for index, response in enumerate(responses):
            warc.write_page(f"http://h/{index}", b"GET / HTTP/1.1\r\n\r\n", response, [("outlink", "http://h/x")])
    return path


def pages(count):
    return [http(HTML % i + b"x" * 2000, "Content-Type: text/html; charset=koi8-r") for i in range(count)]


def collect(path, **options):
    bad = []
    return list(read_records(Path(path), on_bad=bad.append, **options)), bad


def test_warc_round_trip(tmp_path):
    path = write_warc(tmp_path / "a.warc.gz", pages(5))
    records, bad = collect(path)
    assert bad == []
    assert [r.url for r in records] == [f"http://h/{i}" for i in range(5)]
    assert all(r.charset == "koi8-r" and r.timestamp == 1714979289 for r in records)
    for record in records:  # the offset in `record` is where a reader finds it again
        offset = int(record.record.partition("#")[2])
        block = zlib.decompressobj(31).decompress(path.read_bytes()[offset:])
        assert block.startswith(b"WARC/1.1\r\nWARC-Type: response")
        assert record.content in block


def test_same_records_same_warc(tmp_path):
    write_warc(tmp_path / "a.warc.gz", pages(3))
    (tmp_path / "again").mkdir()
    write_warc(tmp_path / "again" / "a.warc.gz", pages(3))
    assert (tmp_path / "a.warc.gz").read_bytes() == (tmp_path / "again" / "a.warc.gz").read_bytes()


def test_plain_warc_and_conversion_records(tmp_path):
    data = gzip.decompress(write_warc(tmp_path / "a.warc.gz", pages(3)).read_bytes())
    data += b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://w/\r\nContent-Type: text/plain\r\n"
    (tmp_path / "a.warc").write_bytes(data + b"Content-Length: 9\r\n\r\nsome text\r\n\r\n")
    records, bad = collect(tmp_path / "a.warc")
    assert [type(r) for r in records] == [RawPage, RawPage, RawPage, Document]
    assert (records[3].text, records[3].url, bad) == ("some text", "http://w/", [])


def test_content_and_transfer_encodings(tmp_path):
    body = HTML % 7
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n"
    responses = [
        http(gzip.compress(body), "Content-Type: text/html", "Content-Encoding: gzip"),
        http(zlib.compress(body), "Content-Type: text/html", "Content-Encoding: deflate"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
        http(body, "Content-Type: text/html", "Content-Encoding: gzip"),  # stored decoded, the header left in place
        http(body),  # no type, but it looks like HTML
    ]
    records, bad = collect(write_warc(tmp_path / "a.warc.gz", responses))
    assert bad == []
    assert [r.content for r in records] == [body] * 5


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (http(HTML, "Content-Type: text/html", status="404 Not Found"), "http_status"),
        (http(HTML, "Content-Type: text/html", status="301 Moved"), "http_status"),
        (http(b"\x89PNG", "Content-Type: image/png"), "not_html"),
        (
            http(gzip.compress(b"\0" * 50_000_000), "Content-Type: text/html", "Content-Encoding: gzip"),
            "decompression_bomb",
        ),
        (http(HTML, "Content-Type: text/html", "Content-Encoding: br"), "unknown_encoding"),
        (http(b"x" * 3_000_000, "Content-Type: text/html"), "page_too_large"),
    ],
)
def test_what_is_no_page_is_counted_and_passed_over(tmp_path, response, reason):
    path = write_warc(tmp_path / "a.warc.gz", [*pages(1), response, *pages(1)])
    records, bad = collect(path, max_record_bytes=1 << 20)
    assert [r.url for r in records] == ["http://h/0", "http://h/2"]
    assert [b.reason for b in bad] == [reason]
    with pytest.raises(BadRecordError, match=reason):
        list(read_records(path, max_record_bytes=1 << 20))


def test_page_cut_when_fetched(tmp_path):
    with WarcWriter(tmp_path / "a.warc.gz", date="2024-05-06T07:08:09Z", software="test") as warc:
        warc.write_page("http://h/", b"GET / HTTP/1.1\r\n\r\n", pages(1)[0], [], truncated="length")
    assert [b.reason for b in collect(tmp_path / "a.warc.gz")[1]] == ["truncated_page"]


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_cut_at_any_byte_keeps_the_whole_records_before(tmp_path, name):
    data = write_warc(tmp_path / "full.warc.gz", pages(6)).read_bytes()
    if name == "a.warc":
        data = gzip.decompress(data)
    counts = []
    for size in range(0, len(data), 97):
        (tmp_path / name).write_bytes(data[:size])
        records, _ = collect(tmp_path / name)
        assert all(r.content.endswith(b"x" * 2000) for r in records)
        counts.append(len(records))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_damage_costs_one_record(tmp_path, name):
    data = bytearray(write_warc(tmp_path / "full.warc.gz", pages(6)).read_bytes())
    if name == "a.warc":
        data = bytearray(gzip.decompress(bytes(data)))
        middle = data.index(b"WARC/1.1\r\nWARC-Type: response", len(data) // 2)
        data[middle : middle + 10] = b"\0\1\2garbage"
    else:
        offsets = [int(r.record.partition("#")[2]) for r in collect(tmp_path / "full.warc.gz")[0]]
        data[offsets[3] + 60 : offsets[3] + 70] = bytes(10)
    (tmp_path / name).write_bytes(data)
    records, bad = collect(tmp_path / name)
    assert len(records) == 5
    assert bad
    assert all(name in b.detail for b in bad)


def declared(size):
    head = b"WARC/1.1\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: %d\r\n\r\n"
    return head % size + b"HTTP/1.1 200 OK\r\n\r\nabc"


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"", {"empty_file"}),
        (b"no warc at all", {"corrupt_warc"}),
        (bytes(5000), {"corrupt_warc"}),
        (declared(10**15), {"page_too_large"}),
        (declared(10**6), {"truncated_record"}),
        (b"WARC/1.1\r\n" * 1000, {"corrupt_warc", "truncated_warc"}),
        (b"\x1f\x8b\x08" * 2000, {"corrupt_warc", "truncated_warc"}),
    ],
)
def test_hostile_files_give_a_reason(tmp_path, content, reasons):
    (tmp_path / "a.warc").write_bytes(content)
    records, bad = collect(tmp_path / "a.warc")
    assert records == []
    assert bad
    assert {b.reason for b in bad} <= reasons
    assert all(b.record.startswith("a.warc#") for b in bad)


READ_A_BOMB = r"""
import re, sys
from pathlib import Path
from herdkern.data.sources import read_records
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
bad = []
before = peak()
records = list(read_records(Path(sys.argv[1]), on_bad=bad.append, max_record_bytes=1 << 20))
print(len(records), [b.reason for b in bad], peak() - before < 40 << 10)
"""


def test_bomb_needs_little_memory(tmp_path):
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(400)) + bomb.flush()
    path = write_warc(
        tmp_path / "a.warc.gz", [http(data, "Content-Type: text/html", "Content-Encoding: gzip"), *pages(1)]
    )
    done = subprocess.run([sys.executable, "-c", READ_A_BOMB, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 ['decompression_bomb'] True"


def test_html_files_and_documents(tmp_path):
    (tmp_path / "a.html").write_bytes(HTML)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "t"}) + "\n{\n")
    (tmp_path / "c.txt").write_text("plain")
    place = f"{tmp_path.name}/a.html"
    assert collect(tmp_path / "a.html")[0] == [RawPage(HTML, "", place, 0, f"{place}#0")]
    assert [b.reason for b in collect(tmp_path / "a.html", max_record_bytes=10)[1]] == ["page_too_large"]
    records, bad = collect(tmp_path / "b.jsonl")
    assert ([r.text for r in records], [b.record for b in bad]) == (["t"], ["b.jsonl#2"])
    assert [r.text for r in collect(tmp_path / "c.txt")[0]] == ["plain"]


def test_rows_may_hold_pages(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"html": "<p>é</p>", "url": "http://h/"}) + "\n" + json.dumps({"text": "t"})
    )
    page, document = collect(tmp_path / "a.jsonl")[0]
    assert page == RawPage("<p>é</p>".encode(), "utf-8", "http://h/", 0, "a.jsonl#1")
    assert document.text == "t"
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"html": ["<p>a</p>"]}), tmp_path / "a.parquet")
    assert [r.content for r in collect(tmp_path / "a.parquet")[0]] == [b"<p>a</p>"]


def test_expand_inputs(tmp_path):
    for name in ("z/b.html", "z/a.warc.gz", "z/deep/c.parquet", "z/skip.png", "d.jsonl.zst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = expand_inputs([tmp_path / "d.jsonl.zst", str(tmp_path / "z")])
    assert [str(p.relative_to(tmp_path)) for p in found] == [
        "d.jsonl.zst",
        "z/a.warc.gz",
        "z/b.html",
        "z/deep/c.parquet",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold a file that ends in"):
        expand_inputs([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"skip\.png must end in"):
        expand_inputs([tmp_path / "z" / "skip.png"])
    with pytest.raises(FileNotFoundError, match="there is none"):
        expand_inputs([tmp_path / "nowhere.warc"])


def test_group_inputs(tmp_path):
    files = []
    for index, size in enumerate((10, 10, 10, 500, 10, 10)):
        files.append(tmp_path / f"{index}.html")
        files[-1].write_bytes(b"x" * size)
    groups = group_inputs(files, max_group_bytes=25)
    assert [[p.stem for p in group] for group in groups] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert group_inputs(files, max_group_files=4) == [files[:4], files[4:]]
    assert group_inputs([]) == []


DATA = os.environ.get("HERDKERN_DATA")


@pytest.mark.skipif(not DATA, reason="HERDKERN_DATA is not set: foreign WARC files are not in the repository")
def test_foreign_files_good_and_broken():
    folder = Path(DATA or "") / "html-extraction" / "warc"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    found = {}
    for path in sorted(folder.iterdir()):
        if ".warc" in path.name:
            records, bad = collect(path)
            found[path.name.partition("__")[2]] = (len(records), {b.reason for b in bad})
    assert found["warcfile.warc.gz"] == (16, set())
    assert found["clipped.warc.gz"] == (0, {"truncated_record"})
    assert found["example-iana.org-chunked.warc"] == (1, set())
    assert found["example-trunc.warc"] == (1, {"corrupt_warc"})
    assert found["example-resource.warc.gz"] == (1, set())


@pytest.mark.parametrize("kind", ["warc.gz", "warc"])
def test_a_cut_file_is_always_reported(tmp_path, kind):
    """Wherever it is cut but between two records: also in a request or metadata record, or before the first page."""
    packed = write_warc(tmp_path / "whole.warc.gz", pages(4)).read_bytes()
    borders, rest = [0], packed
    while rest:
        member = zlib.decompressobj(31)
        record = member.decompress(rest)
        rest = member.unused_data
        borders.append(borders[-1] + len(record) if kind == "warc" else len(packed) - len(rest))
    data = gzip.decompress(packed) if kind == "warc" else packed
    for cut in range(20, len(data), 37):
        if min(abs(cut - border) for border in borders) <= 4 + 8 * (kind == "warc"):
            continue  # nothing, or the blank lines behind a record, is missing
        (tmp_path / f"cut.{kind}").write_bytes(data[:cut])
        _, bad = collect(tmp_path / f"cut.{kind}")  # of a header that is cut also what it lacks
        assert [b.reason in ("truncated_warc", "truncated_record") for b in bad].count(True) == 1, (cut, bad)
    (tmp_path / f"cut.{kind}").write_bytes(data)
    assert (len(collect(tmp_path / f"cut.{kind}")[0]), collect(tmp_path / f"cut.{kind}")[1]) == (4, [])
