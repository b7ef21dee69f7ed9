"""Semantic dedup over the whole data set: of documents whose embeddings are alike one is kept. Bring the embeddings.

Source: Abbas et al. 2023, SemDeDup (arXiv:2303.09540): k-means over the embeddings, then cosine similarities within a
cluster alone. Embeddings of a shard come from a .npy file, from a column of its Parquet file, or from a function of the
texts; no model is downloaded here. k-means is that of faiss (extra `semantic`), spherical, on a sample.
One difference: SemDeDup drops what is like any earlier document of its cluster, also one that was dropped itself; here
a document is dropped for one that is kept: none that is dropped is less like its keeper than min_similarity.
Stages: 1. vectors: embeddings of length one beside the rows of the documents.  2. centroids.  3. groups: the vectors
come together by nearest centroid; in each group, by the order of `keep`, a document is dropped for the first kept one
that is similar enough.  4. drop. The result does not depend on the order of documents or shards.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from herdkern.data.document import document_kind
from herdkern.dedup.arrays import array_header, load_array, read_array, rows_at
from herdkern.dedup.cluster_stages import DECISION, KEPT, SEMANTIC_DUPLICATE, load_rows
from herdkern.dedup.clusters import KEEP_POLICIES
from herdkern.dedup.drop import drop_members
from herdkern.dedup.exact import name_begins, shard_tie, size_bins, write_decisions_by_shard
from herdkern.dedup.minhash_config import MinHashConfig
from herdkern.dedup.sign_stage import DOCUMENT, DOCUMENTS, NAMES, read_rows, sort_keys
from herdkern.engine import Run, StageResult

Embed = Callable[[list[str]], NDArray[Any]]
KeepSemantic = Literal["newest", "longest", "best_score", "smallest_id", "outermost"]
VECTORS, CENTROIDS, MEMBERS, TIE = "vectors.npy", "centroids.npy", "members", "tie"
MEMBER = np.dtype([("cluster", "<i8"), ("order", "<u8", 8), ("row", "<u8"), ("id_bytes", "<u4"), ("url_bytes", "<u4")])
CHUNK_ROWS = 1 << 13
BLOCK = 512  # documents compared with all kept ones at a time
MAX_PARTITIONS = 512
DOCUMENTS_PER_CLUSTER = 8192  # of num_clusters = 0
MAX_TRAINING_VECTORS = 1 << 20  # of k-means, if 39 for each centroid (what faiss wants at least) are not more


@dataclass(frozen=True, kw_only=True)
class SemanticDedupConfig:
    """When the embeddings of two documents are alike, and which of them stays.

    min_similarity: cosine from which on two documents of a cluster are duplicates.
    num_clusters: of k-means; only documents of one cluster are compared. 0 takes one for every 8192 documents.
    keep, score_key: as in MinHashConfig; "outermost", SemDeDup's choice: the document farthest from its centroid.
    column: of Parquet files, a list of numbers for each row.
    """

    min_similarity: float = 0.95
    num_clusters: int = 0
    keep: KeepSemantic = "newest"
    score_key: str = "score"
    column: str = "embedding"
    seed: int = 1
    write_dropped: bool = True
    max_memory: int = 1 << 30

    def __post_init__(self) -> None:
        if not 0.0 < self.min_similarity <= 1.0:
            raise ValueError(f"SemanticDedupConfig: min_similarity must lie in (0, 1], got {self.min_similarity}")
        if self.num_clusters < 0:
            raise ValueError(f"SemanticDedupConfig: num_clusters must be at least 0, got {self.num_clusters}")
        if self.keep not in (*KEEP_POLICIES, "outermost"):
            policies = ", ".join((*KEEP_POLICIES, "outermost"))
            raise ValueError(f"SemanticDedupConfig: keep must be one of {policies}, got {self.keep!r}")
        if self.max_memory < 1 << 20:
            raise ValueError(f"SemanticDedupConfig: max_memory must be at least 1 MiB in bytes, got {self.max_memory}")

    @property
    def columns(self) -> MinHashConfig:
        """What `read_rows` is to read; documents are copies whatever language was found."""
        return MinHashConfig(score_key=self.score_key, within_language=False)


def unit_vectors(vectors: NDArray[Any], where: str = "unit_vectors") -> NDArray[np.float32]:
    """`vectors` (n, dim) of any float dtype as float32 rows of length one; rows of zeros stay (they are like nothing).

    Raises: ValueError for another shape or dtype, and for values that are not finite.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.shape[1] < 1:
        raise ValueError(f"{where}: vectors must be floats of shape (n, dim), got {vectors.dtype} {vectors.shape}")
    vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise ValueError(
            f"{where}: vectors must be finite, got {vectors[row][~np.isfinite(vectors[row])][0]} in row {row}"
        )
    vectors /= np.maximum(np.abs(vectors).max(1, keepdims=True), np.float32(1e-30))  # squares may not overflow
    return vectors / np.maximum(np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None], np.float32(1e-30))


