import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import MinHashConfig, dedup_minhash
from herdkern.dedup.minhash import exact_jaccard
from herdkern.engine import Run


def corpus(rng, num_families):
    """Documents in families of near-copies; (documents, family of every id)."""
    documents, families = [], {}
    for family in range(num_families):
        words = [f"f{family}w{i}" for i in range(240)]
        for member in range(int(rng.integers(1, 5))):
            changed = list(words)
            for place in rng.choice(240, int(rng.integers(0, 3)), replace=False):
                changed[place] = f"x{rng.integers(0, 1 << 30)}"
            id_ = f"{rng.integers(0, 1 << 48):012x}"
            families[id_] = family
            url = f"http://h/{family}/{member}"
            timestamp = int(rng.integers(0, 4))
            documents.append(Document(id=id_, text=" ".join(changed), url=url, lang="en", timestamp=timestamp))
    return documents, families


def run_dedup(folder, shards, config):
    paths = []
    for number, shard in enumerate(shards):
        paths.append(folder / f"in-{number}.jsonl.zst")
        write_documents(paths[-1], shard)
    with Run(folder / "run") as run:
        result = dedup_minhash(run, paths, config)
    kept = [d for path in result.files("documents.jsonl.zst") for d in read_documents(path)]
    dropped = [d for path in result.files("dropped.jsonl.zst") for d in read_documents(path)]
    return result, kept, dropped


@pytest.mark.parametrize("verify", ["exact", "signature", "none"])
@pytest.mark.parametrize("keep", ["newest", "longest", "smallest_id"])
def test_one_of_each_family_is_kept_by_the_policy(tmp_path, verify, keep):
    documents, families = corpus(np.random.default_rng(1), 40)
    result, kept, dropped = run_dedup(
        tmp_path, [documents[:50], documents[50:]], MinHashConfig(verify=verify, keep=keep)
    )
    order = {
        "newest": lambda d: (-d.timestamp, -len(d.text), d.id),
        "longest": lambda d: (-len(d.text), -d.timestamp, d.id),
        "smallest_id": lambda d: d.id,
    }[keep]
    wanted = {}
    for document in sorted(documents, key=order):
        wanted.setdefault(families[document.id], document.id)
    assert sorted(d.id for d in kept) == sorted(wanted.values())
    for document in dropped:
        assert document.meta["kept_id"] == wanted[families[document.id]]
        assert document.meta["reason"] in ("near_duplicate", "exact_duplicate")
    counters = result.counters
    assert counters["docs_in"] == len(documents) == counters["docs_out"] + sum(counters["dropped"].values())
    assert counters["bytes_in"] == sum(len(d.text.encode()) for d in documents)
    assert counters["bytes_out"] == sum(len(d.text.encode()) for d in kept)


def test_the_measured_similarity_is_the_true_one(tmp_path):
    documents, _ = corpus(np.random.default_rng(2), 30)
    _, kept, dropped = run_dedup(tmp_path, [documents], MinHashConfig())
    by_id = {d.id: d for d in documents}
    assert dropped
    for document in dropped:
        texts = [document.text, by_id[document.meta["kept_id"]].text]
        exact = exact_jaccard(texts, np.array([[0, 1]]))[0]
        assert document.meta["similarity"] == round(float(exact), 6) >= 0.75
    texts = [d.text for d in kept]
    every = np.array([(i, j) for i in range(len(kept)) for j in range(i)])
    assert exact_jaccard(texts, every).max() < 0.75


def test_order_and_shards_do_not_matter(tmp_path):
    documents, _ = corpus(np.random.default_rng(3), 40)
    wanted = None
    for number in range(4):
        order = np.random.default_rng(number).permutation(len(documents))
        shards = [[documents[i] for i in part] for part in np.array_split(order, number + 1)]
        (tmp_path / str(number)).mkdir()
        _, kept, dropped = run_dedup(tmp_path / str(number), shards, MinHashConfig())
        result = (sorted(d.id for d in kept), sorted((d.id, json.dumps(d.meta, sort_keys=True)) for d in dropped))
        wanted = wanted or result
        assert result == wanted


def test_exact_copies_short_and_empty_texts(tmp_path):
    texts = [
        "same text",
        "same text",
        "Same, text!",
        "same text here",
        "",
        "",
        "...",
        "…",
        "?!",
        "ab",
        "AB",
        "日本語",
        "日本語",
    ]
    documents = [Document(id=f"{i:02d}", text=text) for i, text in enumerate(texts)]
    _, kept, dropped = run_dedup(tmp_path, [documents], MinHashConfig(keep="smallest_id"))
    assert [d.id for d in kept] == ["00", "03", "04", "06", "07", "08", "09", "11"]
    reasons = {d.id: d.meta["reason"] for d in dropped}
    exact, near = "exact_duplicate", "near_duplicate"
    assert reasons == {"01": exact, "02": near, "05": exact, "10": near, "12": exact}


