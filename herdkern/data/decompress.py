"""Bounded reading of plain, gzip and zstd files: no chunk or line outgrows its cap, damage comes with its offset.

A truncated stream yields everything before the damage and only then raises, so a reader keeps what can be kept.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

CHUNK_BYTES = 1 << 18
BOMB_FLOOR_BYTES = 64 << 20  # below this much output no ratio is suspicious
MAX_EXPANSION = 400  # output / input; text stays under 100, gzip of zeros reaches 1030

_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = 0x184D2A50  # the low four bits are free
_RLE_BLOCK = 1
_RESERVED_BLOCK = 3


class DamagedFileError(ValueError):
    """A compressed file is truncated, corrupt or a bomb; `reason` is a short code, `offset` a byte of the file."""

    def __init__(self, path: Path, offset: int, reason: str, detail: str):
        super().__init__(f"{path}: {detail} at byte {offset}")
        self.path, self.offset, self.reason, self.detail = path, offset, reason, detail


def read_chunks(
    path: Path, *, max_expansion: int = MAX_EXPANSION, on_position: Callable[[int], None] = lambda _: None
) -> Iterator[bytes]:
    """The content of `path`, decompressed when its first bytes are those of gzip or zstd, in pieces of at most 256 KiB.

    on_position: called with the bytes of the file that are read, before each piece.
    Raises: DamagedFileError after the last good piece.
    """
    path = Path(path)
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            pieces = _gunzip(path, file)
        elif int.from_bytes(magic, "little") in (_ZSTD_MAGIC, *range(_SKIPPABLE_MAGIC, _SKIPPABLE_MAGIC + 16)):
            pieces = _unzstd(path, file)
        else:
            while piece := file.read(CHUNK_BYTES):
                on_position(file.tell())
                yield piece
            return
        total = 0
        for piece in pieces:
            on_position(file.tell())
            total += len(piece)
            if total > BOMB_FLOOR_BYTES and total > max_expansion * max(1, file.tell()):
                detail = f"expands more than {max_expansion} times, taken for a decompression bomb"
                raise DamagedFileError(path, file.tell(), "decompression_bomb", detail)
            yield piece


def read_lines(
    path: Path, *, max_line_bytes: int, max_expansion: int = MAX_EXPANSION
) -> Iterator[tuple[int, int, bytes | None]]:
    r"""(number from 1, byte offset in the decompressed content, line without its \n or \r\n) of every line of `path`.

    A line longer than max_line_bytes is never held and comes as None.
    Raises: DamagedFileError, after the last whole line (a piece of a line before damage is not a line).
    """
    held: list[bytes] = []
    held_bytes = start = 0
    number = 1

    def whole(last: bytes) -> bytes | None:
        if held_bytes + len(last) > max_line_bytes:
            return None
        line = b"".join((*held, last))
        return line[:-1] if line.endswith(b"\r") else line

    for chunk in read_chunks(path, max_expansion=max_expansion):
        position = 0
        while (end := chunk.find(b"\n", position)) >= 0:
            yield number, start, whole(chunk[position:end])
            start += held_bytes + end - position + 1
            held, held_bytes = [], 0
            position = end + 1
            number += 1
        held_bytes += len(chunk) - position
        if held_bytes <= max_line_bytes:
            held.append(chunk[position:])
        else:
            held = []
    if held_bytes:
        yield number, start, whole(b"")


def gunzip_bounded(data: bytes, max_bytes: int, *, raw: bool = False) -> bytes:
    """`data`, gzip or zlib (`raw`: also bare deflate), decompressed; what is there of a cut stream; else as it is.

    Raises: DamagedFileError, reason decompression_bomb, if the result passes max_bytes.
    """
    for wbits in (47, -15) if raw else (47,):  # 47: zlib or gzip by its header
        inflate = zlib.decompressobj(wbits)
        try:
            content = inflate.decompress(data, max_bytes + 1)
        except zlib.error:
            continue
        if len(content) > max_bytes:
            raise DamagedFileError(Path(), 0, "decompression_bomb", f"expands beyond {max_bytes} bytes")
        return content
    return data


def _gunzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    inflate = zlib.decompressobj(31)
    pending = b""
    while pending or (pending := file.read(CHUNK_BYTES)):
        try:
            piece = inflate.decompress(pending, CHUNK_BYTES)
        except zlib.error as error:
            offset = file.tell() - len(pending)
            raise DamagedFileError(path, offset, "corrupt_gzip", f"corrupt gzip stream ({error}) near") from None
        pending = inflate.unconsumed_tail
        if piece:
            yield piece
        if inflate.eof:
            pending = inflate.unused_data.lstrip(b"\0")  # tape padding between members is allowed
            while not pending and (more := file.read(CHUNK_BYTES)):
                pending = more.lstrip(b"\0")
            if not pending:
                return
            inflate = zlib.decompressobj(31)
    while piece := inflate.decompress(b"", CHUNK_BYTES):
        yield piece
    if not inflate.eof:
        raise DamagedFileError(path, file.tell(), "truncated_gzip", "truncated gzip stream, ends")


def _unzstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Block by block (RFC 8878): a block holds at most 128 KiB, so output stays small and a cut is seen where it is."""
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    while head := _take(path, file, 4, allow_end=True):
        magic = int.from_bytes(head, "little")
        if magic & ~15 == _SKIPPABLE_MAGIC:
            _take(path, file, int.from_bytes(_take(path, file, 4), "little"))
            continue
        if magic != _ZSTD_MAGIC:
            raise DamagedFileError(path, file.tell() - 4, "corrupt_zstd", "no zstd frame")
        head += _take(path, file, 1)
        single_segment, has_checksum = head[4] >> 5 & 1, head[4] >> 2 & 1
        content_size_bytes = (1 if single_segment else 0, 2, 4, 8)[head[4] >> 6]
        head += _take(path, file, (1 - single_segment) + (0, 1, 2, 4)[head[4] & 3] + content_size_bytes)
        frame = context.decompressobj()
        last = False
        while not last:
            block = _take(path, file, 3)
            header = int.from_bytes(block, "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            if kind == _RESERVED_BLOCK:
                raise DamagedFileError(path, file.tell() - 3, "corrupt_zstd", "corrupt zstd block")
            block += _take(path, file, 1 if kind == _RLE_BLOCK else size)
            if last and has_checksum:
                block += _take(path, file, 4)
            try:
                piece = frame.decompress(head + block)
            except zstandard.ZstdError as error:
                offset = file.tell() - len(block)
                raise DamagedFileError(path, offset, "corrupt_zstd", f"corrupt zstd block ({error})") from None
            head = b""
            if piece:
                yield piece


def _take(path: Path, file: BinaryIO, size: int, *, allow_end: bool = False) -> bytes:
    data = file.read(size)
    if len(data) < size and not (allow_end and not data):
        raise DamagedFileError(path, file.tell(), "truncated_zstd", "truncated zstd stream, ends")
    return data
