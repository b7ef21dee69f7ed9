"""Encoding and decoding with cl100k and o200k: herdkern and nine peers, on one thread, in CPU seconds.

    python benchmarks/bench_bpe_encode.py [--quick] [--case PART] [--json FILE] [--minutes M] [--rounds N]

English, source code and the other languages; one document, a batch of small texts, a batch of documents. Each candidate
runs in a process of its own: "cold" is the first pass of a fresh process, "warm" encodes the same texts over and over,
"steady" goes on with new text for long. Every candidate is called in its fastest way (arrays where it has them). A peer
whose ids are not tiktoken's is named with a failing string and not compared on that row; `exactness` says more: the
first torture string on which it differs. The last table is of hostile texts: time of 2n characters over time of n.
Memory is what a candidate adds for the texts, and what its process held at most. HERDKERN_CORPUS names the folder of
corpus.py's text, HERDKERN_TOKENIZERS that of the vocabularies; --quick does without both: a vocabulary of its own on
text of the installation. The run fits into --minutes (default 12): second rounds go first, then peers that are slower
by far, and it says so.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bpe_picture
import hostile
import numpy as np
from apart import Meter, answer, make_row, print_row, run_apart
from bpe_peers import ENCODERS, Files, Flat, Peer, write_files
from corpus import corpus_folder, installed_texts, read_corpus
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine, status_bytes

from herdkern.tokenizer import train_bpe
from herdkern.tokenizer.export import read_tiktoken

MB = 1_000_000
KINDS: dict[str, set[str]] = {"english": {"en"}, "code": {"c", "python", "javascript"}, "multilingual": set()}
SHAPES = {"document": 1, "small": 1, "large": 5}  # megabytes
QUICK_PEERS = (OURS, "tiktoken", "gigatoken", "snaptokens", "fastokens")
NEAR = (OURS, "gigatoken", "snaptokens", "fastokens", "quicktok-v1")  # as fast as ours or nearly: the second round too
TORTURE_STRINGS = 20_000
STEADY = 24  # slices of a megabyte, none seen before
SMALL_CHARACTERS = 300
VOCABULARIES = {"cl100k": ("llama3", "cl100k*.tiktoken"), "o200k": ("o200k", "o200k*.tiktoken")}
HOSTILE_CHARACTERS = 100_000
REFERENCE = "tiktoken"
PHASES = ("cold", "warm", "steady", "decode")


def shaped(path: str, shape: str) -> list[str]:
    """The texts of one shape, from a file of documents with NUL between them."""
    documents = Path(path).read_text(encoding="utf-8").split("\0")
    left = SHAPES[shape] * MB
    texts = []
    for text in documents:
        texts.append(text)
        left -= len(text.encode())
        if left <= 0:
            break
    if shape == "document":
        return ["\n".join(texts)]
    if shape == "small":
        return [text[i : i + SMALL_CHARACTERS] for text in texts for i in range(0, len(text), SMALL_CHARACTERS)]
    return texts


def new_slices(path: str) -> Iterator[list[str]]:
    """Texts of a megabyte each behind those of the large batch."""
    documents = Path(path).read_text(encoding="utf-8").split("\0")
    some: list[str] = []
    size = skipped = 0
    for text in documents:
        length = len(text.encode())
        if skipped < SHAPES["large"] * MB:
            skipped += length
            continue
        some.append(text)
        size += length
        if size >= MB:
            yield some
            some, size = [], 0


def peer_of(candidate: str, files: list[str]) -> Peer:
    return ENCODERS[candidate](Files(*files))


def digest(found: Flat) -> str:
    ids, counts = found
    return hashlib.sha256(ids.astype(np.uint32).tobytes() + counts.astype(np.int64).tobytes()).hexdigest()


def repeated(call: Callable[[], Any], seconds: float) -> float:
    """Median CPU seconds of calls for so long, three at least where they do not take long."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 - 2 * (sum(samples) > 2 * seconds) or (time.perf_counter() < end and len(samples) < 200):
        start = time.process_time()
        call()
        samples.append(time.process_time() - start)
    return statistics.median(samples)


