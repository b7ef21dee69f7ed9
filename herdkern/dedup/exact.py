"""Exact document dedup over the whole data set: of documents whose texts have the same 128-bit hash one is kept.

The hash is BLAKE2b-128 of the text as it is, or of its normal form: NFC, case folded, runs of white space as one space,
none at the ends (`normal_text`). A chance collision among 10^12 texts has a probability of about 10^-15.
Stages: 1. hash: a row of fixed width for every document, with its hash and all that decides who stays.  2. copies: the
rows come together by hash, in as many partitions as max_memory asks for; of every hash the first by `keep` stays.
3. drop. The result does not depend on the order of documents or shards, on threads, workers or memory.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern.dedup.arrays import read_array
from herdkern.dedup.cluster_stages import DECISION, DECISIONS, EXACT_DUPLICATE, KEPT, load_rows
from herdkern.dedup.clusters import KEEP_POLICIES, KeepPolicy
from herdkern.dedup.drop import drop_members
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.sign_stage import DOCUMENT, DOCUMENTS, NAMES, read_rows, sort_keys
from herdkern.engine import Run, StageResult

RECORD = np.dtype(
    [
        ("high", "<u8"),  # the hash
        ("low", "<u8"),
        ("order", "<u8", 7),  # sort_keys without its last column
        ("row", "<u8"),
        ("id_bytes", "<u4"),  # of id and URL, in the file beside it
        ("url_bytes", "<u4"),
    ]
)
RECORDS, TIE = "records", "tie"
CHUNK_ROWS = 1 << 15
MAX_PARTITIONS = 512
_COPIES = 4  # of its records that a task holds at once, while it sorts


@dataclass(frozen=True, kw_only=True)
class ExactDedupConfig:
    """What makes two documents one, and which of them stays.

    normalize: hash the normal form of the text (`normal_text`), not the text as it is.
    keep, score_key: as in MinHashConfig.  write_dropped: the dropped documents aside, in dropped.jsonl.zst.
    max_memory: bytes that one task may use for its records.
    """

    normalize: bool = False
    keep: KeepPolicy = "newest"
    score_key: str = "score"
    write_dropped: bool = True
    max_memory: int = 1 << 30

    def __post_init__(self) -> None:
        if self.keep not in KEEP_POLICIES:
            raise ValueError(f"ExactDedupConfig: keep must be one of {', '.join(KEEP_POLICIES)}, got {self.keep!r}")
        if self.max_memory < 1 << 20:
            raise ValueError(f"ExactDedupConfig: max_memory must be at least 1 MiB in bytes, got {self.max_memory}")

    @property
    def columns(self) -> MinHashConfig:
        """What `read_rows` is to read; documents are copies whatever language was found."""
        return MinHashConfig(score_key=self.score_key, within_language=False)


def normal_text(text: str) -> str:
    """`text` in NFC, case folded, every run of Unicode white space one space, none at the ends."""
    folded = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def text_hash(text: str | bytes, *, normalize: bool = False) -> bytes:
    """BLAKE2b-128 of a text in UTF-8, 16 bytes: equal for texts that count as equal.

    Raises: UnicodeError if it cannot be written as UTF-8, or has to be normalised and is none.
    """
    if normalize:
        text = normal_text(text if isinstance(text, str) else text.decode())
    return hashlib.blake2b(text if isinstance(text, bytes) else text.encode(), digest_size=16).digest()


def hash_texts(inputs: list[Path], out: Path, config: ExactDedupConfig) -> dict[str, Any]:
    """Stage: DOCUMENTS, the rows of a shard with our hash of each text, and NAMES, their ids and URLs."""
    parts = [np.zeros(0, DOCUMENT)]
    with open(out / NAMES, "wb") as f:
        for rows, names, texts in read_rows(inputs[0], config.columns):
            digests = b"".join(text_hash(text, normalize=config.normalize) for text in texts)
            halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
            rows["text_high"], rows["text_low"] = halves[:, 0], halves[:, 1]
            parts.append(rows.copy())
            f.write(names)
    rows = np.concatenate(parts)
    np.save(out / DOCUMENTS, rows, allow_pickle=False)
    return {"hashed_documents": len(rows), "hashed_bytes": int(rows["text_bytes"].sum())}


def shard_tie(rows: NDArray[np.void]) -> int:
    """A number that tells shards of different documents apart: it decides between documents that agree in all else."""
    with np.errstate(over="ignore"):
        weights = np.arange(1, len(rows) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return int((rows["line_hash"] ^ weights).sum(dtype=np.uint64))


def name_begins(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """Where the names of every row begin in NAMES, and where the last end: int64 (num_docs + 1,)."""
    begins = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows["id_bytes"].astype(np.int64) + rows["url_bytes"], out=begins[1:])
    return begins


def _chunks(folder: Path) -> Iterator[tuple[int, NDArray[np.void], NDArray[np.int64], bytes]]:
    """(first row, rows, where their names begin, names) of a hashed shard."""
    rows = load_rows(folder)
    begins = name_begins(rows)
    with open(folder / NAMES, "rb") as f:
        for begin in range(0, len(rows), CHUNK_ROWS):
            end = min(begin + CHUNK_ROWS, len(rows))
            yield begin, rows[begin:end], begins[begin : end + 1] - begins[begin], f.read(begins[end] - begins[begin])


def partition_hashes(inputs: list[Path], out: Path, config: ExactDedupConfig, num_partitions: int) -> dict[str, Any]:
    """Stage, first half: the records of a hashed shard and their names, dealt by hash."""
    folders = [out / f"part-{p:05d}" for p in range(num_partitions)]
    tie = shard_tie(load_rows(inputs[0])).to_bytes(8, "little")
    for folder in folders:
        folder.mkdir()
        (folder / TIE).write_bytes(tie)
        for name in (RECORDS, NAMES):
            (folder / name).touch()
    for first, rows, begins, names in _chunks(inputs[0]):
        records = np.zeros(len(rows), RECORD)
        records["high"], records["low"] = rows["text_high"], rows["text_low"]
        records["order"] = sort_keys(rows, config.keep)[:, :7]
        records["row"] = np.arange(first, first + len(rows))
        records["id_bytes"], records["url_bytes"] = rows["id_bytes"], rows["url_bytes"]
        parts = rows["text_high"] % np.uint64(num_partitions)
        for part in np.unique(parts).tolist():
            chosen = np.flatnonzero(parts == part)
            with open(folders[part] / RECORDS, "ab") as f:
                f.write(records[chosen].tobytes())
            with open(folders[part] / NAMES, "ab") as f:
                f.write(b"".join(names[begins[i] : begins[i + 1]] for i in chosen.tolist()))
    return {}


def keep_first(inputs: list[Path], out: Path, config: ExactDedupConfig) -> dict[str, Any]:
    """Stage, second half: of every hash the first by the order of `keep`; DECISIONS about all that have copies."""
    pieces = [read_array(folder / RECORDS, RECORD) for folder in inputs]
    shards = np.repeat(np.arange(len(pieces), dtype=np.uint64), [len(piece) for piece in pieces])
    numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(piece)) for piece in pieces)])  # in its piece
    records = np.concatenate([np.zeros(0, RECORD), *pieces])
    del pieces
    ties = np.array([int.from_bytes((folder / TIE).read_bytes(), "little") for folder in inputs], np.uint64)
    by_hash = np.lexsort((records["low"], records["high"]))
    high, low = records["high"][by_hash], records["low"][by_hash]
    is_same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    has_copy = np.append(is_same, False) | np.append(False, is_same)
    chosen = by_hash[has_copy[: len(records)]]
    records, shards, numbers = records[chosen], shards[chosen], numbers[chosen]
    order = records["order"].T[::-1]  # np.lexsort: the last key counts most
    by_order = np.lexsort(
        (records["row"], shards, ties[shards.astype(np.int64)], *order, records["low"], records["high"])
    )
    records, shards, numbers = records[by_order], shards[by_order], numbers[by_order]
    is_first = np.ones(len(records), bool)
    is_first[1:] = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
    firsts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    decisions = np.zeros(len(records), DECISION)
    decisions["place"] = shards << np.uint64(32) | records["row"]
    decisions["cluster"] = records["high"] | np.uint64(1)  # never 0, which stands for no cluster
    decisions["reason"] = np.where(is_first, KEPT, EXACT_DUPLICATE)
    decisions["similarity"] = 1.0
    if len(firsts):
        kept = firsts[group]
        decisions["kept_place"] = decisions["place"][kept]
        decisions["id_bytes"], decisions["url_bytes"] = records["id_bytes"][kept], records["url_bytes"][kept]
        offsets = _copy_names(inputs, out, shards[firsts], numbers[firsts])
        decisions["names_offset"] = offsets[group]
    write_decisions_by_shard(out, decisions, len(inputs))
    return {"clusters": len(firsts), "cluster_sizes": size_bins(np.bincount(group)) if len(firsts) else {}}


def _copy_names(
    inputs: list[Path], out: Path, shards: NDArray[np.uint64], numbers: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Write the names of these records to out/NAMES, shard by shard; returns where those of each begin."""
    offsets = np.zeros(len(shards), np.uint64)
    written = 0
    (out / NAMES).touch()
    with open(out / NAMES, "wb") as target:
        for shard in np.unique(shards).tolist():
            begins = name_begins(read_array(inputs[shard] / RECORDS, RECORD))
            with open(inputs[shard] / NAMES, "rb") as source:
                ours = np.flatnonzero(shards == shard)
                for i in ours[np.argsort(numbers[ours])].tolist():
                    begin, end = int(begins[numbers[i]]), int(begins[numbers[i] + 1])
                    source.seek(begin)
                    offsets[i] = written
                    written += target.write(source.read(end - begin))
    return offsets


