"""The stages of document dedup between signing and dropping; csrc/text/{bands,clusters,cluster_members}.h do the work.

Shards of this run and segments of an index (herdkern.dedup.index) take part alike: a segment brings its documents
already ordered and its bands already sorted, and its documents have the first numbers.
"""

import bisect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herdkern import _text
from herdkern.dedup.arrays import load_array, read_array
from herdkern.dedup.minhash_config import MIB, MinHashConfig
from herdkern.dedup.pieces import line_reader, read_pieces
from herdkern.dedup.sign_stage import BATCH_BYTES, DOCUMENT, DOCUMENTS, KEYS, NAMES, ORDER, SIGNATURES
from herdkern.dedup.signature_file import SignatureFile
from herdkern.engine import read_json, write_json_atomic

EDGES, LABELS, BANDS, SHINGLES, COUNTS = "edges", "labels", "bands", "shingles", "counts.json"
DECISIONS, CLUSTERS, PAIRS, SIZES = "decisions", "clusters.jsonl", "pairs.jsonl", "sizes.json"
NO_CLUSTER = np.uint64((1 << 64) - 1)
KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE, SEMANTIC_DUPLICATE = 0, 1, 2, 3
REASONS = {
    EXACT_DUPLICATE: "exact_duplicate",
    NEAR_DUPLICATE: "near_duplicate",
    SEMANTIC_DUPLICATE: "semantic_duplicate",
}
MAX_EXAMPLES = 20
SNIPPET_CHARS = 300
_SIMILARITY_BINS = 20
DECISION = np.dtype(
    [
        ("place", "<u8"),  # shard << 32 | row
        ("doc", "<u8"),
        ("cluster", "<u8"),
        ("kept_place", "<u8"),
        ("similarity", "<f8"),
        ("names_offset", "<u8"),
        ("id_bytes", "<u4"),
        ("url_bytes", "<u4"),
        ("reason", "<u4"),
        ("zero", "<u4"),
    ]
)


def load_rows(folder: Path) -> NDArray[np.void]:
    """The DOCUMENT rows of a signed shard or segment. Raises: ValueError naming the file if it holds anything else."""
    return load_array(folder / DOCUMENTS, DOCUMENT)


def _numbers_of_rows(folder: Path, numbers: Path) -> NDArray[np.uint64]:
    """The number of every row of a shard."""
    order = load_array(folder / ORDER, np.uint32)
    docs = np.empty(len(order), np.uint64)
    docs[order] = read_array(numbers, np.uint64)
    return docs