def encode(candidate: str, files: list[str], path: str, shape: str, seconds: float) -> dict[str, Any]:
    """One process: cold, warm, and for the large batch the steady state and decoding. Seconds per pass or megabyte."""
    peer = peer_of(candidate, files)
    texts = shaped(path, shape)
    peer.encode(["a"])  # what is made on the first call, such as a compiled pattern
    with Meter() as meter:
        found = peer.encode(texts)
    ids, counts = peer.flat(found)
    size = sum(len(text.encode()) for text in texts)
    result: dict[str, Any] = {"digest": digest((ids, counts)), "bytes": size, "cold": meter.cpu_s}
    result["peak_mib"] = meter.peak_mib
    result["warm"] = repeated(lambda: peer.encode(texts), seconds)
    if shape == "large":
        rows = [np.ascontiguousarray(row, np.uint32) for row in np.split(ids, np.cumsum(counts)[:-1])]
        prepared = peer.prepare(rows)
        text = peer.decode(prepared)
        whole = b"".join(part if isinstance(part, bytes) else (part or "").encode() for part in text)
        result["decoded"] = hashlib.sha256(whole).hexdigest()
        result["decode"] = repeated(lambda: peer.decode(prepared), seconds / 2)
        result["steady"] = steady(peer, path, 6 * seconds)
    result["process_mib"] = status_bytes("VmHWM") / 2**20
    return result


def steady(peer: Peer, path: str, seconds: float) -> float | None:
    """CPU seconds of a megabyte of new text, the median of the second half of the slices; None if time ran out."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    for texts in new_slices(path):
        start = time.process_time()
        peer.encode(texts)
        samples.append((time.process_time() - start) * MB / sum(len(text.encode()) for text in texts))
        if len(samples) == STEADY or time.perf_counter() > end:
            break
    return statistics.median(samples[len(samples) // 2 :]) if len(samples) >= 4 else None


def difference(candidate: str, files: list[str], path: str, shape: str) -> dict[str, Any]:
    """The shortest line found on which the peer's ids are not tiktoken's, cut at both ends while they differ."""
    peer, reference = peer_of(candidate, files), peer_of(REFERENCE, files)

    def ids(which: Peer, texts: list[str]) -> list[list[int]]:
        flat, counts = which.flat(which.encode(texts))
        return [row.tolist() for row in np.split(flat, np.cumsum(counts)[:-1])]

    texts = json.loads(Path(path).read_text()) if shape == "torture" else shaped(path, shape)
    theirs, right = ids(peer, texts), ids(reference, texts)
    wrong = [text for text, a, b in zip(texts, theirs, right) if a != b]
    if not wrong:
        return {"string": None}
    lines = [line for text in wrong for line in text.splitlines(keepends=True)]
    short = [line for line, a, b in zip(lines, ids(peer, lines), ids(reference, lines)) if a != b]
    text = min(short or wrong, key=len)
    for cut in (lambda t: t[1:], lambda t: t[:-1]):
        while len(text) > 1 and len(text) < 2000 and ids(peer, [cut(text)]) != ids(reference, [cut(text)]):
            text = cut(text)
    return {"string": text[:80], "number": len(wrong), "of": len(texts)}


def write_torture(path: Path) -> None:
    """The tests' torture strings, for processes that compare peers on them."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/tokenizer"))
    from torture import torture_strings

    path.write_text(json.dumps(torture_strings(TORTURE_STRINGS, 77)))


def worst_case(files: list[str]) -> list[dict[str, Any]]:
    """For each hostile family MB/s and the time of twice as many characters over the time of n, each the least of 5 to
    100 calls: some take a fifth of a millisecond, which any interruption doubles."""
    peer = peer_of(OURS, files)
    found = []
    for name, family in hostile.FAMILIES.items():
        once, twice = [family(HOSTILE_CHARACTERS)], [family(2 * HOSTILE_CHARACTERS)]
        samples: list[list[float]] = [[], []]
        while len(samples[0]) < 5 or (len(samples[0]) < 100 and sum(map(sum, samples)) < 0.1):
            for texts, taken in zip((once, twice), samples):
                start = time.process_time()
                peer.encode(texts)
                taken.append(time.process_time() - start)
        n, n2 = min(samples[0]), min(samples[1])
        rate = len(once[0].encode()) / MB / n
        found.append({"family": name, "ratio": round(n2 / n, 3), "mb_per_s": round(rate, 1)})
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="English, code, multilingual x cl100k, o200k x shapes of input")
    parser.add_argument("--quick", action="store_true", help="end within 45 s, without corpus and vocabularies")
    parser.add_argument("--case", default="", metavar="PART", help="only rows whose name contains PART")
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--rounds", type=int, metavar="N", help="processes of the fastest for each row (default 2)")
    parser.add_argument("--minutes", type=float, metavar="M", help="the end of the run (default 12)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="the end of one process (default 60)")
    parser.add_argument("--wrap", type=shlex.split, default=[], metavar="CMD", help="runs each process under CMD")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 2)
    options.limit = options.limit or (30 if options.quick else 60)
    options.seconds = 0.05 if options.quick else 0.5
    options.until = time.time() + 60 * (options.minutes or (0.7 if options.quick else 12))
    return options


