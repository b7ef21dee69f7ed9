"""Hugging Face's tokenizer.json.

What we write lists one merge for each token: the two parts that BPE makes of the token's own bytes. A token that is not
made of two (some published vocabularies have such) gets all its splits and switches `ignore_merges` on. What we read
must give the same ids here as there; a file of which that is not known is refused with the reason.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from herdkern.tokenizer.formats.byte_level import byte_level_alphabet, from_byte_level, to_byte_level
from herdkern.tokenizer.formats.contents import Contents, SplitPattern
from herdkern.tokenizer.formats.json_file import integer, items, mapping, read_json, text
from herdkern.tokenizer.formats.merge_recovery import merges_of_ranks, splits_of
from herdkern.tokenizer.pretokenize import SPLIT_PATTERNS, resolve_pattern
from herdkern.tokenizer.special_tokens import BEGIN_OF_TEXT, END_OF_TEXT

__all__ = ["byte_level_alphabet", "from_byte_level", "huggingface_json", "merge_list", "read", "to_byte_level"]

FOREIGN = {  # settings of the model that change ids, and the values with which they do not
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}


def merge_list(mergeable_ranks: Mapping[bytes, int], _encoder: object = None) -> tuple[list[tuple[int, int]], bool]:
    """The merges of a vocabulary as pairs of ids, in order, and whether some token is not made of two others."""
    merges = merges_of_ranks(mergeable_ranks)
    if not merges.skipped:
        return merges.pairs(), False
    by_rank = dict(zip(merges.made.tolist(), ([pair] for pair in merges.pairs())))
    splits = splits_of((skipped.token for skipped in merges.skipped), mergeable_ranks)
    by_rank |= {skipped.token_id: pairs for skipped, pairs in zip(merges.skipped, splits)}
    return [pair for rank in sorted(by_rank) for pair in by_rank[rank]], True


def huggingface_json(
    mergeable_ranks: Mapping[bytes, int],
    special_tokens: Mapping[str, int],
    split_pattern: SplitPattern,
    merges: Iterable[tuple[int, int]],
    ignore_merges: bool,
) -> dict[str, Any]:
    """The content of tokenizer.json.

    Where there is a <|begin_of_text|>, encoding with added special tokens begins with it, as in Llama 3.
    """
    text_of = {rank: to_byte_level(token) for token, rank in mergeable_ranks.items()}
    vocabulary = {text_of[rank]: rank for rank in sorted(text_of)}
    if sorted(special_tokens.values()) != list(range(len(text_of), len(text_of) + len(special_tokens))):
        # An added token outside the vocabulary gets the next id, whatever the file says.
        vocabulary |= special_tokens
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = sorted(special_tokens.items(), key=lambda item: item[1])
    patterns = (split_pattern,) if isinstance(split_pattern, str) else split_pattern
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": name, **flags} for name, token_id in ordered],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
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
            "vocab": vocabulary,
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


def transformers_config(special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer_config.json: what AutoTokenizer needs beside tokenizer.json."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": "<|finetune_right_pad_id|>"}
    for key, name in roles.items():
        if name in special_tokens:
            config[key] = name
    return config


def read(path: Path | str, *, ignore_normalizer: bool = False) -> Contents:
    """The vocabulary of a tokenizer.json.

    ignore_normalizer: read a file whose library changes the text first (NFC, NFKC); give `encode` the text so changed.
    Raises: OSError; ValueError naming file and line if it is no JSON, or saying what this tokenizer cannot express:
    another model than byte-level BPE, a normalizer, another way to split, merges that rank tokens in another order.
    """
    config = read_json(path)
    try:
        return _contents_of(mapping(config, "the file"), ignore_normalizer)
    except ValueError as e:
        raise ValueError(f"read_huggingface: {path}: {e}") from e


def _contents_of(config: Mapping[str, Any], ignore_normalizer: bool) -> Contents:
    model = mapping(config.get("model"), "model")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"must be BPE, got {str(model['type'])[:80]}; other models have no merges to read")
    if is_over_characters(config):
        raise ValueError(
            "must be a byte-level BPE, got one converted from SentencePiece (characters, ▁ for spaces); "
            "read it with herdkern.tokenizer.SentencePieceTokenizer.load"
        )
    for name, harmless in FOREIGN.items():
        if model.get(name) not in harmless:
            raise ValueError(f"must have no {name}, got {str(model[name])[:80]}")
    normalizer = _normalizer_of(config)
    if normalizer and not ignore_normalizer:
        raise ValueError(
            f"must have no normalizer, got {normalizer}; pass ignore_normalizer=True and encode text that is so "
            f"changed already, as unicodedata.normalize('NFKC', text) does for NFKC"
        )
    pattern = split_pattern_of(config)
    ranks = {_token_of(name): integer(rank, f"the id of {name!r}") for name, rank in vocabulary_of(model).items()}
    if len(ranks) != len(vocabulary_of(model)):
        raise ValueError("must name every token once in the byte-level alphabet")
    special, ignored = _added_tokens(config)
    for name, token_id in special.items():
        if ranks.get(_token_of(name)) == token_id:
            del ranks[_token_of(name)]
    _check_merges(model, ranks)
    return Contents(
        format="huggingface",
        mergeable_ranks=ranks,
        special_tokens=special,
        split_pattern=pattern,
        ignored=ignored,
        normalizer=normalizer,
    )


def vocabulary_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """model.vocab. Raises: ValueError if it is no object."""
    return mapping(model.get("vocab"), "model.vocab")


def merges_as_text(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """model.merges in both notations: "left right" and ["left", "right"]. Raises: ValueError naming a bad one."""
    merges = []
    for number, merge in enumerate(items(model.get("merges"), "model.merges")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"merge {number} must be two tokens, got {str(merge)[:80]!r}")
        merges.append((pair[0], pair[1]))
    return merges


def is_over_characters(config: Mapping[str, Any]) -> bool:
    """Does this tokenizer.json merge characters, as those converted from SentencePiece?"""
    model = mapping(config.get("model"), "model")
    kinds = [step.get("type") for step in _steps(config.get("pre_tokenizer"), "pretokenizers")]
    kinds += [step.get("type") for step in _steps(config.get("normalizer"), "normalizers")]
    return bool(model.get("byte_fallback")) or "Metaspace" in kinds or "Prepend" in kinds


def _normalizer_of(config: Mapping[str, Any]) -> str:
    """The names of the steps that change a text, "" for none."""
    return ", ".join(str(step.get("type"))[:40] for step in _steps(config.get("normalizer"), "normalizers"))


def _steps(step: Any, key: str, depth: int = 0) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer with sequences laid flat."""
    if step is None:
        return []
    step = mapping(step, key)
    if step.get("type") != "Sequence":
        return [step]
    if depth == 8:
        raise ValueError(f"{key} must not be nested deeper than 8 sequences")
    return [inner for part in items(step.get(key), key) for inner in _steps(part, key, depth + 1)]


