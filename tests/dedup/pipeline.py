"""URL, document and line dedup one after the other, run as `python pipeline.py RUN INPUTS EXECUTOR`."""

import sys
from pathlib import Path

from herdkern.dedup import LineDedupConfig, dedup_lines, dedup_minhash, dedup_urls
from herdkern.engine import Run, make_executor


def main(run_dir, inputs_dir, executor_kind):
    inputs = sorted(Path(inputs_dir).iterdir())
    with make_executor(executor_kind, 2) as executor, Run(run_dir, executor=executor) as run:
        urls = dedup_urls(run, inputs)
        documents = dedup_minhash(run, urls.files("documents.jsonl.zst"))
        lines = dedup_lines(run, documents.files("documents.jsonl.zst"), LineDedupConfig(max_count=3))
    for name, result in (("urls", urls), ("minhash", documents), ("lines", lines)):
        print(name, result.counters)


if __name__ == "__main__":
    main(*sys.argv[1:])
