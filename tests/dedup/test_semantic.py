"""Semantic dedup against a naive twin; embeddings from files, columns and functions; k-means is deterministic."""

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import semantic
from herdkern.dedup.semantic import SemanticDedupConfig, dedup_semantic, drop_similar, unit_vectors
from herdkern.engine import Run, StageError, make_executor


def make_vectors(count, dim=16, seed=1):
    """Groups of vectors around common points, so that cosines of every size occur."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((max(1, count // 5), dim))
    noise = rng.standard_normal((count, dim)) * rng.choice([0.01, 0.15, 0.5], (count, 1))
    return (points[rng.integers(len(points), size=count)] + noise).astype(np.float32)


def naive_drop(vectors, min_similarity):
    """Keeper of every row, -1 for kept ones, one pair at a time."""
    keeper = []
    for i, vector in enumerate(vectors):
        alike = [j for j in range(i) if keeper[j] < 0 and float(vector @ vectors[j]) >= min_similarity]
        keeper.append(alike[0] if alike else -1)
    return keeper


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 300])
@pytest.mark.parametrize("min_similarity", [0.5, 0.9, 0.99])
def test_drop_similar_is_as_one_pair_at_a_time(monkeypatch, count, min_similarity):
    monkeypatch.setattr(semantic, "BLOCK", 64)
    vectors = unit_vectors(make_vectors(count))
    keeper, cosine = drop_similar(vectors, min_similarity)
    assert keeper.tolist() == naive_drop(vectors, min_similarity)
    dropped = keeper >= 0
    assert np.all(cosine[dropped] >= min_similarity)
    assert count < 64 or dropped.any()


def test_a_chain_keeps_what_is_not_like_its_keeper():
    angles = np.deg2rad([0, 20, 40, 60])
    vectors = unit_vectors(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    keeper, _ = drop_similar(vectors, np.cos(np.deg2rad(25)))
    assert keeper.tolist() == [-1, 0, -1, 2]  # SemDeDup's rule would leave the first alone


def documents_of(count):
    return [
        Document(id=f"{i:016x}", text=f"text {i}", url=f"http://a.example/{i}", timestamp=i % 7) for i in range(count)
    ]


def write_inputs(folder, documents, vectors, num_shards):
    folder.mkdir(exist_ok=True)
    files, arrays = [], []
    for i in range(num_shards):
        files.append(folder / f"in-{i}.jsonl.zst")
        arrays.append(folder / f"in-{i}.npy")
        write_documents(files[-1], documents[i::num_shards])
        np.save(arrays[-1], vectors[i::num_shards])
    return files, arrays


def kept_and_dropped(result):
    kept = sorted(d.id for path in result.files("documents.jsonl.zst") for d in read_documents(path))
    dropped = [d for path in result.files("dropped.jsonl.zst") for d in read_documents(path)]
    return kept, {d.id: d.meta["kept_id"] for d in dropped}, dropped


def test_one_cluster_equals_the_naive_twin(tmp_path):
    documents, vectors = documents_of(200), make_vectors(200)
    files, arrays = write_inputs(tmp_path / "in", documents, vectors, 3)
    with Run(tmp_path / "run") as run:
        result = dedup_semantic(run, files, arrays, SemanticDedupConfig(min_similarity=0.9))
    order = sorted(range(200), key=lambda i: (-documents[i].timestamp, -len(documents[i].text), documents[i].id))
    keeper = naive_drop(unit_vectors(vectors)[order], 0.9)
    wanted = {documents[order[i]].id: documents[order[k]].id for i, k in enumerate(keeper) if k >= 0}
    kept, dropped, documents_dropped = kept_and_dropped(result)
    assert dropped == wanted
    assert kept == sorted({d.id for d in documents} - set(wanted))
    assert wanted
    assert {d.meta["reason"] for d in documents_dropped} == {"semantic_duplicate"}
    assert result.counters["dropped"] == {"semantic_duplicate": len(wanted)}
    unit = unit_vectors(vectors)
    for d in documents_dropped:
        cosine = float(unit[int(d.id, 16)] @ unit[int(d.meta["kept_id"], 16)])
        assert d.meta["similarity"] == pytest.approx(cosine, abs=1e-5)
        assert cosine >= 0.9 - 1e-6


def test_clusters_of_k_means_find_what_one_cluster_finds_of_close_pairs(tmp_path):
    pytest.importorskip("faiss", reason="k-means needs faiss-cpu")
    rng = np.random.default_rng(3)
    points = rng.standard_normal((120, 32))
    vectors = np.concatenate([points, points + 0.01 * rng.standard_normal(points.shape)]).astype(np.float32)
    documents = documents_of(240)
    files, arrays = write_inputs(tmp_path / "in", documents, vectors, 4)
    config = SemanticDedupConfig(min_similarity=0.95, num_clusters=6, keep="smallest_id")
    found = []
    for name, executor, order in (("a", "serial", [0, 1, 2, 3]), ("b", "threads", [2, 0, 3, 1])):
        with make_executor(executor, 2) as pool, Run(tmp_path / name, executor=pool) as run:
            inputs, sources = [files[i] for i in order], [arrays[i] for i in order]
            result = dedup_semantic(run, inputs, sources, config)
        found.append(kept_and_dropped(result)[:2])
        centroids = np.load(tmp_path / name / "data" / "dedup_semantic.centroids" / "task-00000" / "centroids.npy")
        assert centroids.shape == (6, 32)
    assert found[0] == found[1]
    assert found[0][1] == {f"{i + 120:016x}": f"{i:016x}" for i in range(120)}


def test_outermost_is_kept(tmp_path):
    vectors = np.array([[1, 0.0], [1, 0.1], [1, 0.2]], np.float32)  # the mean points to the second
    files, arrays = write_inputs(tmp_path / "in", documents_of(3), vectors, 1)
    with Run(tmp_path / "run") as run:
        result = dedup_semantic(run, files, arrays, SemanticDedupConfig(min_similarity=0.9, keep="outermost"))
    assert kept_and_dropped(result)[0] in ([f"{0:016x}"], [f"{2:016x}"])


def embed_by_length(texts):
    return np.array([[len(text), 1.0, float(text[-1] in "02468")] for text in texts])


def test_function_and_column_give_what_a_file_gives(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    documents = documents_of(60)
    vectors = embed_by_length([d.text for d in documents])
    files, arrays = write_inputs(tmp_path / "in", documents, vectors, 2)
    columns = []
    for i in range(2):
        rows = [{"id": d.id, "text": d.text, "url": d.url, "timestamp": d.timestamp} for d in documents[i::2]]
        for row, vector in zip(rows, vectors[i::2], strict=True):
            row["embedding"] = vector.tolist()
        columns.append(tmp_path / f"in-{i}.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), columns[-1])
    module = type(semantic)("embedders_of_this_test")
    module.embed_by_length = embed_by_length
    monkeypatch.setitem(__import__("sys").modules, "embedders_of_this_test", module)
    monkeypatch.setattr(embed_by_length, "__module__", "embedders_of_this_test")
    config = SemanticDedupConfig(min_similarity=0.999)
    found = []
    for name, inputs, source in (
        ("file", files, arrays),
        ("function", files, embed_by_length),
        ("column", columns, None),
    ):
        with Run(tmp_path / name) as run:
            found.append(kept_and_dropped(dedup_semantic(run, inputs, source, config))[:2])
    assert found[0] == found[1] == found[2]
    assert 0 < len(found[0][0]) < 60


def test_what_does_not_fit_is_named(tmp_path):
    files, arrays = write_inputs(tmp_path / "in", documents_of(10), make_vectors(10), 2)
    with Run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="one file for each of 2 inputs, got 1"):
            dedup_semantic(run, files, arrays[:1])
        with pytest.raises(ValueError, match="must be given for inputs that are not Parquet"):
            dedup_semantic(run, files)
        with pytest.raises(ValueError, match="top-level function"):
            dedup_semantic(run, files, lambda texts: np.zeros((len(texts), 2)))
        np.save(arrays[1], make_vectors(4))
        with pytest.raises(StageError, match=r"in-1.npy must have an embedding for each of the 5 documents.*got 4"):
            dedup_semantic(run, files, arrays)
        bad = make_vectors(5)
        bad[2, 3] = np.nan
        np.save(arrays[1], bad)
        with pytest.raises(StageError, match=r"in-1.npy: vectors must be finite, got nan in row 2"):
            dedup_semantic(run, files, arrays)
        np.save(arrays[1], make_vectors(5, dim=8))
        with pytest.raises(ValueError, match=r"one width in all inputs, got \[8, 16\]"):
            dedup_semantic(run, files, arrays)


def test_no_input_and_empty_files(tmp_path):
    files, arrays = write_inputs(tmp_path / "in", [], np.zeros((0, 4), np.float32), 2)
    with Run(tmp_path / "run") as run:
        assert dedup_semantic(run, [], []).tasks == []
        assert dedup_semantic(run, files, arrays).counters["docs_out"] == 0


def test_rows_of_zeros_are_like_nothing():
    vectors = unit_vectors(np.array([[0.0, 0.0], [0.0, 0.0], [1e30, 0.0], [1e-30, 0.0]], np.float32))
    assert np.isfinite(vectors).all()
    assert drop_similar(vectors, 0.5)[0].tolist() == [-1, -1, -1, 2]


@pytest.mark.parametrize(
    ("name", "value"), [("min_similarity", 0.0), ("num_clusters", -1), ("keep", "oldest"), ("max_memory", 5)]
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"SemanticDedupConfig: {name} must .*{value}"):
        SemanticDedupConfig(**{name: value})
