"""A zstd frame that holds its content as it is: any reader of zstd reads it, and it costs no more than copying."""

import struct

_HEADER = bytes.fromhex("28b52ffd0038")  # magic number; no checksum, no size; a window of 128 KiB
_BLOCK_BYTES = 1 << 17


class StoredFrame:
    """What zstandard's compressobj is, with raw blocks (RFC 8878, 3.1.1.2). There is no checksum."""

    def __init__(self) -> None:
        self._begin = _HEADER

    def compress(self, data: bytes) -> bytes:
        """The blocks of `data`."""
        parts: list[bytes | memoryview] = [self._begin]
        self._begin = b""
        view = memoryview(data)
        for begin in range(0, len(view), _BLOCK_BYTES):
            block = view[begin : begin + _BLOCK_BYTES]
            parts += (struct.pack("<I", len(block) << 3)[:3], block)
        return b"".join(parts)

    def flush(self) -> bytes:
        """The end of the frame: an empty last block."""
        begin, self._begin = self._begin, b""
        return begin + b"\1\0\0"
