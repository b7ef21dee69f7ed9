"""SentencePiece BPE models: another kind of tokenizer than ours, with the ids of the `sentencepiece` package.

Such a model cuts a whole text, not words: it begins with characters, writes ▁ for a space, and a character without a
piece becomes byte pieces or <unk>. The kernel is csrc/text/sentencepiece.h. A model is trained with a Tokenizer.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from herdkern import _text
from herdkern.tokenizer.formats import sentencepiece_file as wire
from herdkern.tokenizer.formats.merge_recovery import Merges, Skipped, recover_merges
from herdkern.tokenizer.formats.sentencepiece_file import ModelFile, Piece, PieceType, Settings

SPACE = "\u2581"  # stands for a space
BY_HAND = -1e8  # pieces with such a score were put in by hand
MERGED = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)  # pieces that a merge may make


class SentencePieceTokenizer:
    """A SentencePiece BPE model, immutable.

    Raises: ValueError if two pieces have one text, or if the model puts spaces behind words.
    """

    def __init__(self, model: ModelFile) -> None:
        wire.check(model)
        if model.settings.treat_whitespace_as_suffix:
            raise ValueError(
                "SentencePieceTokenizer: the model must put spaces before words, got one that has them behind"
            )
        self.model = model

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces by id."""
        return self.model.pieces

    @property
    def settings(self) -> Settings:
        """How a text is changed before it is cut."""
        return self.model.settings

    @property
    def n_vocab(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    @classmethod
    def load(cls, path: Path | str) -> "SentencePieceTokenizer":
        """The model of a .model file. Raises: OSError; ValueError if it is no BPE model of SentencePiece."""
        data = Path(path).read_bytes()
        try:
            return cls(wire.read_bytes(data))
        except ValueError as e:
            raise ValueError(f"read_sentencepiece: {path}: {e}") from e

    def save(self, path: Path | str, *, verify: bool = True) -> None:
        """Write the .model file; as it was read, byte for byte, if it was read.

        verify: before the file gets its name, read it with the `sentencepiece` package, where that is installed, and
        compare ids on texts that are hard to cut.
        Raises: OSError; ValueError showing the first text with other ids; nothing is written then.
        """
        from herdkern.engine import atomic_file
        from herdkern.tokenizer.formats import verify as checks

        with atomic_file(path) as f:
            f.write(wire.to_bytes(self.model))
            f.flush()
            if verify:
                checks.check_sentencepiece(Path(f.name), self)

    @cached_property
    def merges(self) -> Merges:
        """The merges in the order of their scores, and the pieces that no merge makes."""
        # Single characters are there from the start, whatever their score or type.
        is_learnt = [(p.type == PieceType.NORMAL and p.score > BY_HAND) or len(p.text) == 1 for p in self.pieces]
        chosen = [i for i, learnt in enumerate(is_learnt) if learnt]
        chosen.sort(key=lambda i: (-self.pieces[i].score, i))
        merges = recover_merges([self.pieces[i].text.encode() for i in chosen], chosen, characters=True)
        by_hand = [
            Skipped(token=p.text.encode(), token_id=i, reason=f"has the score {p.score:g}: put in by hand")
            for i, p in enumerate(self.pieces)
            if p.type == PieceType.NORMAL and not is_learnt[i]
        ]
        return Merges(left=merges.left, right=merges.right, made=merges.made, skipped=(*merges.skipped, *by_hand))

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Raises: TypeError if it is no str; ValueError if it holds a lone surrogate."""
        if not isinstance(text, str):
            raise TypeError(f"encode: text must be str, got {type(text).__name__}")
        return self._cutter.encode(self.normalize(text))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids stand for. Raises: ValueError naming the first id that is no piece's."""
        settings = self.settings
        out = bytearray()
        may_strip = settings.add_dummy_prefix or settings.remove_extra_whitespaces
        run = bytearray()  # of byte pieces, which may make characters together
        for place, piece_id in enumerate(ids):
            if not 0 <= piece_id < self.n_vocab:
                raise ValueError(f"decode: ids[{place}] must be in [0, {self.n_vocab}), got {piece_id}")
            piece = self.pieces[piece_id]
            if piece.type == PieceType.BYTE:
                run.append(int(piece.text[3:5], 16))
                continue
            out += _valid(run)
            run.clear()
            if piece.type == PieceType.CONTROL:
                continue
            if piece.type == PieceType.UNKNOWN:
                out += settings.unk_surface.encode()
                continue
            text = piece.text
            if may_strip and not out and text.startswith(SPACE):
                text = text[1:]
                may_strip = settings.remove_extra_whitespaces
            out += text.replace(SPACE, " ").encode()
        out += _valid(run)
        if self._denormalizer:
            out = bytearray(self._denormalizer.map(bytes(out)))
        return out.decode("utf-8", "replace")

    def normalize(self, text: str) -> str:
        """The text as the model cuts it: mapped, spaces removed, prefixed and written as ▁."""
        settings = self.settings
        data = text.encode()
        if not data:
            return ""
        if self._charsmap:
            parts = self._user_defined.split(text) if self._user_defined else [text]
            changed = [p.encode() if i % 2 else self._charsmap.map(p.encode()) for i, p in enumerate(parts)]
            text = b"".join(changed).decode("utf-8", "replace")
        if settings.remove_extra_whitespaces:
            while "  " in text:
                text = text.replace("  ", " ")
            text = text.strip(" ")
            if not text:
                return ""
        if settings.add_dummy_prefix:
            text = " " + text
        return text.replace(" ", SPACE) if settings.escape_whitespaces else text

    @cached_property
    def _cutter(self) -> _text.SentencePieceCutter:
        byte_ids = [self._ids[f"<0x{byte:02X}>"] for byte in range(256)] if self.settings.byte_fallback else []
        pieces = [
            _text.SentencePiece(
                p.text, p.score, p.type in MERGED, p.type == PieceType.USER_DEFINED, self._without_unused(i)
            )
            for i, p in enumerate(self.pieces)
        ]
        return _text.SentencePieceCutter(pieces, self._unk_id, byte_ids)

    def _without_unused(self, piece_id: int) -> list[int]:
        """The piece, or the two that make it where it may not be used itself, and so on."""
        found, todo = [], [piece_id]
        while todo:
            piece_id = todo.pop()
            if self.pieces[piece_id].type == PieceType.UNUSED and piece_id in self._parts:
                left, right = self._parts[piece_id]
                todo += [right, left]
            else:
                found.append(piece_id)
        return found

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece.text: i for i, piece in enumerate(self.pieces)}

    @cached_property
    def _parts(self) -> dict[int, tuple[int, int]]:
        """The two parts of each piece that a merge makes, unused ones included."""
        chosen = sorted(
            (i for i, p in enumerate(self.pieces) if p.type in MERGED), key=lambda i: (-self.pieces[i].score, i)
        )
        merges = recover_merges([self.pieces[i].text.encode() for i in chosen], chosen, characters=True)
        return dict(zip(merges.made.tolist(), merges.pairs()))

    @cached_property
    def _unk_id(self) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.type == PieceType.UNKNOWN)

    @cached_property
    def _user_defined(self) -> re.Pattern[str] | None:
        """Finds user-defined pieces, the longest first; split by it, every second part is one."""
        names = [piece.text for piece in self.pieces if piece.type == PieceType.USER_DEFINED]
        if not names:
            return None
        return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    @cached_property
    def _charsmap(self) -> _text.CharsMap | None:
        return _text.CharsMap(self.settings.charsmap) if self.settings.charsmap else None

    @cached_property
    def _denormalizer(self) -> _text.CharsMap | None:
        return _text.CharsMap(self.settings.denormalizer_charsmap) if self.settings.denormalizer_charsmap else None


def _valid(run: bytearray) -> bytes:
    """The bytes of byte pieces with U+FFFD for each byte that is no part of a character."""
    out = bytearray()
    at = 0
    while at < len(run):
        size = _character_size(run, at)
        out += run[at : at + size] if size else "\ufffd".encode()
        at += size or 1
    return bytes(out)


def _character_size(data: bytes | bytearray, at: int) -> int:
    """The size of the UTF-8 character at data[at], 0 if there is none."""
    for size in range(1, 5):
        try:
            data[at : at + size].decode()
        except UnicodeDecodeError:
            continue
        return size
    return 0
