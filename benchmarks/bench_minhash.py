"""MinHash signatures from text: herdkern, its families and code paths, and six packages.

    python benchmarks/bench_minhash.py [--quick] [--full] [--case PART] [--json FILE] [--rounds N] [--peers PYTHON ...]

All start from a list of str and end with 128 slots per document over the set of its 5-word shingles, on one thread, in
a process of their own (minhash_peers.py); times are CPU seconds, memory is what the signing adds to the list at its
peak. gaoya puts its signatures into an index, the others hand them out. Beside each speed stands the error of the
estimates on pairs of known similarity: its root mean square over what theory allows, sqrt(J (1 - J) / 128), and its
mean in standard errors. No time of ours is shown if that is off. --peers: other interpreters, for packages that cannot
be installed beside each other. The text is the corpus that HERDKERN_CORPUS names, else what Python's packages carry (up
to 20 MB); --full adds 700 MB.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from apart import make_row, parse_options, print_row, python_with, run_script
from corpus import corpus_folder, installed_texts, read_corpus
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine
from minhash_peers import CANDIDATES, NUM_SLOTS

from herdkern.dedup.minhash import exact_jaccard, signatures

PIECE_CHARS = 5000  # documents of a crawl are this long on average
OWN = (OURS, "herdkern-avx2", "herdkern-oph", "herdkern-m61")
MODULES = {"rensa-cminhash": "rensa"}


class Signing(NamedTuple):
    """One row: the candidates that are fast enough for so many megabytes."""

    name: str
    megabytes: int
    candidates: tuple[str, ...]


FAST = (*OWN, "gaoya", "rensa", "rensa-cminhash", "FastSketchLSH")
SIGNINGS = [
    Signing("sign-1MB", 1, (*FAST, "datasketch")),
    Signing("sign-2MB", 2, tuple(CANDIDATES)),
    Signing("sign-20MB", 20, FAST),
    Signing("sign-700MB", 700, (*OWN, "gaoya", "rensa")),
]
IN_QUICK, IN_FULL = {"sign-1MB"}, {"sign-700MB"}


def documents(num_bytes: int) -> list[str]:
    """Documents of the corpus; where there is none, installed texts in pieces of about PIECE_CHARS."""
    folder = corpus_folder()
    if folder:
        return read_corpus(folder, num_bytes)
    pieces = []
    for text in installed_texts(num_bytes):
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= PIECE_CHARS:
                pieces.append("".join(lines))
                lines, size = [], 0
        if lines:
            pieces.append("".join(lines))
    return pieces


def pairs_of_texts(num_pairs: int) -> tuple[list[str], np.ndarray]:
    """Pairs of texts and the exact similarity of their shingles: none, a few or many of 300 words are changed."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(num_pairs):
        words = [f"w{i}" for i in rng.integers(0, 1 << 40, 300)]
        other = list(words)
        for place in rng.choice(300, int(rng.integers(1, 60)), replace=False):
            other[place] = f"v{rng.integers(0, 1 << 40)}"
        texts += [" ".join(words), " ".join(other)]
    return texts, exact_jaccard(texts, np.arange(2 * num_pairs).reshape(-1, 2))


def error_of(estimates: Sequence[float], exact: np.ndarray) -> dict[str, float]:
    """{"rms": root mean square error over that of theory, "bias": mean error in standard errors}."""
    error = np.array(estimates) - exact
    theory = float(np.mean(exact * (1 - exact))) / NUM_SLOTS
    return {
        "rms": round(math.sqrt(float(np.mean(error**2)) / theory), 3),
        "bias": round(float(error.mean()) / math.sqrt(theory / len(error)), 2),
    }


