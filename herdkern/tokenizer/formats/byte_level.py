"""The byte-level alphabet: a printable character for each byte, as GPT-2 and Hugging Face write tokens."""

from functools import cache


@cache
def byte_level_alphabet() -> dict[int, str]:
    """byte -> the printable character that GPT-2 and Hugging Face's ByteLevel write for it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_level_order() -> list[int]:
    """The bytes in the order of their characters in that alphabet: '!' first."""
    alphabet = byte_level_alphabet()
    return sorted(range(256), key=alphabet.__getitem__)


def to_byte_level(token: bytes) -> str:
    """The token in the byte-level alphabet."""
    return token.decode("latin-1").translate(byte_level_alphabet())


@cache
def _bytes_of_alphabet() -> dict[int, int]:
    return {ord(char): byte for byte, char in byte_level_alphabet().items()}


def from_byte_level(text: str) -> bytes | None:
    """The bytes that the text stands for in the byte-level alphabet, None if a character is not in it."""
    table = _bytes_of_alphabet()
    try:
        return bytes(table[ord(char)] for char in text)
    except KeyError:
        return None
