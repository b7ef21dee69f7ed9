import random
from pathlib import Path

import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import ContainmentConfig, drop_contained
from herdkern.engine import Run


def text(seed: int, num_words: int = 200) -> str:
    source = random.Random(seed)
    return " ".join(f"w{source.randrange(5000)}" for _ in range(num_words))


def document(name: str, words: str) -> Document:
    return Document(id=name, text=words, url="", source="web", lang="en", timestamp=0, record=f"f#{name}", meta={})


def write(path: Path, *documents: Document) -> Path:
    write_documents(path, documents)
    return path


def ids(paths: list[Path]) -> list[str]:
    return [found.id for path in paths for found in read_documents(path)]


def half_copied(share: float) -> str:
    """A text whose first part stands in the training document of seed 1."""
    return " ".join(text(1).split()[: int(200 * share)] + text(9).split()[int(200 * share) :])


@pytest.fixture
def train(tmp_path):
    shards = [[document("t1", text(0) + " " + text(1))], [document("t2", text(2))]]
    return [write(tmp_path / f"train-{i}.jsonl.zst", *docs) for i, docs in enumerate(shards)]


@pytest.mark.parametrize(("share", "kept"), [(0.0, True), (0.3, True), (0.45, True), (0.6, False), (1.0, False)])
def test_goes_when_more_than_half_of_its_ngrams_are_trained_on(tmp_path, train, share, kept):
    heldout = write(tmp_path / "web.jsonl.zst", document("h", half_copied(share)), document("other", text(7)))
    with Run(tmp_path / "run") as run:
        result = drop_contained(run, [heldout], train, ContainmentConfig())
    assert ids(result.files("heldout/web.jsonl.zst")) == (["h", "other"] if kept else ["other"])
    dropped = list(read_documents(result.files("dropped.jsonl.zst")[0]))
    assert [d.id for d in dropped] == ([] if kept else ["h"])
    assert result.counters["docs_in"] == 4  # both splits
    assert result.counters["docs_out"] == (4 if kept else 3)
    assert result.counters["dropped"] == {} if kept else {"contained_in_training": 1}


def test_parts_of_several_training_documents_count_together(tmp_path, train):
    pieces = text(1).split()[:90] + text(2).split()[:90]
    heldout = write(tmp_path / "web.jsonl.zst", document("h", " ".join(pieces)), document("other", text(7)))
    with Run(tmp_path / "run") as run:
        assert ids(drop_contained(run, [heldout], train, ContainmentConfig()).files("heldout/web.jsonl.zst")) == [
            "other"
        ]


def test_the_least_contained_stays_when_all_would_go(tmp_path, train):
    docs = [document("all", text(1)), document("most", half_copied(0.8))]
    heldout = write(tmp_path / "web.jsonl.zst", *docs)
    with Run(tmp_path / "run") as run:
        assert ids(drop_contained(run, [heldout], train, ContainmentConfig()).files("heldout/web.jsonl.zst")) == [
            "most"
        ]


def test_order_of_training_files_does_not_matter(tmp_path, train):
    heldout = [write(tmp_path / f"{s}.jsonl.zst", document(s, text(1)), document(s + "2", text(8))) for s in "ab"]
    kept = []
    for number, order in enumerate((train, train[::-1])):
        with Run(tmp_path / f"run{number}") as run:
            [task] = drop_contained(run, heldout, order, ContainmentConfig()).tasks
        kept.append({p.name: p.read_bytes() for p in sorted(task.rglob("*.zst"))})
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("field", "value"), [("max_contained", 1.5), ("max_contained", -0.1), ("ngram_size", 0)])
def test_refuses_settings_that_mean_nothing(field, value):
    with pytest.raises(ValueError, match=field):
        ContainmentConfig(**{field: value})
