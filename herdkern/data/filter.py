"""Heuristic filters: the C4, Gopher and FineWeb rule sets. Each gives the reason it drops; what is measured is kept.

The Llama 3 report names the families alone (section 3.1.1); rules and thresholds are the public ones.
Source: Raffel et al. 2020, section 2.2 (C4); Rae et al. 2021, table A1 (Gopher); Penedo et al. 2024 (FineWeb); Li et
al. 2023 (StarCoder, rules for program text). C4's word list is left out: no kept library carries it.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from herdkern.data.document import Document, DocumentWriter, read_documents, with_meta
from herdkern.data.text_counts import (
    DUPLICATE_NGRAMS,
    NO_FULL_STOP,
    TERMINAL,
    TOP_NGRAMS,
    line_counts,
    num_sentences,
    quality_counts,
    repetition_counts,
    words_of,
)

RULE_SETS = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|terms of service", re.IGNORECASE
)
_CITATION = re.compile(r"\[(?:\d{1,3}|edit|citation needed)\]")
_CODE_LINE = re.compile(
    r"^\s*(?:def |class |import |from \S+ import |return\b|if .*[:{]$|for .*[:{]$|#include|>>> |\$ |public )"
    r"|^\s*(?:private |@\w)|[;{}]\s*$|^\s{4,}\S|\w\([^()]*\)\s*(?:->.*)?$|^\w[\w.]* = "
)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """rules: of RULE_SETS.  code_sources: program text, which has rules of its own.  exempt_sources: only the length.

    A document is technical if at least technical_share of it is code: C4's rules about lines and braces, Gopher's about
    bullets and FineWeb's are then off, and repetition thresholds are multiplied by technical_repetition.
    """

    rules: tuple[str, ...] = ("gopher_quality", "gopher_repetition", "c4")
    code_sources: tuple[str, ...] = ("code",)
    exempt_sources: tuple[str, ...] = ("licence",)
    min_words: int = 50
    max_words: int = 100_000
    mean_word_length: tuple[float, float] = (3.0, 10.0)
    max_symbol_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alpha_words: float = 0.8
    min_technical_alpha_words: float = 0.6
    min_stop_words: int = 2
    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    technical_share: float = 0.1
    technical_repetition: float = 4.0
    c4_min_sentences: int = 5
    c4_min_line_words: int = 3
    c4_max_word_characters: int = 1000
    fineweb_min_terminal_lines: float = 0.12
    fineweb_max_short_lines: float = 0.67
    fineweb_max_repeated_line_characters: float = 0.01
    fineweb_max_newline_ratio: float = 0.3
    max_code_line: int = 1000
    max_mean_code_line: float = 100.0
    min_code_letters: float = 0.25

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule not in RULE_SETS:
                raise ValueError(f"FilterConfig: rules must be of {RULE_SETS}, got {rule!r}")
        if len(self.max_top_ngrams) != len(TOP_NGRAMS) or len(self.max_duplicate_ngrams) != len(DUPLICATE_NGRAMS):
            raise ValueError("FilterConfig: max_top_ngrams must have 3 and max_duplicate_ngrams 6 thresholds")


@dataclass(frozen=True, slots=True)
class Verdict:
    """reason: "" keeps.  text: what is left of the document.  counts: everything measured on the way."""

    reason: str
    text: str
    counts: dict[str, Any]


def judge(document: Document, config: FilterConfig) -> Verdict:
    """Apply the rules of `config` that fit the document's source and kind, in the order of RULE_SETS with C4 last."""
    text = document.text
    if document.source in config.code_sources:
        return _judge_code(text, config)
    words = words_of(text)
    if document.source in config.exempt_sources:
        reason = "too_few_words" if len(words) < config.min_words else ""
        return Verdict(reason, text, {"words": len(words)})
    share = document.meta.get("code_share")
    technical_share = share if isinstance(share, float) else code_line_share(text)
    is_technical = technical_share >= config.technical_share or bool(document.meta.get("formulas"))
    counts: dict[str, Any] = {"technical_share": technical_share}
    if "gopher_quality" in config.rules:
        counts.update(quality_counts(text, words, document.lang))
        if reason := _gopher_quality(counts, config, is_technical):
            return Verdict(reason, text, counts)
    if "gopher_repetition" in config.rules:
        counts.update(repetition_counts(text, words))
        if reason := _gopher_repetition(counts, config, config.technical_repetition if is_technical else 1.0):
            return Verdict(reason, text, counts)
    if "fineweb" in config.rules and not is_technical:
        counts.update(line_counts(text))
        if reason := _fineweb(counts, config):
            return Verdict(reason, text, counts)
    if "c4" in config.rules:
        return _c4(text, counts, config, is_technical or document.lang in NO_FULL_STOP)
    return Verdict("", text, counts)


def code_line_share(text: str) -> float:
    """Share of the non-empty lines that look like program text."""
    lines = [line for line in text.split("\n") if line.strip()]
    return sum(1 for line in lines if _CODE_LINE.search(line)) / max(1, len(lines))


