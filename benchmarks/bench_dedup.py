"""Near-duplicate removal end to end, documents in and documents out: herdkern and the packages that people use for it.

    python benchmarks/bench_dedup.py [--quick] [--full] [--case PART] [--json FILE] [--rounds N] [--peers PYTHON ...]

Each candidate reads a file of JSON lines, signs (128 slots, 5-word shingles), bands (16 of 8 rows), clusters and
writes what stays, on one core in a process of its own (dedup_peers.py); times are its CPU seconds, memory is what the
work adds at its peak. The documents are those of HERDKERN_CORPUS, else of what Python's packages carry, with
near-copies planted: 25 of a million bytes, each with a share of its words changed. Slow packages take part in the
smaller cases alone: their time per megabyte is theirs there. Not compared: "herdkern-exact", which decides by the exact
sets of shingles and reads the texts of candidates again for it; "herdkern" decides as the others do, by signatures.

Beside each speed stands what the result is worth against exact Jaccard similarity of shingles, by numpy alone:
recall_planted, of the planted pairs of similarity 0.8 and more those of which one went; recall_natural, the same for
pairs that the corpus has by itself (equal texts aside) and that hold one of 4,000 sampled documents; precision, of the
sampled documents that went those with one of similarity 0.7 or more, or of equal text, among those that stayed. Where
words end is a rule of each package: a pair counts for recall if it is similar by ours and by str.split, a document that
went was right to go if it is similar by either. No time of ours is shown where recall or precision are off.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from apart import make_row, parse_options, print_row, python_with, run_script
from bench_minhash import documents
from corpus import corpus_folder
from dedup_peers import CANDIDATES, MIN_SIMILARITY, NGRAM_SIZE, herdkern, shingles
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine

from herdkern.data.document import Document, write_documents
from herdkern.dedup.minhash import shingle_hashes
from herdkern.engine import sha256_file, write_json_atomic

EXACT = "herdkern-exact"
OWN = (OURS, EXACT)
ASIDE = {EXACT: "decides by exact sets of shingles"}
MODULES = {"rensa-cminhash": ["rensa"], "text-dedup": ["text_dedup", "datasets"], "datatrove": ["datatrove", "orjson"]}
RECALL_AT, SAMPLE = 0.8, 4000
LEAST = {"recall_planted": 0.93, "recall_natural": 0.9, "precision": 0.95}  # of ours; of "exact" precision must be 1


class Job(NamedTuple):
    """One row: the candidates that are fast enough for so many megabytes."""

    name: str
    megabytes: int
    num_pairs: int
    candidates: tuple[str, ...]


FAST = (*OWN, "gaoya", "rensa", "FastSketchLSH")
JOBS = [
    Job("dedup-2MB", 2, 50, (*FAST, "rensa-cminhash", "datasketch")),
    Job("dedup-10MB", 10, 250, tuple(CANDIDATES)),
    Job("dedup-240MB", 240, 6000, FAST),
]
IN_QUICK, IN_FULL = {"dedup-2MB"}, {"dedup-240MB"}


class Truth(NamedTuple):
    """What is known of the documents of a case, by row.

    planted: (num_pairs, 2) rows, with similarities (num_pairs, 2) by our rule and by str.split.  pairs, similarity: the
    same for all pairs of 0.5 and more by either rule that hold a row of `sample`.  text: a number for every distinct
    text.
    """

    planted: np.ndarray
    planted_similarity: np.ndarray
    sample: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray
    text: np.ndarray


def plant(texts: list[str], num_pairs: int) -> tuple[list[str], np.ndarray]:
    """(the texts and near-copies of some of them, in random order; rows of text and copy)."""
    rng = np.random.default_rng(1)
    long = [i for i, text in enumerate(texts) if 120 <= text.count(" ") <= 5000]
    chosen = rng.choice(long, min(num_pairs, len(long)), replace=False)
    copies = []
    for place in chosen.tolist():
        words = texts[place].split(" ")
        for i in rng.choice(len(words), max(1, int(rng.uniform(0.001, 0.04) * len(words))), replace=False):
            words[i] = f"changed{rng.integers(0, 1 << 30)}"
        copies.append(" ".join(words))
    everything = texts + copies
    order = rng.permutation(len(everything))
    row_of = np.argsort(order)
    pairs = np.stack([row_of[chosen], row_of[len(texts) :]], axis=1)
    return [everything[i] for i in order.tolist()], pairs


def similarities(sets: Sequence[np.ndarray], sample: np.ndarray, floor: float) -> dict[tuple[int, int], float]:
    """(row of the sample, another row) -> their exact Jaccard similarity, where it reaches the floor."""
    sizes = np.array([len(one) for one in sets])
    values = np.concatenate(sets)
    order = np.argsort(values, kind="stable")
    values, owners = values[order], np.repeat(np.arange(len(sets), dtype=np.int32), sizes)[order]
    del order
    found = {}
    for row in sample.tolist():
        begins, ends = (np.searchsorted(values, sets[row], side) for side in ("left", "right"))
        lengths = ends - begins
        inside = np.repeat(begins - np.append(0, np.cumsum(lengths)[:-1]), lengths) + np.arange(lengths.sum())
        common = np.bincount(owners[inside], minlength=len(sets))
        share = common / np.maximum(1, sizes + sizes[row] - common)
        share[row] = 0
        for other in np.flatnonzero(share >= floor).tolist():
            found[row, other] = float(share[other])
    return found


def learn_truth(texts: list[str], planted: np.ndarray) -> Truth:
    """The exact similarities that candidates are judged by."""
    own = [np.unique(hashes) for hashes in shingle_hashes(texts, ngram_size=NGRAM_SIZE)]
    plain = [np.unique(np.fromiter(map(hash, shingles(text)), np.int64)) for text in texts]

    def by_both(a: int, b: int) -> tuple[float, ...]:
        common = [len(np.intersect1d(sets[a], sets[b], assume_unique=True)) for sets in (own, plain)]
        return tuple(c / max(1, len(s[a]) + len(s[b]) - c) for c, s in zip(common, (own, plain), strict=True))

    sample = np.sort(np.random.default_rng(2).permutation(len(texts))[:SAMPLE])
    pairs = sorted({pair for sets in (own, plain) for pair in similarities(sets, sample, 0.5)})
    numbers: dict[str, int] = {}
    return Truth(
        planted=planted,
        planted_similarity=np.array([by_both(a, b) for a, b in planted.tolist()]).reshape(-1, 2),
        sample=sample,
        pairs=np.array(pairs, np.int64).reshape(-1, 2),
        similarity=np.array([by_both(a, b) for a, b in pairs]).reshape(-1, 2),
        text=np.array([numbers.setdefault(text, len(numbers)) for text in texts]),
    )


def prepare(job: Job, folder: Path) -> tuple[Path, int, Truth]:
    """(documents, their bytes of text, truth); what the folder holds from an earlier run is taken."""
    corpus = "installed" if corpus_folder() is None else "corpus"
    path, facts, about = (folder / f"{job.name}-{corpus}{end}" for end in (".jsonl", ".npz", ".json"))
    if not about.exists():
        texts, planted = plant(documents(job.megabytes * 1_000_000), job.num_pairs)
        write_documents(path, (Document(id=f"{i:016x}", text=text) for i, text in enumerate(texts)))
        np.savez(facts, **learn_truth(texts, planted)._asdict())
        write_json_atomic(about, {"bytes": sum(len(text.encode()) for text in texts)})
    with np.load(facts) as held:
        return path, json.loads(about.read_text())["bytes"], Truth(**held)


def judge(kept_ids: Sequence[str], truth: Truth) -> dict[str, float | int | None]:
    """Recall and precision, as the head of this file has them."""
    is_kept = np.zeros(len(truth.text), bool)
    is_kept[[int(id_, 16) for id_ in kept_ids]] = True

    def recall(pairs: np.ndarray) -> float | None:
        return round(float(1 - is_kept[pairs].all(axis=1).mean()), 4) if len(pairs) else None

    is_planted = {tuple(pair) for both in truth.planted.tolist() for pair in (both, both[::-1])}
    natural = np.array([tuple(pair) not in is_planted for pair in truth.pairs.tolist()], bool)
    natural &= truth.text[truth.pairs[:, 0]] != truth.text[truth.pairs[:, 1]]
    natural &= truth.similarity.min(axis=1) >= RECALL_AT
    first, second = truth.pairs[(truth.similarity.max(axis=1) >= MIN_SIMILARITY)].T
    has_keeper = np.zeros(len(truth.text), bool)
    has_keeper[first[is_kept[second]]] = True
    has_keeper |= np.isin(truth.text, truth.text[is_kept])
    went = truth.sample[~is_kept[truth.sample]]
    planted = truth.planted[truth.planted_similarity.min(axis=1) >= RECALL_AT]
    return {
        "recall_planted": recall(planted),
        "recall_natural": recall(truth.pairs[natural]),
        "precision": round(float(has_keeper[went].mean()), 4) if len(went) else None,
        "planted_pairs": len(planted),
        "natural_pairs": int(natural.sum()),
        "sampled_that_went": len(went),
        "kept": int(is_kept.sum()),
    }


def what_is_off(candidate: str, judged: dict[str, Any]) -> str:
    """Which figure of ours is too low, or nothing."""
    least = LEAST | ({"precision": 1.0} if candidate == EXACT else {})
    low = [f"{name} {judged[name]}" for name in least if judged[name] is not None and judged[name] < least[name]]
    return ", ".join(low)


def run_one(candidate: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the candidate's process tells, or {"failed": reason}."""
    python = sys.executable if candidate in OWN else python_with(MODULES.get(candidate, [candidate]), options.peers)
    if python is None:
        return {"failed": "not installed"}
    script = str(Path(__file__).with_name("dedup_peers.py"))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [python, script, candidate, str(path), folder]
        return run_script(command, seconds=options.limit, wrap=options.wrap, environment={"PYTHONHASHSEED": "0"})


