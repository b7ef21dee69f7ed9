"""Tokenizer files: which format a file has, reading it, and writing one that is proved before it gets its name.

A folder of ours holds tokenizer.model (tiktoken ranks), tokenizer.json (Hugging Face), tokenizer_config.json and a
manifest with the pattern, the special tokens and the hashes of the others.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from herdkern.engine import atomic_file
from herdkern.tokenizer.formats import huggingface, sentencepiece_export, sentencepiece_file, tekken, tiktoken, verify
from herdkern.tokenizer.formats.contents import Contents
from herdkern.tokenizer.formats.json_file import integer, items, mapping, read_json, text
from herdkern.tokenizer.pretokenize import resolve_pattern

if TYPE_CHECKING:
    from herdkern.tokenizer.tokenizer import Tokenizer

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
MANIFEST, TEKKEN = "herdkern_tokenizer.json", "tekken.json"
Format = Literal["herdkern", "tiktoken", "huggingface", "sentencepiece", "tekken"]
FORMATS: tuple[str, ...] = ("herdkern", "tiktoken", "huggingface", "sentencepiece", "tekken")
HEAD = 4096  # bytes that tell the format


def format_of(path: Path) -> str:
    """The format of a tokenizer file or folder: one of FORMATS.

    Raises: OSError; ValueError naming what it is instead, where that is known.
    """
    if path.is_dir():
        return format_of(file_in(path))
    with open(path, "rb") as f:
        head = f.read(HEAD)
    if head.lstrip()[:1] == b"{":
        return _format_of_json(mapping(read_json(path), "the file"), path)
    if tiktoken.looks_like(head):
        return "tiktoken"
    if sentencepiece_file.looks_like(head):
        return "sentencepiece"
    what = next((name for name, pattern in _OTHERS.items() if re.match(pattern, head)), f"{head[:16]!r}")
    raise ValueError(
        f"load: {path} must be a folder with a tokenizer, tiktoken ranks, a tokenizer.json, a tekken.json or a "
        f"SentencePiece model, got {what}"
    )


_OTHERS = {
    "an empty file": rb"\Z",
    "a trie vocabulary (id, token, length), which has no merges": rb"\d+ b?['\"]",
    "a gzip file; unpack it first": rb"\x1f\x8b",
    "a zip file; unpack it first": rb"PK\x03\x04",
    "a file of word counts; train a tokenizer from it": rb"herdkern word counts ",
    "a list of merges without ids (vocab.bpe, merges.txt); its tokenizer.json has both": rb"#version",
}


def _format_of_json(config: Mapping[str, Any], path: Path) -> str:
    if config.get("format") == "herdkern-tokenizer":
        return "herdkern"
    if tekken.looks_like(config):
        return "tekken"
    if isinstance(config.get("model"), dict):
        return "huggingface"
    raise ValueError(f"load: {path} must describe a tokenizer, got JSON with the keys {list(config)[:6]!r:.200}")


def file_in(folder: Path) -> Path:
    """The file of a folder that holds all of its tokenizer. Raises: FileNotFoundError if there is none."""
    for name in (MANIFEST, JSON, TEKKEN, MODEL):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"load: {folder} must hold {MANIFEST}, {JSON}, {TEKKEN} or {MODEL}, got none of them")


def read(path: Path | str, *, ignore_normalizer: bool = False) -> Contents:
    """The byte-level vocabulary of a file or folder of any format.

    Raises: OSError; ValueError naming file and line if it is damaged, or saying what a Tokenizer cannot express.
    """
    path = Path(path)
    file = file_in(path) if path.is_dir() else path
    kind = "herdkern" if file.name == MANIFEST else format_of(file)
    if kind == "herdkern":
        return _read_folder(file)
    if kind == "huggingface":
        return huggingface.read(file, ignore_normalizer=ignore_normalizer)
    if kind == "tekken":
        return tekken.read(file)
    if kind == "tiktoken":
        return tiktoken.read(file)
    return sentencepiece_export.read(file)


def _read_folder(path: Path) -> Contents:
    """The folder that a manifest describes."""
    manifest = read_json(path)
    try:
        content = mapping(manifest, "the manifest")
        if (content.get("format"), content.get("version")) != ("herdkern-tokenizer", 1):
            raise ValueError(f"must be herdkern-tokenizer version 1, got {content.get('format')!r:.80}")
        if "sha256" in content and content["sha256"] != _own_hash(content):
            raise ValueError("is damaged: it must have the SHA-256 that it names")
        for name, record in mapping(content.get("files"), "files").items():
            if name not in (MODEL, JSON, CONFIG):
                raise ValueError(f"must name the files {MODEL}, {JSON} and {CONFIG}, got {name!r:.80}")
            if _describe(path.parent / name) != record:
                raise ValueError(f"{path.parent / name} is damaged: it must have the size and SHA-256 of {MANIFEST}")
        special = mapping(content.get("special_tokens"), "special_tokens")
        pattern: Any = content.get("split_pattern")
        if isinstance(pattern, list):
            pattern = tuple(text(part, "split_pattern") for part in items(pattern, "split_pattern"))
        else:
            pattern = text(pattern, "split_pattern")
        special = {
            text(name, "a special token"): integer(token_id, f"the id of {name!r}")
            for name, token_id in special.items()
        }
    except (ValueError, RecursionError) as e:
        raise ValueError(f"load: {path}: {e}") from e
    return Contents(
        format="herdkern",
        mergeable_ranks=tiktoken.read_tiktoken(path.parent / MODEL),
        special_tokens=special,
        split_pattern=pattern,
    )


def load(
    path: Path | str,
    *,
    split_pattern: str | Sequence[str] | None = None,
    special_tokens: Mapping[str, int] | None = None,
    ignore_normalizer: bool = False,
) -> tuple[dict[bytes, int], dict[str, int], Any]:
    """Ranks, special tokens and pattern of a file or folder, as Tokenizer takes them.

    split_pattern, special_tokens: for a format that does not name them; they go before what the file says.
    Raises: as `read`; ValueError if nothing says which pattern it is.
    """
    contents = read(path, ignore_normalizer=ignore_normalizer)
    pattern: Any = split_pattern if split_pattern is not None else contents.split_pattern
    if pattern is None:
        raise ValueError(
            f"load: {path} has ranks and no split pattern, and is no published vocabulary that is known here; pass "
            f"split_pattern, such as 'llama3', 'o200k' or 'gpt2', and special_tokens"
        )
    _, regexes = resolve_pattern(pattern, "load")
    special = contents.special_tokens if special_tokens is None else dict(special_tokens)
    return contents.mergeable_ranks, special, regexes[0] if len(regexes) == 1 else regexes


def save(tokenizer: "Tokenizer", path: Path | str, *, format: str = "herdkern", verify: bool = True) -> None:
    """Write a tokenizer in one of FORMATS.

    path: a folder for "herdkern", else a file. verify: before a file gets its name, read it again, with our own reader
    and with the library that it is for where that is installed, and compare ids on texts that are hard to cut.
    Raises: OSError; ValueError if the format has no place for this tokenizer, or showing the first text with other ids;
    nothing is written then.
    """
    path = Path(path)
    if format == "herdkern":
        _save_folder(tokenizer, path, verify)
        return
    if format not in FORMATS:
        raise ValueError(f"save: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if path.is_dir():
        raise IsADirectoryError(f"save: path must be a file for the format {format!r}, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content, prove = _PARTS[format]
    with atomic_file(path) as f:
        _write(f, content(tokenizer))
        if verify:
            prove(Path(f.name), tokenizer)


def _write(f: IO[bytes], data: bytes) -> None:
    f.write(data)
    f.flush()


def _save_folder(tokenizer: "Tokenizer", folder: Path, verify: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        MODEL: _tiktoken(tokenizer),
        JSON: _huggingface(tokenizer),
        CONFIG: _json(huggingface.transformers_config(tokenizer.special_tokens)),
    }
    pattern = tokenizer.split_pattern
    manifest = {
        "format": "herdkern-tokenizer",
        "version": 1,
        "n_vocab": tokenizer.n_vocab,
        "split_pattern": pattern if isinstance(pattern, str) else list(pattern),
        "special_tokens": dict(tokenizer.special_tokens),
        "files": {name: _record(data) for name, data in contents.items()},
    }
    manifest["sha256"] = _own_hash(manifest)
    with ExitStack() as stack:  # leaves in the reverse order: the manifest gets its name last
        files = {name: stack.enter_context(atomic_file(folder / name)) for name in (MANIFEST, *contents)}
        for name, data in (*contents.items(), (MANIFEST, _json(manifest))):
            _write(files[name], data)
        if verify:
            _prove_tiktoken(Path(files[MODEL].name), tokenizer)
            _prove_huggingface(Path(files[JSON].name), tokenizer)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own; folders of earlier versions have none."""
    rest = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(rest.encode()).hexdigest()


