"""HTML files to clean documents without near-duplicates, with the reason for everything that was dropped.

Run: python examples/clean_your_pages.py [FOLDER_OF_HTML]     (without one: pages of this Python's own documentation)
"""

import pydoc
import sys
import tempfile
from pathlib import Path

from herdkern.data.document import read_documents
from herdkern.data.extract import ExtractConfig, extract_shard
from herdkern.data.filter import FilterConfig, filter_shard
from herdkern.data.sources import expand_inputs
from herdkern.dedup.documents import dedup_minhash
from herdkern.engine import Run


def write_pages(folder: Path) -> None:
    """Some real pages, and one of them again with a word changed."""
    for name in ("json", "random", "statistics", "textwrap", "calendar"):
        text = pydoc.html.page(name, pydoc.html.document(pydoc.locate(name), name))
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    copy = (folder / "random.html").read_text(encoding="utf-8").replace("uniform", "flat", 1)
    (folder / "random-copy.html").write_text(copy, encoding="utf-8")


with tempfile.TemporaryDirectory() as temporary:
    pages = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "pages"
    if len(sys.argv) == 1:
        pages.mkdir()
        write_pages(pages)
    with Run(Path(temporary) / "run") as run:
        extracted = run.map("extract", extract_shard, [expand_inputs([pages])], config=ExtractConfig())
        rules = FilterConfig(rules=("gopher_quality",))
        filtered = run.map("filter", filter_shard, extracted.files("documents.jsonl.zst"), config=rules)
        unique = dedup_minhash(run, filtered.files("documents.jsonl.zst"))
        for path in (*filtered.files("dropped.jsonl.zst"), *unique.files("dropped.jsonl.zst")):
            for document in read_documents(path):
                print(f"dropped {document.record:26} {document.meta['reason']:20} {document.meta.get('kept_url', '')}")
        for path in unique.files("documents.jsonl.zst"):
            for document in read_documents(path):
                print(f"kept    {document.record:26} {len(document.text):7,} characters: {document.text[:40]!r}")