def drop_similar(vectors: NDArray[np.float32], min_similarity: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For every row the first kept row that is similar enough, int64 (n,), -1 for kept ones; and the cosine to it.

    vectors: float32 (n, dim), rows of length one in the order in which they are to be kept.
    """
    keeper = np.full(len(vectors), -1, np.int64)
    cosine = np.zeros(len(vectors), np.float32)
    kept: NDArray[np.int64] = np.zeros(0, np.int64)
    for begin in range(0, len(vectors), BLOCK):
        block = vectors[begin : begin + BLOCK]
        for first in range(0, len(kept), BLOCK):  # blocks of kept ones in order: the first match decides
            open_rows = np.flatnonzero(keeper[begin : begin + len(block)] < 0)
            similar = block[open_rows] @ vectors[kept[first : first + BLOCK]].T
            found = similar >= min_similarity
            hit = np.flatnonzero(found.any(1))
            which = found[hit].argmax(1)
            keeper[begin + open_rows[hit]] = kept[first + which]
            cosine[begin + open_rows[hit]] = similar[hit, which]
        inside = block @ block.T
        for row in range(len(block)):
            if keeper[begin + row] >= 0:
                continue
            alike = np.flatnonzero(inside[row, row + 1 :] >= min_similarity) + row + 1
            alike = alike[keeper[begin + alike] < 0]
            keeper[begin + alike] = begin + row
            cosine[begin + alike] = inside[row, alike]
        kept = np.append(kept, begin + np.flatnonzero(keeper[begin : begin + len(block)] < 0))
    return keeper, np.clip(cosine, -1.0, 1.0)


def embed_texts(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: DOCUMENTS, NAMES and VECTORS of [documents] or [documents, vectors]. A shard's vectors fit into memory."""
    path, name = inputs[0], settings["embed"]
    config: SemanticDedupConfig = settings["config"]
    function = load_function(name) if name else None
    parts, vectors = [np.zeros(0, DOCUMENT)], []
    with open(out / NAMES, "wb") as f:
        for rows, names, texts in read_rows(path, config.columns):
            parts.append(rows.copy())
            f.write(names)
            if function is not None:
                made = unit_vectors(function([text.decode() for text in texts]), f"dedup_semantic: {name}")
                if len(made) != len(rows):
                    raise ValueError(
                        f"dedup_semantic: {name} must return a row for each of {len(rows)} texts, got {len(made)}"
                    )
                vectors.append(made)
    rows = np.concatenate(parts)
    if function is None:
        source = inputs[1] if len(inputs) > 1 else path
        vectors = list(_read_vectors(source, config))
    if sum(map(len, vectors)) != len(rows):
        raise ValueError(
            f"dedup_semantic: {inputs[-1]} must have an embedding for each of the {len(rows)} documents of {path}, "
            f"got {sum(map(len, vectors))}"
        )
    if len({piece.shape[1] for piece in vectors}) > 1:
        raise ValueError(f"dedup_semantic: embeddings of {path} must have one width, got several")
    joined = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)
    np.save(out / DOCUMENTS, rows, allow_pickle=False)
    np.save(out / VECTORS, joined, allow_pickle=False)
    return {"embedded_documents": len(rows), "dimensions": {str(joined.shape[1]): 1} if len(rows) else {}}


