"""Training a byte-level BPE vocabulary, and counting the words for it: herdkern and the trainers of five packages.

    python benchmarks/bench_bpe_train.py [--quick] [--full] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

Each candidate runs on one thread in a process of its own that holds the documents as a list of str; times are its CPU
seconds, memory is what the training adds to the list at its peak. Before a time is shown our merges must equal those of
Hugging Face tokenizers (ties="huggingface") and of rustbpe and bpeasy (ties="tiktoken"). gigatoken cuts words in
another way and sentencepiece does another task, so their vocabularies are not compared. The text is the corpus that
HERDKERN_CORPUS names (corpus.py builds it); without it the cases of 10 MB take what Python's packages carry and the
larger ones are left out. --full adds 128k tokens on 700 MB; a candidate ends at --limit (default 420 s) and the table
says so. What takes more than ten seconds runs once.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import bpe_picture
from apart import Meter, answer, make_row, parse_options, print_row, run_apart
from bpe_peers import OTHER_TASK, SAME_MERGES, TRAINERS
from corpus import corpus_folder, installed_texts, read_corpus
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine

from herdkern.tokenizer import WordCounts, train_bpe


class Training(NamedTuple):
    """One row: vocab_size tokens on megabytes of text; 0 tokens: words are counted, nothing is trained."""

    name: str
    megabytes: int
    vocab_size: int
    candidates: tuple[str, ...]
    threads: int = 1


QUICK = (OURS, "herdkern-tiktoken-ties", "rustbpe", "tokenizers")
TRAININGS = [
    Training("2MB-8k", 2, 8_192, QUICK),
    Training("10MB-32k", 10, 32_768, tuple(TRAINERS)),
    Training("100MB-32k", 100, 32_768, tuple(TRAINERS)),
    Training("700MB-128k", 700, 131_072, (OURS, "herdkern-tiktoken-ties", "rustbpe", "tokenizers", "gigatoken")),
    Training("count-2MB", 2, 0, (OURS, "tokenizers")),
    Training("count-10MB", 10, 0, (OURS, "rustbpe", "tokenizers")),
    Training("count-700MB", 700, 0, (OURS,)),
    Training("count-700MB-2-threads", 700, 0, (OURS,), 2),
]
IN_QUICK = {"2MB-8k", "count-2MB"}
IN_FULL = {"700MB-128k"}
LARGEST_INSTALLED = 10  # megabytes that every installation has
ONCE_SECONDS = 10  # what takes longer runs once


def texts_of(megabytes: int) -> list[str]:
    """Documents of the corpus; where there is none, of the installation."""
    folder = corpus_folder()
    return read_corpus(folder, megabytes * 1_000_000) if folder else installed_texts(megabytes * 1_000_000)


def train(candidate: str, megabytes: int, vocab_size: int, threads: int) -> dict[str, Any]:
    """Runs in the candidate's own process. A digest stands for the vocabulary."""
    texts = texts_of(megabytes)
    size = sum(len(text.encode()) for text in texts)
    run = TRAINERS[candidate]
    if vocab_size == 0:
        with Meter() as meter:
            if candidate == OURS:
                digest = len(WordCounts().add(texts, num_threads=threads))
            else:
                run(texts, 257)  # the least that these can be asked for
                digest = 0
        return {"digest": digest, "bytes": size, **vars(meter)}
    with Meter() as meter:
        ranks = run(texts, vocab_size)
    tokens = sorted(ranks, key=ranks.__getitem__)
    digest = hashlib.sha256(b"".join(b"%d " % len(token) + token for token in tokens)).hexdigest()
    return {"digest": digest, "num_tokens": len(tokens), "bytes": size, **vars(meter)}


