"""Line dedup: a line that occurs more than 6 times in a bucket of 30 million documents is removed everywhere in it.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783). What makes two lines equal follows CCNet
(arXiv:1911.00359): case (of the letters that minhash.py names), punctuation and spacing do not count and every digit 0
to 9 is 0. Lines without a letter or digit are never counted. Counts are exact. Buckets are formed by a hash of the
document id, each language has its own.
1. keys: one key per line.  2. count: the keys above the limit, by bucket.  3. the lines are removed.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.data.document import Document, DocumentWriter, read_documents, with_meta
from herdkern.dedup.minhash import on_texts
from herdkern.engine import Run, StageResult

MAX_REPORTED_LINES = 200
_BATCH_CHARS = 16 << 20
_KEY_COUNT = np.dtype([("key", "<u8"), ("count", "<u8")])
_CODE = re.compile(
    r"^    |\t"  # indented, as prose that was taken from a page is not; or the row of a table
    r"|[;{}]\s*$|^\s*[\])}]+[,;:]?\s*$"
    r"|^\s*(?:import [\w.]+(?: as \w+)?(?:,|\s*$)|from [\w.]+ import |def \w+\(|class \w+[(:]|@\w)"
    r"|^\s*(?:#include|#!|//|/\*|\*/|<\?|<!--)"
    r"|^\s*(?:>>>|\.\.\.|\$) \w"
    r"|^\s*(?:return|elif|except|raise|assert|yield|print)\b.*[():=]|^\s*(?:if|for|while|with|try|else)\b.*:\s*$"
    r"|==|!=|->|=>|::|\+=|-=|&&|\|\||\w\(\)|\w\[\w*\]|\w = \w"
)
_FORMULA = re.compile(r"\$[^$\\^_={}+<>]*[\\^_={}+<>][^$]*\$|\\[a-zA-Z]{2,}|\\[(\[]")


@dataclass(frozen=True, kw_only=True)
class LineDedupConfig:
    """Which lines are too frequent.

    max_count: a line that occurs more often in its bucket is removed.  bucket_size: documents in a bucket.
    count: every occurrence, or every document that holds the line.
    code_aware: lines that look like code, formulas or table rows stay.  exempt_sources: documents of these sources are
    neither counted nor changed.  min_kept_share: a document that loses more of its characters is dropped (0: never).
    """

    max_count: int = 6
    bucket_size: int = 30_000_000
    count: Literal["occurrence", "document"] = "occurrence"
    within_language: bool = True
    code_aware: bool = True
    exempt_sources: tuple[str, ...] = ("code",)
    min_kept_share: float = 0.0
    num_partitions: int = 4

    def __post_init__(self) -> None:
        for name in ("max_count", "bucket_size", "num_partitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"LineDedupConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.count not in ("occurrence", "document"):
            raise ValueError(f"LineDedupConfig: count must be 'occurrence' or 'document', got {self.count!r}")
        if not 0.0 <= self.min_kept_share <= 1.0:
            raise ValueError(f"LineDedupConfig: min_kept_share must lie in [0, 1], got {self.min_kept_share}")


@dataclass(frozen=True, kw_only=True)
class _CountConfig(LineDedupConfig):
    """The configuration with what only a first pass knows: the number of buckets of each language."""

    num_buckets: tuple[tuple[str, int], ...] = ()


def is_code_or_formula(line: str) -> bool:
    """Whether a line looks like code, a formula or the row of a table: frequent ones of these are no boilerplate."""
    return _CODE.search(line) is not None or _FORMULA.search(line) is not None


def num_buckets(num_documents: int, bucket_size: int) -> int:
    """Whole buckets, and one more if at least half a bucket is left; at least one."""
    return max(1, num_documents // bucket_size + (2 * (num_documents % bucket_size) >= bucket_size))


def _language(document: Document, config: LineDedupConfig) -> str:
    return document.lang if config.within_language else ""


def line_keys(texts: Sequence[str], *, num_threads: int = 1) -> list[NDArray[np.uint64]]:
    """A key for every line of each text (cut at "\\n"), uint64: equal for lines that count as equal, 0 for no words."""
    values, begins = on_texts("line_keys", _text.line_keys, texts, num_threads, "auto")
    return np.split(values, begins[1:-1]) if len(texts) else []


def _hash_id(document: Document) -> int:
    return int.from_bytes(
        hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _make_keys(inputs: list[Path], out: Path, config: LineDedupConfig) -> dict[str, Any]:
    """keys.npy (a key per line, 0 for lines that do not count), begins.npy, id_hashes.npy and languages.json."""
    keys: list[NDArray[np.uint64]] = []
    id_hashes: list[int] = []
    languages: list[str] = []
    texts: list[str] = []
    batch_chars = 0
    for document in read_documents(inputs[0]):
        id_hashes.append(_hash_id(document))
        languages.append(_language(document, config))
        texts.append("" if document.source in config.exempt_sources else document.text)
        batch_chars += len(document.text)
        if batch_chars >= _BATCH_CHARS:
            keys += line_keys(texts)
            texts, batch_chars = [], 0
    keys += line_keys(texts)
    np.save(out / "keys.npy", np.concatenate(keys) if keys else np.zeros(0, np.uint64))
    np.save(out / "begins.npy", np.cumsum([0, *(len(k) for k in keys)], dtype=np.int64))
    np.save(out / "id_hashes.npy", np.array(id_hashes, dtype=np.uint64))
    (out / "languages.json").write_text(json.dumps(languages))
    counts = {lang: languages.count(lang) for lang in sorted(set(languages))}
    return {"documents_by_language": counts, "lines": int(sum((k != 0).sum() for k in keys))}


def _salted_keys(folder: Path, config: _CountConfig) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(keys mixed with language and bucket of their document, 0 kept; begin of every document's lines)."""
    keys, begins = np.load(folder / "keys.npy"), np.load(folder / "begins.npy")
    id_hashes = np.load(folder / "id_hashes.npy")
    languages = json.loads((folder / "languages.json").read_text())
    buckets = dict(config.num_buckets)
    salts = np.zeros(len(id_hashes), np.uint64)
    for lang in sorted(set(languages)):
        ours = np.array([name == lang for name in languages])
        digest = hashlib.blake2b(lang.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        bucket = id_hashes[ours] % np.uint64(buckets[lang])
        salts[ours] = np.uint64(int.from_bytes(digest, "little")) + bucket * np.uint64(0x9E3779B97F4A7C15)
    salted = (keys ^ np.repeat(salts, np.diff(begins))) * np.uint64(0xD6E8FEB86659FD93)
    salted ^= salted >> np.uint64(32)
    return np.where(keys == 0, np.uint64(0), np.maximum(salted, np.uint64(1))), begins


def _partition(inputs: list[Path], out: Path, config: _CountConfig, num_partitions: int) -> dict[str, Any]:
    """part-<p>: the distinct keys of a shard that fall there, sorted, with their counts."""
    keys, begins = _salted_keys(inputs[0], config)
    if config.count == "document":
        documents = np.repeat(np.arange(len(begins) - 1), np.diff(begins))
        order = np.lexsort((documents, keys))
        keys, documents = keys[order], documents[order]
        keys = keys[np.append(True, (keys[1:] != keys[:-1]) | (documents[1:] != documents[:-1]))[: len(keys)]]
    distinct, counts = np.unique(keys[keys != 0], return_counts=True)
    places = (distinct >> np.uint64(40)) % np.uint64(num_partitions)
    for partition in range(num_partitions):
        ours = places == partition
        _save_counts(out / f"part-{partition:05d}", distinct[ours], counts[ours])
    return {"distinct_lines_in_shards": len(distinct)}


def _save_counts(path: Path, keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
    table = np.zeros(len(keys), _KEY_COUNT)
    table["key"], table["count"] = keys, counts
    with open(path, "wb") as f:
        np.save(f, table)


def _find_frequent(inputs: list[Path], out: Path, config: _CountConfig) -> dict[str, Any]:
    """frequent.npy: the keys of one partition that occur more than max_count times over all shards, sorted."""
    tables = [np.load(path) for path in inputs]
    table = np.concatenate(tables) if tables else np.zeros(0, _KEY_COUNT)
    keys, places = np.unique(table["key"], return_inverse=True)
    counts = np.bincount(places, weights=table["count"], minlength=len(keys)).astype(np.int64)  # exact below 2^53
    frequent = counts > config.max_count
    _save_counts(out / "frequent.npy", keys[frequent], counts[frequent])
    return {"distinct_lines": len(keys), "frequent_lines": int(frequent.sum())}


def _remove_lines(text: str, remove: NDArray[np.bool_], config: LineDedupConfig) -> tuple[str, list[int]]:
    """(`text` without the lines marked in `remove`, which they were). Blank lines that meet at a gap become one."""
    kept: list[str] = []
    removed: list[int] = []
    gap = False
    for number, line in enumerate(text.split("\n")):
        if remove[number] and not (config.code_aware and is_code_or_formula(line)):
            removed.append(number)
            gap = True
            continue
        if gap and not line.strip() and (not kept or not kept[-1].strip()):
            continue
        gap = False
        kept.append(line)
    while gap and kept and not kept[-1].strip():
        kept.pop()
    return ("\n".join(kept), removed) if removed else (text, removed)


class _Marks:
    """Which lines of a shard are too frequent, and how often they occur."""

    def __init__(self, keys_folder: Path, tables: list[Path], config: _CountConfig):
        frequent = np.concatenate([np.load(path) for path in tables])
        frequent = frequent[np.argsort(frequent["key"])]
        self.keys, self.begins = _salted_keys(keys_folder, config)
        places = np.searchsorted(frequent["key"], self.keys)
        places[places == len(frequent)] = 0
        found = frequent["key"][places] == self.keys if len(frequent) else np.zeros(len(self.keys), bool)
        self.counts = np.zeros(len(self.keys), np.int64)
        self.counts[found] = frequent["count"][places[found]]
        self.examples: dict[int, tuple[int, str]] = {}  # key -> (count, the line as it stood)

    def of_document(self, row: int) -> NDArray[np.bool_]:
        """One flag per line of the document."""
        return self.counts[self.begins[row] : self.begins[row + 1]] > 0

    def note(self, row: int, removed: list[int], text: str) -> None:
        """Remember removed lines for the report: of equal keys the line that sorts first."""
        lines = text.split("\n")
        for number in removed:
            place = self.begins[row] + number
            entry = (int(self.counts[place]), lines[number].strip())
            key = int(self.keys[place])
            self.examples[key] = min(self.examples.get(key, entry), entry)


def _drop_lines(inputs: list[Path], out: Path, config: _CountConfig) -> dict[str, Any]:
    """Stage function. inputs: a shard of documents, its keys, and the frequent keys of every partition."""
    marks = _Marks(inputs[1], inputs[2:], config)
    num_documents = num_removed = num_changed = bytes_in = 0
    with (
        DocumentWriter(out / "documents.jsonl.zst") as kept_writer,
        DocumentWriter(out / "dropped.jsonl.zst") as dropped_writer,
    ):
        for row, document in enumerate(read_documents(inputs[0])):
            num_documents += 1
            bytes_in += len(document.text.encode())
            marked = marks.of_document(row)
            text, removed = _remove_lines(document.text, marked, config) if marked.any() else (document.text, [])
            if not removed:
                kept_writer.write(document)
                continue
            marks.note(row, removed, document.text)
            num_removed += len(removed)
            num_changed += 1
            if text.strip() and len(text) >= config.min_kept_share * len(document.text):
                kept_writer.write(with_meta(replace(document, text=text), lines_removed=len(removed)))
            else:
                share = round(1 - len(text) / len(document.text), 6)
                document = with_meta(document, lines_removed=len(removed), share_removed=share)
                dropped_writer.write(document, reason="duplicate_lines")
    _write_removed(out / "removed_lines.jsonl", marks.examples)
    num_dropped = dropped_writer.num_documents
    return {
        "docs_in": num_documents,
        "docs_out": kept_writer.num_documents,
        "bytes_in": bytes_in,
        "bytes_out": kept_writer.text_bytes,
        "dropped": {"duplicate_lines": num_dropped} if num_dropped else {},
        "docs_changed": num_changed,
        "lines_removed": num_removed,
    }


def _write_removed(path: Path, removed_lines: dict[int, tuple[int, str]]) -> None:
    """The most frequent removed lines with their count in the bucket, one JSON object a line."""
    entries = sorted(removed_lines.values(), key=lambda entry: (-entry[0], entry[1]))
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for count, line in entries[:MAX_REPORTED_LINES]:
            f.write(json.dumps({"line": line[:500], "count": count}, ensure_ascii=True) + "\n")


def dedup_lines(
    run: Run, inputs: Sequence[Path], config: LineDedupConfig | None = None, *, name: str = "dedup_lines"
) -> StageResult:
    """Remove the lines that occur more than `max_count` times in their bucket, all of their occurrences.

    inputs: document files.  The result's task folders hold documents.jsonl.zst (meta.lines_removed where text changed),
    dropped.jsonl.zst (reason "duplicate_lines": nothing was left) and removed_lines.jsonl, one task per input.
    Raises: StageError if an input cannot be read.
    """
    config = config or LineDedupConfig()
    files = [Path(path) for path in inputs]
    keyed = run.map(f"{name}.keys", _make_keys, files, config=config)
    by_language = keyed.counters.get("documents_by_language", {})
    buckets = tuple((lang, num_buckets(n, config.bucket_size)) for lang, n in sorted(by_language.items()))
    counting = _CountConfig(**asdict(config), num_buckets=buckets)
    frequent = run.exchange(
        f"{name}.count", _partition, _find_frequent, keyed.tasks, num_partitions=config.num_partitions, config=counting
    )
    tables = frequent.files("frequent.npy")
    shards = [[path, task, *tables] for path, task in zip(files, keyed.tasks, strict=True)]
    return run.map(name, _drop_lines, shards, config=counting)
