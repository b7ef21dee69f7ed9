"""Document dedup over the whole data set: exact copies by hash, near-duplicates by MinHash, one of each cluster kept.

Source: The Llama 3 Herd of Models, section 3.1.1 (arXiv:2407.21783), which gives no parameters; those here are ours.
1. sign: signatures of every shard.  2. cluster: candidates by bands, verified, components, whom to keep.  3. drop.
The result does not depend on the order of documents or shards: inside, documents are ordered by id.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern.data.document import read_documents
from herdkern.dedup.clusters import KeepPolicy, candidate_pairs, connected_components, keep_order
from herdkern.dedup.drop import Decision, drop_documents, write_decisions
from herdkern.dedup.minhash import estimate_jaccard, exact_jaccard, signature_spec, signatures
from herdkern.engine import Run, StageResult, read_json, write_json_atomic

MAX_EXAMPLES = 20
SNIPPET_CHARS = 300
_BATCH_CHARS = 16 << 20
_VERIFY_CHARS = 256 << 20  # texts of candidates in memory at a time; their shingle sets take about twice as much
_MAX_TIME = 1 << 53  # a timestamp of a damaged record may be any whole number


@dataclass(frozen=True, kw_only=True)
class MinHashConfig:
    """When two documents are near-duplicates, and which of them stays.

    num_bands, rows_per_band: two documents of Jaccard similarity s are compared with probability
    1 - (1 - s^rows_per_band)^num_bands; the defaults find s = 0.75 with 0.98 and s = 0.85 with 0.9999.
    min_similarity: what counts as a near-duplicate, by `verify`: of the shingle sets themselves ("exact"), of the
    signatures ("signature"), or everything that shares a band ("none").
    """

    num_bands: int = 20
    rows_per_band: int = 6
    ngram_size: int = 5
    seed: int = 1
    min_similarity: float = 0.75
    verify: Literal["exact", "signature", "none"] = "exact"
    keep: KeepPolicy = "newest"
    within_language: bool = True  # documents of different `lang` are never duplicates

    def __post_init__(self) -> None:
        for name in ("num_bands", "rows_per_band", "ngram_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"MinHashConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.min_similarity <= 1.0:
            raise ValueError(f"MinHashConfig: min_similarity must lie in (0, 1], got {self.min_similarity}")
        if self.verify not in ("exact", "signature", "none"):
            raise ValueError(f"MinHashConfig: verify must be exact, signature or none, got {self.verify!r}")
        if self.keep not in ("newest", "longest", "smallest_id"):
            raise ValueError(f"MinHashConfig: keep must be newest, longest or smallest_id, got {self.keep!r}")

    @property
    def spec(self) -> str:
        """What makes signatures of this configuration comparable."""
        return signature_spec(
            num_bands=self.num_bands,
            rows_per_band=self.rows_per_band,
            ngram_size=self.ngram_size,
            seed=self.seed,
        )


def _sign(inputs: list[Path], out: Path, config: MinHashConfig) -> dict[str, Any]:
    """signatures.npy, one row per document, and documents.jsonl: [id, timestamp, length, lang, text hash, URL]."""
    parts = [np.zeros((0, config.num_bands * config.rows_per_band), np.uint32)]
    texts: list[str] = []
    batch_chars = num_documents = 0

    def flush() -> None:
        parts.append(
            signatures(
                texts,
                num_bands=config.num_bands,
                rows_per_band=config.rows_per_band,
                ngram_size=config.ngram_size,
                seed=config.seed,
                num_threads=1,  # the executor has the other cores
            )
        )
        texts.clear()

    with open(out / "documents.jsonl", "w", encoding="utf-8", newline="\n") as index:
        for document in read_documents(inputs[0]):
            digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            timestamp = max(-_MAX_TIME, min(document.timestamp, _MAX_TIME))
            row = [document.id, timestamp, len(document.text), document.lang, digest, document.url]
            index.write(json.dumps(row) + "\n")
            texts.append(document.text)
            num_documents += 1
            batch_chars += len(document.text)
            if batch_chars >= _BATCH_CHARS:
                flush()
                batch_chars = 0
    flush()
    np.save(out / "signatures.npy", np.concatenate(parts))
    write_json_atomic(out / "signatures.json", {"spec": config.spec, "num_documents": num_documents})
    return {"signed_documents": num_documents}


class _Corpus:
    """All documents without their texts, ordered by id, and where each lies."""

    def __init__(self, inputs: list[Path], config: MinHashConfig):
        self.folders, self.files = inputs[0::2], inputs[1::2]  # sign task folder and document file of each shard
        rows: list[tuple[list[Any], int, int]] = []
        parts = []
        for shard, folder in enumerate(self.folders):
            spec = read_json(folder / "signatures.json")["spec"]
            if spec != config.spec:
                raise ValueError(f"dedup_minhash: signatures must be of {config.spec!r}, got {spec!r} in {folder}")
            parts.append(np.load(folder / "signatures.npy"))
            with open(folder / "documents.jsonl", encoding="utf-8") as f:
                rows += [(json.loads(line), shard, row) for row, line in enumerate(f)]
        order = sorted(range(len(rows)), key=lambda i: (rows[i][0][0], rows[i][1], rows[i][2]))
        self.signatures = np.concatenate(parts)[order] if parts else np.zeros((0, 1), np.uint32)
        rows = [rows[i] for i in order]
        self.ids = [row[0][0] for row in rows]
        self.timestamps = np.array([row[0][1] for row in rows], dtype=np.int64)
        self.lengths = np.array([row[0][2] for row in rows], dtype=np.int64)
        self.languages = [row[0][3] for row in rows]
        self.hashes = [row[0][4] for row in rows]
        self.urls = [row[0][5] for row in rows]
        self.places = [(row[1], row[2]) for row in rows]

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, wanted: set[int]) -> dict[int, str]:
        """The texts of the documents of these indices; reads every shard that holds one."""
        by_shard: dict[int, dict[int, int]] = {}
        for index in wanted:
            shard, row = self.places[index]
            by_shard.setdefault(shard, {})[row] = index
        found: dict[int, str] = {}
        for shard, rows in by_shard.items():
            last = max(rows)
            for row, document in enumerate(read_documents(self.files[shard])):
                if row in rows:
                    found[rows[row]] = document.text
                if row == last:
                    break
        return found


def _exact_copies(corpus: _Corpus, ranks: NDArray[np.int64]) -> dict[int, int]:
    """Document -> the kept document with the same text."""
    best: dict[str, int] = {}
    for index, digest in enumerate(corpus.hashes):
        if digest not in best or ranks[index] < ranks[best[digest]]:
            best[digest] = index
    return {index: best[digest] for index, digest in enumerate(corpus.hashes) if best[digest] != index}


def _similar_pairs(
    corpus: _Corpus, survivors: NDArray[np.int64], config: MinHashConfig
) -> tuple[NDArray[np.int64], int, dict[tuple[int, int], float]]:
    """(verified pairs of document indices, number of candidates, the exact similarities of the verified pairs)."""
    groups = None
    if config.within_language:
        names = {lang: i for i, lang in enumerate(sorted(set(corpus.languages)))}
        groups = np.array([names[corpus.languages[i]] for i in survivors], dtype=np.uint64)
    floor = {"exact": config.min_similarity, "signature": config.min_similarity, "none": 0.0}[config.verify]
    if config.verify == "exact":  # 4 standard deviations of the estimate below: nothing similar is lost here
        num_slots = config.num_bands * config.rows_per_band
        floor = max(0.0, floor - 4 * math.sqrt(floor * (1 - floor) / num_slots))
    pairs = candidate_pairs(
        corpus.signatures[survivors],
        num_bands=config.num_bands,
        rows_per_band=config.rows_per_band,
        min_similarity=floor,
        groups=groups,
    )
    pairs = survivors[pairs]
    if config.verify != "exact" or not len(pairs):
        return pairs, len(pairs), {}
    similarity = _exact(corpus, pairs, config)
    is_similar = similarity >= config.min_similarity
    similar = zip(pairs[is_similar].tolist(), similarity[is_similar].tolist(), strict=True)
    known = {(first, second): value for (first, second), value in similar}
    return pairs[is_similar], len(pairs), known


def _exact(corpus: _Corpus, pairs: NDArray[np.int64], config: MinHashConfig) -> NDArray[np.float64]:
    """Jaccard similarity of pairs of documents, float64 (num_pairs,); the texts are read in several passes if many."""
    found = [np.zeros(0)]
    for begin, end in _runs(corpus, pairs):
        texts = corpus.texts(set(pairs[begin:end].ravel().tolist()))
        known = sorted(texts)
        positions = np.searchsorted(np.array(known, dtype=np.int64), pairs[begin:end])
        found.append(exact_jaccard([texts[i] for i in known], positions, ngram_size=config.ngram_size))
    return np.concatenate(found)


def _runs(corpus: _Corpus, pairs: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of pairs whose texts have about _VERIFY_CHARS characters together."""
    begin = num_chars = 0
    inside: set[int] = set()
    for end, pair in enumerate(pairs.tolist(), start=1):
        new = set(pair) - inside
        inside |= new
        num_chars += sum(int(corpus.lengths[i]) for i in new)
        if num_chars >= _VERIFY_CHARS or end == len(pairs):
            yield begin, end
            begin, num_chars, inside = end, 0, set()


