"""Our dedup inside datatrove pipelines: one task, and three executors with many tasks."""

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed (its pins: a virtual environment of its own)")

from datatrove.data import Document, Media
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from herdkern.dedup.datatrove_step import Dedup, DedupShards, ReadShard, WriteShard, from_document, to_document
from herdkern.dedup.exact import ExactDedupConfig
from herdkern.dedup.lines import LineDedupConfig
from herdkern.dedup.urls import UrlDedupConfig

LINE = "a line that stands on every page of this site"


def make_documents():
    documents = []
    for i in range(30):
        text = f"{LINE}\nbut this is what page {chr(97 + i % 20)} says of itself"  # digits would not tell lines apart
        metadata = {"url": f"http://a.example/{i % 25}", "date": f"2024-01-{1 + i % 28:02d}T00:00:00Z", "n": {"i": i}}
        documents.append(Document(text=text, id=f"doc-{i}", metadata=metadata))
    return documents


class Collect(PipelineStep):
    type, name = "TEST", "collect"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{rank}.txt").write_text("".join(f"{d.id}\t{d.text!r}\t{d.metadata['n']['i']}\n" for d in data))
        yield from ()


class Give(PipelineStep):
    type, name = "TEST", "give"

    def run(self, data, rank=0, world_size=1):
        yield from make_documents()[rank::world_size]


STEPS = (UrlDedupConfig(), ExactDedupConfig(), LineDedupConfig(max_count=6))


def collected(folder):
    return sorted(line for path in folder.iterdir() for line in path.read_text().splitlines())


def wanted():
    """Of 25 URLs the newest, of 20 texts the newest of these, without the line."""
    newest = {}
    for number, document in enumerate(make_documents()):
        url = document.metadata["url"]
        if url not in newest or document.metadata["date"] >= newest[url][1].metadata["date"]:
            newest[url] = (number, document)
    by_text = {}
    for number, document in newest.values():
        if document.text not in by_text or document.metadata["date"] > by_text[document.text][1].metadata["date"]:
            by_text[document.text] = (number, document)
    rows = by_text.values()
    return sorted(f"{d.id}\t{d.text.removeprefix(LINE + chr(10))!r}\t{number}" for number, d in rows)


def test_in_the_middle_of_a_pipeline(tmp_path):
    blocks = [Give(), Dedup(tmp_path / "dedup", STEPS), Collect(tmp_path / "out")]
    stats = LocalPipelineExecutor(blocks, tasks=1, logging_dir=str(tmp_path / "logs")).run()
    assert collected(tmp_path / "out") == wanted()
    told = {name: value.total for block in stats.stats for name, value in block.stats.items()}
    assert told["dropped: duplicate_url"] == 5
    assert told["dedup_lines: kept"] == len(wanted())


def test_three_executors_with_many_tasks(tmp_path):
    folder = tmp_path / "dedup"
    for number, (blocks, tasks) in enumerate(
        [
            ([Give(), WriteShard(folder)], 3),
            ([DedupShards(folder, STEPS, num_shards=3)], 1),
            ([ReadShard(folder), Collect(tmp_path / "out")], 2),
        ]
    ):
        logs = str(tmp_path / f"logs-{number}")
        LocalPipelineExecutor(blocks, tasks=tasks, workers=1, logging_dir=logs).run()
    assert collected(tmp_path / "out") == wanted()


def test_documents_come_back_as_they_were():
    document = Document(
        text="täxt\n", id="an id / of theirs", metadata={"url": "http://a/", "x": [1, {"y": None}], "f": 0.5}
    )
    back = from_document(to_document(document))
    assert (back.text, back.id, back.metadata) == (document.text, document.id, document.metadata)
    assert to_document(document).url == "http://a/"
    assert to_document(Document(text="", id="a", metadata={"date": "1970-01-02"})).timestamp == 86400


def test_what_cannot_be_held_is_named(tmp_path):
    with pytest.raises(ValueError, match="'a' must have no media"):
        to_document(Document(text="", id="a", media=[Media(id="m", type=0, url="")]))
    with pytest.raises(ValueError, match="metadata of document 'a' must be what JSON can hold"):
        to_document(Document(text="", id="a", metadata={"x": {1, 2}}))
    with pytest.raises(ValueError, match="world_size must be 1, got 2"):
        list(Dedup(tmp_path, STEPS).run([], 0, 2))
    with pytest.raises(ValueError, match="each kind once"):
        DedupShards(tmp_path, (UrlDedupConfig(), UrlDedupConfig()), num_shards=1)
    list(WriteShard(tmp_path).run(make_documents()))
    with pytest.raises(FileNotFoundError, match="must exist; run WriteShard in 2 tasks"):
        list(DedupShards(tmp_path, STEPS, num_shards=2).run(()))
    with pytest.raises(FileNotFoundError, match="run DedupShards first"):
        list(ReadShard(tmp_path).run())
