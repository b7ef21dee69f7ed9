"""URL dedup: of a list of URLs with time stamps which are not the newest of their page; herdkern and Python libraries.

    python benchmarks/bench_url_dedup.py [--quick] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

Each candidate runs on one thread in a process of its own that holds the URLs as a list of str and the time stamps as an
array; times are its CPU seconds, memory is what the work adds at its peak. "herdkern" makes the 128-bit keys, writes
the 48-byte records to a file and finds the newest in the table. The others put a canonical form into a dict: "w3lib" is
canonical_url, the rule that ours equals; "url-normalize" and "courlan" have rules of their own, which merge less or
other pages, so what they leave is shown and not compared. "herdkern keys" are the keys alone.
The URLs are made: pages of many hosts, each met one to three times in variants of scheme, case, port, fragment, order
of parameters and tracking. Before any time is taken, exactly one of each page must be left, the newest.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from apart import Meter, answer, make_row, parse_options, print_row, run_apart
from harness import OURS, Bench, Case, pytest_cases, write_json
from machine import describe_machine

from herdkern import _text
from herdkern.dedup.urls import RECORD, UrlDedupConfig, canonical_url, native_rules, url_keys

KEYS = "herdkern keys"
ASIDE = {KEYS: "the keys alone", "url-normalize": "another rule", "courlan": "another rule"}
CASES = {"20k": 20_000, "200k": 200_000, "1M": 1_000_000, "5M": 5_000_000}
LARGEST_OF_PEERS = 200_000
CHUNK = 1 << 14
WORDS = "news Artikel 2024 index.html caf%C3%A9 wiki Straße view.php p %C3%BCber-uns tag a_b product en".split()


def make_urls(number: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(URLs in random order, their pages, their time stamps)."""
    rng = random.Random(number)
    found: list[tuple[int, str]] = []
    page = 0
    while len(found) < number:
        host = f"{rng.choice(('www.', '', 'm.'))}site{rng.randrange(number // 40 + 1)}.{rng.choice(('com', 'de'))}"
        path = "/".join(rng.choices(WORDS, k=rng.randint(1, 4))) + f"/{page}"
        query = [f"{rng.choice('abcdq')}={rng.choice(WORDS)}{i}" for i in range(rng.choice((0, 0, 0, 1, 2)))]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            fields = [*query, *rng.choice(([], [], ["utm_source=feed"], ["fbclid=IwAR1x"]))]
            rng.shuffle(fields)
            scheme = rng.choice(("http", "https", "https"))
            port = rng.choice(("", "", "", "", ":443" if scheme == "https" else ":80"))
            name = host.upper() if rng.random() < 0.02 else host
            end = "/" * (rng.random() < 0.2) + "?" * bool(fields) + "&".join(fields) + "#top" * (rng.random() < 0.05)
            found.append((page, f"{scheme}://{name}{port}/{path}{end}"))
        page += 1
    rng.shuffle(found)
    return [url for _, url in found], np.array([p for p, _ in found]), np.array(rng.choices(range(10**6), k=len(found)))