def write_decisions_by_shard(out: Path, decisions: NDArray[np.void], num_shards: int) -> None:
    """Write DECISIONS in the order of places, and shard-<number>, how many are about each shard."""
    (out / NAMES).touch()
    decisions = decisions[np.argsort(decisions["place"])]
    decisions.tofile(out / DECISIONS)
    counts = np.bincount((decisions["place"] >> np.uint64(32)).astype(np.int64), minlength=num_shards)
    for shard, count in enumerate(counts.tolist()):
        (out / f"shard-{shard:05d}").write_text(f"{count}\n")


def size_bins(sizes: NDArray[np.int64]) -> dict[str, int]:
    """How many clusters have at least 2, 4, 8, ... documents and fewer than the next power of two."""
    powers, counts = np.unique(np.floor(np.log2(sizes)).astype(np.int64), return_counts=True)
    return {str(1 << power): count for power, count in zip(powers.tolist(), counts.tolist(), strict=True)}


def dedup_exact(
    run: Run, inputs: Sequence[Path], config: ExactDedupConfig | None = None, *, name: str = "dedup_exact"
) -> StageResult:
    """Keep one of the documents that have the same text.

    inputs: document files.  The result's task folders, one per input, hold documents.jsonl.zst, dropped.jsonl.zst
    (reason "exact_duplicate"; meta names the kept document) and clusters.npy, uint64 (num_docs,): equal for documents
    of the same text, 0 for those without a copy.
    Raises: StageError if an input cannot be read.
    """
    config = config or ExactDedupConfig()
    files = [Path(path) for path in inputs]
    hashed = run.map(f"{name}.hash", hash_texts, files, config=config)
    num_bytes = hashed.counters.get("hashed_documents", 0) * RECORD.itemsize * _COPIES
    num_partitions = min(MAX_PARTITIONS, max(2, -(-num_bytes // config.max_memory)))
    copies = run.exchange(
        f"{name}.copies", partition_hashes, keep_first, hashed.tasks, num_partitions=num_partitions, config=config
    )
    shards = [
        [path, hashed.tasks[i], copies.tasks[0] / f"shard-{i:05d}", *copies.tasks] for i, path in enumerate(files)
    ]
    return run.map(name, drop_members, shards, config={"config": config})
