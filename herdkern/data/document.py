"""The document record and its files: JSON lines, Parquet and plain text in, `documents.jsonl.zst` out."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import zstandard

from herdkern.data.decompress import CHUNK_BYTES, MAX_EXPANSION, DamagedFileError, read_lines
from herdkern.data.stored_zstd import StoredFrame
from herdkern.engine import atomic_file

MAX_LINE_BYTES = 64 << 20
OWN_LINE_BYTES = 8 * MAX_LINE_BYTES  # a text of MAX_LINE_BYTES may have grown by escapes when it was written
TEXT_PIECE_BYTES = 1 << 20  # a longer text file is cut at the next blank line
MAX_TIMESTAMP = 1 << 53  # beyond it no whole number is a time
_FIELDS = ("id", "text", "url", "source", "lang", "timestamp", "record")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from.

    id: 16 hex digits.  timestamp: seconds since 1970, 0 if unknown.  record: provenance, `<file>#<offset or index>`.
    lang: ISO 639 code, "und" if undetermined, "" if not yet asked.  meta: JSON values.
    """

    id: str
    text: str
    url: str = ""
    source: str = ""
    lang: str = ""
    timestamp: int = 0
    record: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON with the fields in a fixed order, `meta` sorted by key: equal documents give equal bytes."""
        line = {name: getattr(self, name) for name in _FIELDS}
        line["meta"] = {key: self.meta[key] for key in sorted(self.meta)}
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """What could not be read: `record` is `<file>#<line, row or byte>`, `reason` a short code, `detail` a sentence."""

    record: str
    reason: str
    detail: str


class BadRecordError(ValueError):
    """A record that could not be read, raised where nobody collects bad records."""

    def __init__(self, bad: BadRecord):
        super().__init__(f"read_documents: {bad.record} must be a readable document, got {bad.reason}: {bad.detail}")
        self.bad = bad

    def __reduce__(self) -> tuple[type["BadRecordError"], tuple[BadRecord]]:
        return BadRecordError, (self.bad,)  # as workers send it


@dataclass(frozen=True, slots=True)
class _Limits:
    line_bytes: int
    expansion: int


OnBad = Callable[[BadRecord], None]


def raise_bad_record(bad: BadRecord) -> None:
    """The `on_bad` of a reader that must not lose anything."""
    raise BadRecordError(bad)


def document_id(*parts: str) -> str:
    """16 hex digits that depend on `parts` alone (BLAKE2b-64, parts separated by NUL)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def clean_text(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def read_documents(
    path: Path | str,
    *,
    on_bad: OnBad = raise_bad_record,
    max_line_bytes: int = 0,
    text_key: str = "text",
    html_key: str = "",
) -> Iterator[Document]:
    """The documents of `path` by suffix: .jsonl .json .ndjson .txt .text .md .rst (each also .gz or .zst), .parquet.

    A line needs `text_key` alone; keys that are no field of Document go to `meta`. With `html_key` a line without text
    may hold a page under that key: it becomes the text, marked by `meta["is_html"]`. A text file is one document, or
    one per TEXT_PIECE_BYTES cut at a blank line. Memory stays near max_line_bytes whatever the file holds; 0 stands for
    MAX_LINE_BYTES, and for OWN_LINE_BYTES where no record may be lost (what a stage wrote must be readable to the next,
    so there a file may also expand without a limit).
    Raises: BadRecordError naming file and line, unless `on_bad` collects the bad records and reading goes on behind
    them; ValueError for another suffix.
    """
    path = Path(path)
    kind = document_kind(path)
    may_lose = on_bad is not raise_bad_record
    limits = _Limits(
        line_bytes=max_line_bytes or (MAX_LINE_BYTES if may_lose else OWN_LINE_BYTES),
        expansion=MAX_EXPANSION if may_lose else sys.maxsize,
    )
    if kind == "parquet":
        yield from _read_parquet(path, on_bad, text_key, html_key)
        return
    try:
        if kind == "jsonl":
            yield from _read_json_lines(path, on_bad, limits, text_key, html_key)
        else:
            yield from _read_text(path, on_bad, limits)
    except DamagedFileError as error:
        on_bad(BadRecord(f"{path.name}#{error.offset}", error.reason, str(error)))


def document_kind(path: Path) -> str:
    """ "jsonl", "text" or "parquet", by the suffix. Raises: ValueError for another suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".json", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".txt", ".text", ".md", ".rst"):
        return "text"
    raise ValueError(
        f"read_documents: path must end in .jsonl, .json, .ndjson, .txt, .text, .md, .rst (each also .gz or .zst) "
        f"or .parquet, got {path.name!r}"
    )


def _read_json_lines(path: Path, on_bad: OnBad, limits: _Limits, text_key: str, html_key: str) -> Iterator[Document]:
    for number, _, line in read_lines(path, max_line_bytes=limits.line_bytes, max_expansion=limits.expansion):
        if line is None:
            detail = f"{path}, line {number}: longer than {limits.line_bytes} bytes; split it or raise max_line_bytes"
            on_bad(BadRecord(f"{path.name}#{number}", "line_too_long", detail))
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        document = document_of_line(line, path, number, text_key=text_key, html_key=html_key)
        if isinstance(document, BadRecord):
            on_bad(document)
        else:
            yield document


def document_of_line(
    line: bytes, path: Path, number: int, *, text_key: str = "text", html_key: str = ""
) -> Document | BadRecord:
    """The document in one line of JSON that is not blank, or what is wrong with it. number: of the line, from 1."""
    record = f"{path.name}#{number}"

    def bad(reason: str, detail: str) -> BadRecord:
        return BadRecord(record, reason, f"{path}, line {number}: {detail}")

    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return bad("invalid_utf8", f"byte {error.start} is not UTF-8")
    except RecursionError:
        return bad("invalid_json", "nested too deeply")
    except ValueError as error:
        return bad("invalid_json", str(error))
    document = _from_values(values, record, text_key, html_key)
    return bad("no_text", document) if isinstance(document, str) else document


def _read_text(path: Path, on_bad: OnBad, limits: _Limits) -> Iterator[Document]:
    held: list[str] = []
    held_bytes = begin = 0

    def cut() -> Document:
        text = "\n".join(held).strip("\n")
        record = f"{path.name}#{begin}"
        return Document(id=document_id(record, text), text=text, record=record)

    for number, offset, line in read_lines(path, max_line_bytes=limits.line_bytes, max_expansion=limits.expansion):
        if not held:
            begin = offset
        try:
            if line is None:
                detail = (
                    f"{path}, line {number}: longer than {limits.line_bytes} bytes; split it or raise max_line_bytes"
                )
                on_bad(BadRecord(f"{path.name}#{offset}", "line_too_long", detail))
                continue
            held.append((line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode())
        except UnicodeDecodeError as error:
            detail = f"{path}, line {number}: byte {error.start} is not UTF-8"
            on_bad(BadRecord(f"{path.name}#{offset}", "invalid_utf8", detail))
            continue
        held_bytes += len(line) + 1
        if held_bytes >= TEXT_PIECE_BYTES and (not line.strip() or held_bytes >= 16 * TEXT_PIECE_BYTES):
            yield cut()
            held, held_bytes = [], 0
    if any(line.strip() for line in held):
        yield cut()


def _read_parquet(path: Path, on_bad: OnBad, text_key: str, html_key: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"read_documents: Parquet needs pyarrow ({error}); pip install 'herdkern[parquet]'"
        ) from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names and html_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                on_bad(BadRecord(f"{path.name}#0", "no_text", f"{path}: has no column {text_key!r}, only {names}"))
                return
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    record = f"{path.name}#{row}"
                    row += 1
                    if isinstance(values.get("meta"), str):
                        values["meta"] = _meta_of_json(values["meta"])
                    document = _from_values(values, record, text_key, html_key)
                    if isinstance(document, str):
                        on_bad(BadRecord(record, "no_text", f"{path}, row {row}: {document}"))
                    else:
                        yield document
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        on_bad(BadRecord(f"{path.name}#{row}", "corrupt_parquet", f"{path}, near row {row}: {error}"))


def _meta_of_json(text: str) -> Any:
    """A column `meta` of text as herdkern.dedup.parquet writes it: the value of its JSON, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_values(values: Any, record: str, text_key: str, html_key: str) -> Document | str:
    """The document, or what is wrong with `values`."""
    is_html = isinstance(values, dict) and values.get(text_key) is None and isinstance(values.get(html_key), str)
    if is_html:
        text_key = html_key
    if not isinstance(values, dict) or not isinstance(values.get(text_key), str):
        got = f"the keys {sorted(values)[:8]}" if isinstance(values, dict) else f"a JSON {type(values).__name__}"
        return f"must be an object with a string {text_key!r}, got {got}"
    text = clean_text(values[text_key])
    known = {name: values[name] for name in _FIELDS if isinstance(values.get(name), str)}
    meta = values.get("meta")
    meta = dict(meta) if isinstance(meta, dict) else {}
    extra = {key: value for key, value in values.items() if key not in _FIELDS and key not in (text_key, "meta")}
    meta.update((key, value) for key, value in extra.items() if isinstance(value, (str, int, float, bool)))
    meta = _writable(meta)
    if is_html:
        meta["is_html"] = True
    timestamp = values.get("timestamp", 0)
    is_time = isinstance(timestamp, int) and not isinstance(timestamp, bool) and abs(timestamp) <= MAX_TIMESTAMP
    return Document(
        id=clean_text(known.get("id", "")) or document_id(record, text),
        text=text,
        url=clean_text(known.get("url", "")),
        source=clean_text(known.get("source", "")),
        lang=clean_text(known.get("lang", "")),
        timestamp=timestamp if is_time else 0,
        record=clean_text(known.get("record") or record),
        meta=meta,
    )


def _writable(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` as it is if it can be written again; else without what JSON cannot hold, its texts cleaned."""
    try:
        json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
        return meta
    except (ValueError, TypeError, RecursionError):
        return {
            clean_text(str(key)): value for key, value in ((k, _plain(v)) for k, v in meta.items()) if value is not None
        }


def _plain(value: Any) -> Any:
    """A scalar that JSON can hold, None for any other value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return clean_text(value) if isinstance(value, str) else value if isinstance(value, int) else None


Writer = TypeVar("Writer", bound="DocumentWriter")


class DocumentWriter:
    """Writes documents to `path`, zstd at `level` with a checksum (plain if it ends in .jsonl), as a context manager.

    level: of zstd; 0 stores the text as it is in a zstd frame, without a checksum.

    The file appears under its name when the block ends well, complete and synced; until then, and for ever after an
    error, there is nothing there. The same documents give the same bytes.
    """

    def __init__(self, path: Path | str, *, level: int = 3):
        self.path, self.level = Path(path), level
        self.num_documents = 0
        self.text_bytes = 0  # UTF-8 bytes of `text` alone
        self._output = atomic_file(self.path, hashed=True)
        self._pending: list[bytes | memoryview] = []
        self._pending_bytes = 0

    def __enter__(self: Writer) -> Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._output.__enter__()
        compress = zstandard.ZstdCompressor(level=self.level or 1, write_checksum=True, write_content_size=False)
        self._compressor: Any = compress.compressobj() if self.level else StoredFrame()
        if self.path.suffix == ".jsonl":
            self._compressor = None
        return self

    def write(self, document: Document, **extra: str) -> None:
        """Append `document`; `extra` becomes further fields of the line (the `reason` of a dropped document)."""
        line = document.to_json()
        if extra:
            tail = json.dumps(extra, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
            line = f"{line[:-1]},{tail[1:]}"
        data = line.encode() + b"\n"
        self._pending.append(data)
        self._pending_bytes += len(data)
        self.num_documents += 1
        self.text_bytes += len(document.text.encode())
        if self._pending_bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if isinstance(self._compressor, StoredFrame):
            self._file.writelines(self._compressor.blocks(pending))
            return
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        self._file.write(data if self._compressor is None else self._compressor.compress(data))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                if self._compressor is not None:
                    self._file.write(self._compressor.flush())
        except BaseException:
            self._output.__exit__(*sys.exc_info())
            raise
        self._output.__exit__(kind, error, trace)


def write_documents(path: Path | str, documents: Iterable[Document]) -> int:
    """Write all `documents` to `path` and return how many they were."""
    with DocumentWriter(path) as writer:
        for document in documents:
            writer.write(document)
    return writer.num_documents


def with_meta(document: Document, **values: Any) -> Document:
    """`document` with `values` added to its `meta`."""
    return replace(document, meta={**document.meta, **values})
