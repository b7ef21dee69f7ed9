"""A byte-level vocabulary as a SentencePiece model, and back, where that kind of model can hold it.

Bytes become the characters of the byte-level alphabet: the model's normalizer maps each byte of a text to its
character, its denormalizer maps them back. What SentencePiece has no place for is a split pattern: it merges wherever
two symbols make a piece. Ids are the same only if no token could ever lie across the border of two words. That is so
for SENTENCEPIECE_PATTERN, whose borders are exactly the places where a space follows something else, with a vocabulary
of which no token holds such a place; a Tokenizer trained with it has such a vocabulary.
"""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from herdkern.tokenizer.formats import verify
from herdkern.tokenizer.formats.byte_level import byte_level_alphabet, from_byte_level, to_byte_level
from herdkern.tokenizer.formats.charsmap import build
from herdkern.tokenizer.formats.contents import Contents
from herdkern.tokenizer.formats.merge_recovery import merges_of_ranks
from herdkern.tokenizer.formats.sentencepiece_file import ModelFile, Piece, PieceType, Settings, read_bytes

if TYPE_CHECKING:
    from herdkern.tokenizer.tokenizer import Tokenizer

SENTENCEPIECE_PATTERN = r" *[^ ]+| +"
NORMALIZER = "herdkern_byte_level"
HOLE = "\u2400"  # begins the names of pieces for ids that no token has; no character of the byte-level alphabet


@functools.cache
def settings() -> Settings:
    """The settings with which SentencePiece cuts the bytes of a text."""
    alphabet = byte_level_alphabet()
    there = {bytes([byte]): char.encode() for byte, char in alphabet.items()}
    back = {char.encode(): bytes([byte]) for byte, char in alphabet.items()}
    return Settings(
        normalizer=NORMALIZER,
        charsmap=build(there),
        denormalizer_charsmap=build(back),
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        escape_whitespaces=False,
    )


def model_of(tokenizer: "Tokenizer") -> ModelFile:
    """The tokenizer as a model; one more piece, <unk>, has the first id that no token has.

    Raises: ValueError if SentencePiece would give other ids, saying why.
    """
    if tokenizer.split_pattern != SENTENCEPIECE_PATTERN:
        raise ValueError(
            f"save: a SentencePiece model has no split pattern and would merge across the words of this one, got "
            f"{tokenizer.split_pattern!r:.100}; train with split_pattern={SENTENCEPIECE_PATTERN!r} "
            f"(herdkern.tokenizer.formats.sentencepiece_export.SENTENCEPIECE_PATTERN) for one that has both forms"
        )
    across = next((token for token in tokenizer.mergeable_ranks if re.search(rb"[^ ] ", token)), None)
    if across is not None:
        raise ValueError(f"save: no token of a SentencePiece export may lie across two words, got {across!r}")
    if skipped := merges_of_ranks(tokenizer.mergeable_ranks).skipped:
        raise ValueError(
            f"save: SentencePiece reaches tokens by merges alone, got {skipped[0].token!r}, which {skipped[0].reason}"
        )
    names = {
        token_id: (to_byte_level(token), PieceType.NORMAL) for token, token_id in tokenizer.mergeable_ranks.items()
    }
    names |= {token_id: (name, PieceType.CONTROL) for name, token_id in tokenizer.special_tokens.items()}
    texts = [name for name, _ in names.values()]
    if len(set(texts)) != len(texts):
        raise ValueError("save: special tokens must not read like ordinary ones in the byte-level alphabet")
    unknown = next(i for i in range(tokenizer.n_vocab + 1) if i not in names)
    names[unknown] = ("<unk>" if "<unk>" not in texts else f"{HOLE}unk", PieceType.UNKNOWN)
    pieces = []
    for token_id in range(max(names) + 1):
        name, kind = names.get(token_id, (f"{HOLE}{token_id}", PieceType.CONTROL))
        pieces.append(Piece(name, float(-token_id) if kind == PieceType.NORMAL else 0.0, kind))
    return ModelFile(pieces=tuple(pieces), settings=settings())


def read(path: Path | str) -> Contents:
    """The vocabulary of a model that `model_of` made.

    Raises: OSError; ValueError if it is no SentencePiece BPE model, or one that is no byte-level vocabulary.
    """
    data = Path(path).read_bytes()
    try:
        model = read_bytes(data)
        if model.settings != settings():
            raise ValueError(
                "is a SentencePiece model, which is another kind of tokenizer (characters, no words); "
                "read it with herdkern.tokenizer.SentencePieceTokenizer.load"
            )
        ranks: dict[bytes, int] = {}
        special = {}
        for token_id, piece in enumerate(model.pieces):
            if piece.type == PieceType.NORMAL:
                token = from_byte_level(piece.text)
                if token is None or piece.score != -token_id:
                    raise ValueError(f"piece {token_id} must be bytes with the score {-token_id}, got {piece}")
                ranks[token] = token_id
            elif piece.type == PieceType.CONTROL and not piece.text.startswith(HOLE):
                special[piece.text] = token_id
    except ValueError as e:
        raise ValueError(f"read_sentencepiece: {path}: {e}") from e
    return Contents(
        format="sentencepiece", mergeable_ranks=ranks, special_tokens=special, split_pattern=SENTENCEPIECE_PATTERN
    )


def prove(path: Path, tokenizer: "Tokenizer") -> bool:
    """Read the file with `sentencepiece`; False if that is not installed. Raises: ValueError on other ids or texts."""
    try:
        import sentencepiece
    except ImportError:
        return False
    what = f"sentencepiece {sentencepiece.__version__}"
    theirs = verify.opened(what, lambda: sentencepiece.SentencePieceProcessor(model_file=str(path)))
    texts = [text for text in verify.texts_for(tokenizer.mergeable_ranks) if "\0" not in text]
    ids = [theirs.encode(text) for text in texts]
    verify.compare(what, texts, tokenizer.encode_ordinary_batch(texts), ids)
    back = theirs.decode(ids)
    if back != texts:
        wrong = next(text for text, other in zip(texts, back) if text != other)
        raise ValueError(f"save: {what} must decode to the text, got another for {wrong!r:.200}; nothing was written")
    return True
