"""The recipe on pages that nobody tuned it on: real articles, and good and broken WARC files of other makers."""

import io
import json
import os
from pathlib import Path

import pytest
import zstandard

from herdkern.data.warc import WarcWriter
from herdkern.engine import read_json

DATA = os.environ.get("HERDKERN_DATA", "")
FOLDER = Path(DATA) / "html-extraction"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="HERDKERN_DATA names no folder with html-extraction/")


def write_warc(path: Path, source: Path, limit: int) -> int:
    """A WARC of the first pages of a file of {"url", "html"} lines; returns how many."""
    with WarcWriter(path, date="2024-01-01T00:00:00Z", software="test") as warc, open(source, "rb") as file:
        reader = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
        for number, line in zip(range(limit), reader):
            page = json.loads(line)
            url = page.get("url") or f"http://test/{number}"
            body = page["html"].encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
            warc.write_page(url, b"GET / HTTP/1.1\r\n\r\n", head.encode() + body, [])
    return limit


def test_real_articles_and_foreign_warcs_run_through_the_recipe(runs, tmp_path):
    num_pages = write_warc(tmp_path / "articles.warc.gz", FOLDER / "article_extraction_benchmark.jsonl.zst", 60)
    words = runs.arguments(tmp_path / "run", tmp_path / "articles.warc.gz", FOLDER / "warc", train__steps=6)
    words += ["--data.filter.rules", "gopher_quality", "gopher_repetition", "c4", "--data.language.languages"]
    done = runs.run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    extract = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    counters = [entry["counters"] for entry in extract if entry["stage"] == "extract"]
    assert sum(c["docs_out"] for c in counters) > 0.9 * num_pages
    reasons = {reason for c in counters for reason in c["dropped"]}
    assert {"corrupt_warc", "truncated_record"} & reasons, reasons
    assert read_json(run / "evaluation.json")["bits_per_byte"] > 0
    assert "Dropped text" in (run / "report.html").read_text(encoding="utf-8")
