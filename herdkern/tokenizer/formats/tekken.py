"""Mistral's tekken.json: tokens by rank with their bytes in base64, the split pattern, special tokens before the ranks.

The id of an ordinary token is its rank plus the number of special tokens; of the ranks listed only as many count as
the vocabulary's default size has room for.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from herdkern.tokenizer.formats.contents import Contents, SplitPattern
from herdkern.tokenizer.formats.json_file import integer, items, mapping, read_json, text

RENUMBER = "herdkern.tokenizer.formats.tekken.renumbered gives such ids to a vocabulary that no model uses yet"

# The names that files without a list of special tokens leave to the library (Mistral NeMo, Pixtral).
DEFAULT_NAMES = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)


def looks_like(config: Mapping[str, Any]) -> bool:
    """Is this JSON object of this format?"""
    return isinstance(config.get("config"), dict) and isinstance(config.get("vocab"), list)


def read(path: Path | str) -> Contents:
    """The vocabulary of a tekken.json. Raises: OSError; ValueError saying what is not as the format has it."""
    content = read_json(path)
    try:
        return _contents_of(mapping(content, "the file"))
    except ValueError as e:
        raise ValueError(f"read_tekken: {path}: {e}") from e


def _contents_of(content: Mapping[str, Any]) -> Contents:
    config = mapping(content.get("config"), "config")
    num_special = integer(config.get("default_num_special_tokens"), "default_num_special_tokens")
    size = integer(config.get("default_vocab_size"), "default_vocab_size")
    vocabulary = items(content.get("vocab"), "vocab")
    used = size - num_special
    if not 0 < used <= len(vocabulary):
        raise ValueError(f"must list the {used} ranks that default_vocab_size leaves, got {len(vocabulary)}")
    ranks: dict[bytes, int] = {}
    for number, entry in enumerate(vocabulary[:used]):
        entry = mapping(entry, f"entry {number} of vocab")
        rank = integer(entry.get("rank"), f"the rank of entry {number} of vocab")
        encoded = text(entry.get("token_bytes"), f"token_bytes of entry {number} of vocab")
        try:
            token = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error) as e:
            raise ValueError(f"entry {number} of vocab must have base64 token_bytes, got {encoded[:80]!r}") from e
        if rank != number or not token or token in ranks:
            raise ValueError(
                f"entry {number} of vocab must have rank {number} and a token of its own, got {token!r:.80}"
            )
        ranks[token] = rank + num_special
    ignored = len(vocabulary) - used
    return Contents(
        format="tekken",
        mergeable_ranks=ranks,
        special_tokens=_special_tokens(content, num_special),
        split_pattern=text(config.get("pattern"), "config.pattern"),
        ignored=(f"{ignored} ranks beyond default_vocab_size {size}",) if ignored else (),
    )


def _special_tokens(content: Mapping[str, Any], num_special: int) -> dict[str, int]:
    names = dict(enumerate(DEFAULT_NAMES[:num_special]))
    listed = content.get("special_tokens")
    if listed is not None:
        names = {}
        for number, entry in enumerate(items(listed, "special_tokens")):
            entry = mapping(entry, f"special token {number}")
            rank = integer(entry.get("rank"), f"the rank of special token {number}")
            if rank >= num_special or rank in names:
                raise ValueError(f"special token {number} must have a rank of its own below {num_special}, got {rank}")
            names[rank] = text(entry.get("token_str"), f"token_str of special token {number}")
    if num_special > 1 << 16:
        raise ValueError(f"default_num_special_tokens must be at most {1 << 16}, got {num_special}")
    special = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(num_special)}
    if len(special) != num_special:
        raise ValueError("special tokens must have different names")
    return special


def tekken_json(
    mergeable_ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], split_pattern: SplitPattern
) -> str:
    """The text of a tekken.json.

    Raises: ValueError if the vocabulary is not special tokens first and then ranks without a gap, or has a sequence of
    split patterns: the format has no place for either.
    """
    if not isinstance(split_pattern, str):
        raise ValueError(f"save: tekken has one split pattern, got a sequence of {len(split_pattern)}")
    ordered = sorted(mergeable_ranks.items(), key=lambda item: item[1])
    num_special = ordered[0][1]
    if [token for token, _ in ordered[:256]] != [bytes([byte]) for byte in range(256)]:
        raise ValueError(f"save: tekken must begin with the single bytes in their order, {RENUMBER}")
    if [rank for _, rank in ordered] != list(range(num_special, num_special + len(ordered))):
        raise ValueError("save: tekken must have ordinary tokens with ids in one run, got a gap between them")
    if sorted(special_tokens.values()) != list(range(num_special)):
        raise ValueError(
            f"save: tekken must have special tokens with the ids below all others, 0 to {num_special - 1}, got "
            f"{sorted(special_tokens.values())[:8]}; {RENUMBER}"
        )
    config = {
        "pattern": split_pattern,
        "num_vocab_tokens": len(ordered),
        "default_vocab_size": num_special + len(ordered),
        "default_num_special_tokens": num_special,
        "version": "v7",
    }
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": _readable(token)}
        for i, (token, _) in enumerate(ordered)
    ]
    names = sorted(special_tokens.items(), key=lambda item: item[1])
    special = [{"rank": rank, "token_str": name, "is_control": True} for name, rank in names]
    content = {"config": config, "vocab": vocabulary, "special_tokens": special}
    return json.dumps(content, ensure_ascii=False) + "\n"


def _readable(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def renumbered(
    mergeable_ranks: Mapping[bytes, int], special_tokens: Iterable[str], *, num_special: int = 0
) -> tuple[dict[bytes, int], dict[str, int]]:
    """The same vocabulary with ids as tekken wants them: special tokens, single bytes by value, the others in order.

    special_tokens: in the order of their new ids. num_special: at least so many, filled up with <SPECIAL_i>;
        mistral-common 1.5 wants more than 20, of which it names the first 20 as DEFAULT_NAMES, whatever the file says.
    Texts are cut into the same tokens. A model that was trained with the old ids needs the old ids.
    """
    names = list(special_tokens)
    names += [f"<SPECIAL_{i}>" for i in range(len(names), num_special)]
    special = {name: i for i, name in enumerate(names)}
    ordered = sorted(
        mergeable_ranks, key=lambda token: (len(token) > 1, token if len(token) == 1 else b"", mergeable_ranks[token])
    )
    return {token: len(special) + i for i, token in enumerate(ordered)}, special
