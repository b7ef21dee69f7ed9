"""A zstd frame that holds its content as it is: any reader of zstd reads it, and it costs no more than copying."""

import struct
from collections.abc import Iterable

_HEADER = bytes.fromhex("28b52ffd0038")  # magic number; no checksum, no size; a window of 128 KiB
_BLOCK_BYTES = 1 << 17


class StoredFrame:
    """A frame of raw blocks (RFC 8878, 3.1.1.2). There is no checksum."""

    def __init__(self) -> None:
        self._begin = _HEADER

    def blocks(self, parts: Iterable[bytes | memoryview]) -> list[bytes | memoryview]:
        """The blocks of what the parts hold, one behind the other: views of the parts, which are not copied."""
        blocks: list[bytes | memoryview] = [self._begin]
        self._begin = b""
        held: list[memoryview] = []
        room = _BLOCK_BYTES

        def close() -> None:
            nonlocal held, room
            blocks.append(struct.pack("<I", (_BLOCK_BYTES - room) << 3)[:3])
            blocks.extend(held)
            held, room = [], _BLOCK_BYTES

        for part in parts:
            view = memoryview(part)
            while len(view):
                held.append(view[:room])
                view = view[room:]
                room -= len(held[-1])
                if not room:
                    close()
        if held:
            close()
        return blocks

    def flush(self) -> bytes:
        """The end of the frame: an empty last block."""
        begin, self._begin = self._begin, b""
        return begin + b"\1\0\0"
