import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import MinHashConfig, dedup_minhash
from herdkern.dedup.clusters import band_keys
from herdkern.dedup.minhash import exact_jaccard, signatures
from herdkern.dedup.parquet import write_parquet
from herdkern.engine import Run, StageError


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


def files_below(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("verify", ["exact", "signature", "none"])
def test_little_memory_gives_the_same(tmp_path, monkeypatch, verify):
    """Sorted runs are spilled, components take several passes, shingles are read again."""
    documents, _ = corpus(np.random.default_rng(3), 200)
    rng = np.random.default_rng(4)
    shared = [f"s{i}" for i in range(100)]  # a component of many that are kept: each has half of this text
    for _ in range(150):
        own = [f"o{rng.integers(0, 1 << 40)}" for _ in range(40)]
        documents.append(Document(id=f"{rng.integers(0, 1 << 48):012x}", text=" ".join(shared + own), lang="en"))
    found = []
    for name, native_bytes in (("much", 1 << 28), ("little", 1 << 15)):
        monkeypatch.setattr(MinHashConfig, "native_bytes", property(lambda _, n=native_bytes: n))
        (tmp_path / name).mkdir()
        run_dedup(
            tmp_path / name,
            [documents[::2], documents[1::2]],
            MinHashConfig(verify=verify, num_bands=40, rows_per_band=3),
        )
        data = tmp_path / name / "run" / "data"
        found.append(files_below(data / "dedup_minhash") | files_below(data / "dedup_minhash.cluster"))
    assert found[0] == found[1]


def naive_kept(documents, config):
    """Ids of the kept: in keep order, each document that is not similar to a kept one with which it shares a band."""
    ordered = sorted(documents, key=lambda d: (-d.timestamp, -len(d.text), d.id))
    signed = signatures([d.text for d in ordered], **config.signature_settings)
    keys = band_keys(signed, num_bands=config.num_bands, rows_per_band=config.rows_per_band)
    kept = []
    for i, document in enumerate(ordered):
        near = [j for j in kept if (keys[i] == keys[j]).any()]
        near = [
            j for j in near if exact_jaccard([document.text, ordered[j].text], [(0, 1)])[0] >= config.min_similarity
        ]
        if not near and document.text not in {ordered[j].text for j in kept}:
            kept.append(i)
    return sorted(ordered[i].id for i in kept)


def test_a_chain_is_cut_where_documents_are_not_similar_to_the_kept_one(tmp_path):
    """Each text differs from the one before in some words: neighbours are similar, the ends are not."""
    documents = []
    for chain in range(12):
        words = [f"c{chain}w{i}" for i in range(120)]
        for step in range(9):
            documents.append(Document(id=f"{chain:02d}{(step * 7) % 9}", text=" ".join(words), timestamp=step % 3))
            for place in range(step * 10, step * 10 + 3):
                words[place] = f"c{chain}n{step}p{place}"
    config = MinHashConfig()
    _, kept, dropped = run_dedup(tmp_path, [documents[::2], documents[1::2]], config)
    assert sorted(d.id for d in kept) == naive_kept(documents, config)
    assert 12 < len(kept) < len(documents)
    by_id = {d.id: d for d in documents}
    for document in dropped:
        keeper = by_id[document.meta["kept_id"]]
        assert keeper.id in {d.id for d in kept}
        assert exact_jaccard([by_id[document.id].text, keeper.text], [(0, 1)])[0] >= config.min_similarity


def test_clusters_are_kept_beside_the_documents(tmp_path):
    documents, _ = corpus(np.random.default_rng(6), 40)
    result, kept, dropped = run_dedup(tmp_path, [documents[:60], documents[60:]], MinHashConfig())
    cluster_of = {}
    for shard, path in zip((documents[:60], documents[60:]), result.files("clusters.npy"), strict=True):
        clusters = np.load(path)
        assert clusters.dtype == np.uint64
        cluster_of |= dict(zip((d.id for d in shard), clusters.tolist(), strict=True))
    for document in dropped:
        assert cluster_of[document.id] == cluster_of[document.meta["kept_id"]] != 0
    with_copies = {d.meta["kept_id"] for d in dropped}
    assert all((cluster_of[d.id] != 0) == (d.id in with_copies) for d in kept)
    assert len({cluster_of[i] for i in with_copies}) == len(with_copies)


def test_the_best_score_is_kept(tmp_path):
    text = " ".join(f"word{i}" for i in range(60))
    scores = [0.25, None, 0.8234567890123456, "high", True]
    documents = [
        Document(id=f"{i}", text=text + f" {i}", meta={} if score is None else {"quality": score}, timestamp=9 - i)
        for i, score in enumerate(scores)
    ]
    _, kept, _ = run_dedup(tmp_path, [documents], MinHashConfig(keep="best_score", score_key="quality"))
    assert [d.id for d in kept] == ["2"]


def test_nothing_is_written_aside_unless_wanted(tmp_path):
    documents, _ = corpus(np.random.default_rng(5), 10)
    result, kept, dropped = run_dedup(tmp_path, [documents], MinHashConfig(write_dropped=False))
    assert not dropped
    assert len(kept) == result.counters["docs_out"] < len(documents)


AWKWARD = [
    b'{"text":"only a text"}',
    b'  {"id": "spaced", "text": "with spaces", "meta": {"b": 1, "a": 2.50}}',
    b'{"text":"escapes \\u00e9 \\/ \\ud83d\\ude00 \\ud800 end","url":"http://h/\\u0041"}',
    b"",
    b'{"id":"a","text":"t\\u0001","url":"","source":"","lang":"","timestamp":1,"record":"r",'
    b'"meta":{"x":1e3,"y":[1,{"k":null}]}}',
    b'{"id":"b","text":"plain \xc3\xa9","url":"u","source":"s","lang":"en","timestamp":-5,"record":"r#1",'
    b'"meta":{"x":0.1}}\r',
    b'{"id":"c","text":"twice","text":"the last","url":"","source":"","lang":"","timestamp":1,"record":"r","meta":{}}',
    b'{"id":"d","text":"","url":"","source":"","lang":"","timestamp":99999999999999999999,"record":"r","meta":{"a":-0.0}}',
    b'{"id":"","text":"no id","url":"","source":"","lang":"","timestamp":true,"record":"","meta":{"a":"\\/"}}',
]


def test_lines_of_every_kind_come_out_as_read_documents_reads_them(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(AWKWARD))  # a byte order mark, no line end at the end
    with Run(tmp_path / "run") as run:
        result = dedup_minhash(run, [path])
    kept = list(read_documents(result.tasks[0] / "documents.jsonl.zst"))
    assert [d.to_json() for d in kept] == [d.to_json() for d in read_documents(path)]
    assert len(kept) == 8


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(AWKWARD[0] + b"\n{broken\n")
    with Run(tmp_path / "run") as run, pytest.raises(StageError, match=r"in\.jsonl, line 2"):
        dedup_minhash(run, [path])


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
        ({"max_memory": 1 << 20}, "max_memory must be at least 134217728 bytes, got 1048576"),
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


@pytest.mark.parametrize("level", [0, 19])
def test_documents_are_the_same_at_every_level_of_compression(tmp_path, level):
    documents, _ = corpus(np.random.default_rng(8), 10)
    found = []
    for name, config in (("a", MinHashConfig()), ("b", MinHashConfig(compression_level=level))):
        (tmp_path / name).mkdir()
        found.append(run_dedup(tmp_path / name, [documents], config)[1:])
    assert found[0] == found[1]


def test_parquet_that_we_wrote_keeps_meta(tmp_path):
    pytest.importorskip("pyarrow")
    text = " ".join(f"word{i}" for i in range(50))
    documents = [
        Document(id=str(i), text=text, record="r", meta={"score": i, "deep": {"a": [1, None]}}) for i in (1, 2)
    ]
    write_parquet(tmp_path / "in.parquet", iter(documents))
    assert list(read_documents(tmp_path / "in.parquet")) == documents
    with Run(tmp_path / "run") as run:
        result = dedup_minhash(run, [tmp_path / "in.parquet"], MinHashConfig(keep="best_score"))
    assert list(read_documents(result.tasks[0] / "documents.jsonl.zst")) == documents[1:]
