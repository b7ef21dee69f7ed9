"""SentencePiece's .model file: the few fields of its protocol buffer that decide the ids, read and written.

A file that is read and written has the same bytes. Source: the wire format
of protocol buffers; the field numbers of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
BPE = 2
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class PieceType(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place. A higher score is merged first."""

    text: str
    score: float = 0.0
    type: PieceType = PieceType.NORMAL


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a text is changed before it is cut, and what stands for what is not in the vocabulary."""

    normalizer: str = ""
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    unk_surface: str = " \u2047 "
    denormalizer_charsmap: bytes = b""


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """The content of a .model file of type BPE.

    raw: its messages other than pieces, as (field, bytes). source: the whole file as it was read.
    """

    pieces: tuple[Piece, ...]
    settings: Settings
    raw: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)
    source: bytes = field(default=b"", repr=False, compare=False)


def fields_of(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: whole numbers as int, the other kinds as their bytes.

    Raises: ValueError at the first byte that is no protocol buffer.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at) if data[at] > 0x7F else (data[at], at + 1)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind == BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"must be a protocol buffer, got the wire type {kind} at byte {at}")
        if at > end or number == 0:
            raise ValueError(f"must be a protocol buffer, got field {number} that ends at byte {at} of {end}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for place in range(at, min(at + 10, len(data))):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise ValueError(f"must be a protocol buffer, got a number without an end at byte {at}")


def looks_like(head: bytes) -> bool:
    """Is `head`, the start of a file, of this format? It begins with a piece, whose first field is its text."""
    return len(head) > 3 and head[0] == 0x0A and 0x0A in head[2:4]


def read_bytes(data: bytes) -> ModelFile:
    """The content of a .model file. Raises: ValueError saying what is no BPE model of SentencePiece."""
    pieces: list[Piece] = []
    raw = []
    messages: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}, 5: {}}
    for number, value in fields_of(data):
        if not isinstance(value, bytes):
            raise ValueError(f"must be a SentencePiece model, got a number as field {number}")
        if number == 1:
            pieces.append(_piece_of(value, len(pieces)))
            continue
        raw.append((number, value))
        if number in messages:
            messages[number] = dict(fields_of(value))
    trainer, normalizer, denormalizer = (messages[number] for number in (2, 3, 5))
    kind = _number(trainer, 3, 1)
    if kind != BPE:
        name = MODEL_TYPES.get(kind, str(kind))
        raise ValueError(f"must be a BPE model, got a {name} model, which has no merges")
    settings = Settings(
        normalizer=_text(normalizer, 1, ""),
        charsmap=_bytes(normalizer, 2),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        escape_whitespaces=bool(_number(normalizer, 5, 1)),
        treat_whitespace_as_suffix=bool(_number(trainer, 24, 0)),
        byte_fallback=bool(_number(trainer, 35, 0)),
        unk_surface=_text(trainer, 44, Settings.unk_surface),
        denormalizer_charsmap=_bytes(denormalizer, 2),
    )
    model = ModelFile(pieces=tuple(pieces), settings=settings, raw=tuple(raw), source=data)
    check(model)
    return model


def check(model: ModelFile) -> None:
    """Refuse pieces that cannot work together. Raises: ValueError naming the first."""
    seen: dict[str, int] = {}
    for number, piece in enumerate(model.pieces):
        if not piece.text or piece.text in seen:
            first = seen.get(piece.text)
            raise ValueError(f"piece {number} must have a text of its own, got {piece.text!r:.80}, also piece {first}")
        seen[piece.text] = number
    num_unknown = sum(piece.type == PieceType.UNKNOWN for piece in model.pieces)
    if num_unknown != 1:
        raise ValueError(f"must have one piece for what is unknown, got {num_unknown}")
    if model.settings.byte_fallback:
        for byte in range(256):
            place = seen.get(f"<0x{byte:02X}>")
            if place is None or model.pieces[place].type != PieceType.BYTE:
                raise ValueError(f"must have the piece <0x{byte:02X}> of type byte, as byte_fallback is on")


def _piece_of(message: bytes, number: int) -> Piece:
    fields = dict(fields_of(message))
    score = fields.get(2, b"\0\0\0\0")
    kind = _number(fields, 3, 1)
    if not isinstance(score, bytes) or len(score) != 4 or kind not in list(PieceType):
        raise ValueError(f"piece {number} must have a score and a known type, got {score!r} and {kind}")
    value = struct.unpack("<f", score)[0]
    if value != value:
        raise ValueError(f"piece {number} must have a score, got NaN")
    name = _text(fields, 1, "")
    if not name:  # at once: two bytes of a file are such a piece, so there may be very many
        raise ValueError(f"piece {number} must have a text of its own, got none")
    return Piece(name, value, PieceType(kind))


def _number(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"must be a SentencePiece model, got {value!r:.60} as the number of field {number}")
    return value


def _bytes(fields: dict[int, int | bytes], number: int) -> bytes:
    value = fields.get(number, b"")
    if not isinstance(value, bytes):
        raise ValueError(f"must be a SentencePiece model, got the number {value} as the text of field {number}")
    return value


def _text(fields: dict[int, int | bytes], number: int, default: str) -> str:
    try:
        return _bytes(fields, number).decode() if number in fields else default
    except UnicodeDecodeError as e:
        raise ValueError(f"must hold UTF-8 text, got {e.reason} in field {number}") from e


def to_bytes(model: ModelFile) -> bytes:
    """The .model file: as it was read; else its pieces with `raw`, or with messages made of the settings."""
    if model.source:
        return model.source
    out = bytearray()
    for piece in model.pieces:
        message = _field(1, piece.text.encode()) + _key(2, FIXED32) + struct.pack("<f", piece.score)
        if piece.type != PieceType.NORMAL:
            message += _key(3, VARINT) + _write_varint(piece.type)
        out += _field(1, message)
    for number, message in model.raw or _messages(model):
        out += _field(number, message)
    return bytes(out)


def with_settings(model: ModelFile, settings: Settings) -> ModelFile:
    """The model with other settings, and none of the messages that held the old ones."""
    return replace(model, settings=settings, raw=(), source=b"")


def _messages(model: ModelFile) -> list[tuple[int, bytes]]:
    s = model.settings
    of_type = {kind: [i for i, piece in enumerate(model.pieces) if piece.type == kind] for kind in PieceType}
    unknown = of_type[PieceType.UNKNOWN][0]
    trainer = _number_field(3, BPE) + _number_field(4, len(model.pieces))
    trainer += _number_field(24, s.treat_whitespace_as_suffix) + _number_field(35, s.byte_fallback)
    trainer += _number_field(40, unknown)
    for number, name in ((41, "<s>"), (42, "</s>"), (43, "<pad>")):
        trainer += _number_field(
            number, next((i for i in of_type[PieceType.CONTROL] if model.pieces[i].text == name), -1)
        )
    trainer += _field(44, s.unk_surface.encode()) + _field(45, model.pieces[unknown].text.encode())
    normalizer = _field(1, s.normalizer.encode()) + (_field(2, s.charsmap) if s.charsmap else b"")
    for number, value in ((3, s.add_dummy_prefix), (4, s.remove_extra_whitespaces), (5, s.escape_whitespaces)):
        normalizer += _number_field(number, value)
    messages = [(2, trainer), (3, normalizer)]
    if s.denormalizer_charsmap:
        off = b"".join(_number_field(number, 0) for number in (3, 4, 5))  # no prefix, no spaces removed or escaped
        messages.append((5, _field(2, s.denormalizer_charsmap) + off))
    return messages


def _key(number: int, kind: int) -> bytes:
    return _write_varint(number << 3 | kind)


def _write_varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers take all 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    return _key(number, BYTES) + _write_varint(len(value)) + value


def _number_field(number: int, value: int) -> bytes:
    return _key(number, VARINT) + _write_varint(int(value))