def _added_tokens(config: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    special: dict[str, int] = {}
    ignored = []
    for number, token in enumerate(items(config.get("added_tokens"), "added_tokens")):
        token = mapping(token, f"added token {number}")
        name = text(token.get("content"), f"the content of added token {number}")
        special[name] = integer(token.get("id"), f"the id of {name!r}")
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if flags:
            ignored.append(f"{', '.join(flags)} of the added token {name!r}: it is found in a text as it is written")
    return special, tuple(ignored)


def _token_of(name: str) -> bytes:
    token = from_byte_level(name)
    # A special token inside the vocabulary need not be in the byte-level alphabet.
    return text(name, "a token").encode() if token is None else token


def split_pattern_of(config: Mapping[str, Any]) -> SplitPattern:
    """The pre-tokenizers as one pattern or a sequence of them. Raises: ValueError naming those that are none."""
    steps = _steps(config.get("pre_tokenizer"), "pretokenizers")
    kinds = [str(step.get("type"))[:40] for step in steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise ValueError(f"must split by patterns and then map bytes (ByteLevel), got the pre-tokenizers {kinds}")
    last = steps.pop()
    if last.get("add_prefix_space", True):
        raise ValueError("must have add_prefix_space off, got one that begins every text with a space")
    patterns = [_pattern_of(step, alone=len(steps) == 1) for step in steps]
    if last.get("use_regex", True):
        patterns.append(_one(SPLIT_PATTERNS["gpt2"]))
    if not patterns:
        patterns.append(r"[\s\S]+")  # the whole text is one word
    return patterns[0] if len(patterns) == 1 else tuple(patterns)


def _one(pattern: SplitPattern) -> str:
    return pattern if isinstance(pattern, str) else pattern[0]


def _pattern_of(step: Mapping[str, Any], *, alone: bool) -> str:
    kind = step.get("type")
    if kind == "Digits":  # theirs are all numeric characters
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if kind != "Split":
        raise ValueError(
            f"must split by patterns, got the pre-tokenizer {str(kind)[:40]}, which this one does not have"
        )
    pattern = mapping(step.get("pattern"), "a split's pattern")
    if "Regex" in pattern:
        regex = text(pattern["Regex"], "a split's pattern")
    else:
        regex = re.escape(text(pattern.get("String"), "a split's pattern"))
    behavior, invert = step.get("behavior"), bool(step.get("invert"))
    # Cutting at what lies between the matches and dropping that is the same where nothing lies between.
    covers = alone and invert and behavior == "Removed" and resolve_pattern(regex)[0] is not None
    if behavior != "Isolated" and not covers:
        raise ValueError(f"must keep the words of a split whole (Isolated), got {str(behavior)[:40]}, invert {invert}")
    return regex


def _check_merges(model: Mapping[str, Any], ranks: Mapping[bytes, int]) -> None:
    """Refuse merges that do not rank tokens as their ids do.

    Both libraries then merge alike: parts of a token can meet only in the way that greedy merging of the token's own
    bytes leads to, so further merges of the same token change nothing.
    """
    listed: set[tuple[int, int]] = set()
    last = -1
    for number, (left, right) in enumerate(merges_as_text(model)):
        a, b = _token_of(left), _token_of(right)
        rank = ranks.get(a + b, -1)
        if rank < last or rank < 0 or a not in ranks or b not in ranks:
            raise ValueError(
                f"merge {number} ({left!r}, {right!r}) must make a token of no lower id than the one before"
            )
        last = rank
        listed.add((ranks[a], ranks[b]))
    merges = merges_of_ranks(ranks)
    token_of = {rank: token for token, rank in ranks.items()}
    for pair, made in zip(merges.pairs(), merges.made.tolist()):
        if pair not in listed:
            parts = (token_of[pair[0]], token_of[pair[1]])
            raise ValueError(f"token {token_of[made]!r} must be made by a merge of {parts[0]!r} and {parts[1]!r}")
    for skipped, splits in zip(merges.skipped, splits_of((skipped.token for skipped in merges.skipped), ranks)):
        if not model.get("ignore_merges") or any(pair not in listed for pair in splits):
            raise ValueError(f"token {skipped.token!r} must be made by a merge; it {skipped.reason}")