def run_job(job: Job, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of one case; None, said aloud, if ours failed or its result is off."""
    path, num_bytes, truth = prepare(job, folder)
    sha256_file(path)  # read once, so that nobody is the first and pays for the disk
    runs: dict[str, list[dict[str, Any]]] = {}
    judged: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for turn in range(options.rounds):
        for candidate in job.candidates:
            if candidate in failed or (turn and runs[candidate][0]["wall_s"] > options.limit / 20):
                continue
            one = run_one(candidate, path, options)
            if "failed" in one:
                failed[candidate] = f"failed: {one['failed']}"
            else:
                judged[candidate] = judge(one.pop("kept"), truth)
                runs.setdefault(candidate, []).append(one)
                if candidate in OWN and (off := what_is_off(candidate, judged[candidate])):
                    print(f"\n{job.name}: no times: WRONG RESULT: {candidate} {off}", flush=True)
                    return None
            said = failed.get(candidate) or f"{num_bytes / 1e6 / one['cpu_s']:.2f} MB/s, {one['peak_mib']:.0f} MiB"
            print(f"    {job.name} {candidate}: {said}", flush=True)
    if OURS not in runs:
        print(f"\n{job.name}: no times: {failed[OURS]}", flush=True)
        return None
    samples = {name: [one["cpu_s"] for one in some] for name, some in runs.items()}
    aside = {name: what for name, what in ASIDE.items() if name in runs}
    row = make_row(job.name, samples, num_bytes, clock="cpu_s", aside=aside, threads=1)
    row["peak_mib"] = {name: round(min(one["peak_mib"] for one in some), 1) for name, some in runs.items()}
    row["process_mib"] = {name: round(min(one["process_mib"] for one in some), 1) for name, some in runs.items()}
    row["wall_s"] = {name: round(min(one["wall_s"] for one in some), 3) for name, some in runs.items()}
    row["times"] = {name: round(row[name] / row[OURS], 2) for name in samples if name != OURS}
    row["judged"] = judged
    row["docs"] = len(truth.text)
    row["versions"] = {name: some[0]["version"] for name, some in runs.items() if some[0]["version"]}
    if failed:
        row["failed"] = failed
    print_row(row)
    print_judged(row)
    return row


def print_judged(row: dict[str, Any]) -> None:
    """A line for each candidate: what its result is worth, and its memory."""

    def share(value: float | None) -> str:
        return "     -" if value is None else f"{value:6.3f}"

    print(f"  {'':16} planted natural precision    kept  MiB added   (pairs and documents judged: ours)")
    for name, one in row["judged"].items():
        shown = [share(one[key]) for key in ("recall_planted", "recall_natural", "precision")]
        counts = (
            f"   ({one['planted_pairs']}, {one['natural_pairs']}, {one['sampled_that_went']})" if name == OURS else ""
        )
        print(f"  {name:16}  {'  '.join(shown)}  {one['kept']:8} {row['peak_mib'][name]:9.0f}{counts}", flush=True)


def main() -> int:
    options = parse_options(
        (job.name for job in JOBS), limit=600, quick_limit=40, full="also 240 MB", takes_peers=True,
        keeps="documents and their exact similarities",
    )  # fmt: skip
    if options.quick:
        os.environ.pop("HERDKERN_CORPUS", None)
    jobs = [job for job in JOBS if (job.name in IN_QUICK) == options.quick and options.case in job.name]
    jobs = [job for job in jobs if options.full or job.name not in IN_FULL]
    machine = describe_machine(1) | {"clock": "cpu", "corpus": "installed" if corpus_folder() is None else "corpus"}
    print(f"dedup on {machine['cpu']}, {machine['cores']} cores, CPU seconds of one core, {machine['corpus']} text")
    rows: list[dict[str, Any]] = []
    report = {"bench": "dedup", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for i, job in enumerate(jobs):
            row = run_job(job, folder, options)
            rows += [row] if row else []
            write_json(options.json, report | {"unfinished": True})
            print(f"  {i + 1} of {len(jobs)}, {time.time() - start:.0f} s since the start", flush=True)
    write_json(options.json, report)
    return 1 if len(rows) < len(jobs) else 0


def small() -> dict[str, Any]:
    texts, planted = plant(documents(500_000), 12)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "in.jsonl"
    write_documents(path, (Document(id=f"{i:016x}", text=text) for i, text in enumerate(texts)))
    dedup = herdkern(verify="exact")

    def run() -> Any:
        with tempfile.TemporaryDirectory(dir=folder.name) as out:
            return list(dedup(path, Path(out))())

    judged = judge(run(), learn_truth(texts, planted))
    assert not what_is_off(EXACT, judged), judged
    return {OURS: run}


test_dedup = pytest_cases(Bench("dedup", [Case(name="500kB", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
