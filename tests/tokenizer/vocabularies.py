"""Production vocabularies for the tests, found by size and hash among fetched files and installed packages.

HERDKERN_TOKENIZERS names a folder that `python tools/fetch_tokenizers.py` filled; no file of it is in the repository.
"""

import base64
import hashlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from herdkern.tokenizer.export import from_byte_level

PACKAGES = (  # and the folders of them that carry such files
    ("tiktoken_ext", "data"),
    ("litellm", "litellm_core_utils/tokenizers"),
    ("whisper", "assets"),
    ("anthropic", "."),
    ("llama_models", "llama3"),
)


class Vocabulary(NamedTuple):
    """A production vocabulary. pattern: name of its split pattern. num_tokens: without the special tokens."""

    pattern: str
    num_bytes: int
    sha256: str
    num_tokens: int
    specials: dict[str, int]


PRODUCTION = {
    "gpt2": Vocabulary("gpt2", 835_554, "306cd27f03c1a714", 50_256, {"<|endoftext|>": 50_256}),
    "cl100k": Vocabulary(
        *("llama3", 1_681_126, "223921b76ee99bde", 100_256),
        {"<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258, "<|endofprompt|>": 100_276},
    ),
    "o200k": Vocabulary(
        "o200k", 3_613_922, "446a9538cb6c348e", 199_998, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}
    ),
    "llama3": Vocabulary(
        *("llama3", 2_183_982, "82e9d31979e92ab9", 128_000),
        {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001, "<|eot_id|>": 128_009},
    ),
    "claude": Vocabulary("gpt2", 1_774_213, "c241737df24b4e7f", 64_995, {"<EOT>": 0, "<META>": 1}),
}


@cache
def find(name: str) -> Path | None:
    """The file of a production vocabulary, or None where it is not at hand."""
    wanted = PRODUCTION[name]
    named = os.environ.get("HERDKERN_TOKENIZERS")
    paths = sorted(Path(named).rglob("*")) if named else []
    for package, inside in PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            paths += sorted(Path(root, inside).glob("*"))
    likely = (path for path in paths if path.is_file() and path.stat().st_size == wanted.num_bytes)
    return next((p for p in likely if hashlib.sha256(p.read_bytes()).hexdigest().startswith(wanted.sha256)), None)


def read_ranks(name: str) -> dict[bytes, int]:
    """The ranks of a vocabulary that `find` found, by a reader of the tests' own."""
    path = find(name)
    assert path is not None
    data = path.read_bytes()
    if data[:1] == b"{":
        content = json.loads(data)
        special = {token["content"] for token in content["added_tokens"]}
        vocab = content["model"]["vocab"]
        ranks = {from_byte_level(token): rank for token, rank in vocab.items() if token not in special}
    else:
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    assert len(ranks) == PRODUCTION[name].num_tokens
    return ranks
