"""tiktoken's files of ranks: a line "<base64 token> <rank>" for each token.

Such a file names neither its split pattern nor its special tokens. Those of published vocabularies are known by the
hash of their ranks (known_vocabulary).
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from herdkern.engine import atomic_file
from herdkern.tokenizer.formats.contents import Contents
from herdkern.tokenizer.special_tokens import llama3_special_tokens

MAX_RANK = 1 << 31
_LINE = re.compile(rb"[A-Za-z0-9+/]+=*[ \t]+-?[0-9]+\s*")

# SHA-256 of the ranks as `tiktoken_bytes` writes them -> name, split pattern, special tokens.
_KNOWN: dict[str, tuple[str, str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
        "r50k_base (GPT-2)",
        "gpt2",
        {"<|endoftext|>": 50256},
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": (
        "p50k_base (Codex)",
        "gpt2",
        {"<|endoftext|>": 50256},
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k_base (GPT-4)",
        "cl100k",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k_base (GPT-4o)",
        "o200k",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": (
        "Llama 3",
        "llama3",
        {name: 128_000 + i for i, name in enumerate(llama3_special_tokens())},
    ),
}


def tiktoken_bytes(mergeable_ranks: Mapping[bytes, int]) -> bytes:
    """The file of these ranks, by rank."""
    ordered = sorted(mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def read_tiktoken(path: Path | str) -> dict[bytes, int]:
    """mergeable_ranks of a tiktoken file. Raises: OSError; ValueError naming file and line of the first bad one."""
    return read(path).mergeable_ranks


def read(path: Path | str) -> Contents:
    """The vocabulary of a tiktoken file, with pattern and special tokens where it is a published one.

    An empty token, which one published file has, is left out: no text has it. Raises: as read_tiktoken.
    """
    data = Path(path).read_bytes()
    ranks: dict[bytes, int] = {}
    owner: dict[int, int] = {}
    ignored = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"read_tiktoken: {path}:{number}"
        try:
            encoded, rank_text = line.split()
            token, rank = _decoded(encoded), int(rank_text)
            if rank >= MAX_RANK:
                raise ValueError(f"the rank must be below {MAX_RANK}")
        except (ValueError, binascii.Error) as e:
            raise ValueError(f"{where}: must be '<base64 token> <rank>', got {line[:80]!r}") from e
        if token in ranks or rank < 0 or rank in owner:
            raise ValueError(
                f"{where}: must have a token and a rank of its own, neither negative nor on an earlier line, "
                f"got {line[:80]!r}"
            )
        owner[rank] = number
        if token:
            ranks[token] = rank
        else:
            ignored.append(f"line {number}: the empty token of rank {rank}, which no text has")
    name, pattern, special = known_vocabulary(ranks)
    return Contents(
        format="tiktoken",
        mergeable_ranks=ranks,
        special_tokens=special,
        split_pattern=pattern,
        ignored=tuple(ignored),
        name=name,
    )


def _decoded(encoded: bytes) -> bytes:
    if encoded == b"=":  # how Whisper's file writes the empty token
        return b""
    return base64.b64decode(encoded, validate=True)


def known_vocabulary(mergeable_ranks: Mapping[bytes, int]) -> tuple[str, str | None, dict[str, int]]:
    """Name, split pattern and special tokens of a published vocabulary; "", None and none for another."""
    digest = hashlib.sha256(tiktoken_bytes(mergeable_ranks)).hexdigest()
    name, pattern, special = _KNOWN.get(digest, ("", None, {}))
    return name, pattern, dict(special)


def looks_like(head: bytes) -> bool:
    """Is `head`, the start of a file, of this format?"""
    first = next((line for line in head.split(b"\n") if line.strip()), b"")
    return _LINE.fullmatch(first) is not None


def write_tiktoken(path: Path | str, mergeable_ranks: Mapping[bytes, int]) -> None:
    """Write ranks as tiktoken reads them: a line "<base64 token> <rank>" each. Raises: OSError."""
    with atomic_file(path) as f:
        f.write(tiktoken_bytes(mergeable_ranks))


def known_beginning(mergeable_ranks: Mapping[bytes, int]) -> tuple[str, int]:
    """The largest published vocabulary that the first ranks are, and its size; "" and 0 if they are none.

    Llama 3's first 100,256 ranks are those of cl100k_base, for instance.
    """
    ordered = sorted(mergeable_ranks.items(), key=lambda item: item[1])
    for name, size in (("o200k_base", 199_998), ("Llama 3", 128_000), ("cl100k_base", 100_256), ("r50k_base", 50_256)):
        if size < len(ordered) and known_vocabulary(dict(ordered[:size]))[0].startswith(name):
            return name, size
    return "", 0
