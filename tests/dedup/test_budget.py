"""The memory budget of the command line, with documents made on the fly: the peak of the process, and equal files.

python tests/dedup/test_budget.py ACTION INPUTS OUT MAX_MEMORY       one run; the last line is its peak in bytes
"""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from herdkern.engine import sha256_file

MB = 1_000_000
PIECES, PIECE_WORDS = 1 << 16, 15  # texts are made of these: two of them share few shingles by chance


def write_shard(path, number, num_bytes, mean_bytes):
    """JSON lines of about num_bytes of text; among them exact copies, near-copies, new versions and frequent lines."""
    rng = np.random.default_rng([7, number])
    words = np.array([f"{chr(97 + i % 26)}{i:x}" for i in range(5000)])
    drawn = np.random.default_rng(7).integers(0, len(words), (PIECES, PIECE_WORDS))
    pieces = [" ".join(row) for row in words[drawn].tolist()]
    frequent = [f"read more about number {i} on our pages" for i in range(50)]
    mean_pieces = max(2, mean_bytes // len(pieces[0]))
    held, size, count = [], 0, 0
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        while size < num_bytes:
            kind, chance = rng.random(), rng.random()
            if held and kind < 0.2:
                text, url = held[int(chance * len(held))]
                if kind < 0.1:
                    text = text.replace("\\n", f"\\nchanged{count} ", 1)
                url = url if kind < 0.03 else f"http://copy.example/{number}/{count}"
            else:
                chosen = rng.integers(0, PIECES, 1 + int(2 * mean_pieces * chance)).tolist()
                lines = [pieces[i] for i in chosen]
                lines.insert(len(lines) // 2, frequent[int(chance * 50)])
                text, url = "\\n".join(lines), f"http://site{count % 997}.example/{number}/{count}"
                if len(held) < 2000:
                    held.append((text, url))
            f.write(
                f'{{"id":"{number:04x}{count:012x}","text":"{text}","url":"{url}","source":"made","lang":"en",'
                f'"timestamp":{1_500_000_000 + count},"record":"made#{count}","meta":{{}}}}\n'
            )
            size += len(text)
            count += 1


def peak_bytes():
    """Of this process alone: ru_maxrss begins at the size of the process that started it."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def main(action, inputs, out, max_memory):
    from herdkern.dedup import cli

    options = ["--out", out, "--executor", "serial", "--max-memory", max_memory]
    with contextlib.redirect_stdout(sys.stderr):
        assert cli.main([action, inputs, *options]) == 0
    print(peak_bytes())


def run(folder, action, max_memory):
    """(peak bytes, SHA-256 of every file of documents by its path)."""
    out = folder / f"{action}-{max_memory}"
    command = [sys.executable, __file__, action, str(folder / "in"), str(out), max_memory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    paths = sorted((out / "data").glob("*/task-*/d*.jsonl.zst"))
    files = {str(path.relative_to(out)): sha256_file(path) for path in paths}
    shutil.rmtree(out)
    return int(done.stdout.splitlines()[-1]), files, done.stderr


def check(tmp_path, action, budget, large, *, shards, shard_bytes, mean_bytes):
    (tmp_path / "in").mkdir()
    for number in range(shards):
        write_shard(tmp_path / "in" / f"in-{number}.jsonl", number, shard_bytes, mean_bytes)
    peak, files, told = run(tmp_path, action, f"{budget // MB}MB")
    peak_of_large, wanted, _ = run(tmp_path, action, f"{large // MB}MB")
    print(told)
    print(f"{action}: peak {peak / MB:.0f} MB of {budget / MB:.0f}, {peak_of_large / MB:.0f} MB of {large / MB:.0f}")
    assert files == wanted
    assert len(files) >= 2 * shards
    assert peak <= 1.1 * budget


@pytest.mark.parametrize("action", ["all", "exact"])
def test_a_small_budget(tmp_path, action):
    check(tmp_path, action, 140 * MB, 1000 * MB, shards=2, shard_bytes=3 * MB, mean_bytes=400)


@pytest.mark.full
@pytest.mark.parametrize("action", ["all", "exact"])
def test_twenty_times_the_budget(tmp_path, action):
    check(tmp_path, action, 200 * MB, 4000 * MB, shards=8, shard_bytes=500 * MB, mean_bytes=4000)


@pytest.mark.full
@pytest.mark.parametrize("action", ["all", "exact"])
def test_many_short_documents(tmp_path, action):
    """What is held for each document counts most here: two million of 300 bytes."""
    check(tmp_path, action, 200 * MB, 4000 * MB, shards=8, shard_bytes=75 * MB, mean_bytes=300)


if __name__ == "__main__":
    main(*sys.argv[1:])
