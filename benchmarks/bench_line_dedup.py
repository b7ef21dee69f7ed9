"""Line dedup: texts in, texts without the lines that occur more than six times out; herdkern and two others.

    python benchmarks/bench_line_dedup.py [--quick] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

Each candidate runs on one thread in a process of its own that holds the documents as a list of str; times are its CPU
seconds, memory is what the work adds to the list at its peak. "herdkern" finds and removes. Not compared, since they do
not do the same: "herdkern hash + count" leaves the removal out, from bytes or from str; "herdkern stages" is
dedup_lines from JSON lines to compressed JSON lines, all stages, files synced; "datatrove" is the work of its sentence
dedup set to single lines (the first stage and the search, its own normal form): every copy but the first is found,
nothing is removed. "cc_net in NumPy" is the plain method: CCNet's normal form by regular expressions, SHA-1,
numpy.unique, lines joined again.
A candidate that does not finish in --limit (120) seconds is named with the reason, and the others go on.
Before any time is taken, lines planted 1 to 12 times must be gone exactly if they occur more than six times. The text
is the corpus that HERDKERN_CORPUS names; without it the case of 10 MB takes what Python's packages carry.
"""

import argparse
import hashlib
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from apart import Meter, answer, make_row, parse_options, print_row, run_apart
from corpus import corpus_folder, installed_texts, read_corpus
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine

from herdkern import _text
from herdkern.dedup.lines import remove_frequent_lines

COUNT, COUNT_STR = "herdkern hash + count", "herdkern hash + count, str"
STAGES, CC_NET, DATATROVE = "herdkern stages", "cc_net in NumPy", "datatrove"
ASIDE = {
    COUNT: "leaves the removal out; texts are bytes of UTF-8",
    COUNT_STR: "leaves the removal out",
    STAGES: "reads and writes files",
    DATATROVE: "finds all copies but the first, removes none",
}
CASES = {"2MB": 2, "10MB": 10, "100MB": 100, "700MB": 700}
LARGEST_INSTALLED, LARGEST_OF_PEERS = 10, 100  # megabytes
MAX_COUNT = 6


def texts_of(megabytes: int) -> list[str]:
    """Documents of the corpus; where there is none, of the installation."""
    folder = corpus_folder()
    return read_corpus(folder, megabytes * 1_000_000) if folder else installed_texts(megabytes * 1_000_000)


def remove_herdkern(texts: list[str]) -> dict[str, Any]:
    kept = remove_frequent_lines(texts, max_count=MAX_COUNT, code_aware=False, num_threads=1)
    return {"characters_left": sum(map(len, kept))}


def count_herdkern(texts: Sequence[str | bytes]) -> dict[str, Any]:
    """Keys, a few megabytes of text at a time, then exact counts, as the stages work."""
    keys = []
    begin = 0
    while begin < len(texts):
        end, size = begin, 0
        while end < len(texts) and size < 8 << 20:
            size += len(texts[end])
            end += 1
        some, begins = _text.line_keys(texts[begin:end], 1, "auto")
        keys.append(_text.partition_lines(some, begins, np.zeros(end - begin, np.uint64), False, 1)[0])
        begin = end
    table = _text.LineCounts(0, 1, 1, sum(map(len, keys)))
    for some in keys:
        table.add(some)
    num_keys = table.num_keys()
    return {"distinct_lines": num_keys, "bytes_per_line": round(table.table_bytes() / max(1, num_keys), 2)}


def run_stages(texts: list[str]) -> dict[str, Any]:
    from herdkern.data.document import Document, write_documents
    from herdkern.dedup.lines import LineDedupConfig, dedup_lines
    from herdkern.engine import Run

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "in.jsonl"
        write_documents(path, (Document(id=f"{i:016x}", text=text) for i, text in enumerate(texts)))
        texts.clear()
        with Meter() as meter, Run(Path(name) / "run") as run:
            counters = dedup_lines(run, [path], LineDedupConfig(max_memory=128 << 20)).counters
    return {"lines_removed": counters["lines_removed"], "meter": vars(meter)}


DIGITS, NO_WORD = re.compile(r"\d"), re.compile(r"[^\w\s]|_")


def remove_cc_net(texts: list[str]) -> dict[str, Any]:
    """CCNet's rule (case, digits and punctuation do not count), 64 bits of SHA-1, numpy.unique."""
    lines = [text.split("\n") for text in texts]
    digests = bytearray()
    for some in lines:
        for line in some:
            form = NO_WORD.sub("", DIGITS.sub("0", line.strip().lower()))
            digests += hashlib.sha1(form.encode(), usedforsecurity=False).digest()[:8] if form else bytes(8)
    keys = np.frombuffer(digests, np.uint64)
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    stays = ((counts[places] <= MAX_COUNT) | (keys == 0)).tolist()
    kept, begin = [], 0
    for some in lines:
        kept.append("\n".join(line for line, flag in zip(some, stays[begin : begin + len(some)], strict=True) if flag))
        begin += len(some)
    return {"characters_left": sum(map(len, kept))}


def find_datatrove(texts: list[str]) -> dict[str, Any]:
    from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig
    from datatrove.utils.hashing import create_hash_func
    from datatrove.utils.text import simplify_text

    config = SentDedupConfig(n_sentences=1, split_sentences=False)
    hash_line = create_hash_func(config.hash_config)
    found = []
    for number, text in enumerate(texts):
        forms = [simplify_text(line, config.norm_config) for line in text.splitlines()]
        found += [(hash_line(form), number, place & 0xFFFF) for place, form in enumerate(forms) if form.strip()]
    table = np.array(found, dtype=[("hash", config.hash_config.np_descr), ("doc", "<u4"), ("sent", "<u2")])
    table.sort(axis=0)
    return {"copies": int((table["hash"][1:] == table["hash"][:-1]).sum())}