def _read_vectors(path: Path, config: SemanticDedupConfig) -> Iterator[NDArray[np.float32]]:
    where = f"dedup_semantic: {path}"
    if path.suffix == ".npy":
        try:
            head = array_header(path)
        except ValueError as error:
            raise ValueError(f"{where} must be a .npy file of numbers, got {error}") from error
        if len(head.shape) != 2:
            raise ValueError(f"{where} must have shape (num_docs, dim), got {head.shape}")
        if head.is_fortran:  # its rows lie apart
            yield unit_vectors(load_array(path), where)
            return
        for begin in range(0, head.shape[0], CHUNK_ROWS):
            rows = np.arange(begin, min(begin + CHUNK_ROWS, head.shape[0]))
            yield unit_vectors(rows_at(path, rows, head.dtype, head.shape[1], head.begin), where)
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if config.column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{where} must have the column {config.column!r} of embeddings, it has {names}")
        for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=[config.column]):
            lists = batch.column(0)
            lengths = set(lists.value_lengths().to_pylist()) if hasattr(lists, "value_lengths") else {0}
            if len(lengths) > 1 or None in lengths or 0 in lengths:
                raise ValueError(f"{where}: column {config.column!r} must hold lists of one length, got {lengths}")
            values = lists.flatten().to_numpy(zero_copy_only=False)
            yield unit_vectors(values.reshape(len(lists), -1), where)


