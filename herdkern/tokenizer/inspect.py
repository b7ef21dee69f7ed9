"""A tokenizer's passport: what a file is, what it was made of, and how it compresses each language.

`herdkern tokenizer inspect FILE` prints it; it is JSON and a picture as well.
"""

import html
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from herdkern.tokenizer.formats import files, huggingface_characters, sentencepiece_export, tiktoken
from herdkern.tokenizer.formats.contents import Contents, SplitPattern
from herdkern.tokenizer.formats.json_file import read_json
from herdkern.tokenizer.formats.merge_recovery import Merges, merges_of_ranks
from herdkern.tokenizer.formats.samples import SAMPLES
from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer
from herdkern.tokenizer.formats.sentencepiece_file import PieceType
from herdkern.tokenizer.pretokenize import resolve_pattern
from herdkern.tokenizer.tokenizer import Tokenizer

FIRST_MERGES = 20
LONGEST = 12
MAX_SAMPLE_BYTES = 1 << 20  # of each file of a samples folder


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How one sample is cut."""

    bytes: int
    characters: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """More is shorter sequences."""
        return self.bytes / max(1, self.tokens)

    @property
    def characters_per_token(self) -> float:
        """More is shorter sequences; comparable within a script."""
        return self.characters / max(1, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What a tokenizer file is. Tokens are texts with U+FFFD where their bytes are no characters.

    num_listed: merges that the file lists; 0 where the format lists none and they were recovered from the tokens.
    skipped: tokens that no merge makes, with the reason; ignored: entries of the file that are no part of it.
    """

    path: str
    format: str
    model: str
    name: str
    n_vocab: int
    num_tokens: int
    num_merges: int
    num_listed: int
    split_pattern: str
    split_regex: tuple[str, ...]
    normalizer: str
    special_tokens: dict[str, int]
    first_merges: tuple[str, ...]
    longest_tokens: tuple[str, ...]
    lengths: dict[int, int]
    skipped: tuple[tuple[str, int, str], ...]
    ignored: tuple[str, ...]
    compression: dict[str, Compression]

    def as_json(self) -> str:
        """All of it as JSON."""
        content = asdict(self)
        content["compression"] = {
            name: {
                **asdict(found),
                "bytes_per_token": round(found.bytes_per_token, 4),
                "characters_per_token": round(found.characters_per_token, 4),
            }
            for name, found in self.compression.items()
        }
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    def as_text(self) -> str:
        """All of it for a terminal; lists are cut short."""
        rows = [
            ("file", self.path),
            ("format", self.format + (f": {self.name}" if self.name else "")),
            ("model", self.model),
            (
                "entries",
                f"{self.n_vocab:,} ids, {self.num_tokens:,} ordinary tokens, {len(self.special_tokens):,} special",
            ),
            (
                "merges",
                f"{self.num_merges:,}" + (f" of {self.num_listed:,} listed" if self.num_listed else ", recovered"),
            ),
            ("pattern", self.split_pattern),
            *(("", regex) for regex in self.split_regex),
            ("normalizer", self.normalizer or "none"),
            ("special", _cut([f"{name} {i}" for name, i in self.special_tokens.items()])),
            ("first merges", _cut(self.first_merges)),
            ("longest", _cut([repr(token[:40]) for token in self.longest_tokens])),
            (
                "skipped",
                f"{len(self.skipped):,}" + "".join(f"\n{'':14}{t!r} ({i}) {why}" for t, i, why in self.skipped[:5]),
            ),
            *(("ignored", what) for what in self.ignored[:8]),
        ]
        lines = [f"{head:14}{value}" for head, value in rows]
        if self.compression:
            lines += ["", f"{'sample':24}{'bytes':>9}{'tokens':>9}{'bytes/token':>13}{'chars/token':>13}"]
        for name, found in self.compression.items():
            numbers = f"{found.bytes_per_token:13.2f}{found.characters_per_token:13.2f}"
            lines.append(f"{name:24.24}{found.bytes:9,}{found.tokens:9,}{numbers}")
        return "\n".join(lines) + "\n"

    def as_svg(self) -> str:
        """The picture: bytes for each token by sample, and how long the tokens are."""
        return _picture(self)


