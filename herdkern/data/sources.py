"""What a corpus can come in: WARC, HTML files, JSON lines, Parquet, text. Damage costs the damaged records alone."""

import datetime
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from herdkern.data.decompress import DamagedFileError, gunzip_bounded
from herdkern.data.document import BadRecord, Document, OnBad, clean_text, document_id, raise_bad_record, read_documents

MAX_RECORD_BYTES = 64 << 20
_WARC_SUFFIXES = (".warc", ".warc.gz", ".warc.zst", ".warc.lz4")
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_DOCUMENT_STEMS = (".jsonl", ".json", ".ndjson", ".txt", ".text", ".md", ".rst")
_DOCUMENT_SUFFIXES = (".parquet", *(stem + end for stem in _DOCUMENT_STEMS for end in ("", ".gz", ".zst")))
INPUT_SUFFIXES = _WARC_SUFFIXES + _HTML_SUFFIXES + _DOCUMENT_SUFFIXES
_RESYNC_MARKS = (b"\x1f\x8b\x08", b"WARC/1.", b"WARC/0.1")
_WINDOW = 1 << 20


@dataclass(frozen=True, slots=True)
class RawPage:
    """A page as fetched: HTML bytes, the charset of its HTTP header, and where it is from (see Document)."""

    content: bytes
    charset: str
    url: str
    timestamp: int
    record: str


def expand_inputs(inputs: Iterable[Path | str]) -> list[Path]:
    """The files of `inputs` in order, folders replaced by the readable files below them, sorted by path.

    Raises: FileNotFoundError if a path does not exist, ValueError if a file is of no known kind or a folder has none.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.name.lower().endswith(INPUT_SUFFIXES) and p.is_file())
            if not below:
                raise ValueError(f"expand_inputs: {path} must hold a file that ends in {', '.join(INPUT_SUFFIXES)}")
            files.extend(below)
        elif not path.exists():
            raise FileNotFoundError(f"expand_inputs: {path} must be a file or folder, there is none")
        elif not path.name.lower().endswith(INPUT_SUFFIXES):
            raise ValueError(f"expand_inputs: {path} must end in {', '.join(INPUT_SUFFIXES)}")
        else:
            files.append(path)
    return files


def group_inputs(
    files: list[Path], *, max_group_bytes: int = 64 << 20, max_group_files: int = 1000
) -> list[list[Path]]:
    """`files` cut into runs for one task each: neighbours until a run reaches a limit."""
    groups: list[list[Path]] = []
    room = 0
    for path in files:
        size = path.stat().st_size
        if not groups or size > room or len(groups[-1]) >= max_group_files:
            groups.append([])
            room = max_group_bytes
        groups[-1].append(path)
        room -= size
    return groups


def read_records(
    path: Path, *, on_bad: OnBad = raise_bad_record, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[RawPage | Document]:
    """Pages and documents of one file of any kind in INPUT_SUFFIXES.

    What is no page (other HTTP status or type) and what cannot be read goes to `on_bad` with its reason; reading goes
    on behind it. Nothing larger than max_record_bytes is held, compressed or not.
    """
    name = path.name.lower()
    if name.endswith(_WARC_SUFFIXES):
        yield from _read_warc(path, on_bad, max_record_bytes)
    elif name.endswith(_HTML_SUFFIXES):
        place = f"{path.resolve().parent.name}/{path.name}"  # folders of pages have an index.html each
        record = f"{place}#0"
        if path.stat().st_size > max_record_bytes:
            on_bad(BadRecord(record, "page_too_large", f"{path}: larger than {max_record_bytes} bytes"))
            return
        yield RawPage(path.read_bytes(), "", place, 0, record)
    else:
        for document in read_documents(path, on_bad=on_bad, max_line_bytes=max_record_bytes, html_key="html"):
            if document.meta.get("is_html"):
                content = document.text.encode()
                yield RawPage(content, "utf-8", document.url, document.timestamp, document.record)
            else:
                yield document


def _read_warc(path: Path, on_bad: OnBad, max_record_bytes: int) -> Iterator[RawPage | Document]:
    """Records of a WARC file; behind a damaged stretch reading starts again at the next record that can be found."""
    start = 0
    cut_at = ""  # the record already reported as truncated

    def note(bad: BadRecord) -> None:
        nonlocal cut_at
        cut_at = bad.record if bad.reason in ("truncated_record", "page_too_large") else ""
        on_bad(bad)

    with open(path, "rb") as file:
        size = path.stat().st_size
        if size == 0:
            on_bad(BadRecord(f"{path.name}#0", "empty_file", f"{path}: has no bytes"))
        while start < size:
            file.seek(start)
            last = start
            types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
            types |= WarcRecordType.warcinfo | WarcRecordType.request | WarcRecordType.metadata | WarcRecordType.revisit
            try:
                for record in ArchiveIterator(_Part(file, start), record_types=types, parse_http=False):
                    last = start + record.stream_pos
                    found = _read_record(record, f"{path.name}#{last}", note, max_record_bytes)
                    if found is not None:
                        yield found
                if cut_at != f"{path.name}#{last}" and _is_cut(file, last):
                    on_bad(BadRecord(f"{path.name}#{last}", "truncated_warc", f"{path}: ends within a record"))
                return
            except OSError as error:
                detail = f"{path}: damaged near byte {last}: {error}"
                on_bad(BadRecord(f"{path.name}#{last}", "corrupt_warc", detail))
            start = _next_record(file, last + 1, size)


def _is_cut(file: BinaryIO, last: int) -> bool:
    """Whether the file ends inside the record at byte `last` or one behind it: the reader skips such a rest."""
    file.seek(last)
    piece = file.read(_WINDOW)
    if piece[:2] != b"\x1f\x8b":
        head, end, _ = piece.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length:[ \t]*(\d+)", head)
        if piece[:5] != b"WARC/" or not end or length is None:
            return piece[:5] == b"WARC/" and not end
        stop = last + len(head) + 4 + int(length[1])
        if stop > file.seek(0, 2):
            return True
        file.seek(stop)
        rest = file.read(_WINDOW).strip()
        return rest != b"" and b"\r\n\r\n" not in rest
    inflate = zlib.decompressobj(31)
    while piece:
        try:
            inflate.decompress(piece, _WINDOW)
        except zlib.error:
            return False  # damage that the reader has passed over
        piece = inflate.unconsumed_tail or inflate.unused_data.lstrip(b"\0") or file.read(_WINDOW)
        if inflate.eof and piece:
            inflate = zlib.decompressobj(31)
    return not inflate.eof


class _Part:
    """The rest of a file from an offset on, as a stream of its own."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._start = file, start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (self._start if whence == 0 else 0), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def close(self) -> None:
        """The file stays open for the parts behind this one."""