def run_one(candidate: str, files: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What the candidate's process tells, or {"failed": reason}."""
    python = sys.executable if candidate in OWN else python_with([MODULES.get(candidate, candidate)], options.peers)
    if python is None:
        return {"failed": "not installed"}
    isa = {"HERDKERN_ISA": "avx2"} if candidate == "herdkern-avx2" else {}
    script = str(Path(__file__).with_name("minhash_peers.py"))
    return run_script([python, script, candidate, *files], seconds=options.limit, wrap=options.wrap, environment=isa)


def run_signing(signing: Signing, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of one case; None, said aloud, if ours failed or its estimates are off."""
    texts = documents(signing.megabytes * 1_000_000)
    joined = "\0".join(text.replace("\0", " ") for text in texts).encode("utf-8", "surrogateescape")
    num_bytes = len(joined) - len(texts) + 1
    (folder / "texts").write_bytes(joined)
    del joined, texts
    pairs, exact = pairs_of_texts(400 if options.quick else 4000)
    (folder / "pairs").write_text("\0".join(pairs), encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for turn in range(options.rounds):
        for candidate in signing.candidates:
            if candidate in failed or (turn and found[candidate][0]["wall_s"] > options.limit / 20):
                continue
            files = [str(folder / "texts")] + ([str(folder / "pairs")] if turn == 0 else [])
            one = run_one(candidate, files, options)
            if "failed" in one:
                failed[candidate] = f"failed: {one['failed']}"
            else:
                found.setdefault(candidate, []).append(one)
            said = failed.get(candidate) or f"{num_bytes / 1e6 / one['cpu_s']:.1f} MB/s, {one['peak_mib']:.0f} MiB"
            print(f"    {signing.name} {candidate}: {said}", flush=True)
    errors = {name: error_of(runs[0]["estimates"], exact) for name, runs in found.items() if runs[0]["estimates"]}
    off = [f"{name} {errors.get(name)}" for name in OWN if name in found and is_off(name, errors.get(name))]
    if OURS not in found or off:
        print(f"\n{signing.name}: no times: {failed.get(OURS) or 'WRONG RESULT: ' + ', '.join(off)}", flush=True)
        return None
    samples = {name: [one["cpu_s"] for one in runs] for name, runs in found.items()}
    aside = {name: "another family or code path of ours" for name in OWN[1:] if name in found}
    row = make_row(signing.name, samples, num_bytes, clock="cpu_s", aside=aside, threads=1)
    row["peak_mib"] = {name: round(min(one["peak_mib"] for one in runs), 1) for name, runs in found.items()}
    row["error"] = errors
    row["times"] = {name: round(row[name] / row[OURS], 2) for name in samples if name != OURS}
    row["versions"] = {name: runs[0]["version"] for name, runs in found.items() if runs[0]["version"]}
    row["docs_per_s"] = {
        name: round(runs[0]["num_docs"] / statistics.median(samples[name]), 1) for name, runs in found.items()
    }
    if failed:
        row["failed"] = failed
    print_row(row)
    shown = ", ".join(f"{name} {e['rms']:.2f} ({e['bias']:+.1f})" for name, e in errors.items())
    print(f"  error over theory (bias in standard errors): {shown}", flush=True)
    return row


def is_off(name: str, error: dict[str, float] | None) -> bool:
    """Whether estimates of ours have more error than theory allows; that of oph is larger for these small sets."""
    return error is None or abs(error["bias"]) > 4 or error["rms"] > (1.4 if name == "herdkern-oph" else 1.15)


def chosen(options: argparse.Namespace) -> list[Signing]:
    """The cases that were asked for and whose text is there."""
    if options.quick:
        os.environ.pop("HERDKERN_CORPUS", None)
        return [s for s in SIGNINGS if s.name in IN_QUICK and options.case in s.name]
    some = [s for s in SIGNINGS if options.case in s.name and s.name not in IN_QUICK]
    some = [s for s in some if options.full or s.name not in IN_FULL]
    if corpus_folder() is None and any(s.megabytes > 20 for s in some):
        print("larger cases are left out: HERDKERN_CORPUS must name a folder of corpus.py", flush=True)
        some = [s for s in some if s.megabytes <= 20]
    return some


def main() -> int:
    options = parse_options((s.name for s in SIGNINGS), limit=600, quick_limit=30, full="also 700 MB", takes_peers=True)
    signings = chosen(options)
    machine = describe_machine(1) | {"clock": "cpu", "corpus": "installed" if corpus_folder() is None else "corpus"}
    print(f"minhash on {machine['cpu']}, {machine['cores']} cores, CPU seconds of one thread, {machine['corpus']} text")
    rows: list[dict[str, Any]] = []
    report = {"bench": "minhash", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        for i, signing in enumerate(signings):
            row = run_signing(signing, Path(folder), options)
            rows += [row] if row else []
            write_json(options.json, report | {"unfinished": True})
            print(f"  {i + 1} of {len(signings)}, {time.time() - start:.0f} s since the start", flush=True)
    write_json(options.json, report)
    return 1 if len(rows) < len(signings) else 0


def small() -> dict[str, Any]:
    texts = documents(1_000_000)
    return {OURS: lambda: signatures(texts, num_bands=16, rows_per_band=8)}


test_minhash = pytest_cases(Bench("minhash", [Case(name="1MB", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