def inspect(
    path: Path | str, *, samples: Path | str | None = None, split_pattern: SplitPattern | None = None
) -> Passport:
    """The passport of a tokenizer file or folder of any format.

    samples: a folder of UTF-8 text files, one for each language, in place of the sentences that come with the package.
    split_pattern: for a file of ranks that is no published vocabulary; without it such a file has no compression.
    Raises: OSError; ValueError naming what is damaged or no BPE.
    """
    path = Path(path)
    texts = dict(SAMPLES) if samples is None else dict(_samples_in(Path(samples)))
    file = files.file_in(path) if path.is_dir() else path
    kind = files.format_of(file)
    if kind == "sentencepiece":
        model = SentencePieceTokenizer.load(file)
        if model.settings != sentencepiece_export.settings():
            return _of_sentencepiece(path, model, texts)
    if kind == "huggingface" and _is_over_characters(file):
        return _of_characters(path, file)
    contents = files.read(path, ignore_normalizer=True)
    return _of_bytes(path, contents, texts, split_pattern)


def _of_bytes(path: Path, contents: Contents, texts: Mapping[str, str], split_pattern: SplitPattern | None) -> Passport:
    pattern: Any = split_pattern or contents.split_pattern
    compression = {}
    known, regexes = "not named by the file", tuple[str, ...]()
    if pattern is not None:
        tokenizer = Tokenizer(contents.mergeable_ranks, contents.special_tokens, pattern)
        compression = _compression(texts, lambda text: len(tokenizer.encode_ordinary(text)))
        name, regexes = resolve_pattern(pattern)
        known = name or ("a sequence of its own" if len(regexes) > 1 else "its own")
    name = contents.name
    if not name and contents.format == "tiktoken":
        begins, size = tiktoken.known_beginning(contents.mergeable_ranks)
        name = f"begins with the {size:,} ranks of {begins}" if begins else ""
    token_of = {i: token for token, i in contents.mergeable_ranks.items()}
    merges = merges_of_ranks(contents.mergeable_ranks)
    ids = [*contents.mergeable_ranks.values(), *contents.special_tokens.values()]
    return Passport(
        path=str(path),
        format=contents.format,
        model="byte-level BPE",
        name=name,
        n_vocab=1 + max(ids, default=-1),
        num_listed=0,
        split_pattern=known,
        split_regex=regexes,
        normalizer=contents.normalizer,
        special_tokens=contents.special_tokens,
        ignored=contents.ignored,
        compression=compression,
        **_of_tokens(list(contents.mergeable_ranks), merges, token_of),
    )


def _of_sentencepiece(path: Path, model: SentencePieceTokenizer, texts: Mapping[str, str]) -> Passport:
    settings = model.settings
    switches = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces", "byte_fallback")
    on = [name for name in switches if getattr(settings, name)]
    special = {p.text: i for i, p in enumerate(model.pieces) if p.type in (PieceType.CONTROL, PieceType.USER_DEFINED)}
    kinds = Counter(p.type.name.lower() for p in model.pieces)
    token_of = {i: piece.text.encode() for i, piece in enumerate(model.pieces)}
    ordinary = [piece.text.encode() for piece in model.pieces if piece.type == PieceType.NORMAL]
    return Passport(
        path=str(path),
        format="sentencepiece",
        model=f"SentencePiece BPE over characters ({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())})",
        name="",
        n_vocab=model.n_vocab,
        num_listed=0,
        split_pattern="none: whole texts are cut",
        split_regex=(),
        normalizer=", ".join([settings.normalizer or "unnamed", *on]),
        special_tokens=special,
        ignored=(),
        compression=_compression(texts, lambda text: len(model.encode(text))),
        **_of_tokens(ordinary, model.merges, token_of),
    )


