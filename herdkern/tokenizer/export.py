"""Tokenizer files: tiktoken's tokenizer.model, Hugging Face's tokenizer.json and a manifest with their hashes.

tokenizer.json lists one merge for each token: the two parts that BPE makes of the token's own bytes. A token that is
not made of two (some published vocabularies have such) gets all its splits and switches `ignore_merges` on.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herdkern.engine import atomic_file
from herdkern.tokenizer.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT

if TYPE_CHECKING:
    from herdkern import _text

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
MANIFEST = "herdkern_tokenizer.json"
Loaded = tuple[dict[bytes, int], dict[str, int], str]  # mergeable_ranks, special_tokens, split_pattern


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


def write_tiktoken(path: Path | str, mergeable_ranks: Mapping[bytes, int]) -> None:
    """Write ranks as tiktoken reads them: a line "<base64 token> <rank>" each. Raises: OSError."""
    ordered = sorted(mergeable_ranks.items(), key=lambda item: item[1])
    with atomic_file(path) as f:
        f.write(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered))


def read_tiktoken(path: Path | str) -> dict[bytes, int]:
    """mergeable_ranks of a tiktoken file. Raises: OSError; ValueError naming file and line of the first bad one."""
    ranks: dict[bytes, int] = {}
    owner: dict[int, int] = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"read_tiktoken: {path}:{number}"
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as e:
            raise ValueError(f"{where}: must be '<base64 token> <rank>', got {line[:80]!r}") from e
        if not token or token in ranks or rank < 0 or rank in owner:
            raise ValueError(
                f"{where}: must have a token and a rank of its own, neither empty nor negative nor on an earlier line, "
                f"got {line[:80]!r}"
            )
        ranks[token] = rank
        owner[rank] = number
    return ranks


def merge_list(mergeable_ranks: Mapping[bytes, int], encoder: "_text.Encoder") -> tuple[list[tuple[int, int]], bool]:
    """The merges of a vocabulary as pairs of ids, in order, and whether some token is not made of two others."""
    tokens = [(token, rank) for token, rank in mergeable_ranks.items() if len(token) > 1]
    tokens.sort(key=lambda item: item[1])
    merges: list[tuple[int, int]] = []
    has_others = False
    for (token, _), (left, right) in zip(tokens, encoder.merges_of(tokens).tolist()):
        if left < 0xFFFFFFFF:
            merges.append((left, right))
            continue
        has_others = True
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(mergeable_ranks.get(a, -1), mergeable_ranks.get(b, -1)) for a, b in splits]
        merges += sorted(pair for pair in pairs if min(pair) >= 0)
    return merges, has_others


def huggingface_json(
    mergeable_ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    split_pattern: str,
    merges: Iterable[tuple[int, int]],
    ignore_merges: bool,
) -> dict[str, Any]:
    """The content of tokenizer.json.

    Where there is a <|begin_of_text|>, encoding with added special tokens begins with it, as in Llama 3.
    """
    text_of = {rank: to_byte_level(token) for token, rank in mergeable_ranks.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = sorted(special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": name, **flags} for name, token_id in ordered],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split_pattern}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": _begin_with(BEGIN_OF_TEXT, special_tokens),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {text_of[rank]: rank for rank in sorted(text_of)},
            "merges": [[text_of[left], text_of[right]] for left, right in merges],
        },
    }


def _begin_with(name: str, special_tokens: Mapping[str, int]) -> dict[str, Any] | None:
    if name not in special_tokens:
        return None
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": type_id}} for which, type_id in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [special_tokens[name]], "tokens": [name]}},
    }


def read_huggingface(path: Path | str) -> Loaded:
    """Ranks, special tokens and pattern of a tokenizer.json.

    Raises: OSError; ValueError naming file and line if it is no JSON, or saying what this tokenizer cannot express:
    another model than byte-level BPE, a normalizer, another split pattern, merges whose order is not that of the ids.
    """
    config = _read_json(path)
    try:
        model = config["model"]
        pattern = _split_pattern_of(config)
        for what, value in (("normalizer", config["normalizer"]), ("dropout", model.get("dropout"))):
            if value:
                raise ValueError(f"must have no {what}, got {str(value)[:80]}")
        if model["type"] != "BPE":
            raise ValueError(f"must be BPE, got {model['type']}")
        ranks = {_token_of(text): int(rank) for text, rank in model["vocab"].items()}
        special = {str(token["content"]): int(token["id"]) for token in config["added_tokens"]}
        for name in special:
            if ranks.get(_token_of(name)) == special[name]:
                del ranks[_token_of(name)]
        _check_merge_order(model, ranks)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"read_huggingface: {path}: must describe a byte-level BPE, failed at {e!r}") from e
    except ValueError as e:
        raise ValueError(f"read_huggingface: {path}: {e}") from e
    return ranks, special, pattern


def _token_of(text: str) -> bytes:
    token = from_byte_level(text)
    # A special token inside the vocabulary need not be in the byte-level alphabet.
    return text.encode() if token is None else token


def _split_pattern_of(config: Mapping[str, Any]) -> str:
    pre_tokenizer = config["pre_tokenizer"]
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True) or steps[1].get("add_prefix_space", True):
        raise ValueError(f"must split by one pattern and then map bytes, got the pre-tokenizers {kinds}")
    return str(steps[0]["pattern"]["Regex"])


def _check_merge_order(model: Mapping[str, Any], ranks: Mapping[bytes, int]) -> None:
    """The order of merges must be that of the tokens they make, and every longer token must be made by one."""
    made: set[int] = set()
    last = -1
    for number, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank = ranks.get(_token_of(left) + _token_of(right), -1)
        if rank < last:
            raise ValueError(
                f"merge {number} ({left!r}, {right!r}) must make a token of no lower id than the one before"
            )
        last = rank
        made.add(rank)
    if model.get("ignore_merges"):
        return
    for token, rank in ranks.items():
        if len(token) > 1 and rank not in made:
            raise ValueError(f"token {token!r} must be made by a merge")


def _read_json(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"load: {path}:{e.lineno}: must be JSON, got {e.msg} at column {e.colno}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"load: {path}: must be UTF-8, got {e.reason} at byte {e.start}") from e


def save(
    folder: Path,
    mergeable_ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    split_pattern: str,
    encoder: "_text.Encoder",
) -> None:
    """Write all files of a tokenizer, the manifest last. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    merges, has_others = merge_list(mergeable_ranks, encoder)
    content = huggingface_json(mergeable_ranks, special_tokens, split_pattern, merges, has_others)
    write_tiktoken(folder / MODEL, mergeable_ranks)
    _write_json(folder / JSON, content)
    _write_json(folder / CONFIG, _transformers_config(special_tokens))
    manifest = {
        "format": "herdkern-tokenizer",
        "version": 1,
        "n_vocab": 1 + max([*mergeable_ranks.values(), *special_tokens.values()]),
        "split_pattern": split_pattern,
        "special_tokens": dict(special_tokens),
        "files": {name: _describe(folder / name) for name in (MODEL, JSON, CONFIG)},
    }
    _write_json(folder / MANIFEST, manifest)


