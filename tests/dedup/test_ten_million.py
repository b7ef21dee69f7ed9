"""Banding and clustering of ten million documents within 1 GB, with signatures made up and written to files.

python tests/dedup/test_ten_million.py FOLDER NUM_DOCS MAX_MEMORY       one run; the last line is JSON
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from herdkern.dedup import MinHashConfig
from herdkern.dedup.cluster_stages import shard_decisions
from herdkern.dedup.clusters import candidate_pairs
from herdkern.dedup.documents import cluster_signed
from herdkern.dedup.minhash import estimate_jaccard
from herdkern.dedup.sign_stage import DOCUMENT, DOCUMENTS, KEYS, NAMES, ORDER, SIGNATURES, sort_keys
from herdkern.dedup.signature_file import write_signatures
from herdkern.engine import Run, SerialExecutor
from herdkern.engine.task import Task

FAMILY = 5  # one document in two has no copy, the other half comes in families of this size
SHARD_DOCS = 250_000


def signatures_of(numbers, num_slots):
    """Of documents by number: made by a hash, so that any of them can be made again."""
    in_family = numbers % 10 >= 5
    base = np.where(in_family, numbers // FAMILY * FAMILY, numbers).astype(np.uint64)
    state = (base[:, None] * np.uint64(num_slots) + np.arange(num_slots, dtype=np.uint64)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    slots = ((state ^ (state >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(32)).astype(np.uint32)
    own = (
        numbers.astype(np.uint64)[:, None] * np.uint64(num_slots) + np.arange(num_slots, dtype=np.uint64) + np.uint64(1)
    )
    mixed = (own * np.uint64(0xD1B54A32D192ED03)) >> np.uint64(32)
    changed = in_family[:, None] & (mixed % np.uint64(100) < np.uint64(8))  # two of a family agree in 0.85 of the slots
    return np.where(changed, mixed.astype(np.uint32), slots)


def write_shard(folder, numbers, config):
    folder.mkdir(parents=True)
    num_slots = config.num_bands * config.rows_per_band
    write_signatures(
        folder / SIGNATURES, config.spec, (signatures_of(p, num_slots) for p in np.array_split(numbers, 16))
    )
    rows = np.zeros(len(numbers), DOCUMENT)
    ids = [f"{n:016d}" for n in numbers.tolist()]
    data = np.frombuffer("".join(ids).encode(), ">u8").reshape(-1, 2)
    rows["id_high"], rows["id_low"] = data[:, 0], data[:, 1]
    rows["text_low"] = rows["text_high"] = rows["line_hash"] = rows["id_hash"] = numbers.astype(np.uint64) + np.uint64(
        1
    )
    rows["id_bytes"] = 16
    (folder / NAMES).write_bytes("".join(ids).encode())
    np.save(folder / DOCUMENTS, rows)
    keys = sort_keys(rows, config.keep)
    order = np.lexsort(keys.T[::-1])
    keys[order].tofile(folder / KEYS)
    np.save(folder / ORDER, order.astype(np.uint32))


def settings(max_memory):
    return MinHashConfig(num_bands=14, rows_per_band=8, verify="signature", keep="smallest_id", max_memory=max_memory)


def shards_of(num_docs):
    order = np.random.default_rng(1).permutation(num_docs)
    return np.array_split(order, max(2, num_docs // SHARD_DOCS))


class Metered(SerialExecutor):
    """Adds up the CPU seconds of the tasks of each stage."""

    def __init__(self):
        self.seconds = {}

    def submit(self, fn, /, *args, **kwargs):
        cpu = time.process_time()
        future = super().submit(fn, *args, **kwargs)
        (stage,) = {task.key.stage for task in args if isinstance(task, Task)}
        self.seconds[stage] = round(self.seconds.get(stage, 0) + time.process_time() - cpu, 2)
        return future


def main(folder, num_docs, max_memory):
    config = settings(max_memory)
    signed = sorted((folder / "signed").iterdir())
    executor = Metered()
    started, cpu = time.perf_counter(), time.process_time()
    with Run(folder / "run", executor=executor) as run:
        found = cluster_signed(run, [], signed, config, name="ten")
    report = {
        "docs": num_docs,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_bytes": peak_bytes(),
        "max_memory": max_memory,
        "stages": executor.seconds,
        "disk_bytes": sum(p.stat().st_size for p in (folder / "run").rglob("*") if p.is_file()),
        "resolved": [str(path) for path in found.resolved],
    }
    print(json.dumps(report))


def peak_bytes():
    """Of this process alone: ru_maxrss begins at the size of the process that started it."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def naive_kept(numbers, config):
    """Of complete families: greedy in the order of ids, with all signatures in memory."""
    numbers = np.sort(numbers)
    signed = signatures_of(numbers, config.num_bands * config.rows_per_band)
    pairs = candidate_pairs(signed, num_bands=config.num_bands, rows_per_band=config.rows_per_band)
    labels = {}
    for a, b in pairs.tolist():
        labels.setdefault(a // FAMILY, set()).update((a, b))
    keeper = {}
    for places in labels.values():
        kept = []
        for place in sorted(places):
            near = [
                k
                for k in kept
                if (signed[k] == signed[place]).reshape(config.num_bands, -1).all(axis=1).any()
                and estimate_jaccard(signed[k], signed[place]) * signed.shape[1] >= config.min_matches
            ]
            if near:
                keeper[int(numbers[place])] = int(numbers[near[0]])
            else:
                kept.append(place)
    return keeper


def check(tmp_path, num_docs, max_memory, sample_docs):
    config = settings(max_memory)
    shards = shards_of(num_docs)
    for number, numbers in enumerate(shards):
        write_shard(tmp_path / "signed" / f"shard-{number:05d}", numbers, config)
    command = [sys.executable, __file__, str(tmp_path), str(num_docs), str(max_memory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print({key: value for key, value in report.items() if key != "resolved"})
    assert report["peak_bytes"] <= 1.1 * max_memory
    first = np.random.default_rng(2).integers(0, (num_docs - sample_docs) // 10) * 10
    sample = np.arange(first, first + sample_docs)
    wanted = naive_kept(sample, config)
    keeper = {}
    for shard, numbers in enumerate(shards):
        for path in report["resolved"]:
            for decision in shard_decisions(Path(path), shard):
                number = int(numbers[int(decision["place"]) & 0xFFFFFFFF])
                if decision["reason"] and first <= number < first + sample_docs:
                    kept_shard, kept_row = divmod(int(decision["kept_place"]), 1 << 32)
                    keeper[number] = int(shards[kept_shard][kept_row])
    assert keeper == wanted
    assert len(wanted) > sample_docs // 4


def test_a_hundred_thousand(tmp_path):
    check(tmp_path, 100_000, 160 << 20, 3000)


@pytest.mark.full
def test_ten_million_within_a_gigabyte(tmp_path):
    check(tmp_path, 10_000_000, 1 << 30, 100_000)


def test_the_made_up_signatures_are_as_said():
    numbers = np.arange(20)
    signed = signatures_of(numbers, 112)
    assert (signatures_of(numbers[7:9], 112) == signed[7:9]).all()
    assert 0.7 < np.mean([estimate_jaccard(signed[5], signed[i]) for i in range(6, 10)]) < 0.95
    assert estimate_jaccard(signed[0], signed[1]) < 0.1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