def _gopher_quality(counts: dict[str, Any], config: FilterConfig, is_technical: bool) -> str:
    if counts["words"] < config.min_words:
        return "too_few_words"
    if counts["words"] > config.max_words:
        return "too_many_words"
    low, high = config.mean_word_length
    if not counts["unspaced"] and not low <= counts["mean_word_length"] <= (1.5 * high if is_technical else high):
        return "mean_word_length"
    if counts["symbol_ratio"] > config.max_symbol_ratio:
        return "symbols"
    if counts["bullet_lines"] > config.max_bullet_lines and not is_technical:
        return "bullet_lines"
    if counts["ellipsis_lines"] > config.max_ellipsis_lines:
        return "ellipsis_lines"
    if counts["alpha_words"] < (config.min_technical_alpha_words if is_technical else config.min_alpha_words):
        return "words_without_letters"
    if 0 <= counts["stop_words"] < config.min_stop_words:
        return "no_stop_words"
    return ""


def _gopher_repetition(counts: dict[str, Any], config: FilterConfig, factor: float) -> str:
    limits = {
        "duplicate_lines": config.max_duplicate_lines,
        "duplicate_paragraphs": config.max_duplicate_paragraphs,
        "duplicate_line_characters": config.max_duplicate_line_characters,
        "duplicate_paragraph_characters": config.max_duplicate_paragraph_characters,
    }
    limits.update((f"top_{n}gram", limit) for n, limit in zip(TOP_NGRAMS, config.max_top_ngrams, strict=True))
    limits.update(
        (f"duplicate_{n}gram", limit) for n, limit in zip(DUPLICATE_NGRAMS, config.max_duplicate_ngrams, strict=True)
    )
    for name, limit in limits.items():
        if counts[name] > limit * factor:
            return name
    return ""


def _fineweb(counts: dict[str, Any], config: FilterConfig) -> str:
    if counts["terminal_lines"] < config.fineweb_min_terminal_lines:
        return "few_terminal_lines"
    if counts["short_lines"] > config.fineweb_max_short_lines:
        return "short_lines"
    if counts["repeated_line_characters"] > config.fineweb_max_repeated_line_characters:
        return "repeated_lines"
    if counts["newline_ratio"] > config.fineweb_max_newline_ratio:
        return "many_newlines"
    return ""


def _c4(text: str, counts: dict[str, Any], config: FilterConfig, has_other_lines: bool) -> Verdict:
    """C4: lines that are no sentences go, then documents that hold a placeholder, a brace or too few sentences.

    has_other_lines: code, or a language without full stops: its lines and sentences are not judged.
    """
    removed: Counter[str] = Counter()
    text = _CITATION.sub("", text)
    if "lorem ipsum" in text.lower():
        return Verdict("lorem_ipsum", text, counts)
    if not has_other_lines:
        if "{" in text:
            return Verdict("curly_bracket", text, counts)
        lines = []
        for line in text.split("\n"):
            reason = _c4_line(line.strip(), config) if line.strip() else ""
            if reason:
                removed[reason] += 1
            else:
                lines.append(line)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        counts["lines_removed"] = dict(sorted(removed.items()))
        counts["sentences"] = num_sentences(text)
        if counts["sentences"] < config.c4_min_sentences:
            return Verdict("too_few_sentences", text, counts)
    return Verdict("", text, counts)


def _c4_line(line: str, config: FilterConfig) -> str:
    words = words_of(line)
    if not line.endswith(TERMINAL) or line.endswith(("...", "…")):
        return "no_terminal_punctuation"
    if len(words) < config.c4_min_line_words:
        return "short_line"
    if any(len(word) > config.c4_max_word_characters for word in words):
        return "long_word"
    if "javascript" in line.lower():
        return "javascript"
    if _POLICY.search(line):
        return "policy"
    return ""


def _judge_code(text: str, config: FilterConfig) -> Verdict:
    lines = text.split("\n")
    counts = {
        "max_line": max(map(len, lines)),
        "mean_line": len(text) / len(lines),
        "letters": sum(map(str.isalpha, text)) / max(1, len(text)),
        "words": len(text.split()),
    }
    if counts["words"] < 10:
        return Verdict("too_few_words", text, counts)
    if counts["max_line"] > config.max_code_line:
        return Verdict("long_code_line", text, counts)
    if counts["mean_line"] > config.max_mean_code_line:
        return Verdict("mean_code_line", text, counts)
    if counts["letters"] < config.min_code_letters:
        return Verdict("few_letters", text, counts)
    return Verdict("", text, counts)


def filter_shard(inputs: list[Path], out: Path, config: FilterConfig) -> dict[str, Any]:
    """Stage: keep what passes `judge`; the rest goes to dropped.jsonl.zst with its reason and what was measured."""
    dropped: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    docs_in = 0
    with DocumentWriter(out / "documents.jsonl.zst") as writer, DocumentWriter(out / "dropped.jsonl.zst") as refuse:
        for path in inputs:
            for document in read_documents(path):
                docs_in += 1
                verdict = judge(document, config)
                removed.update(verdict.counts.get("lines_removed", {}))
                if verdict.reason:
                    dropped[verdict.reason] += 1
                    counts = {name: _short(value) for name, value in verdict.counts.items()}
                    refuse.write(with_meta(document, counts=counts), reason=verdict.reason)
                else:
                    writer.write(replace(document, text=verdict.text))
    counters = {"docs_in": docs_in, "docs_out": writer.num_documents, "text_bytes": writer.text_bytes}
    return {**counters, "dropped": dict(sorted(dropped.items())), "lines_removed": dict(sorted(removed.items()))}


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