def is_chosen(options: argparse.Namespace, name: str, kind: str, shape: str) -> bool:
    return any(options.case in f"{name} {kind} {shape} {phase}" for phase in PHASES)


def vocabularies(folder: Path, options: argparse.Namespace) -> list[Files]:
    """Those of HERDKERN_TOKENIZERS; without them, or for --quick, one that is trained here."""
    named = os.environ.get("HERDKERN_TOKENIZERS")
    found = []
    for name, (pattern, files) in VOCABULARIES.items() if named and not options.quick else ():
        if not any(is_chosen(options, name, kind, shape) for kind in KINDS for shape in SHAPES):
            continue
        for path in sorted(Path(str(named)).rglob(files))[:1]:
            found.append(write_files(folder, name, pattern, read_tiktoken(path)))
    if not found:
        print("own vocabulary: --quick, or HERDKERN_TOKENIZERS names no folder with cl100k and o200k", flush=True)
        ranks = train_bpe(installed_texts(5 * MB), 32_768, special_tokens=()).mergeable_ranks
        found.append(write_files(folder, "own", "llama3", ranks))
    return found


def write_texts(folder: Path, quick: bool) -> dict[str, str]:
    """A file of documents for each kind of text, with NUL between them."""
    corpus = None if quick else corpus_folder()
    paths = {}
    if corpus is None:
        texts = {"installed": installed_texts(12 * MB)[::-1]}  # the vocabulary was trained on the first of them
    else:
        languages = set(json.loads((corpus / "stats.json").read_text())["languages"])
        others = languages - KINDS["english"] - KINDS["code"]
        size = (SHAPES["large"] + STEADY + 2) * MB
        texts = {kind: read_corpus(corpus, size, some or others) for kind, some in KINDS.items()}
    for kind, some in texts.items():
        path = folder / f"{kind}.txt"
        path.write_text("\0".join(text.replace("\0", "") for text in some), encoding="utf-8", newline="")
        paths[kind] = str(path)
    return paths


