"""The three dedup stages together: same bytes for every executor and after every kill."""

import random
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from herdkern.data.document import Document, write_documents

PIPELINE = Path(__file__).with_name("pipeline.py")


def write_inputs(folder, num_shards):
    """Library files with planted repeats of URLs, near-copies and lines."""
    folder.mkdir()
    rng = random.Random(1)
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]:
        text = path.read_text(encoding="utf-8")[:20_000]
        url = f"http://docs.example/{path.stem}"
        documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text, url=url, timestamp=5))
        if rng.random() < 0.5:  # an older crawl of the same page
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=text[:-5], url=url + "#old", timestamp=3))
        if rng.random() < 0.5:  # a near-copy elsewhere
            near = text.replace("the", "teh", 2)
            documents.append(Document(id=f"{rng.getrandbits(64):016x}", text=near, url=url + "/copy", timestamp=4))
    rng.shuffle(documents)
    for shard in range(num_shards):
        write_documents(folder / f"in-{shard}.jsonl.zst", documents[shard::num_shards])


def run(run_dir, inputs, executor, kill_after=None):
    """True if the pipeline ended by itself, False if it was killed."""
    command = [sys.executable, str(PIPELINE), str(run_dir), str(inputs), executor]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, error = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    assert process.returncode == 0, error
    return True


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_executors_give_the_same_bytes(tmp_path):
    write_inputs(tmp_path / "in", 3)
    trees = []
    for executor in ("serial", "processes"):
        assert run(tmp_path / executor, tmp_path / "in", executor)
        trees.append(tree(tmp_path / executor / "data"))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 30


@pytest.mark.full
@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_killed_dedup_ends_byte_identical(tmp_path, executor):
    write_inputs(tmp_path / "in", 4)
    started = time.monotonic()
    assert run(tmp_path / "calm", tmp_path / "in", executor)
    longest = time.monotonic() - started
    wanted = tree(tmp_path / "calm" / "data")
    rng = random.Random(7)
    kills = attempts = 0
    while kills < 20:
        attempts += 1
        run_dir = tmp_path / f"killed-{attempts}"
        while not run(run_dir, tmp_path / "in", executor, kill_after=rng.uniform(0.05, longest)):
            kills += 1
        assert tree(run_dir / "data") == wanted
