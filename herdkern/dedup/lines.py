"""Line dedup: a line that occurs more than 6 times in a bucket of 30 million documents is removed everywhere in it.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783). What makes two lines equal follows CCNet
(arXiv:1911.00359): case (of the letters that minhash.py names), punctuation and spacing do not count and every digit 0
to 9 is 0. Lines without a letter or digit are never counted. Counts are exact. Buckets are formed by a hash of the
document id, each language has its own.
1. keys: 8 bytes per line.  2. count: the keys of each partition of all shards are counted in a table of at most 16
bytes per distinct line; more keys than max_memory has room for are counted in several passes. What comes back to a
shard is which of its lines are too frequent, not the table.  3. the lines are removed.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.arrays import read_array
from herdkern.dedup.drop import LineWriter
from herdkern.dedup.line_files import (
    CHUNK_DOCUMENTS,
    DOCUMENT_ROW,
    ShardLines,
    join_marks,
    read_chunks,
    write_marks,
)
from herdkern.dedup.minhash import on_texts, usable_threads
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.engine import Run, StageResult

MAX_REPORTED_LINES = 200
TABLE_BYTES_PER_LINE = 16  # at most: a slot has 8 bytes, a segment is more than half full
_CANDIDATE = np.dtype([("key", "<u8"), ("id_hash", "<u8"), ("line", "<u8"), ("place", "<u8")])
BATCH_BYTES = 4 << 20  # of documents whose lines are looked up at a time
LEVEL = 3  # of zstd
_CANDIDATES = 1 << 18  # held at least before those that cannot be first are dropped


@dataclass(frozen=True, kw_only=True)
class LineDedupConfig:
    """Which lines are too frequent.

    max_count: a line that occurs more often in its bucket is removed.  bucket_size: documents in a bucket.
    count: every occurrence, or every document that holds the line.
    keep_first: so many of them (occurrences or documents, as counted) keep the line: those whose document's id has the
    smallest BLAKE2b-64 hash, of one document the upper ones; which these are does not depend on the order of shards.
    code_aware: lines that look like code, formulas or table rows stay.  exempt_sources: documents of these sources are
    neither counted nor changed.  min_kept_share: a document that loses more of its characters is dropped (0: never).
    max_memory: bytes that a task may use for its tables.
    """

    max_count: int = 6
    bucket_size: int = 30_000_000
    count: Literal["occurrence", "document"] = "occurrence"
    keep_first: int = 0
    within_language: bool = True
    code_aware: bool = True
    exempt_sources: tuple[str, ...] = ("code",)
    min_kept_share: float = 0.0
    num_partitions: int = 4
    max_memory: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("max_count", "bucket_size", "num_partitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"LineDedupConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_partitions > 256:
            raise ValueError(f"LineDedupConfig: num_partitions must be at most 256, got {self.num_partitions}")
        if self.count not in ("occurrence", "document"):
            raise ValueError(f"LineDedupConfig: count must be 'occurrence' or 'document', got {self.count!r}")
        if not 0 <= self.keep_first <= self.max_count:
            raise ValueError(
                f"LineDedupConfig: keep_first must lie in [0, max_count={self.max_count}], got {self.keep_first}"
            )
        if not 0.0 <= self.min_kept_share <= 1.0:
            raise ValueError(f"LineDedupConfig: min_kept_share must lie in [0, 1], got {self.min_kept_share}")
        if self.max_memory < 1 << 20:
            raise ValueError(f"LineDedupConfig: max_memory must be at least 1 MiB in bytes, got {self.max_memory}")


@dataclass(frozen=True, kw_only=True)
class _CountConfig(LineDedupConfig):
    """The configuration with what only a first pass knows: the number of buckets of each language."""

    num_buckets: tuple[tuple[str, int], ...] = ()


def is_code_or_formula(line: str) -> bool:
    """Whether a line looks like code, a formula or the row of a table: frequent ones of these are no boilerplate."""
    return bool(_text.is_code_or_formula([line.encode("utf-8", "surrogatepass")])[0])


def num_buckets(num_documents: int, bucket_size: int) -> int:
    """Whole buckets, and one more if at least half a bucket is left; at least one."""
    return max(1, num_documents // bucket_size + (2 * (num_documents % bucket_size) >= bucket_size))


def line_keys(texts: Sequence[str | bytes], *, num_threads: int = 1) -> list[NDArray[np.uint64]]:
    """A key for every line of each text (cut at "\\n"), uint64: equal for lines that count as equal, 0 for no words."""
    values, begins = on_texts("line_keys", _text.line_keys, texts, num_threads, "auto")
    return np.split(values, begins[1:-1]) if len(texts) else []


def remove_frequent_lines(
    texts: Sequence[str],
    *,
    max_count: int = 6,
    count: Literal["occurrence", "document"] = "occurrence",
    code_aware: bool = True,
    num_threads: int | None = None,
) -> list[str]:
    """`texts` without the lines that occur more than max_count times in all of them: one bucket, in memory.

    num_threads: that take the keys, None for all usable cores; the result is the same.
    """
    values, begins = on_texts("remove_frequent_lines", _text.line_keys, texts, usable_threads(num_threads), "auto")
    salts = np.zeros(len(texts), np.uint64)
    salted, origins, _ = _text.partition_lines(values, begins, salts, count == "document", 1)
    table = _text.LineCounts(0, 1, 1, len(salted))
    table.add(salted)
    places, counts = table.find_frequent(salted, max_count)
    marks = np.zeros(len(values), np.uint64)
    marks[origins[places]] = counts
    new_texts, _ = _text.remove_lines(texts, begins, marks, values, code_aware, _text.RemovedLines(1))
    return [text if new is None else new for text, new in zip(texts, new_texts, strict=True)]


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _make_keys(inputs: list[Path], out: Path, config: LineDedupConfig) -> dict[str, Any]:
    """keys.bin (a key per line, 0 for lines that do not count), documents.bin and languages.json."""
    lines = _text.LineKeys(list(config.exempt_sources), config.within_language, *line_reader(inputs[0]))
    by_language = np.zeros(0, np.int64)
    num_lines = num_bytes = 0
    with open(out / "keys.bin", "wb") as key_file, open(out / "documents.bin", "wb") as document_file:
        for piece, last in read_pieces(inputs[0], lines):
            lines.scan(piece, last)
            num_bytes += len(piece)
            if num_bytes >= BATCH_BYTES or last:
                rows, keys = lines.take()
                languages = np.bincount(rows.view(DOCUMENT_ROW)["language"].reshape(-1), minlength=len(lines.languages))
                languages[: len(by_language)] += by_language
                by_language = languages
                key_file.write(keys.data)
                document_file.write(rows.data)
                num_lines += int(np.count_nonzero(keys))
                num_bytes = 0
    names = lines.languages
    (out / "languages.json").write_text(json.dumps(names))
    documents_by_language = dict(sorted(zip(names, by_language.tolist(), strict=True)))
    return {"documents_by_language": documents_by_language, "lines": num_lines}


def _salts(folder: Path, rows: NDArray[Any], config: _CountConfig) -> NDArray[np.uint64]:
    """What language and bucket of each document add to the keys of its lines."""
    names = json.loads((folder / "languages.json").read_text())
    buckets = dict(config.num_buckets)
    sizes = np.array([buckets[name] for name in names] or [1], np.uint64)[rows["language"]]
    salts = np.array([_hash_text(name) for name in names] or [0], np.uint64)[rows["language"]]
    return salts + rows["id_hash"] % sizes * np.uint64(0x9E3779B97F4A7C15)


def _partition(inputs: list[Path], out: Path, config: _CountConfig, num_partitions: int) -> dict[str, Any]:
    """part-<p>: the keys of the shard's lines that fall there, in order, as uint64 of which bit 0 means a repeat."""
    num_lines = 0
    with ShardLines(inputs[0]) as lines, ExitStack() as stack:
        files = [stack.enter_context(open(out / f"part-{p:05d}", "wb")) for p in range(num_partitions)]
        while len(rows := lines.next_rows(CHUNK_DOCUMENTS)):
            keys, begins = lines.keys_of(rows)
            salts = _salts(inputs[0], rows, config)
            keys, _, parts = _text.partition_lines(keys, begins, salts, config.count == "document", num_partitions)
            num_lines += len(keys)
            for file, (begin, end) in zip(files, pairwise(parts), strict=True):
                file.write(keys[begin:end].data)
    return {"counted_lines": num_lines}