def run_training(training: Training, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of one training; None, said aloud, if ours failed or has other merges than a peer."""
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    task = {"function": "train", "megabytes": training.megabytes, "vocab_size": training.vocab_size}
    for turn in range(options.rounds):
        for candidate in training.candidates:
            if candidate in failed or (turn and found[candidate][0]["wall_s"] > ONCE_SECONDS):
                continue
            asked = task | {"candidate": candidate, "threads": training.threads}
            one = run_apart(asked, seconds=options.limit, threads=training.threads, wrap=options.wrap)
            if "failed" in one:
                failed[candidate] = f"failed: {one['failed']}"
            else:
                found.setdefault(candidate, []).append(one)
            said = failed.get(candidate) or f"{one['cpu_s']:.2f} s, {one['peak_mib']:.0f} MiB"
            print(f"    {training.name} {candidate}: {said}", flush=True)
    if OURS not in found:
        print(f"\n{training.name}: no times: {failed[OURS]}", flush=True)
        return None
    digests = {candidate: runs[0]["digest"] for candidate, runs in found.items()}
    for peer, twin in SAME_MERGES.items() if training.vocab_size else ():
        if twin in failed or (peer in digests and digests[peer] != digests.get(twin)):
            what = failed.get(twin, f"WRONG RESULT: {peer} has other merges than {twin}")
            print(f"\n{training.name}: no times: {what}", flush=True)
            return None
    clock = "wall_s" if training.threads > 1 else "cpu_s"
    samples = {candidate: [one[clock] for one in runs] for candidate, runs in found.items()}
    num_bytes = found[OURS][0]["bytes"]
    aside = {name: what for name, what in OTHER_TASK.items() if name in found}
    row = make_row(training.name, samples, num_bytes, clock=clock, aside=aside, threads=training.threads)
    row["peak_mib"] = {name: round(min(one["peak_mib"] for one in runs), 1) for name, runs in found.items()}
    row["wall_s"] = {name: round(min(one["wall_s"] for one in runs), 3) for name, runs in found.items()}
    if training.vocab_size:
        row["same_merges"] = sorted(peer for peer in SAME_MERGES if peer in found)
        lean = [peak for name, peak in row["peak_mib"].items() if name != OURS and name not in aside]
        row["memory_of_leanest_peer"] = round(row["peak_mib"][OURS] / max(min(lean, default=0.1), 0.1), 3)
        row["times"] = {name: round(row[name] / row[OURS], 2) for name in samples if name != OURS}
    if failed:
        row["failed"] = failed
    print_row(row)
    return row


def chosen(options: argparse.Namespace) -> list[Training]:
    """The trainings that were asked for and whose text is there."""
    if options.quick:
        os.environ.pop("HERDKERN_CORPUS", None)
        return [training for training in TRAININGS if training.name in IN_QUICK and options.case in training.name]
    some = [t for t in TRAININGS if options.case in t.name and t.name not in IN_QUICK]
    some = [t for t in some if options.full or t.name not in IN_FULL]
    if corpus_folder() is None:
        for training in some:
            if training.megabytes > LARGEST_INSTALLED:
                print(f"{training.name} is left out: HERDKERN_CORPUS must name a folder of corpus.py", flush=True)
        some = [t for t in some if t.megabytes <= LARGEST_INSTALLED]
    cores = len(os.sched_getaffinity(0))
    return [t for t in some if t.threads <= cores]


def main() -> int:
    answer({"train": train})
    options = parse_options((t.name for t in TRAININGS), limit=420, quick_limit=30, full="also 128k tokens on 700 MB")
    trainings = chosen(options)
    machine = describe_machine(1) | {"clock": "cpu", "corpus": "installed" if corpus_folder() is None else "corpus"}
    print(
        f"bpe_train on {machine['cpu']}, {machine['cores']} cores, CPU seconds of one thread, {machine['corpus']} text"
    )
    rows: list[dict[str, Any]] = []
    report = {"bench": "bpe_train", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    start = time.time()
    for i, training in enumerate(trainings):
        row = run_training(training, options)
        rows += [row] if row else []
        write_json(options.json, report | {"unfinished": True})
        print(f"  {i + 1} of {len(trainings)}, {time.time() - start:.0f} s since the start", flush=True)
    summarise(report)
    write_json(options.json, report)
    if options.json:
        bpe_picture.draw(Path(options.json))
    print("\n" + json.dumps(report))
    return 1 if len(rows) < len(trainings) else 0


def summarise(report: dict[str, Any]) -> None:
    """Adds how much faster two threads count than one, by the wall clock, and prints it."""
    walls = {row["case"]: row["wall_s"][OURS] for row in report["cases"]}
    one, two = walls.get("count-700MB"), walls.get("count-700MB-2-threads")
    if one and two:
        report["count_2_threads"] = round(one / two, 2)
        print(f"\ncounting on 2 threads takes 1/{one / two:.2f} of the time on the wall of 1 thread")


def small() -> dict[str, Any]:
    texts = installed_texts(1_000_000)
    return {OURS: lambda: train_bpe(texts, 4096, special_tokens=())}


test_bpe_train = pytest_cases(Bench("bpe_train", [Case(name="1MB-4k", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