CANDIDATES: dict[str, Callable[[Any], dict[str, Any]]] = {
    OURS: remove_herdkern,
    COUNT: count_herdkern,
    COUNT_STR: count_herdkern,
    STAGES: run_stages,
    CC_NET: remove_cc_net,
    DATATROVE: find_datatrove,
}


def work(candidate: str, megabytes: int) -> dict[str, Any]:
    """Runs in the candidate's own process."""
    texts = texts_of(megabytes)
    size, lines = sum(len(text.encode()) for text in texts), sum(text.count("\n") + 1 for text in texts)
    if candidate == COUNT:
        texts = [text.encode() for text in texts]
    CANDIDATES[candidate](texts[:1].copy())  # imports are no part of the work
    with Meter() as meter:
        found = CANDIDATES[candidate](texts)
    return {"bytes": size, "lines": lines, **vars(meter), **found.pop("meter", {}), "found": found}


def check() -> None:
    """Planted lines go exactly if they occur more than six times, wherever and in whatever form they stand."""
    rng = random.Random(1)
    words = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(600)]
    documents = [[f"own {words[i]} {words[j]} line" for j in range(6)] for i in range(400)]
    for count in range(1, 13):
        for number in range(20):
            for _ in range(count):
                form = rng.choice(["planted {} x {}", "Planted: {}, X {}!", "  PLANTED {} -- x {}  "])
                rng.choice(documents).append(form.format(words[count], words[number]))
    for lines in documents:
        rng.shuffle(lines)
    kept = remove_frequent_lines(["\n".join(lines) for lines in documents], max_count=MAX_COUNT)
    left = Counter()
    for line in "\n".join(kept).split("\n"):
        form = re.sub(r"[\W_]+", " ", line.lower()).split()
        left[(form[0], form[1] if form[0] == "planted" else "")] += 1
    wanted = {("planted", words[count]): 20 * count for count in range(1, MAX_COUNT + 1)}
    assert left == {**wanted, ("own", ""): 2400}, left


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    megabytes = CASES[name]
    runs: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    peers = (CC_NET, DATATROVE) if megabytes <= LARGEST_OF_PEERS else ()
    for turn in range(options.rounds):
        for candidate in (OURS, COUNT, COUNT_STR, STAGES, *peers):
            if candidate in failed or (turn and runs[candidate][0]["wall_s"] > options.limit / 20):
                continue
            task = {"function": "work", "candidate": candidate, "megabytes": megabytes}
            one = run_apart(task, seconds=options.limit, wrap=options.wrap)
            if "failed" in one:
                failed[candidate] = f"failed: {one['failed']}"
            else:
                runs.setdefault(candidate, []).append(one)
            said = failed.get(candidate) or f"{one['cpu_s']:.2f} s, {one['peak_mib']:.0f} MiB"
            print(f"    {name} {candidate}: {said}", flush=True)
    if OURS not in runs:
        print(f"\n{name}: no times: {failed[OURS]}", flush=True)
        return None
    samples = {candidate: [one["cpu_s"] for one in some] for candidate, some in runs.items()}
    aside = {candidate: what for candidate, what in ASIDE.items() if candidate in runs}
    row = make_row(name, samples, runs[OURS][0]["bytes"], clock="cpu_s", aside=aside)
    row["peak_mib"] = {candidate: round(min(one["peak_mib"] for one in some), 1) for candidate, some in runs.items()}
    row["wall_s"] = {candidate: round(min(one["wall_s"] for one in some), 3) for candidate, some in runs.items()}
    row["lines"] = runs[OURS][0]["lines"]
    row["found"] = {candidate: some[0]["found"] for candidate, some in runs.items()}
    row["bytes_per_distinct_line"] = row["found"].get(COUNT, {}).get("bytes_per_line")
    if failed:
        row["failed"] = failed
    print_row(row)
    return row


def main() -> int:
    answer({"work": work})
    options = parse_options(CASES, limit=120, quick_limit=40)
    if options.quick:
        os.environ.pop("HERDKERN_CORPUS", None)
    largest = LARGEST_INSTALLED if corpus_folder() is None else max(CASES.values())
    names = ["2MB"] if options.quick else [name for name in CASES if name != "2MB" and CASES[name] <= largest]
    names = [name for name in names if options.case in name]
    check()
    machine = describe_machine(1) | {"clock": "cpu", "corpus": "installed" if corpus_folder() is None else "corpus"}
    print(f"line_dedup on {machine['cpu']}, CPU seconds of one thread, {machine['corpus']} text; planted lines: exact")
    rows: list[dict[str, Any]] = []
    report = {"bench": "line_dedup", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    for name in names:
        row = run_case(name, options)
        rows += [row] if row else []
        write_json(options.json, report | {"unfinished": True})
    write_json(options.json, report)
    return 1 if len(rows) < len(names) else 0


def small() -> dict[str, Any]:
    texts = installed_texts(1_000_000)
    return {OURS: lambda: remove_herdkern(texts)}


test_line_dedup = pytest_cases(Bench("line_dedup", [Case(name="1MB", setup=small, check=lambda functions: check())]))

if __name__ == "__main__":
    sys.exit(main())