def _transformers_config(special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer_config.json: what AutoTokenizer needs beside tokenizer.json."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": "<|finetune_right_pad_id|>"}
    for key, name in roles.items():
        if name in special_tokens:
            config[key] = name
    return config


def load(path: Path) -> Loaded:
    """Ranks, special tokens and pattern of a folder (ours or Hugging Face's) or of a tokenizer.json.

    Raises: as Tokenizer.load does.
    """
    if not path.is_dir():
        return read_huggingface(path)
    if not (path / MANIFEST).exists():
        return read_huggingface(path / JSON)
    manifest = _read_json(path / MANIFEST)
    try:
        if (manifest["format"], manifest["version"]) != ("herdkern-tokenizer", 1):
            raise ValueError(
                f"load: {path / MANIFEST} must be herdkern-tokenizer version 1, got {manifest['format']!r}"
            )
        for name, record in manifest["files"].items():
            if _describe(path / name) != record:
                raise ValueError(f"load: {path / name} is damaged: it must have the size and SHA-256 of {MANIFEST}")
        special = {str(name): int(token_id) for name, token_id in manifest["special_tokens"].items()}
        return read_tiktoken(path / MODEL), special, str(manifest["split_pattern"])
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"load: {path / MANIFEST} must describe a tokenizer, failed at {e!r}") from e


def _describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path, "w") as f:
        # Without indent the encoder is C: ten times faster on a large vocabulary.
        f.write(json.dumps(content, ensure_ascii=False, indent=None if "model" in content else 1) + "\n")
