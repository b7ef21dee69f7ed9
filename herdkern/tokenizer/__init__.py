"""Byte-level BPE tokenizers: training, encoding identical to tiktoken, files for tiktoken and Hugging Face.

tokenizer = train_bpe(texts, 32_000)         # train.py
ids = tokenizer.encode("Hello world")        # tokenizer.py
tokenizer.save("tokenizer")                  # export.py: tokenizer.model, tokenizer.json

A name is imported when it is used, so that `herdkern tokenizer --help` answers at once.
"""

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from herdkern.tokenizer.counts import WordCounts, count_shards, iter_counts, merge_counts
    from herdkern.tokenizer.extend import ExtensionReport, extend_vocabulary
    from herdkern.tokenizer.formats.sentencepiece import SentencePieceTokenizer
    from herdkern.tokenizer.pretokenize import LLAMA3_SPLIT_PATTERN, split_words
    from herdkern.tokenizer.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT, llama3_special_tokens
    from herdkern.tokenizer.tokenizer import Tokenizer
    from herdkern.tokenizer.train import train_bpe

__all__ = [
    "BEGIN_OF_TEXT",
    "END_OF_TEXT",
    "LLAMA3_SPLIT_PATTERN",
    "ExtensionReport",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordCounts",
    "count_shards",
    "extend_vocabulary",
    "iter_counts",
    "llama3_special_tokens",
    "merge_counts",
    "split_words",
    "train_bpe",
]

_HOMES = {
    "BEGIN_OF_TEXT": "special_tokens",
    "END_OF_TEXT": "special_tokens",
    "ExtensionReport": "extend",
    "LLAMA3_SPLIT_PATTERN": "pretokenize",
    "SentencePieceTokenizer": "formats.sentencepiece",
    "Tokenizer": "tokenizer",
    "WordCounts": "counts",
    "count_shards": "counts",
    "extend_vocabulary": "extend",
    "iter_counts": "counts",
    "llama3_special_tokens": "special_tokens",
    "merge_counts": "counts",
    "split_words": "pretokenize",
    "train_bpe": "train",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"herdkern.tokenizer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'herdkern.tokenizer' has no attribute {name!r}")