def load_function(name: str) -> Embed:
    """The function "module:name", as workers and the journal know it. Raises: ValueError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"dedup_semantic: embeddings must be MODULE:FUNCTION, got {name!r} ({error})") from error
    return function


def train_centroids(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage: CENTROIDS, float32 (num_clusters, dim), by spherical k-means over the sample of all shards."""
    config: SemanticDedupConfig = settings["config"]
    num_clusters: int = settings["num_clusters"]
    points = _training_vectors(inputs, num_clusters * max(39, min(256, MAX_TRAINING_VECTORS // num_clusters)))
    num_clusters = max(1, min(num_clusters, len(points)))
    if num_clusters == 1:
        centroids = points.mean(0, keepdims=True) if len(points) else np.zeros((1, 1), np.float32)
    else:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(f"dedup_semantic: k-means needs the extra herdkern[semantic] ({error})") from error
        faiss.omp_set_num_threads(1)  # the order of sums, and so the last bits, must not depend on the machine
        kmeans = faiss.Kmeans(
            points.shape[1], num_clusters, niter=20, seed=config.seed, spherical=True, min_points_per_centroid=1,
            max_points_per_centroid=len(points),
        )  # fmt: skip
        kmeans.train(points)
        centroids = kmeans.centroids
    np.save(out / CENTROIDS, unit_vectors(centroids), allow_pickle=False)
    return {"clusters_of_k_means": len(centroids), "training_vectors": len(points)}


def _training_vectors(folders: list[Path], count: int) -> NDArray[np.float32]:
    """The vectors of at most `count` different texts, those of the smallest hashes, whatever the order of shards."""
    hashes = [load_rows(folder)["text_low"].copy() for folder in folders]
    shards = np.repeat(np.arange(len(hashes)), [len(some) for some in hashes])
    begins = np.cumsum([0, *map(len, hashes)])
    _, first = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_index=True)
    chosen = first[:count]
    pieces = []
    for shard in np.unique(shards[chosen]).tolist():
        ours = np.flatnonzero(shards[chosen] == shard)
        rows = chosen[ours] - begins[shard]
        by_row = np.argsort(rows)
        pieces.append((ours[by_row], _vectors_at(folders[shard], rows[by_row])))
    points = np.zeros((len(chosen), pieces[0][1].shape[1] if pieces else 1), np.float32)
    for ours, vectors in pieces:
        points[ours] = vectors
    return points


def _vectors_at(folder: Path, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of the VECTORS of a shard; they ascend."""
    path = folder / VECTORS
    head = array_header(path)
    if head.dtype != np.float32 or len(head.shape) != 2 or head.is_fortran:
        raise ValueError(f"dedup_semantic: {path} must hold rows of float32, got {head.dtype} {head.shape}")
    return rows_at(path, rows, np.float32, head.shape[1], head.begin)


def partition_vectors(inputs: list[Path], out: Path, settings: dict[str, Any], num_partitions: int) -> dict[str, Any]:
    """Stage, first half: [embedded shard, centroids]: documents and vectors dealt by their nearest centroid."""
    config: SemanticDedupConfig = settings["config"]
    rows = load_rows(inputs[0])
    centroids = load_array(inputs[1] / CENTROIDS)
    begins = name_begins(rows)
    folders = [out / f"part-{p:05d}" for p in range(num_partitions)]
    for folder in folders:
        folder.mkdir()
        (folder / TIE).write_bytes(shard_tie(rows).to_bytes(8, "little"))
        for name in (MEMBERS, NAMES, "vectors"):
            (folder / name).touch()
    with open(inputs[0] / NAMES, "rb") as names_file:
        for first in range(0, len(rows), CHUNK_ROWS):
            some = rows[first : first + CHUNK_ROWS]
            block = _vectors_at(inputs[0], np.arange(first, first + len(some)))
            names = names_file.read(int(begins[first + len(some)] - begins[first]))
            near = block @ centroids.T
            members = np.zeros(len(some), MEMBER)
            members["cluster"] = near.argmax(1)
            members["row"] = np.arange(first, first + len(some))
            members["order"] = _order(some, near.max(1), config)
            members["id_bytes"], members["url_bytes"] = some["id_bytes"], some["url_bytes"]
            for part in np.unique(members["cluster"] % num_partitions).tolist():
                chosen = np.flatnonzero(members["cluster"] % num_partitions == part)
                spans = [
                    (int(begins[first + i] - begins[first]), int(begins[first + i + 1] - begins[first])) for i in chosen
                ]
                for name, data in (
                    (MEMBERS, members[chosen].tobytes()),
                    (NAMES, b"".join(names[begin:end] for begin, end in spans)),
                    ("vectors", block[chosen].tobytes()),
                ):
                    with open(folders[part] / name, "ab") as f:
                        f.write(data)
    return {}


def _order(rows: NDArray[np.void], nearness: NDArray[np.float32], config: SemanticDedupConfig) -> NDArray[np.uint64]:
    """What orders documents for keeping, the first kept: uint64 (num_docs, 8)."""
    if config.keep != "outermost":
        return sort_keys(rows, config.keep)
    order = sort_keys(rows, "smallest_id")
    order[:, 0] = np.round((np.clip(nearness, -1, 1) + 1) * 1e6).astype(np.uint64)  # smaller: farther from the centroid
    return order


@dataclass(frozen=True)
class _Piece:
    """What one shard has in a partition."""

    members: NDArray[np.void]
    begins: NDArray[np.int64]  # of names
    vectors: Path
    dimensions: int
    names: Path
    tie: int


def _load_piece(folder: Path, dimensions: int) -> _Piece:
    members = read_array(folder / MEMBERS, MEMBER)
    return _Piece(
        members=members,
        begins=name_begins(members),
        vectors=folder / "vectors",
        dimensions=dimensions,
        names=folder / NAMES,
        tie=int.from_bytes((folder / TIE).read_bytes(), "little"),
    )


def keep_one_of_each(inputs: list[Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Stage, second half: DECISIONS about the documents of each cluster that are alike."""
    config: SemanticDedupConfig = settings["config"]
    pieces = [_load_piece(folder, settings["dimensions"]) for folder in inputs]
    clusters = np.unique(np.concatenate([np.zeros(0, np.int64), *(piece.members["cluster"] for piece in pieces)]))
    found = [np.zeros(0, DECISION)]
    sizes: list[NDArray[np.int64]] = []
    written = 0
    with open(out / NAMES, "wb") as names:
        for cluster in clusters.tolist():
            shards, numbers, vectors = _in_order(pieces, cluster)
            keeper, cosine = drop_similar(vectors, config.min_similarity)
            dropped = np.flatnonzero(keeper >= 0)
            for kept in np.unique(keeper[dropped]).tolist():
                copies = dropped[keeper[dropped] == kept]
                piece, number = pieces[shards[kept]], int(numbers[kept])
                group = np.append(kept, copies)
                decisions = np.zeros(len(group), DECISION)
                rows = np.array([pieces[shards[i]].members["row"][numbers[i]] for i in group], np.uint64)
                decisions["place"] = shards[group].astype(np.uint64) << np.uint64(32) | rows
                decisions["cluster"] = piece.members["order"][number, 6] | np.uint64(1)  # hash of the kept document
                decisions["reason"] = [KEPT] + [SEMANTIC_DUPLICATE] * len(copies)
                decisions["similarity"] = np.append(1.0, cosine[copies])
                decisions["kept_place"] = decisions["place"][0]
                decisions["names_offset"] = written
                decisions["id_bytes"] = piece.members["id_bytes"][number]
                decisions["url_bytes"] = piece.members["url_bytes"][number]
                with open(piece.names, "rb") as source:
                    source.seek(int(piece.begins[number]))
                    written += names.write(source.read(int(piece.begins[number + 1] - piece.begins[number])))
                found.append(decisions)
                sizes.append(np.array([len(group)]))
    write_decisions_by_shard(out, np.concatenate(found), len(inputs))
    return {"clusters": len(sizes), "cluster_sizes": size_bins(np.concatenate(sizes)) if sizes else {}}


def _in_order(pieces: list[_Piece], cluster: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(shard, number in its piece, vector) of the documents of a cluster, the first to keep first."""
    where = [np.flatnonzero(piece.members["cluster"] == cluster) for piece in pieces]
    shards = np.repeat(np.arange(len(pieces)), [len(numbers) for numbers in where])
    numbers = np.concatenate(where)
    order = np.concatenate([piece.members["order"][at] for piece, at in zip(pieces, where, strict=True)])
    ties = np.array([piece.tie for piece in pieces], np.uint64)[shards]
    by_order = np.lexsort((numbers, shards, ties, *order.T[::-1]))
    vectors = np.concatenate(
        [rows_at(piece.vectors, at, np.float32, piece.dimensions) for piece, at in zip(pieces, where, strict=True)]
    )
    return shards[by_order], numbers[by_order], vectors[by_order]


def dedup_semantic(
    run: Run,
    inputs: Sequence[Path],
    embeddings: Sequence[Path] | Embed | None = None,
    config: SemanticDedupConfig | None = None,
    *,
    name: str = "dedup_semantic",
) -> StageResult:
    """Keep one document of each group whose embeddings have a cosine of min_similarity or more to the kept one.

    inputs: document files.  embeddings: a .npy (num_docs, dim) or Parquet file for each of them, in their order; or a
    top-level function, list[str] -> float (n, dim); None reads `config.column` of inputs that are Parquet.
    The result's task folders, one per input, hold documents.jsonl.zst, dropped.jsonl.zst (reason "semantic_duplicate";
    meta names the kept document and the cosine to it) and clusters.npy, uint64 (num_docs,), 0 for none.
    Raises: ValueError if embeddings do not fit the inputs; StageError if an input cannot be read.
    """
    config = config or SemanticDedupConfig()
    files = [Path(path) for path in inputs]
    groups, function = _sources(files, embeddings)
    settings: dict[str, Any] = {"config": config, "embed": function}
    embedded = run.map(f"{name}.vectors", embed_texts, groups, config=settings)
    dimensions = sorted(int(key) for key in embedded.counters.get("dimensions", {}))
    if len(dimensions) > 1:
        raise ValueError(f"dedup_semantic: embeddings must have one width in all inputs, got {dimensions}")
    num_docs = embedded.counters.get("embedded_documents", 0)
    num_clusters = config.num_clusters or max(1, num_docs // DOCUMENTS_PER_CLUSTER)
    centroids = run.once(
        f"{name}.centroids", train_centroids, embedded.tasks, config={**settings, "num_clusters": num_clusters}
    ).tasks[0]
    width = (dimensions or [1])[0]
    num_partitions = -(-num_docs * (4 * width + MEMBER.itemsize) * 2 // config.max_memory)
    found = run.exchange(
        f"{name}.groups",
        partition_vectors,
        keep_one_of_each,
        [[folder, centroids] for folder in embedded.tasks],
        num_partitions=min(MAX_PARTITIONS, max(2, num_partitions)),
        config={"config": config, "dimensions": width},
    )
    shards = [
        [path, embedded.tasks[i], found.tasks[0] / f"shard-{i:05d}", *found.tasks] for i, path in enumerate(files)
    ]
    return run.map(name, drop_members, shards, config={"config": config})


def _sources(files: list[Path], embeddings: Sequence[Path] | Embed | None) -> tuple[list[list[Path]], str]:
    """(the inputs of each task, MODULE:FUNCTION or "")."""
    if embeddings is None:
        for path in files:
            if document_kind(path) != "parquet":
                raise ValueError(
                    f"dedup_semantic: embeddings must be given for inputs that are not Parquet, got {path}"
                )
        return [[path] for path in files], ""
    if callable(embeddings):
        name = f"{embeddings.__module__}:{embeddings.__qualname__}"
        if "<" in name or load_function(name) is not embeddings:
            raise ValueError(f"dedup_semantic: embeddings must be a top-level function of a module, got {name}")
        return [[path] for path in files], name
    vectors = [Path(path) for path in embeddings]
    if len(vectors) != len(files):
        raise ValueError(
            f"dedup_semantic: embeddings must be one file for each of {len(files)} inputs, got {len(vectors)}"
        )
    return [[path, vector] for path, vector in zip(files, vectors, strict=True)], ""