def _tiktoken(tokenizer: "Tokenizer") -> bytes:
    return tiktoken.tiktoken_bytes(tokenizer.mergeable_ranks)


def _huggingface(tokenizer: "Tokenizer") -> bytes:
    merges, has_others = huggingface.merge_list(tokenizer.mergeable_ranks)
    ranks, special, pattern = tokenizer.mergeable_ranks, tokenizer.special_tokens, tokenizer.split_pattern
    return _json(huggingface.huggingface_json(ranks, special, pattern, merges, has_others))


def _tekken(tokenizer: "Tokenizer") -> bytes:
    return tekken.tekken_json(tokenizer.mergeable_ranks, tokenizer.special_tokens, tokenizer.split_pattern).encode()


def _sentencepiece(tokenizer: "Tokenizer") -> bytes:
    return sentencepiece_file.to_bytes(sentencepiece_export.model_of(tokenizer))


def _prove_tiktoken(path: Path, tokenizer: "Tokenizer") -> None:
    _same_as_read(tiktoken.read(path), tokenizer, ranks_only=True)
    verify.check_tiktoken(path, tokenizer)


def _prove_huggingface(path: Path, tokenizer: "Tokenizer") -> None:
    _same_as_read(huggingface.read(path), tokenizer)
    verify.check_huggingface(path, tokenizer)


