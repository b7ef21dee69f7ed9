"""Document files as pieces of JSON lines for the native readers (csrc/text/bind_documents.cpp)."""

from collections.abc import Callable, Iterator
from pathlib import Path

from herdkern import _text
from herdkern.data.decompress import CHUNK_BYTES, DamagedFileError, read_chunks
from herdkern.data.document import (
    OWN_LINE_BYTES,
    BadRecord,
    BadRecordError,
    document_kind,
    document_of_line,
    read_documents,
)

LineReader = Callable[[bytes, int], bytes]


def line_reader(path: Path) -> tuple[str, LineReader]:
    """The last two arguments of the native readers: the file's name, and what makes a plain line of one they leave."""

    def plain_line(line: bytes, number: int) -> bytes:
        document = document_of_line(line, path, number)
        if isinstance(document, BadRecord):
            raise BadRecordError(document)
        return document.to_json().encode()

    try:
        path.name.encode()
    except UnicodeEncodeError:  # records and ids are made of the name in Python's way of writing such bytes
        return "", plain_line
    return path.name, plain_line


def read_pieces(path: Path, lines: _text.DocumentLines) -> Iterator[tuple[bytes, bool]]:
    """(piece, whether it is the last) of a document file; documents that are no JSON lines come as such.

    lines: the native reader that gets the pieces.
    Raises: BadRecordError for damage or too long a line.
    """
    if document_kind(path) != "jsonl":
        held: list[bytes] = []
        num_bytes = 0
        for document in read_documents(path):
            held.append(document.to_json().encode() + b"\n")
            num_bytes += len(held[-1])
            if num_bytes >= CHUNK_BYTES:
                yield b"".join(held), False
                held, num_bytes = [], 0
        yield b"".join(held), True
        return
    try:
        for piece in read_chunks(path, max_expansion=1 << 62):
            yield piece, False
            if lines.num_pending_bytes > OWN_LINE_BYTES:
                number = lines.num_lines + 1
                detail = f"{path}, line {number}: longer than {OWN_LINE_BYTES} bytes; split it"
                raise BadRecordError(BadRecord(f"{path.name}#{number}", "line_too_long", detail))
        yield b"", True
    except DamagedFileError as error:
        raise BadRecordError(BadRecord(f"{path.name}#{error.offset}", error.reason, str(error))) from error