def _of_characters(path: Path, file: Path) -> Passport:
    merges, num_listed = huggingface_characters.read_merges(file)
    content = read_json(file)
    ids: dict[str, int] = content["model"]["vocab"]
    special = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return Passport(
        path=str(path),
        format="huggingface",
        model="BPE over characters, converted from SentencePiece",
        name="",
        n_vocab=1 + max([*ids.values(), *special.values()], default=-1),
        num_listed=num_listed,
        split_pattern="not read",
        split_regex=(),
        normalizer="",
        special_tokens=special,
        ignored=(),
        compression={},
        **_of_tokens([name.encode() for name in ids], merges, {i: name.encode() for name, i in ids.items()}),
    )


def _is_over_characters(file: Path) -> bool:
    from herdkern.tokenizer.formats.huggingface import is_over_characters

    content = read_json(file)
    return isinstance(content, dict) and is_over_characters(content)


def _of_tokens(tokens: Sequence[bytes], merges: Merges, token_of: Mapping[int, bytes]) -> dict[str, Any]:
    first = [f"{_shown(token_of[a])} + {_shown(token_of[b])}" for a, b in merges.pairs()[:FIRST_MERGES]]
    longest = sorted(tokens, key=lambda token: (-len(token), token))[:LONGEST]
    lengths = Counter(len(token) for token in tokens)
    return {
        "num_tokens": len(tokens),
        "num_merges": len(merges),
        "first_merges": tuple(first),
        "longest_tokens": tuple(token.decode("utf-8", "replace")[:200] for token in longest),
        "lengths": dict(sorted(lengths.items())),
        "skipped": tuple((s.token.decode("utf-8", "replace")[:200], s.token_id, s.reason) for s in merges.skipped),
    }


def _compression(texts: Mapping[str, str], count: Callable[[str], int]) -> dict[str, Compression]:
    return {
        name: Compression(bytes=len(text.encode()), characters=len(text), tokens=count(text))
        for name, text in texts.items()
    }


def _samples_in(folder: Path) -> Iterator[tuple[str, str]]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    if not paths:
        raise ValueError(f"inspect: samples must be a folder with text files, got none in {folder}")
    for path in paths:
        with open(path, "rb") as f:
            yield path.stem, f.read(MAX_SAMPLE_BYTES).decode("utf-8", "ignore")


def _shown(token: bytes) -> str:
    return repr(token.decode()) if _is_text(token) else repr(token)


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _cut(values: Sequence[str], limit: int = 10) -> str:
    rest = f", and {len(values) - limit:,} more" if len(values) > limit else ""
    return ", ".join(values[:limit]) + rest if values else "none"


def _picture(passport: Passport) -> str:
    """Bars as SVG: no chart library is needed to draw them, or to look at them."""
    rows = [(name, found.bytes_per_token) for name, found in passport.compression.items()]
    rows += [] if rows else [("no sample", 0.0)]
    most = max(value for _, value in rows) or 1.0
    lengths = [(str(size), float(passport.lengths.get(size, 0))) for size in range(1, 16)]
    lengths.append(("16+", float(sum(count for size, count in passport.lengths.items() if size > 15))))
    height = 70 + 18 * max(len(rows), len(lengths))
    title = f"{passport.name or Path(passport.path).name}: {passport.n_vocab:,} ids, {passport.num_merges:,} merges"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="860" height="{height}" fill="#fff"/>',
        f'<text x="20" y="24" font-size="15">{html.escape(title)}</text>',
        '<text x="20" y="48" fill="#555">bytes for each token</text>',
        '<text x="500" y="48" fill="#555">tokens by length in bytes</text>',
        *_bars(rows, left=150, width=250, most=most, colour="#2f6f9f", form="{:.2f}"),
        *_bars(lengths, left=530, width=240, most=max(v for _, v in lengths) or 1.0, colour="#9f6a2f", form="{:,.0f}"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(
    rows: Sequence[tuple[str, float]], *, left: int, width: int, most: float, colour: str, form: str
) -> Iterator[str]:
    for place, (name, value) in enumerate(rows):
        y = 60 + 18 * place
        size = width * value / most
        yield f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{html.escape(name[:20])}</text>'
        yield f'<rect x="{left}" y="{y}" width="{size:.1f}" height="13" fill="{colour}"/>'
        yield f'<text x="{left + size + 5:.1f}" y="{y + 11}" fill="#555">{form.format(value)}</text>'