def _similarity_to_kept(
    corpus: _Corpus, near: NDArray[np.int64], known: dict[tuple[int, int], float], config: MinHashConfig
) -> NDArray[np.float64]:
    """Exact similarity of every (dropped, kept) in `near`; `known` has those that were compared for the clusters."""
    order = [(min(pair), max(pair)) for pair in near.tolist()]
    unknown = np.array([pair for pair in order if pair not in known], dtype=np.int64).reshape(-1, 2)
    similarities = dict(known)
    for pair, value in zip(unknown.tolist(), _exact(corpus, unknown, config).tolist(), strict=True):
        similarities[pair[0], pair[1]] = value
    return np.array([similarities[pair] for pair in order], dtype=np.float64)


def _cluster(inputs: list[Path], out: Path, config: MinHashConfig) -> dict[str, Any]:
    """drop-<shard> for every shard, clusters.jsonl (who was kept for whom) and pairs.jsonl (examples with text)."""
    corpus = _Corpus(inputs, config)
    ranks = keep_order(config.keep, corpus.ids, corpus.timestamps, corpus.lengths)
    copies = _exact_copies(corpus, ranks)
    survivors = np.array([i for i in range(len(corpus)) if i not in copies], dtype=np.int64)
    pairs, num_candidates, known = _similar_pairs(corpus, survivors, config)
    labels = connected_components(pairs, len(corpus))
    kept_of: dict[int, int] = {}  # component -> its document of the smallest rank
    for index in survivors.tolist():
        label = int(labels[index])
        if label not in kept_of or ranks[index] < ranks[kept_of[label]]:
            kept_of[label] = index
    near = np.array(
        [(i, kept_of[int(labels[i])]) for i in survivors.tolist() if kept_of[int(labels[i])] != i], dtype=np.int64
    ).reshape(-1, 2)
    if config.verify == "exact":
        similarity = _similarity_to_kept(corpus, near, known, config)
    else:
        similarity = estimate_jaccard(corpus.signatures[near[:, 0]], corpus.signatures[near[:, 1]])
    dropped = {i: ("near_duplicate", kept, float(s)) for (i, kept), s in zip(near.tolist(), similarity, strict=True)}
    for index, original in copies.items():  # of a near-duplicate, then it shares that one's fate
        dropped[index] = dropped.get(original, ("exact_duplicate", original, 1.0))
    _write_clusters(corpus, dropped, out)
    _write_examples(corpus, near, similarity, out)
    sizes = np.bincount([kept for _, kept, _ in dropped.values()]) if dropped else np.zeros(1, np.int64)
    return {
        "candidate_pairs": num_candidates,
        "similar_pairs": len(pairs),
        "clusters": int((sizes > 0).sum()),
        "largest_cluster": int(sizes.max()) + 1 if dropped else 0,
        "linked_through_others": int((similarity < config.min_similarity).sum()),  # to the kept one they are less alike
    }