def winners_herdkern(urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    """For each URL the place of the one that stays."""
    with tempfile.TemporaryDirectory() as name:
        paths = [str(Path(name) / "records.bin"), str(Path(name) / "names.bin")]
        with open(paths[1], "wb") as names:
            names.write(np.zeros(2, np.uint32).tobytes())  # ids that are equal beyond their first bytes: none
        chunk = np.zeros(CHUNK, RECORD)
        with open(paths[0], "wb", buffering=0) as file:
            for begin in range(0, len(urls), CHUNK):
                keys, _ = url_keys(urls[begin : begin + CHUNK])
                records = chunk[: len(keys)]
                records["low"], records["high"] = keys[:, 0], keys[:, 1]
                records["timestamp"] = timestamps[begin : begin + CHUNK]
                records["id_prefix"] = np.arange(begin, begin + len(keys))
                file.write(records.data)
        table = _text.UrlTable([(*paths, 0, len(urls))], len(urls), 0, 1, 1)
        winners = np.zeros(len(urls), np.uint32)
        held = chunk.view(np.uint8)
        with open(paths[0], "rb", buffering=0) as file:
            for begin in range(0, len(urls), CHUNK):
                table.add(held[: file.readinto(held.data)], begin)
            file.seek(0)
            for begin in range(0, len(urls), CHUNK):
                winners[begin : begin + CHUNK] = table.find(held[: file.readinto(held.data)], begin)
    winners_herdkern.table_bytes = table.table_bytes()  # type: ignore[attr-defined]
    return winners


def winners_of_dict(canonical: Callable[[str], str | None], urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    best: dict[str, tuple[int, int]] = {}
    forms = []
    for place, (url, timestamp) in enumerate(zip(urls, timestamps.tolist(), strict=True)):
        form = canonical(url) or url
        forms.append(form)
        entry = (-timestamp, place)
        if form not in best or entry < best[form]:
            best[form] = entry
    return np.array([best[form][1] for form in forms])


def winners_w3lib(urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    return winners_of_dict(canonical_url, urls, timestamps)


def winners_url_normalize(urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    from url_normalize import url_normalize

    return winners_of_dict(url_normalize, urls, timestamps)


def winners_courlan(urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    from courlan import clean_url

    return winners_of_dict(clean_url, urls, timestamps)


def keys_alone(urls: list[str], timestamps: np.ndarray) -> np.ndarray:
    for begin in range(0, len(urls), CHUNK):
        url_keys(urls[begin : begin + CHUNK])
    return np.zeros(0, np.uint32)


CANDIDATES: dict[str, Callable[[list[str], np.ndarray], np.ndarray]] = {
    OURS: winners_herdkern,
    KEYS: keys_alone,
    "w3lib": winners_w3lib,
    "url-normalize": winners_url_normalize,
    "courlan": winners_courlan,
}


def work(candidate: str, number: int) -> dict[str, Any]:
    """Runs in the candidate's own process."""
    urls, _, timestamps = make_urls(number)
    CANDIDATES[candidate](urls[:10], timestamps[:10])  # imports are no part of the work
    with Meter() as meter:
        winners = CANDIDATES[candidate](urls, timestamps)
    found = {"left": len(np.unique(winners))}
    if candidate == OURS:
        found["table_bytes_per_url"] = round(winners_herdkern.table_bytes / len(urls), 2)  # type: ignore[attr-defined]
        forms = _text.canonicalise_urls(urls[:100_000], native_rules(UrlDedupConfig()))
        found["native_share"] = round(sum(form is not None for form in forms) / len(forms), 4)
    return {"urls": len(urls), "bytes": sum(map(len, urls)), **vars(meter), "found": found}


def check() -> None:
    """One of each page is left, the newest; and w3lib says the same."""
    urls, pages, timestamps = make_urls(5000)
    order = np.lexsort((np.arange(len(urls)), -timestamps, pages))
    newest = np.zeros(pages.max() + 1, np.int64)
    first = order[np.append(True, np.diff(pages[order]) != 0)]
    newest[pages[first]] = first
    for name in (OURS, "w3lib"):
        assert (CANDIDATES[name](urls, timestamps) == newest[pages]).all(), f"{name}: not the newest of each page"


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    number = CASES[name]
    runs: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    candidates = list(CANDIDATES) if number <= LARGEST_OF_PEERS else [OURS, KEYS]
    for turn in range(options.rounds):
        for candidate in candidates:
            if candidate in failed or (turn and runs[candidate][0]["wall_s"] > options.limit / 20):
                continue
            task = {"function": "work", "candidate": candidate, "number": number}
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
    row["urls"] = runs[OURS][0]["urls"]
    row["million_urls_per_s"] = {c: round(row["urls"] / (1e3 * row[c]), 4) for c in samples}
    row["found"] = {candidate: some[0]["found"] for candidate, some in runs.items()}
    row["table_bytes_per_url"] = row["found"][OURS]["table_bytes_per_url"]
    if failed:
        row["failed"] = failed
    print_row(row)
    print(
        "  million URLs/s: " + ", ".join(f"{c} {rate:g}" for c, rate in row["million_urls_per_s"].items()), flush=True
    )
    return row


def main() -> int:
    answer({"work": work})
    options = parse_options(CASES, limit=120, quick_limit=40)
    names = [name for name in CASES if (name == "20k") == options.quick and options.case in name]
    check()
    machine = describe_machine(1) | {"clock": "cpu"}
    print(f"url_dedup on {machine['cpu']}, CPU seconds of one thread; one of each page is left, the newest")
    rows: list[dict[str, Any]] = []
    report = {"bench": "url_dedup", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    for name in names:
        row = run_case(name, options)
        rows += [row] if row else []
        write_json(options.json, report | {"unfinished": True})
    write_json(options.json, report)
    return 1 if len(rows) < len(names) else 0


def small() -> dict[str, Any]:
    urls, _, timestamps = make_urls(20_000)
    return {OURS: lambda: winners_herdkern(urls, timestamps)}


test_url_dedup = pytest_cases(Bench("url_dedup", [Case(name="20k", setup=small, check=lambda functions: check())]))

if __name__ == "__main__":
    sys.exit(main())