def _next_record(file: BinaryIO, start: int, size: int) -> int:
    """Where the next gzip member or record may begin at or behind `start`; `size` if nowhere."""
    while start < size:
        file.seek(start)
        window = file.read(_WINDOW)
        found = [position for mark in _RESYNC_MARKS if (position := window.find(mark)) >= 0]
        if found:
            return start + min(found)
        start += max(1, len(window) - 8)
        if len(window) < _WINDOW:
            break
    return size


def _read_record(record: WarcRecord, place: str, on_bad: OnBad, max_record_bytes: int) -> RawPage | Document | None:
    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")

    def bad(reason: str, detail: str) -> None:
        on_bad(BadRecord(place, reason, f"{detail}: {url}"))

    kind = record.record_type
    if not kind & (WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion):
        return None
    declared = record.content_length
    if declared > max_record_bytes:
        bad("page_too_large", f"record declares {declared} bytes, at most {max_record_bytes} are read")
        return None
    try:
        record.freeze()
        if record.content_length < declared:
            bad("truncated_record", f"record declares {declared} bytes, {record.content_length} are there")
            return None
        if record.headers.get("WARC-Truncated"):
            bad("truncated_page", f"page was cut when fetched ({record.headers.get('WARC-Truncated')})")
            return None
        content_type, charset = record.headers.get("Content-Type") or "", ""
        if record.is_http:
            record.parse_http(auto_decode="transfer")  # "content" would expand without a bound
            status = record.http_headers.status_code if record.http_headers is not None else None
            if status != 200:
                bad("http_status", f"status {status}")
                return None
            content_type, charset = record.http_content_type or "", record.http_charset or ""
        encoding = (record.http_headers.get("Content-Encoding") or "") if record.http_headers is not None else ""
        body = _decoded(record.reader.read(), encoding.lower().strip(), max_record_bytes)
    except DamagedFileError as error:
        bad(error.reason, error.detail)
        return None
    except (OSError, ValueError, MemoryError) as error:
        bad("bad_http", f"cannot be decoded ({error})")
        return None
    kind_of_body = _kind_of(body, content_type)
    if kind_of_body == "html":
        return RawPage(body, charset, url, _timestamp(record), place)
    if kind_of_body == "text":
        text = clean_text(body.decode(charset if charset.lower() == "utf-8" else "utf-8", "replace"))
        return Document(id=document_id(url, text), text=text, url=url, timestamp=_timestamp(record), record=place)
    bad("not_html", f"content type {content_type or 'unknown'}")
    return None


def _decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """`body` without its Content-Encoding; as it is if it never had one, as some archives store it."""
    if encoding in ("gzip", "x-gzip", "deflate"):
        return gunzip_bounded(body, max_bytes, raw=encoding == "deflate")
    if encoding in ("br", "zstd", "compress"):
        raise DamagedFileError(Path(), 0, "unknown_encoding", f"content encoding {encoding} is not read")
    return body


def _kind_of(body: bytes, content_type: str) -> str:
    """ "html", "text" or "" by the declared type, by the first bytes if there is none."""
    declared = content_type.partition(";")[0].strip().lower()
    if declared in ("text/html", "application/xhtml+xml"):
        return "html"
    if declared == "text/plain":
        return "text"
    head = body[:1024].lstrip().lower()
    if declared in ("", "application/octet-stream", "application/xml", "text/xml") and (
        head.startswith((b"<!doctype html", b"<html")) or b"<html" in head
    ):
        return "html"
    return ""


def _timestamp(record: WarcRecord) -> int:
    try:
        date = record.record_date
    except ValueError:
        return 0
    if date is None:
        return 0
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)
    return int(date.timestamp())
