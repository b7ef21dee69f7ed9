"""Counting far more than memory holds: the peak stays within the budget, and the counts are those of a run in memory.

The input is a few shards of real words and of words that occur in one shard alone, listed under many names (links), so
gigabytes are read without gigabytes on disk. The distinct words do not fit into the budget: runs are spilled.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from herdkern.tokenizer import WordCounts, train_bpe
from herdkern.tokenizer.counts import iter_counts

MB = 1 << 20
COUNT = """
import sys
from pathlib import Path
from herdkern.cli import main

status = main(sys.argv[1:])
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print("peak", int(lines["VmHWM"].split()[0]) * 1024)
sys.exit(status)
"""


def write_shards(folder, num_shards, new_words, num_links, real):
    """num_shards files of JSON lines, each with new_words words of its own, each under num_links names."""
    rng = np.random.default_rng(17)
    for shard in range(num_shards):
        path = folder / f"{shard:03d}-0.jsonl"
        letters = rng.integers(ord("a"), ord("z") + 1, (new_words, 10), dtype=np.uint8)
        letters[:, 0] = ord(" ")
        words = letters.tobytes().decode()
        with open(path, "w", encoding="utf-8") as f:
            for begin in range(0, len(words), 10_000):
                f.write(json.dumps({"text": words[begin : begin + 10_000]}) + "\n")
            for text in real:
                f.write(json.dumps({"text": text}) + "\n")
        for link in range(1, num_links):
            (folder / f"{shard:03d}-{link}.jsonl").symlink_to(path.name)
    return sorted(folder.glob("*.jsonl"))


def peak_of_count(paths, out, *options):
    """Peak memory of `herdkern tokenizer count` in a process of its own."""
    command = [sys.executable, "-c", COUNT, "tokenizer", "count", *map(str, paths), "--out", str(out)]
    done = subprocess.run([*command, "--num-threads", "1", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def count_in_memory(paths):
    """Counts of all documents in one table."""
    counts = WordCounts()
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            counts.add(json.loads(line)["text"] for line in lines)
    return counts


def check_budget(folder, budget, num_shards, new_words, num_links, real, least_input):
    (folder / "shards").mkdir()
    paths = write_shards(folder / "shards", num_shards, new_words, num_links, real)
    assert sum(path.stat().st_size for path in paths) >= least_input
    peak = peak_of_count(paths, folder / "counts", "--max-memory", str(budget))
    print(f"peak {peak / MB:.1f} MiB of {budget / MB:.0f}")
    assert peak <= 1.1 * budget, f"peak {peak / MB:.1f} MiB of {budget / MB:.0f}"
    free = peak_of_count(paths[::num_links], folder / "free")  # each shard once: all the distinct words
    assert free > 1.1 * budget, f"peak {free / MB:.1f} MiB without a budget: nothing was spilled"
    in_memory = count_in_memory(paths)
    in_memory.save(folder / "in-memory")
    assert (folder / "counts").read_bytes() == (folder / "in-memory").read_bytes()
    return in_memory


def test_twice_the_budget(tmp_path, small_texts):
    """190 MB of input and 1.6 million distinct words in 100 MB, of which Python itself takes about 40."""
    counts = check_budget(tmp_path, 100 * MB, 8, 200_000, 6, small_texts, 190_000_000)
    assert len(counts) > 1_500_000
    from_file = train_bpe(WordCounts.load(tmp_path / "counts"), 600, special_tokens=())
    assert from_file == train_bpe(counts, 600, special_tokens=())


@pytest.mark.full
def test_twenty_times_the_budget(tmp_path, mixed_texts):
    """4 GB of input and 12 million distinct words in 200 MB."""
    counts = check_budget(tmp_path, 200 * MB, 16, 800_000, 8, 5 * mixed_texts, 20 * 200 * MB)
    assert len(counts) > 12_000_000
    from_file = train_bpe(WordCounts.load(tmp_path / "counts"), 2000, special_tokens=())
    assert from_file == train_bpe(counts, 2000, special_tokens=())


def test_counts_above_2_33(tmp_path):
    """One word more often than 33 bits can say, by merges of files and through training."""
    WordCounts().add_words({"aab": 3 << 32, "ab": 1}).save(tmp_path / "a")
    WordCounts().add_words({"aab": 5 << 32, "bb": 1 << 31}).save(tmp_path / "b")
    total = WordCounts.load(tmp_path / "a").merge(WordCounts.load(tmp_path / "b"))
    assert dict(total.items()) == {b"aab": 8 << 32, b"ab": 1, b"bb": 1 << 31}
    total.save(tmp_path / "c")
    assert dict(iter_counts(tmp_path / "c")) == {b"aab": 8 << 32, b"ab": 1, b"bb": 1 << 31}
    tokenizer = train_bpe(WordCounts.load(tmp_path / "c"), 258, special_tokens=())
    assert list(tokenizer.mergeable_ranks)[256:] == [b"ab", b"aab"]  # (8 << 32) + 1 pairs "ab", then (8 << 32) "aab"