@pytest.mark.parametrize("timestamp", [10**20, -(10**20), -(2**63)])
def test_a_timestamp_of_any_size_stops_nothing(tmp_path, timestamp):
    text = " ".join(f"word{i}" for i in range(50))
    documents = [Document(id=f"{i:016x}", text=text, timestamp=t) for i, t in enumerate((5, timestamp))]
    _, kept, dropped = run_dedup(tmp_path, [documents], MinHashConfig())
    assert [d.id for d in kept] == [documents[0].id]  # what is no time is an unknown one
    assert [d.id for d in dropped] == [documents[1].id]


def test_verification_in_passes_gives_the_same(tmp_path, monkeypatch):
    documents, _ = corpus(np.random.default_rng(3), 40)
    trees = []
    for name, limit in (("one", 1 << 28), ("many", 3000)):
        monkeypatch.setattr("herdkern.dedup.documents._VERIFY_CHARS", limit)
        passes = []
        read = _Corpus.texts
        with monkeypatch.context() as patch:
            patch.setattr(
                _Corpus, "texts", lambda self, wanted, read=read, n=passes: n.append(wanted) or read(self, wanted)
            )
            (tmp_path / name).mkdir()
            run_dedup(tmp_path / name, [documents[::2], documents[1::2]], MinHashConfig())
        folder = tmp_path / name / "run" / "data"
        trees.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
        lengths = {i: len(d.text) for i, d in enumerate(sorted(documents, key=lambda d: d.id))}
        assert max(sum(lengths[i] for i in wanted) for wanted in passes[:-1]) <= limit + 2 * max(lengths.values())
    assert len(passes) > 10
    assert trees[0] == trees[1]


def test_languages_are_apart_unless_asked(tmp_path):
    text = " ".join(f"word{i}" for i in range(50))
    documents = [Document(id="1", text=text + " a", lang="en"), Document(id="2", text=text + " b", lang="de")]
    _, kept, _ = run_dedup(tmp_path, [documents], MinHashConfig())
    assert len(kept) == 2
    (tmp_path / "global").mkdir()
    _, kept, _ = run_dedup(tmp_path / "global", [documents], MinHashConfig(within_language=False))
    assert [d.id for d in kept] == ["1"]


def test_no_documents(tmp_path):
    _, kept, dropped = run_dedup(tmp_path, [[], []], MinHashConfig())
    assert kept == dropped == []


def test_clusters_and_examples_are_written(tmp_path):
    documents, families = corpus(np.random.default_rng(5), 40)
    run_dedup(tmp_path, [documents], MinHashConfig())
    folder = tmp_path / "run/data/dedup_minhash.cluster/task-00000"
    clusters = [json.loads(line) for line in (folder / "clusters.jsonl").read_text().splitlines()]
    for cluster in clusters:
        assert len({families[i] for i in [cluster["kept"], *cluster["dropped"]]}) == 1
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert 0 < len(pairs) <= 20
    texts = {d.id: d.text for d in documents}
    for pair in pairs:
        assert pair["kept"] in texts[pair["kept_id"]]
        assert pair["dropped"] in texts[pair["dropped_id"]]
        assert len(pair["kept"]) <= 300
        assert 0.75 <= pair["similarity"] <= 1
        assert pair["kept_url"].startswith("http://h/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bands": 0}, "num_bands must be at least 1, got 0"),
        ({"min_similarity": 0.0}, r"min_similarity must lie in \(0, 1\], got 0.0"),
        ({"verify": "maybe"}, "verify must be exact, signature or none, got 'maybe'"),
        ({"keep": "best"}, "keep must be one of newest, longest, best_score, smallest_id, got 'best'"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MinHashConfig(**arguments)


@pytest.mark.skipif("HERDKERN_DATA" not in os.environ, reason="needs HERDKERN_DATA (dedup/django_docs)")
def test_real_pages_against_all_pairs(tmp_path):
    import zstandard

    folder = Path(os.environ["HERDKERN_DATA"]) / "dedup"
    with open(folder / "django_docs_5.0_5.1.jsonl.zst", "rb") as f:
        reader = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(f), encoding="utf-8")
        documents = [Document(id=row["id"], text=row["text"]) for row in map(json.loads, reader)]
    with gzip.open(folder / "django_docs_5.0_5.1_pairs_truth.jsonl.gz", "rt") as f:
        truth = [json.loads(line) for line in f]
    places = {d.id: i for i, d in enumerate(documents)}
    pairs = np.array([(places[t["a"]], places[t["b"]]) for t in truth])
    exact = exact_jaccard([d.text for d in documents], pairs)
    listed = np.array([t["jaccard"] for t in truth])  # of lower-cased \w+ words, rounded to 5 digits
    assert (abs(exact - listed) < 1e-5).mean() > 0.99
    _, _, dropped = run_dedup(tmp_path, [documents[:400], documents[400:]], MinHashConfig())
    gone = {d.id for d in dropped}
    above = [t for t, similarity in zip(truth, exact, strict=True) if similarity >= 0.8]
    assert len(above) > 300
    assert np.mean([t["a"] in gone or t["b"] in gone for t in above]) >= 0.99