def _write_clusters(corpus: _Corpus, dropped: dict[int, tuple[str, int, float]], out: Path) -> None:
    by_shard: dict[int, list[Decision]] = {shard: [] for shard in range(len(corpus.files))}
    members: dict[int, list[int]] = {}
    for index, (reason, kept, similarity) in sorted(dropped.items()):
        shard, row = corpus.places[index]
        meta = {"kept_id": corpus.ids[kept], "kept_url": corpus.urls[kept], "similarity": round(similarity, 6)}
        by_shard[shard].append(Decision(row=row, reason=reason, meta=meta))
        members.setdefault(kept, []).append(index)
    for shard, decisions in by_shard.items():
        write_decisions(out / f"drop-{shard:05d}", decisions)
    with open(out / "clusters.jsonl", "w", encoding="utf-8", newline="\n") as f:
        for kept in sorted(members):
            entry = {"kept": corpus.ids[kept], "dropped": [corpus.ids[i] for i in members[kept]]}
            f.write(json.dumps(entry) + "\n")


def _write_examples(corpus: _Corpus, near: NDArray[np.int64], similarity: NDArray[np.float64], out: Path) -> None:
    """Up to MAX_EXAMPLES near-duplicates over the whole range of similarity, cut to where the texts begin to differ."""
    order = np.lexsort((near[:, 0], similarity)) if len(near) else np.zeros(0, np.int64)
    chosen = order[np.unique(np.linspace(0, len(order) - 1, MAX_EXAMPLES).astype(np.int64))] if len(order) else order
    texts = corpus.texts(set(near[chosen].ravel().tolist()))
    with open(out / "pairs.jsonl", "w", encoding="utf-8", newline="\n") as f:
        for pair in chosen.tolist():
            index, kept = near[pair].tolist()
            begin = max(0, _first_difference(texts[kept], texts[index]) - SNIPPET_CHARS // 3)
            entry: dict[str, Any] = {"similarity": round(float(similarity[pair]), 6)}
            for which, i in (("kept", kept), ("dropped", index)):
                entry[which] = texts[i][begin : begin + SNIPPET_CHARS]
                entry[f"{which}_id"], entry[f"{which}_url"] = corpus.ids[i], corpus.urls[i]
            f.write(json.dumps(entry, sort_keys=True) + "\n")


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


def dedup_minhash(
    run: Run, inputs: Sequence[Path], config: MinHashConfig | None = None, *, name: str = "dedup_minhash"
) -> StageResult:
    """Keep one document of every cluster of exact copies and near-duplicates.

    inputs: document files.  The result's task folders hold documents.jsonl.zst and dropped.jsonl.zst (reasons
    "exact_duplicate" and "near_duplicate"; meta names the kept document and the similarity to it), one task per input.
    RUN/data/<name>.cluster/task-00000 holds clusters.jsonl and pairs.jsonl.
    Raises: StageError if an input cannot be read.
    """
    config = config or MinHashConfig()
    files = [Path(path) for path in inputs]
    signed = run.map(f"{name}.sign", _sign, files, config=config)
    both = [path for pair in zip(signed.tasks, files, strict=True) for path in pair]
    clustered = run.once(f"{name}.cluster", _cluster, both, config=config)
    shards = [[path, clustered.tasks[0] / f"drop-{shard:05d}"] for shard, path in enumerate(files)]
    return run.map(name, drop_documents, shards, config=config)
