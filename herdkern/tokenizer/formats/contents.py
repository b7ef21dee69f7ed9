"""What a tokenizer file holds, before it becomes a Tokenizer."""

from dataclasses import dataclass

SplitPattern = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A byte-level BPE vocabulary as one of the readers found it.

    split_pattern: None where the format does not name one, as tiktoken's ranks.
    ignored: entries of the file that are no part of the vocabulary, and why.
    normalizer: what the file's own library does to a text before it encodes; a Tokenizer never changes the text.
    """

    format: str
    mergeable_ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    split_pattern: SplitPattern | None
    ignored: tuple[str, ...] = ()
    normalizer: str = ""
    name: str = ""
