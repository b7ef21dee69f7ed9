"""kill -9 during count, merge and train by the command line: a second run ends in the same files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

RUN = """
import sys
from herdkern.cli import main

folder = sys.argv[1]
shards = [f"{folder}/../shards/{i}.jsonl" for i in range(4)]
for half in (0, 1):
    main(["tokenizer", "count", *shards[2 * half : 2 * half + 2], "--out", f"{folder}/counts-{half}"])
main(["tokenizer", "merge", f"{folder}/counts-0", f"{folder}/counts-1", "--out", f"{folder}/counts"])
main(["tokenizer", "train", f"{folder}/counts", "--out", f"{folder}/tokenizer", "--vocab-size", "4096"])
print("done")
"""


def start(folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert out.rstrip().endswith(b"done")


def files_of(folder):
    """Name and content of every file: nothing half-written may be left beside them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_at_random(tmp_path, texts, num_points, seed):
    (tmp_path / "shards").mkdir()
    for i in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[i::4])
        (tmp_path / f"shards/{i}.jsonl").write_text(lines, encoding="utf-8")
    finish(start(tmp_path / "first"))  # for the file caches; the second tells the time
    began = time.monotonic()
    finish(start(tmp_path / "reference"))
    took = time.monotonic() - began
    expected = files_of(tmp_path / "reference")
    assert {"counts", "counts-0", "counts-1", "tokenizer/tokenizer.model"} <= set(expected)
    rng = random.Random(seed)
    killed = 0
    for point in range(4 * num_points):
        folder = tmp_path / f"run-{point}"
        process = start(folder)
        time.sleep(rng.uniform(0.1, 1.0) * took)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it was quicker than that; the machine has less to do now
            took *= 0.9
        killed += process.returncode == -signal.SIGKILL
        finish(start(folder))
        assert files_of(folder) == expected, point
        shutil.rmtree(folder)
        if killed == num_points:
            return
    raise AssertionError(f"{killed} of {4 * num_points} runs were killed before their end")


def test_kill_at_some_points(tmp_path, small_texts):
    kill_at_random(tmp_path, small_texts, 4, 1)


@pytest.mark.full
def test_kill_at_fifty_points(tmp_path, small_texts):
    kill_at_random(tmp_path, small_texts, 50, 2)