def _find_frequent(inputs: list[Path], out: Path, config: _CountConfig) -> dict[str, Any]:
    """Marks of one partition: for every shard which of its keys here occur too often, and how often."""
    num_keys = sum(path.stat().st_size for path in inputs) // 8
    num_passes = max(1, math.ceil(num_keys * TABLE_BYTES_PER_LINE / config.max_memory))
    part = int(inputs[0].name.removeprefix("part-")) if inputs else 0
    totals: Counter[str] = Counter()
    for number in range(num_passes):
        first = part * num_passes + number
        table = _text.LineCounts(first, first + 1, config.num_partitions * num_passes, num_keys // num_passes)
        for path in inputs:
            for _, keys in read_chunks(path, np.uint64):
                table.add(keys)
        totals["distinct_lines"] += table.num_keys()
        totals["frequent_lines"] += table.num_frequent(config.max_count)
        for shard, path in enumerate(inputs):
            found = (
                (begin, table.find_frequent(keys, config.max_count)) for begin, keys in read_chunks(path, np.uint64)
            )
            marks = ((places + begin, counts) for begin, (places, counts) in found)
            totals["marked_lines"] += write_marks(out / f"shard-{shard:05d}.{number}", marks)
    for shard in range(len(inputs)):
        join_marks(out / f"shard-{shard:05d}", [out / f"shard-{shard:05d}.{number}" for number in range(num_passes)])
    return {name: totals[name] for name in ("distinct_lines", "frequent_lines", "marked_lines")}


def _first_of_each(candidates: NDArray[Any], config: _CountConfig) -> NDArray[Any]:
    """Those that keep their line, sorted by key, hash of the document id and line."""
    candidates = candidates[
        np.lexsort((candidates["place"], candidates["line"], candidates["id_hash"], candidates["key"]))
    ]
    if not len(candidates):
        return candidates
    is_new_key = np.append(True, candidates["key"][1:] != candidates["key"][:-1])
    is_counted = np.ones(len(candidates), bool)
    if config.count == "document":
        is_counted[1:] = is_new_key[1:] | (candidates["id_hash"][1:] != candidates["id_hash"][:-1])
    number = np.cumsum(is_counted)
    first = number[is_new_key][np.cumsum(is_new_key) - 1]
    return candidates[number - first < config.keep_first]


def _find_first(inputs: list[Path], out: Path, config: _CountConfig, num_partitions: int) -> dict[str, Any]:
    """part-<p>: of a shard's lines that are too frequent those that may be among the first of all shards."""
    held = np.zeros(0, _CANDIDATE)
    first_line = 0
    limit = _CANDIDATES
    with ShardLines(inputs[0], inputs[1:]) as lines:
        while len(rows := lines.next_rows(CHUNK_DOCUMENTS)):
            keys, begins, counts = lines.marks_of(rows, _salts(inputs[0], rows, config))
            marked = np.flatnonzero(counts)
            document = np.searchsorted(begins, marked, side="right") - 1
            more = np.zeros(len(marked), _CANDIDATE)
            more["key"], more["id_hash"] = keys[marked], rows["id_hash"][document]
            more["line"], more["place"] = marked - begins[document], marked + first_line
            held = np.concatenate([held, more])
            if len(held) > limit:
                held = _first_of_each(held, config)
                limit = max(_CANDIDATES, 2 * len(held))
            first_line += len(keys)
    held = _first_of_each(held, config)
    parts = (held["key"] >> np.uint64(1)) % np.uint64(num_partitions)
    for part in range(num_partitions):
        (out / f"part-{part:05d}").write_bytes(held[parts == part].tobytes())
    return {}


def _choose_first(inputs: list[Path], out: Path, config: _CountConfig) -> dict[str, Any]:
    """first-<shard>: places of the lines of a shard that stay although they are too frequent, uint64, sorted."""
    pieces = [read_array(path, _CANDIDATE) for path in inputs]
    shards = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    candidates = np.concatenate(pieces) if pieces else np.zeros(0, _CANDIDATE)
    candidates["place"] |= shards.astype(np.uint64) << np.uint64(40)  # the last to decide: ids are one then
    chosen = _first_of_each(candidates, config)["place"]
    for shard in range(len(pieces)):
        ours = chosen[chosen >> np.uint64(40) == shard] & np.uint64((1 << 40) - 1)
        (out / f"first-{shard:05d}").write_bytes(np.sort(ours).tobytes())
    return {"lines_kept_as_first": len(chosen)}


def _drop_lines(inputs: list[Path], out: Path, config: _CountConfig) -> dict[str, Any]:
    """Stage function. inputs: a shard of documents, its keys, the marks of every partition, places that stay."""
    marks, firsts = inputs[2 : 2 + config.num_partitions], inputs[2 + config.num_partitions :]
    stays = np.concatenate([np.zeros(0, np.uint64), *(read_array(path, np.uint64) for path in firsts)])
    removed = _text.RemovedLines(MAX_REPORTED_LINES)
    documents = _text.LineDealer(
        list(config.exempt_sources), config.code_aware, config.min_kept_share, *line_reader(inputs[0])
    )
    first_line = 0
    with (
        ShardLines(inputs[1], marks) as lines,
        LineWriter(out / "documents.jsonl.zst", level=LEVEL) as kept_writer,
        LineWriter(out / "dropped.jsonl.zst", level=LEVEL) as dropped_writer,
    ):
        for piece, last in read_pieces(inputs[0], documents):
            num_documents = documents.hold(piece, last)
            if documents.num_held_bytes < BATCH_BYTES and not last:
                continue
            rows = lines.next_rows(num_documents)
            keys, begins, counts = lines.marks_of(rows, _salts(inputs[1], rows, config))
            if len(stays):
                ours = stays[(stays >= first_line) & (stays < first_line + len(keys))]
                counts[ours.astype(np.int64) - first_line] = 0
            first_line += len(keys)
            kept, gone = documents.deal(begins, counts, keys, removed)
            kept_writer.write_lines([kept])
            dropped_writer.write_lines([gone])
    _write_removed(out / "removed_lines.jsonl", removed.entries())
    counters: dict[str, int] = documents.counters
    num_dropped = counters["docs_in"] - counters["docs_out"]
    return {**counters, "dropped": {"duplicate_lines": num_dropped} if num_dropped else {}}


def _write_removed(path: Path, entries: list[tuple[int, str]]) -> None:
    """The most frequent removed lines with their count in the bucket, one JSON object a line."""
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for count, line in entries:
            f.write(json.dumps({"line": line[:500], "count": count}, ensure_ascii=True) + "\n")


def dedup_lines(
    run: Run, inputs: Sequence[Path], config: LineDedupConfig | None = None, *, name: str = "dedup_lines"
) -> StageResult:
    """Remove the lines that occur more than `max_count` times in their bucket, all but the first `keep_first` of them.

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
    first: list[Path] = []
    if config.keep_first:
        needed = math.ceil(frequent.counters.get("marked_lines", 0) * 3 * _CANDIDATE.itemsize / config.max_memory)
        groups = [[task, *_marks_of_shard(frequent, shard)] for shard, task in enumerate(keyed.tasks)]
        num_partitions = min(256, max(config.num_partitions, needed))
        first = run.exchange(
            f"{name}.first", _find_first, _choose_first, groups, num_partitions=num_partitions, config=counting
        ).tasks
    shards = [
        [path, task, *_marks_of_shard(frequent, shard), *(folder / f"first-{shard:05d}" for folder in first)]
        for shard, (path, task) in enumerate(zip(files, keyed.tasks, strict=True))
    ]
    return run.map(name, _drop_lines, shards, config=counting)


def _marks_of_shard(frequent: StageResult, shard: int) -> list[Path]:
    return [task / f"shard-{shard:05d}" for task in frequent.tasks]
