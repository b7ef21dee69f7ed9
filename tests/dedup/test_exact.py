"""Exact document dedup against a dictionary in memory; any order of shards, any executor, any memory."""

import random

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import exact
from herdkern.dedup.exact import ExactDedupConfig, dedup_exact, normal_text, text_hash
from herdkern.engine import Run, make_executor

TEXTS = ["one text", "One  text\n", "another", "ein Straßenname", "EIN STRASSENNAME", "", "cafe\u0301", "caf\u00e9"]


def make_documents(count, seed=1):
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        text = rng.choice(TEXTS) if rng.random() < 0.5 else f"text {rng.randrange(count)}"
        url = rng.choice(["", f"http://a.example/{rng.randrange(9)}"])
        meta = {"score": rng.randrange(3)} if rng.random() < 0.5 else {}
        id_ = f"{rng.getrandbits(64):016x}"
        documents.append(Document(id=id_, text=text, url=url, timestamp=rng.randrange(4), meta=meta))
    return documents


def write_shards(folder, documents, num_shards):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"in-{i}.jsonl.zst" for i in range(num_shards)]
    for i, path in enumerate(paths):
        write_documents(path, documents[i::num_shards])
    return paths


def naive(documents, config):
    """(kept, {dropped id: kept id}) by a dictionary."""

    def rank(d):
        score = d.meta.get(config.score_key, float("-inf"))
        return {
            "newest": (-d.timestamp, -len(d.text), d.id),
            "longest": (-len(d.text), -d.timestamp, d.id),
            "best_score": (-score, -d.timestamp, -len(d.text), d.id),
            "smallest_id": (d.id,),
        }[config.keep]

    best = {}
    for d in documents:
        key = normal_text(d.text) if config.normalize else d.text
        if key not in best or rank(d) < rank(best[key]):
            best[key] = d
    keepers = {d.id: best[normal_text(d.text) if config.normalize else d.text].id for d in documents}
    return {d.id for d in best.values()}, {id_: keeper for id_, keeper in keepers.items() if id_ != keeper}


def outcome(result):
    kept = [d.id for path in result.files("documents.jsonl.zst") for d in read_documents(path)]
    dropped = [d for path in result.files("dropped.jsonl.zst") for d in read_documents(path)]
    return kept, dropped


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normal"])
@pytest.mark.parametrize("keep", ["newest", "longest", "best_score", "smallest_id"])
def test_equals_a_dictionary(tmp_path, keep, normalize):
    documents = make_documents(400)
    config = ExactDedupConfig(keep=keep, normalize=normalize)
    with Run(tmp_path / "run") as run:
        result = dedup_exact(run, write_shards(tmp_path / "in", documents, 3), config)
    kept, dropped = outcome(result)
    wanted, keepers = naive(documents, config)
    assert len(kept) == len(set(kept))
    assert set(kept) == wanted
    assert {d.id: d.meta["kept_id"] for d in dropped} == keepers
    urls = {d.id: d.url for d in documents}
    assert all(d.meta["kept_url"] == urls[d.meta["kept_id"]] for d in dropped)
    assert {d.meta["reason"] for d in dropped} == {"exact_duplicate"}
    assert result.counters["dropped"] == {"exact_duplicate": len(keepers)}
    assert result.counters["docs_in"] == 400


def test_kept_documents_come_out_as_they_went_in(tmp_path):
    documents = make_documents(100)
    with Run(tmp_path / "run") as run:
        result = dedup_exact(run, write_shards(tmp_path / "in", documents, 2))
    by_id = {d.id: d for d in documents}
    for path in result.files("documents.jsonl.zst"):
        for document in read_documents(path):
            assert (document.text, document.url, document.timestamp) == (
                by_id[document.id].text, by_id[document.id].url, by_id[document.id].timestamp
            )  # fmt: skip


def test_clusters_are_told(tmp_path):
    texts = ["a", "b", "a", "c", "b", "a"]
    documents = [Document(id=f"{i:016x}", text=text) for i, text in enumerate(texts)]
    with Run(tmp_path / "run") as run:
        result = dedup_exact(run, write_shards(tmp_path / "in", documents, 1), ExactDedupConfig(keep="smallest_id"))
    clusters = np.load(result.files("clusters.npy")[0])
    assert clusters[0] == clusters[2] == clusters[5] != 0
    assert clusters[1] == clusters[4] != 0
    assert clusters[3] == 0
    assert len({0, *clusters.tolist()}) == 3


def files_by_content(result):
    names = ("documents.jsonl.zst", "dropped.jsonl.zst")
    return sorted(b"".join(task.joinpath(name).read_bytes() for name in names) for task in result.tasks)


def test_order_of_shards_executor_and_memory_do_not_matter(tmp_path, monkeypatch):
    documents = make_documents(300, seed=2)
    documents += documents[:40]  # the very same documents again: only their shards tell them apart
    paths = write_shards(tmp_path / "in", documents, 3)
    found = []
    for name, order, executor, memory in (
        ("plain", paths, "serial", 1 << 30),
        ("permuted", [paths[2], paths[0], paths[1]], "serial", 1 << 30),
        ("threads", paths, "threads", 1 << 30),
        ("small", paths, "serial", 1 << 20),
    ):
        if name == "small":
            monkeypatch.setattr(exact, "CHUNK_ROWS", 7)
            monkeypatch.setattr(exact, "_COPIES", 400)  # so that 1 MiB takes many partitions
        with make_executor(executor, 2) as pool, Run(tmp_path / name, executor=pool) as run:
            found.append(files_by_content(dedup_exact(run, order, ExactDedupConfig(max_memory=memory))))
    assert found[0] == found[1] == found[2] == found[3]
    assert len(list((tmp_path / "small" / "data" / "dedup_exact.copies").iterdir())) > 2


def test_no_input_and_empty_files(tmp_path):
    with Run(tmp_path / "run") as run:
        assert dedup_exact(run, []).tasks == []
        result = dedup_exact(run, write_shards(tmp_path / "in", [], 2))
    assert result.counters["docs_in"] == result.counters["docs_out"] == 0


def test_duplicates_are_written_only_if_wanted(tmp_path):
    paths = write_shards(tmp_path / "in", make_documents(50), 1)
    with Run(tmp_path / "run") as run:
        result = dedup_exact(run, paths, ExactDedupConfig(write_dropped=False))
    assert result.files("dropped.jsonl.zst") == []
    assert result.counters["dropped"]["exact_duplicate"] > 0


def test_hash_is_blake2b_of_128_bits():
    import hashlib

    assert text_hash("a text") == hashlib.blake2b(b"a text", digest_size=16).digest()
    assert text_hash(b"a text") == text_hash("a text")
    assert text_hash("A\u00a0 Text ", normalize=True) == text_hash("a text", normalize=True) == text_hash("a text")
    assert text_hash("a text") != text_hash("A text")


@pytest.mark.parametrize(("name", "value"), [("keep", "oldest"), ("max_memory", 5)])
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"ExactDedupConfig: {name} must be .*{value}"):
        ExactDedupConfig(**{name: value})
