"""Counting shards: equal to counting their documents, whatever the budget, the order, the threads and the executor."""

import gzip
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import zstandard

from herdkern import _text
from herdkern.data.document import read_documents
from herdkern.engine import StageError, make_executor
from herdkern.tokenizer import WordCounts, count_shards, iter_counts, split_words
from herdkern.tokenizer import shard_counts as module
from herdkern.tokenizer.counts_file import bytes_left, resident_bytes, write_counts_file
from herdkern.tokenizer.pretokenize import make_splitter


def random_text(rng, size):
    """Words of many lengths, most of them seldom."""
    alphabets = ("abcdefghijklmnopqrstuvwxyz", "abé中😀\n' 0123456789")
    words = ("".join(rng.choices(rng.choice(alphabets), k=rng.choice([1, 2, 4, 8, 30]))) for _ in range(size))
    return " ".join(words)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One file of every kind."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(7)
    texts = [[random_text(rng, 60) for _ in range(60)] for _ in range(6)]
    lines = ["".join(json.dumps({"id": "1", "text": t, "n": [1, {}]}, ensure_ascii=i % 2) + "\n" for t in some)
             for i, some in enumerate(texts)]  # fmt: skip
    (folder / "0.jsonl").write_text(lines[0])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    (folder / "2.jsonl.zst").write_bytes(zstandard.compress(lines[2].encode()))
    parquet.write_table(pyarrow.table({"n": range(60), "text": texts[3]}), folder / "3.parquet")
    (folder / "4.txt").write_text("\n\n".join(texts[4]) * 20)
    (folder / "5.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[5].replace("\n", "\r\n\n").rstrip().encode())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def expected(shards, tmp_path_factory):
    """The file that counting the documents one by one gives."""
    path = tmp_path_factory.mktemp("expected") / "counts"
    naive = Counter(
        word for shard in shards for document in read_documents(shard) for word in split_words(document.text)
    )
    WordCounts().add_words(naive).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_counting_shards_is_counting_documents(shards, expected, tmp_path, num_threads):
    header = count_shards(shards, tmp_path / "out", num_threads=num_threads)
    assert (tmp_path / "out").read_bytes() == expected
    assert header.num_occurrences == sum(count for _, count in iter_counts(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("executor", ["threads", "processes", "ray", "dask"])
def test_any_executor_and_any_order(shards, expected, tmp_path, executor, monkeypatch):
    if (library := {"ray": "ray", "dask": "distributed"}.get(executor)) and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: herdkern[{executor}] is not installed")
    monkeypatch.setattr(module, "TASK_BYTES", 10_000)  # so that there is something to share out
    shuffled = random.Random(3).sample(shards, len(shards))
    with make_executor(executor, 2) as pool:
        count_shards(shuffled, tmp_path / "out", executor=pool)
    assert (tmp_path / "out").read_bytes() == expected


MPI = """
import sys
from mpi4py.futures import MPIPoolExecutor
from herdkern.tokenizer import count_shards, shard_counts
shard_counts.TASK_BYTES = 10_000
if __name__ == "__main__":
    with MPIPoolExecutor() as pool:
        count_shards(sys.argv[2:], sys.argv[1], executor=pool)
"""


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py: herdkern[mpi] is not installed")
def test_mpi(shards, expected, tmp_path):
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("needs mpiexec")
    (tmp_path / "count.py").write_text(MPI)
    command = [mpiexec, "-n", "2", sys.executable, "-m", "mpi4py.futures", tmp_path / "count.py", tmp_path / "out"]
    subprocess.run([*map(str, command), *map(str, shards)], check=True, timeout=120)
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("max_bytes", [1, 100_000])
def test_a_table_that_spills_counts_the_same(shards, expected, tmp_path, num_threads, max_bytes):
    splitter = make_splitter("llama3")
    counter = _text.BudgetCounter(splitter, max_bytes, str(tmp_path), num_threads)
    for path in shards:
        counter.add_texts([document.text for document in read_documents(path)], 0)
    assert counter.num_spilled_bytes > 50_000

    def finish(descriptor, begin):
        return counter.finish(descriptor, "out", begin, lambda: 1 << 20, str(tmp_path), None)

    patterns = tuple(splitter.patterns)
    write_counts_file(tmp_path / "out", patterns, _text.unicode_version, finish)
    assert (tmp_path / "out").read_bytes() == expected
    assert os.listdir(tmp_path) == ["out"]


def test_weights(shards, tmp_path):
    weights = {"*.parquet": "1/3", "4.txt": 0, "0.jsonl": 2}
    count_shards(shards, tmp_path / "out", weights=weights)
    triple: Counter[bytes] = Counter()
    for path in shards:
        factor = {"3.parquet": 1, "4.txt": 0, "0.jsonl": 6}.get(path.name, 3)
        for word in chain.from_iterable(split_words(document.text) for document in read_documents(path)):
            triple[word] += factor
    rounded = {word: (2 * count + 3) // 6 for word, count in triple.items()}
    assert dict(iter_counts(tmp_path / "out")) == {word: count for word, count in rounded.items() if count}


def test_a_kept_folder_counts_only_what_is_new(shards, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK_BYTES", 1)  # each file for itself
    count_shards(shards[:3], tmp_path / "out", work=tmp_path / "work")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("counts")}
    assert len(before) == 3
    count_shards(shards, tmp_path / "out", work=tmp_path / "work", max_memory=resident_bytes() + (200 << 20))
    assert (tmp_path / "out").read_bytes() == expected
    assert {p: p.stat().st_mtime_ns for p in before} == before
    count_shards(shards, tmp_path / "out", work=tmp_path / "work", weights={"*.txt": 2})
    assert (tmp_path / "out").read_bytes() != expected


def test_a_kill_at_any_point_changes_nothing(shards, expected, tmp_path):
    code = f"""
import sys
from herdkern.tokenizer import count_shards, shard_counts
shard_counts.TASK_BYTES = 1
print("on", flush=True)
count_shards({[*map(str, shards)]!r}, {str(tmp_path / "out")!r}, num_threads=1)
"""
    kills = 0
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills > 0
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "out").read_bytes() == expected
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_told_and_the_work_goes_on(shards, expected, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StageError, match="may not grow further"):
            count_shards(shards, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    count_shards(shards, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl#2 must be a readable document, got invalid_json"),
        ("a.jsonl", b'{"text": "a"}\n\n{"no": "b"}', r"a\.jsonl#3 must be a readable document, got no_text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl#1 must be a readable document, got invalid_utf8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "truncated_gzip"),
        ("a.txt", b"\xff\n", "invalid_utf8"),
        ("a.parquet", b"PAR1", "corrupt_parquet"),
    ],
)
def test_bad_shards_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=message):
        count_shards([tmp_path / name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_record_is_told_shortly(tmp_path):
    """By a worker as well, whose error travels: file, line, cause and remedy, and no traceback."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    with make_executor("processes", 1) as pool:
        for executor in (None, pool):
            with pytest.raises(StageError) as error:
                count_shards([path], tmp_path / "out", executor=executor)
            message = str(error.value)
            assert message.startswith("count_shards: a.jsonl#2 must be a readable document, got invalid_json: ")
            assert f"{path}, line 2: " in message
            assert message.endswith("; mend or remove it and run again, files counted so far are kept")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_full_disk_ends_a_counting_for_good(tmp_path, num_threads):
    """While some threads write what passes the budget the others go on to look words up."""
    rng = random.Random(4)
    texts = [random_text(rng, 3000) for _ in range(40)]
    counter = _text.BudgetCounter(make_splitter("llama3"), 20_000, str(tmp_path), num_threads)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            counter.add_texts(texts, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for again in (
        lambda: counter.add_texts(texts, 0),  # words are lost: no counts can come of it
        lambda: counter.finish(-1, "out", 0, lambda: 1 << 20, str(tmp_path), None),
    ):
        with pytest.raises(OSError, match="File too large"):
            again()


PEAK = """
import re, sys
from pathlib import Path
from herdkern.tokenizer import count_shards
count_shards([sys.argv[1]], sys.argv[2], max_memory=int(sys.argv[3]), num_threads=2)
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is in /proc/self/status")
@pytest.mark.parametrize("kind", ["words", "escapes", "for Python"])
def test_lines_near_the_limit_stay_within_the_budget(tmp_path, kind):
    """Words and lines of 8 MB within 150 MB, of which Python takes about 40: 16 of them would be too much."""
    size, budget, num_lines = 8_000_000, 150 << 20, 16 if kind == "words" else 3
    path, expected = tmp_path / "a.jsonl", WordCounts()
    with open(path, "w") as f:
        for i in range(num_lines):
            if kind == "words":
                text = chr(ord("a") + i) * size
                expected.add_words({text: 1})
                f.write(json.dumps({"text": text}) + "\n")
                continue
            rng = random.Random(i)
            text = " ".join(f"{rng.getrandbits(40):x}é" for _ in range(size // 18))
            expected.add(text)
            line = json.dumps({"text": text})  # é is an escape
            f.write((line if kind == "escapes" else line.replace('"text"', '"t\\u0065xt"')) + "\n")
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out"), str(budget)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{kind}: peak {peak / 2**20:.0f} MiB of {budget / 2**20:.0f}")
    assert peak <= 1.1 * budget, f"peak {peak / 2**20:.0f} MiB of {budget / 2**20:.0f}"
    expected.save(tmp_path / "expected")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="at least one file, got none"):
        count_shards([], tmp_path / "out")
    with pytest.raises(ValueError, match="each file once"):
        count_shards([tmp_path / "a.txt", tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"path must end in"):
        count_shards([tmp_path / "a.xyz"], tmp_path / "out")
    with pytest.raises(StageError, match=r"max_memory must be at least \d+ MiB here"):
        count_shards([tmp_path / "a.txt"], tmp_path / "out", max_memory=1 << 20)
    with pytest.raises(ValueError, match="leave a file"):
        count_shards([tmp_path / "a.txt"], tmp_path / "out", weights={"*": 0})
    with make_executor("threads", 2) as pool, pytest.raises(ValueError, match="must not be a pool of threads"):
        count_shards([tmp_path / "a.txt"], tmp_path / "out", max_memory=1 << 30, executor=pool)
    with pytest.raises(ValueError, match="f: max_memory must be at least"):
        bytes_left(1000, "f")


def test_a_line_over_the_budget_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab " * 10_000_000}) + "\n")
    with pytest.raises(StageError, match=r"line_too_long.*line 1: longer than \d+ bytes; split it or raise max_memory"):
        count_shards([tmp_path / "a.jsonl"], tmp_path / "out", max_memory=resident_bytes() + (100 << 20))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    text, work = tmp_path / "a.txt", tmp_path / "counts.work"
    text.write_text("some words")
    work.mkdir()
    (work / "thesis").write_text("years of it")
    with pytest.raises(FileExistsError, match=r"counts\.work must not hold other files"):
        count_shards([text], tmp_path / "counts")
    assert [path.name for path in work.iterdir()] == ["thesis"]
    (work / "thesis").unlink()
    assert count_shards([text], tmp_path / "counts").num_words == 2
    assert not work.exists()