def measure(
    task: dict[str, Any], options: argparse.Namespace, until: float
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What the processes of each candidate found, and why one has none. until: when a second round may still begin."""
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for turn in range(options.rounds):
        for candidate in QUICK_PEERS if options.quick else ENCODERS:
            if candidate in failed or (turn and (candidate not in NEAR or time.time() > until)):
                continue
            if time.time() > options.until and candidate not in (*NEAR, REFERENCE):
                failed[candidate] = "left out: the time of the whole run was over"
                continue
            asked = task | {"function": "encode", "candidate": candidate, "seconds": options.seconds}
            one = run_apart(asked, seconds=options.limit, wrap=options.wrap)
            if "failed" in one:
                failed[candidate] = f"failed: {one['failed']}"
            elif turn == 0 and REFERENCE in found and one["digest"] != found[REFERENCE][0]["digest"]:
                what = run_apart(task | {"function": "difference", "candidate": candidate}, seconds=options.limit)
                failed[candidate] = f"other ids, for instance for {what.get('string', what)!r}"
            else:
                found.setdefault(candidate, []).append(one)
    return found, failed


def run_kind(files: Files, kind: str, path: str, shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one text, vocabulary and shape: cold, warm, steady, decode."""
    share = (options.until - time.time()) / max(1, options.left)
    options.left -= 3 if shape == "large" else 1
    share *= 3 if shape == "large" else 1
    task = {"files": list(files), "path": path, "shape": shape}
    found, failed = measure(task, options, time.time() + 0.7 * share)
    for name in (OURS, REFERENCE):
        if name not in found:
            print(f"\n{files.name} {kind} {shape}: no times: {name}: {failed[name]}", flush=True)
            return []
    if found[OURS][0]["digest"] != found[REFERENCE][0]["digest"]:
        print(f"\n{files.name} {kind} {shape}: no times: WRONG RESULT: ids are not tiktoken's", flush=True)
        return []
    rows = []
    for phase in ("cold", "warm", *(("steady", "decode") if shape == "large" else ())):
        name = f"{files.name} {kind} {shape} {phase}"
        some, wrong = rows_of(phase, found)
        if OURS in some and options.case in name:
            size = MB if phase == "steady" else found[OURS][0]["bytes"]
            row = make_row(name, some, size, phase=phase)
            row["over_tiktoken"] = round(row[REFERENCE] / row[OURS], 2) if REFERENCE in row else None
            if phase == "cold":
                row["peak_mib"] = {peer: round(runs[0]["peak_mib"], 1) for peer, runs in found.items()}
                row["process_mib"] = {peer: round(runs[0]["process_mib"], 1) for peer, runs in found.items()}
            row |= {"failed": failed | wrong} if failed or wrong else {}
            print_row(row)
            rows.append(row)
    return rows


def rows_of(phase: str, found: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The samples of one phase, and what is wrong with those that have none."""
    some: dict[str, list[float]] = {}
    wrong: dict[str, str] = {}
    for peer, runs in found.items():
        samples = [one[phase] for one in runs if one.get(phase)]
        if phase == "decode" and runs[0]["decoded"] != found[OURS][0]["decoded"]:
            wrong[peer] = "decodes to another text"
        elif samples:
            some[peer] = samples
        else:
            wrong[peer] = "too slow to reach a steady state in time"
    return some, wrong


def summarise(report: dict[str, Any]) -> None:
    """Adds the range of the ratios by phase, and prints it."""
    report["summary"] = {}
    for phase in PHASES:
        rows = [row for row in report["cases"] if row["phase"] == phase]
        for key in ("ratio", "over_tiktoken"):
            values = [row[key] for row in rows if row[key]]
            if values:
                low, middle = min(values), statistics.median(values)
                report["summary"][f"{phase} {key}"] = {"least": low, "median": round(middle, 3), "rows": len(values)}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in report["summary"].items()))


def run_checks(files: Files, report: dict[str, Any], options: argparse.Namespace, strings: str) -> None:
    """The hostile families of ours, and the first torture string on which each peer differs. strings: their file."""
    asked = {"function": "worst_case", "files": list(files)}
    worst = run_apart(asked, seconds=2 * options.limit, wrap=options.wrap)
    report.setdefault("worst_case", {})[files.name] = worst if isinstance(worst, list) else [worst]
    if isinstance(worst, list):
        worst.sort(key=lambda family: -family["ratio"])
        shown = ", ".join(f"{one['family']} {one['ratio']} ({one['mb_per_s']} MB/s)" for one in worst[:6])
        print(f"\n{files.name}: time(2n)/time(n) of {len(worst)} hostile families, the worst: {shown}", flush=True)
    else:
        print(f"\n{files.name}: hostile families: {worst}", flush=True)
    if options.quick:
        return
    exactness = report.setdefault("exactness", {}).setdefault(files.name, {})
    task = {"function": "difference", "files": list(files), "path": strings, "shape": "torture"}
    for candidate in ENCODERS:
        asked = task | {"candidate": candidate}
        exactness[candidate] = run_apart(asked, seconds=options.limit, wrap=options.wrap)
        print(f"  torture strings, {candidate}: {exactness[candidate]}", flush=True)


def main() -> int:
    answer({"encode": encode, "difference": difference, "worst_case": worst_case})
    options = parse()
    machine = describe_machine(1) | {"clock": "cpu"}
    rows: list[dict[str, Any]] = []
    report = {"bench": "bpe_encode", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    print(f"bpe_encode on {machine['cpu']}, {machine['cores']} cores, CPU seconds of one thread")
    missing = 0
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        texts = write_texts(Path(folder), options.quick)
        write_torture(Path(folder, "torture.json"))
        chosen = vocabularies(Path(folder), options)
        asked = [(files, kind, shape) for files in chosen for kind in texts for shape in SHAPES]
        asked = [one for one in asked if is_chosen(options, one[0].name, *one[1:])]
        options.left = sum(3 if shape == "large" else 1 for _, _, shape in asked) + 2 * len(chosen)
        for files in chosen:
            for kind, path in texts.items():
                for shape in SHAPES:
                    if (files, kind, shape) not in asked:
                        continue
                    found = run_kind(files, kind, path, shape, options)
                    missing += not found
                    rows += found
                    write_json(options.json, report | {"unfinished": True})
                    print(f"  {time.time() - start:.0f} s since the start", flush=True)
            options.left -= 2
            if not options.case or any(options.case in name for name in ("hostile", "torture")):
                run_checks(files, report, options, str(Path(folder, "torture.json")))
    summarise(report)
    write_json(options.json, report)
    if options.json:
        bpe_picture.draw(Path(options.json))
    print("\n" + json.dumps(report))
    return 1 if missing else 0


def small() -> dict[str, Any]:
    texts = installed_texts(MB)
    tokenizer = train_bpe(texts, 4096, special_tokens=())
    return {OURS: lambda: tokenizer.encode_to_numpy(texts)}


test_bpe_encode = pytest_cases(Bench("bpe_encode", [Case(name="warm-1MB", setup=small, bytes=MB)]))

if __name__ == "__main__":
    sys.exit(main())
