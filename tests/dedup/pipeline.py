"""URL, document and line dedup one after the other, as tests run it: in this process, or as a program of its own.

`python pipeline.py RUN INPUTS KIND WORKERS [reversed]` prints `summary` as JSON.
"""

import hashlib
import json
import random
import sys
import sysconfig
from pathlib import Path

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import LineDedupConfig, dedup_lines, dedup_minhash, dedup_urls
from herdkern.engine import Run, make_executor


def write_inputs(folder, num_shards, num_files=120, num_chars=20_000):
    """Library files with planted repeats of URLs, near-copies and lines."""
    folder.mkdir()
    rng = random.Random(1)
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:num_files]:
        text = path.read_text(encoding="utf-8")[:num_chars]
        url = f"http://docs.example/{path.stem}"
        documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text, url=url, timestamp=5))
        if rng.random() < 0.5:  # an older crawl of the same page
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text[:-5], url=url + "#old", timestamp=3))
        if rng.random() < 0.5:  # a near-copy elsewhere
            near = text.replace("the", "teh", 2)
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=near, url=url + "/copy", timestamp=4))
    rng.shuffle(documents)
    for shard in range(num_shards):
        write_documents(folder / f"in-{shard}.jsonl.zst", documents[shard::num_shards])


def run_stages(run_dir, inputs, executor):
    """[(name, result)] of the three dedups over document files."""
    with Run(run_dir, executor=executor) as run:
        urls = dedup_urls(run, inputs)
        documents = dedup_minhash(run, urls.files("documents.jsonl.zst"))
        lines = dedup_lines(run, documents.files("documents.jsonl.zst"), LineDedupConfig(max_count=3))
    return [("urls", urls), ("minhash", documents), ("lines", lines)]


def summary(inputs, results):
    """What does not depend on the order of the inputs: for each input its files' SHA-256, and the clusters."""
    files = {
        f"{name} {path.name} {file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for name, result in results
        for path, task in zip(inputs, result.tasks, strict=True)
        for file in sorted(task.iterdir())
    }
    clusters = {}
    for task in dict(results)["minhash"].tasks:
        for document in read_documents(task / "dropped.jsonl.zst"):
            clusters.setdefault(document.meta["kept_id"], []).append(document.id)
    counters = {name: result.counters for name, result in results}
    return {
        "files": files,
        "clusters": {kept: sorted(clusters[kept]) for kept in sorted(clusters)},
        "counters": counters,
    }


def main(run_dir, inputs_dir, kind, workers, order=""):
    inputs = sorted(Path(inputs_dir).iterdir(), reverse=order == "reversed")
    with make_executor(kind, int(workers)) as executor:
        print(json.dumps(summary(inputs, run_stages(run_dir, inputs, executor)), sort_keys=True), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
