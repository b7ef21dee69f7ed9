"""The HTML report of dedup runs: it holds what the run did, refuses nothing hostile, and needs no network."""

import html.parser
import random
import re
from xml.etree import ElementTree

import pytest

from herdkern.data.document import Document, write_documents
from herdkern.dedup import LineDedupConfig, MinHashConfig, dedup_lines, dedup_minhash, dedup_urls
from herdkern.dedup.exact import dedup_exact
from herdkern.engine import Run, write_json_atomic
from herdkern.report.dedup import read_dedup, render_dedup, steps_of, write_dedup_report
from herdkern.report.dedup_picture import write_dedup_picture

HOSTILE = '<script>alert(1)</script> & "quotes" \x00 \u202e'


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


WORDS = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "un", "est")]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rng = random.Random(1)
    documents = []
    for i in range(60):
        text = f"{words(rng, 120)}\n{HOSTILE} on every page"
        copies = [text, *(text.replace(" ", " and ", n) for n in range(1, rng.choice([1, 1, 3, 6])))]
        for n, copy in enumerate(copies):
            url = f"http://site-{i % 3}.example/page-{i}" + (f"?copy={n}" if n % 2 else "")
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=copy, url=url, timestamp=n))
    for shard in range(2):
        write_documents(folder / f"in-{shard}.jsonl.zst", documents[shard::2])
    minhash = MinHashConfig()
    with Run(folder / "run") as run:
        result = dedup_urls(run, sorted(folder.glob("in-*")))
        result = dedup_minhash(run, result.files("documents.jsonl.zst"), minhash)
        dedup_lines(run, result.files("documents.jsonl.zst"), LineDedupConfig())
    settings = {"num_bands": 20, "rows_per_band": 6, "min_similarity": 0.75, "verify": "exact"}
    write_json_atomic(folder / "run" / "config.json", {"name": "dedup all", "steps": {"dedup_minhash": settings}})
    return folder / "run"


class Page(html.parser.HTMLParser):
    """Headings, links, scripts, and whether every element that is opened is closed."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.headings = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_every_part_is_there(run_dir):
    text = write_dedup_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    for heading in ("Summary", "What each step left", "Clusters", "Clusters side by side", "Removed lines", "URLs"):
        assert heading in page.headings
    assert "1 − (1 − s^6)^20" in text
    assert "How many clusters are how large" in text
    assert "<del>" in text
    assert "<ins>" in text
    assert "site-0.example" in text


def test_figures_are_those_of_the_run(run_dir):
    record = read_dedup(run_dir)
    steps = {stage.name: stage for stage in steps_of(record)}
    assert list(steps) == ["dedup_urls", "dedup_minhash", "dedup_lines"]
    text = render_dedup(record)
    for stage in steps.values():
        assert f"{stage.docs_out:,}" in text
    urls = sum(count for _, count in record.hosts)
    assert urls == steps["dedup_urls"].dropped["duplicate_url"]
    assert len(record.similarities["dedup_minhash"]) == sum(steps["dedup_minhash"].dropped.values())


def test_nothing_is_loaded_or_run(run_dir):
    text = render_dedup(read_dedup(run_dir))
    page = Page(text)
    assert "script" not in page.seen
    assert "link" not in page.seen
    assert not [value for name, value in page.attributes if name in ("src", "onclick", "onload")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "default-src 'none'" in text
    assert not re.search(r"<script|\x00|\u202e", text)
    assert "&lt;script&gt;" in text


def test_the_same_run_gives_the_same_page(run_dir, tmp_path):
    first, second = (write_dedup_report(run_dir, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_of_one_step_or_none_has_a_report(tmp_path):
    write_documents(tmp_path / "in.jsonl", [Document(id=f"{i:016x}", text=f"text {i % 3}") for i in range(9)])
    with Run(tmp_path / "run") as run:
        pass
    (tmp_path / "run" / "journal.jsonl").touch()
    Page(render_dedup(read_dedup(tmp_path / "run")))
    with Run(tmp_path / "run") as run:
        dedup_exact(run, [tmp_path / "in.jsonl"])
    text = render_dedup(read_dedup(tmp_path / "run"))
    assert "66.7%" in text
    assert "2 to 3 documents" in text


def test_a_damaged_dropped_file_is_no_reason_to_fail(run_dir, tmp_path):
    import shutil

    shutil.copytree(run_dir, tmp_path / "run")
    path = next((tmp_path / "run" / "data" / "dedup_urls").glob("task-*/dropped.jsonl.zst"))
    path.write_bytes(path.read_bytes()[:-20])
    assert render_dedup(read_dedup(tmp_path / "run"))


def test_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run_dir must be a run folder"):
        write_dedup_report(tmp_path)


def test_the_picture_has_every_figure_and_is_alone(run_dir, tmp_path):
    root = ElementTree.parse(write_dedup_picture(run_dir, tmp_path / "dedup.svg")).getroot()
    text = " ".join(root.itertext())
    for title in ("What each step left", "20 bands of 6 rows", "How many clusters", "How similar the dropped are"):
        assert title in text
    kept = steps_of(read_dedup(run_dir))[-1].docs_out
    assert f"{kept:,}" in text
    assert not [v for element in root.iter() for v in element.attrib.values() if "://" in v or v.startswith("url(")]


def test_the_picture_of_a_run_without_stages(tmp_path):
    (tmp_path / "run").mkdir()
    write_json_atomic(tmp_path / "run" / "config.json", {"name": "empty"})
    root = ElementTree.parse(write_dedup_picture(tmp_path / "run", tmp_path / "empty.svg")).getroot()
    assert root.tag.endswith("svg")