def number(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: numbers-<shard>, the documents' numbers in the shard's order, and `shards`, the shard of every number."""
    config: MinHashConfig = settings["config"]
    ties = []
    for folder in inputs:
        with SignatureFile(folder / SIGNATURES, config.spec):
            pass
        hashes = load_rows(folder)["line_hash"]
        with np.errstate(over="ignore"):
            weights = np.arange(1, len(hashes) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            ties.append(int((hashes ^ weights).sum(dtype=np.uint64)))
    keys = [str(folder / KEYS) for folder in inputs]
    _text.number_documents(keys, ties, settings["first"], str(out), config.native_bytes)
    return {"numbered_documents": (out / "shards").stat().st_size // 4}


def partition_bands(inputs: list[Path], out: Path, settings: dict[str, Any], num_partitions: int) -> dict[str, Any]:
    """Stage, first half: the band records of [signed shard, its numbers] or of [segment], dealt by key."""
    config: MinHashConfig = settings["config"]
    rows = load_rows(inputs[0]) if len(inputs) == 2 else np.zeros(0, DOCUMENT)
    expected = len(rows) * (config.num_bands + 1)  # one for each band, and one for the text
    partitioner = _text.BandPartitioner(str(out), num_partitions, config.native_bytes // 2, expected)
    if len(inputs) == 1:
        partitioner.add_sorted(str(inputs[0] / BANDS), settings["offsets"][inputs[0].name])
    else:
        docs = _numbers_of_rows(inputs[0], inputs[1])
        groups, texts = rows["group"].copy(), rows["text_low"].copy()
        with SignatureFile(inputs[0] / SIGNATURES, config.spec) as file:
            begin = 0
            for block in file.batches(BATCH_BYTES):
                end = begin + len(block)
                columns = docs[begin:end], groups[begin:end], texts[begin:end]
                partitioner.add_signatures(block, config.num_bands, config.rows_per_band, *columns)
                begin = end
    partitioner.finish()
    return {"band_records": partitioner.num_records}


def link_bands(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage, second half: edges between documents of equal keys."""
    config: MinHashConfig = settings["config"]
    counts = _text.link_bands([str(p) for p in inputs], str(out / EDGES), config.min_bits, config.native_bytes)
    write_json_atomic(out / COUNTS, counts)
    return {"candidate_pairs": counts["links"], "shared_keys": counts["shared_keys"], "edges": counts["edges"]}


def components(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: labels-<shard> in the shard's order from [numbers, edges, …]; a segment's under its number behind them."""
    config: MinHashConfig = settings["config"]
    first, segments = settings["first"], settings["segments"]
    shards = inputs[0] / "shards"
    num_docs = first + shards.stat().st_size // 4
    num_shards = settings["num_shards"]
    _text.label_components([str(p) for p in inputs[1:]], num_docs, str(out), str(out / LABELS), config.native_bytes)
    members, _ = _text.deal_labels(str(out / LABELS), str(shards), first, num_shards, str(out), config.native_bytes)
    with open(out / LABELS, "rb") as labels:
        for i, (_, size) in enumerate(segments):
            with open(out / f"labels-{num_shards + i:05d}", "wb") as f:
                left = size * 8
                while left and (piece := labels.read(min(left, MIB))):
                    f.write(piece)
                    left -= len(piece)
    (out / LABELS).unlink()
    return {"linked_documents": members}


def _texts_of(path: Path, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
    """(row, text) of the wanted documents of a file, in order."""
    lines = _text.DocumentTexts(wanted.view(np.uint8), *line_reader(path))
    for piece, last in read_pieces(path, lines):
        yield from lines.texts(piece, last)


Shingles = tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]  # rows, hashes, begins and end of each


def batches_of_shingles(
    path: Path, num_docs: int, members: NDArray[np.int64], config: MinHashConfig
) -> Iterator[Shingles]:
    """The hashes of the shingles of the members of a file of num_docs documents, in order."""
    wanted = np.zeros(num_docs, bool)
    wanted[members] = True
    lines = _text.DocumentTexts(wanted.view(np.uint8), *line_reader(path))
    held: list[Shingles] = []
    num_bytes = 0
    for piece, last in read_pieces(path, lines):
        held.append(lines.shingles(piece, last, config.shingle_plan))
        num_bytes += len(held[-1][1]) * 8
        if num_bytes >= BATCH_BYTES or last:
            rows, hashes, ends = (np.concatenate(parts) for parts in zip(*_shifted(held), strict=True))
            yield rows, hashes, np.concatenate([[0], ends])
            held, num_bytes = [], 0


def _shifted(parts: list[Shingles]) -> Iterator[Shingles]:
    """The parts with the ends of their shingles as they are when all hashes lie one behind the other."""
    begin = 0
    for rows, hashes, begins in parts:
        yield rows, hashes, begins[1:] + begin
        begin += len(hashes)


def _batches_of_segment(folder: Path, members: NDArray[np.int64], num_docs: int) -> Iterator[Shingles]:
    begins = read_array(folder / f"{SHINGLES}.begins", np.int64)
    if len(begins) != num_docs + 1:
        raise ValueError(f"{folder / SHINGLES}.begins must have {num_docs + 1} numbers, got {len(begins)}")
    with open(folder / SHINGLES, "rb") as f:
        for batch in np.array_split(members, max(1, len(members) // 512)):
            found = [np.zeros(0, np.uint64)]
            for row in batch.tolist():
                f.seek(8 * int(begins[row]))
                found.append(read_array(f, np.uint64, int(begins[row + 1] - begins[row])))
            yield batch, np.concatenate(found), np.cumsum([len(values) for values in found])


def partition_members(inputs: list[Path], out: Path, settings: dict[str, Any], num_partitions: int) -> dict[str, Any]:
    """Stage, first half: the documents of a shard or segment that are in components, dealt by component.

    inputs: [signed shard, its labels, its numbers, documents] or [segment, its labels].
    """
    config: MinHashConfig = settings["config"]
    folder = inputs[0]
    shard = int(inputs[1].name.rpartition("-")[2])
    rows = load_rows(folder)
    labels = np.full(len(rows), NO_CLUSTER)
    if len(inputs) == 2:
        docs = np.arange(len(rows), dtype=np.uint64) + np.uint64(settings["offsets"][folder.name])
        labels[:] = read_array(inputs[1], np.uint64)
    else:
        docs = _numbers_of_rows(folder, inputs[2])
        labels[load_array(folder / ORDER, np.uint32)] = read_array(inputs[1], np.uint64)
    members = np.flatnonzero(labels != NO_CLUSTER)
    name_begins = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows["id_bytes"].astype(np.int64) + rows["url_bytes"], out=name_begins[1:])
    if config.verify != "exact":
        none = np.zeros(0, np.uint64)
        parts = np.array_split(members, 1 + len(members) // 8192)
        batches: Iterator[Shingles] = ((batch, none, np.zeros(len(batch) + 1, np.int64)) for batch in parts)
    elif len(inputs) == 2:
        batches = _batches_of_segment(folder, members, len(rows))
    else:
        batches = batches_of_shingles(inputs[3], len(rows), members, config)
    writer = _text.MemberWriter(str(out), num_partitions, config.native_bytes // 2)
    names = read_array(folder / NAMES, np.uint8)
    plain_rows = rows.view(np.uint8)
    with SignatureFile(folder / SIGNATURES, config.spec) as file:
        for batch, values, begins in batches:
            if not len(batch):
                continue
            begin, end = int(batch[0]), int(batch[-1]) + 1
            block = file.read(begin, end)
            writer.add(block, begin, batch, plain_rows, labels, docs, shard, names, name_begins, values, begins)
    writer.finish()
    return {"members": len(members)}


def resolve_members(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage, second half: who of each component is kept: `decisions`, `names`, `clusters.jsonl`."""
    config: MinHashConfig = settings["config"]
    counts = _text.resolve_members(
        [str(p) for p in inputs],
        str(out),
        config.verify,
        config.num_bands,
        config.rows_per_band,
        4,
        config.min_matches,
        config.min_similarity,
        config.native_bytes,
    )
    write_json_atomic(out / COUNTS, counts)
    return {"similar_pairs": counts["similar"], "clusters": counts["clusters"]}


def shard_decisions(folder: Path, shard: int) -> NDArray[np.void]:
    """The decisions about one shard in the folder of one task of `resolve_members`, by row."""
    path = folder / DECISIONS
    place = DECISION.fields["place"][1]  # type: ignore[index]
    with open(path, "rb") as f:

        def shard_of(number: int) -> int:
            f.seek(number * DECISION.itemsize + place)
            return int(read_array(f, np.uint64, 1)[0]) >> 32

        every = range(path.stat().st_size // DECISION.itemsize)
        begin = bisect.bisect_left(every, shard, key=shard_of)
        end = bisect.bisect_left(every, shard + 1, lo=begin, key=shard_of)
        f.seek(begin * DECISION.itemsize)
        return read_array(f, DECISION, end - begin)


def _choose_examples(folders: list[Path]) -> list[tuple[Path, Any]]:
    """(folder, decision) of up to MAX_EXAMPLES near-duplicates over the whole range of similarity, chosen by a hash."""
    best: dict[int, list[tuple[int, int, Any]]] = {}
    for number, folder in enumerate(folders):
        size = (folder / DECISIONS).stat().st_size // DECISION.itemsize
        for begin in range(0, size, 1 << 16):
            count = min(1 << 16, size - begin)
            with open(folder / DECISIONS, "rb") as f:
                f.seek(begin * DECISION.itemsize)
                chunk = read_array(f, DECISION, count)
            chunk = chunk[chunk["reason"] == NEAR_DUPLICATE]
            bins = (chunk["similarity"] * (_SIMILARITY_BINS - 1e-9)).astype(int)
            mixed = (chunk["doc"] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            for which in np.unique(bins).tolist():
                inside = np.flatnonzero(bins == which)
                inside = inside[np.argsort(mixed[inside], kind="stable")[:MAX_EXAMPLES]]
                found = best.setdefault(which, [])
                found += [(int(mixed[i]), number, chunk[i]) for i in inside]
                found.sort(key=lambda entry: entry[0])
                del found[MAX_EXAMPLES:]
    chosen = []
    for depth in range(MAX_EXAMPLES):  # the bins take turns
        chosen += [entries[depth] for _, entries in sorted(best.items()) if depth < len(entries)]
    chosen = sorted(chosen[:MAX_EXAMPLES], key=lambda entry: (float(entry[2]["similarity"]), entry[0]))
    return [(folders[number], decision) for _, number, decision in chosen]


def _first_difference(first: str, second: str) -> int:
    shorter = min(len(first), len(second))
    low, high = 0, shorter  # the longest common prefix, by halving
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _write_examples(folders: list[Path], signed: list[Path], files: list[Path], out: Path) -> None:
    """pairs.jsonl: texts side by side, cut to where they begin to differ."""
    chosen = _choose_examples(folders)
    places = {int(d[name]) for _, d in chosen for name in ("place", "kept_place")}
    found: dict[int, tuple[str, str, str]] = {}  # place -> id, URL, text
    for shard in sorted({place >> 32 for place in places if place >> 32 < len(files)}):
        rows = load_rows(signed[shard])
        wanted = np.zeros(len(rows), bool)
        wanted[[place & 0xFFFFFFFF for place in places if place >> 32 == shard]] = True
        begins = np.concatenate([[0], np.cumsum(rows["id_bytes"].astype(np.int64) + rows["url_bytes"])])
        with open(signed[shard] / NAMES, "rb") as f:
            for row, text in _texts_of(files[shard], wanted):
                f.seek(int(begins[row]))
                id_ = f.read(int(rows["id_bytes"][row])).decode()
                url = f.read(int(rows["url_bytes"][row])).decode()
                found[shard << 32 | row] = (id_, url, text.decode())
    with open(out / PAIRS, "w", encoding="utf-8", newline="\n") as pairs:
        for _, decision in chosen:
            dropped, kept = found.get(int(decision["place"])), found.get(int(decision["kept_place"]))
            if dropped is None or kept is None:  # the kept one is in an index, which has no texts
                continue
            begin = max(0, _first_difference(kept[2], dropped[2]) - SNIPPET_CHARS // 3)
            entry: dict[str, Any] = {"similarity": round(float(decision["similarity"]), 6)}
            for which, shown in (("kept", kept), ("dropped", dropped)):
                entry[f"{which}_id"], entry[f"{which}_url"] = shown[:2]
                entry[which] = shown[2][begin : begin + SNIPPET_CHARS]
            pairs.write(json.dumps(entry, sort_keys=True) + "\n")


def describe_clusters(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: clusters.jsonl, pairs.jsonl and sizes.json from [resolved, …, signed, …, documents, …]."""
    num_shards = settings["num_shards"]
    resolved = inputs[: len(inputs) - (2 if settings["has_files"] else 1) * num_shards]
    signed, files = inputs[len(resolved) : len(resolved) + num_shards], inputs[len(resolved) + num_shards :]
    sizes: dict[str, int] = {}
    largest = largest_component = num_clusters = similar = 0
    with open(out / CLUSTERS, "wb") as clusters:
        for folder in resolved:
            counts = read_json(folder / COUNTS)
            largest = max(largest, counts["largest_cluster"])
            largest_component = max(largest_component, counts["largest_component"])
            num_clusters += counts["clusters"]
            similar += counts["similar"]
            for power, count in enumerate(counts["sizes"]):
                if count:
                    sizes[str(1 << power)] = sizes.get(str(1 << power), 0) + count
            with open(folder / CLUSTERS, "rb") as f:
                shutil.copyfileobj(f, clusters, MIB)
    _write_examples(resolved, signed, files, out)  # none without files
    histogram = {"clusters_of_at_least": dict(sorted(sizes.items(), key=lambda item: int(item[0])))}
    write_json_atomic(out / SIZES, {**histogram, "largest_cluster": largest, "largest_component": largest_component})
    return {
        "candidate_pairs": settings["candidate_pairs"],
        "similar_pairs": similar,
        "clusters": num_clusters,
        "largest_cluster": largest,
        "largest_component": largest_component,
        "cluster_sizes": sizes,
    }
