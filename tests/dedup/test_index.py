"""New crawls against a saved index: the same as all at once, damage and other settings refused."""

import json

import numpy as np
import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import MinHashConfig
from herdkern.dedup.documents import dedup_minhash
from herdkern.dedup.index import add_to_index, read_index, save_index
from herdkern.engine import Run


def crawls(rng, num_crawls):
    """Documents of several crawls, the ids of each behind those of the one before, near-copies within and across."""
    found = [[] for _ in range(num_crawls)]
    for family in range(60):
        words = [f"f{family}w{i}" for i in range(100)]
        for _ in range(int(rng.integers(1, 6))):
            changed = list(words)
            for place in rng.choice(100, int(rng.integers(0, 5)), replace=False):  # some pairs are not similar any more
                changed[place] = f"x{rng.integers(0, 1 << 30)}"
            crawl = int(rng.integers(num_crawls))
            id_ = f"{crawl}{rng.integers(0, 1 << 40):015x}"
            found[crawl].append(Document(id=id_, text=" ".join(changed), url=f"http://h/{id_}", lang="en"))
    return found


def ids_of(result, name):
    return sorted(d.id for path in result.files(name) for d in read_documents(path))


def write(folder, documents):
    paths = []
    for number in range(2):
        paths.append(folder / f"in-{number}.jsonl.zst")
        write_documents(paths[-1], documents[number::2])
    return paths


@pytest.mark.parametrize("verify", ["exact", "signature"])
def test_crawl_by_crawl_equals_all_at_once(tmp_path, verify):
    config = MinHashConfig(keep="smallest_id", verify=verify)
    parts = crawls(np.random.default_rng(1), 3)
    (tmp_path / "all").mkdir()
    with Run(tmp_path / "all" / "run") as run:
        whole = dedup_minhash(run, write(tmp_path / "all", [d for part in parts for d in part]), config)
    kept, dropped = [], []
    for number, part in enumerate(parts):
        folder = tmp_path / f"crawl-{number}"
        folder.mkdir()
        with Run(folder / "run") as run:
            take = save_index if number == 0 else add_to_index
            result = take(run, tmp_path / "index", write(folder, part), config)
        kept += ids_of(result, "documents.jsonl.zst")
        dropped += ids_of(result, "dropped.jsonl.zst")
    assert sorted(kept) == ids_of(whole, "documents.jsonl.zst")
    assert sorted(dropped) == ids_of(whole, "dropped.jsonl.zst")
    assert dropped
    segments = read_index(tmp_path / "index", config)
    assert [s.first for s in segments] == np.cumsum([0] + [s.num_docs for s in segments[:-1]]).tolist()
    assert sum(s.num_docs for s in segments) == len(kept)


def test_what_is_in_the_index_stays(tmp_path):
    """The policy ranks the new document first, yet it is the one that goes, and it tells for whom."""
    text = " ".join(f"word{i}" for i in range(80))
    config = MinHashConfig(keep="newest")
    for number, timestamp in enumerate((1, 9)):
        folder = tmp_path / f"crawl-{number}"
        folder.mkdir()
        documents = [Document(id=f"d{number}", text=text + f" {number}", url=f"u{number}", timestamp=timestamp)]
        with Run(folder / "run") as run:
            take = save_index if number == 0 else add_to_index
            result = take(run, tmp_path / "index", write(folder, documents), config)
    (gone,) = (d for path in result.files("dropped.jsonl.zst") for d in read_documents(path))
    assert (gone.id, gone.meta["kept_id"], gone.meta["kept_url"]) == ("d1", "d0", "u0")


def test_a_crawl_that_is_there_already_adds_nothing(tmp_path, caplog):
    config = MinHashConfig(keep="smallest_id")
    for number in range(2):
        (tmp_path / f"crawl-{number}").mkdir()
    first, second = (write(tmp_path / f"crawl-{n}", part) for n, part in enumerate(crawls(np.random.default_rng(3), 2)))
    for number, paths in enumerate((first, second)):
        with Run(tmp_path / f"run-{number}") as run:
            (add_to_index if number else save_index)(run, tmp_path / "index", paths, config)
    assert not caplog.records
    before = {p: p.read_bytes() for p in sorted((tmp_path / "index").rglob("*")) if p.is_file()}
    for again in ("run-1", "run-2"):  # in the same run and in another
        with Run(tmp_path / again) as run:
            result = add_to_index(run, tmp_path / "index", second, config)
        assert ids_of(result, "documents.jsonl.zst") == []
        assert result.counters["docs_out"] == 0
        assert str(tmp_path / "index") in caplog.text
        assert "nothing was added" in caplog.text
        caplog.clear()
        assert {p: p.read_bytes() for p in sorted((tmp_path / "index").rglob("*")) if p.is_file()} == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    paths = write(folder, crawls(np.random.default_rng(2), 1)[0])
    with Run(folder / "run") as run:
        save_index(run, folder / "index", paths)
    return folder, paths


def test_other_settings_are_refused_by_name(saved, tmp_path):
    folder, paths = saved
    with Run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match=r"was made with .*seed=1 \(asked for 2\)"):
            add_to_index(run, folder / "index", paths, MinHashConfig(seed=2))
        with pytest.raises(ValueError, match=r"was made with min_similarity=0.75 \(asked for 0.8\); use"):
            add_to_index(run, folder / "index", paths, MinHashConfig(min_similarity=0.8))
        with pytest.raises(FileExistsError, match="index must be a new folder"):
            save_index(run, folder / "index", paths)
        with pytest.raises(FileNotFoundError):
            add_to_index(run, folder / "none", paths)
    read_index(folder / "index", MinHashConfig(max_memory=1 << 28, write_dropped=False))  # these do not matter


@pytest.mark.parametrize("name", ["signatures", "bands", "documents.npy", "names", "shingles", "shingles.begins"])
def test_a_flipped_bit_is_found(saved, name):
    folder, _ = saved
    path = folder / "index" / "segment-00000" / name
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="segment-00000 is damaged"):
        read_index(folder / "index", MinHashConfig())
    path.write_bytes(data)
    read_index(folder / "index", MinHashConfig())


def test_an_index_of_another_version_is_refused(saved, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="must be an index of version 1"):
        read_index(tmp_path, MinHashConfig())