def _prove_tekken(path: Path, tokenizer: "Tokenizer") -> None:
    _same_as_read(tekken.read(path), tokenizer)
    verify.check_tekken(path, tokenizer)


def _prove_sentencepiece(path: Path, tokenizer: "Tokenizer") -> None:
    _same_as_read(sentencepiece_export.read(path), tokenizer)
    sentencepiece_export.prove(path, tokenizer)


def _same_as_read(found: Contents, tokenizer: "Tokenizer", *, ranks_only: bool = False) -> None:
    """Refuse a written file that does not read as it was meant. Raises: ValueError."""
    same = found.mergeable_ranks == tokenizer.mergeable_ranks
    if not ranks_only:
        same = same and found.special_tokens == tokenizer.special_tokens
        same = same and found.split_pattern == tokenizer.split_pattern
    if not same:
        raise ValueError(f"save: the written {found.format} file must read as the tokenizer, got other tokens or ids")


_PARTS: dict[str, tuple[Callable[["Tokenizer"], bytes], Callable[[Path, "Tokenizer"], None]]] = {
    "tiktoken": (_tiktoken, _prove_tiktoken),
    "huggingface": (_huggingface, _prove_huggingface),
    "tekken": (_tekken, _prove_tekken),
    "sentencepiece": (_sentencepiece, _prove_sentencepiece),
}


def _json(content: Mapping[str, Any]) -> bytes:
    # Without indent the encoder is C: ten times faster on a large vocabulary.
    return (json.dumps(content, ensure_ascii=False, indent=None if "model" in content else 1) + "\n").encode()


def _describe(path: Path) -> dict[str, Any]:
    return _record(path.read_bytes())


def _record(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
