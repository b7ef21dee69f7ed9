"""The counts file: read by a naive twin, damaged at every place, merged in passes and with weights."""

import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import _text
from herdkern.tokenizer import LLAMA3_SPLIT_PATTERN, WordCounts, iter_counts, merge_counts
from herdkern.tokenizer.counts_file import MAGIC, MAGIC_1, read_header, whole_weights, write_counts_file


def read_naively(path):
    """The format as its comment describes it."""
    data = path.read_bytes()
    magic, line, body = data.split(b"\n", 2)
    assert magic == b"herdkern word counts 2"
    digits, _, text = line.partition(b" ")
    assert int(digits, 16) == zlib.crc32(text + b"\n")
    header = json.loads(text)
    counts, checks, place = {}, b"", 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = block[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while place < len(body):
        length, check = struct.unpack_from("<II", body, place)
        block = body[place + 8 : place + 8 + length]
        assert zlib.crc32(block) == check
        checks += struct.pack("<I", check)
        place += 8 + length
        word, at = b"", 0
        while at < len(block):
            shared, rest = number(), number()
            word = word[:shared] + block[at : at + rest]
            at += rest
            counts[word] = number()
    assert header["check"] == zlib.crc32(checks) if checks else header["check"] == 0
    assert header["num_bytes"] == len(body)
    assert header["num_words"] == len(counts)
    assert header["num_occurrences"] == sum(counts.values())
    return header, counts


def random_counts(seed, size=4000):
    rng = random.Random(seed)
    return {rng.randbytes(rng.choice([1, 2, 3, 6, 12, 30])): rng.choice([1, 1, 2, 300, 1 << 40]) for _ in range(size)}


def saved(path, counts):
    WordCounts().add_words(counts).save(path)
    return path


def test_the_format_is_what_it_says(tmp_path):
    counts = random_counts(1, 20_000) | {b"x" * 100_000: 5, b"x" * 100_001: 6}
    header, found = read_naively(saved(tmp_path / "counts", counts))
    assert list(found.items()) == sorted(counts.items())
    assert header["split_pattern"] == [LLAMA3_SPLIT_PATTERN]
    assert header["unicode"] == _text.unicode_version
    assert header["num_blocks"] > 3
    assert list(iter_counts(tmp_path / "counts")) == sorted(counts.items())
    assert dict(WordCounts.load(tmp_path / "counts").items()) == counts


def test_no_words(tmp_path):
    assert read_naively(saved(tmp_path / "empty", {}))[1] == {}
    assert len(WordCounts.load(tmp_path / "empty")) == 0
    assert list(iter_counts(tmp_path / "empty")) == []


def test_format_1_is_read(tmp_path):
    counts = dict(sorted(random_counts(2, 100).items()))
    lengths = struct.pack(f"<{len(counts)}q", *map(len, counts))
    body = lengths + struct.pack(f"<{len(counts)}q", *counts.values()) + b"".join(counts)
    header = {"num_words": len(counts), "num_bytes": sum(map(len, counts)), "split_pattern": LLAMA3_SPLIT_PATTERN}
    header |= {"unicode": _text.unicode_version, "sha256": hashlib.sha256(body).hexdigest()}
    old = tmp_path / "old"
    old.write_bytes(b"herdkern word counts 1\n" + json.dumps(header).encode() + b"\n" + body)
    assert dict(WordCounts.load(old).items()) == counts
    assert list(iter_counts(old)) == sorted(counts.items())
    merge_counts([old, saved(tmp_path / "new", {b"a": 1})], tmp_path / "sum")
    assert dict(iter_counts(tmp_path / "sum")) == Counter(counts) + Counter({b"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old", "sum"]
    for damage in (old.read_bytes()[:-1], old.read_bytes()[:-1] + b"\0"):
        old.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged") as error:
            WordCounts.load(old)
        assert str(old) in str(error.value)


def test_hostile_headers_are_refused(tmp_path):
    path, deep = tmp_path / "counts", b"[" * 100_000 + b"\n"
    for content in (MAGIC_1 + deep, MAGIC + b"%08x " % zlib.crc32(deep) + deep):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be the header of a counts file"):
            WordCounts.load(path)
    path.write_bytes(MAGIC_1 + b'{"num_words": 0, "num_bytes": 0, "split_pattern": "llama3", "unicode": "x"}\n')
    with pytest.raises(ValueError, match="does not match its checksum"):
        WordCounts.load(path)


@pytest.mark.parametrize("read", [WordCounts.load, lambda path: list(iter_counts(path))], ids=["load", "stream"])
def test_every_damage_is_found(tmp_path, read):
    path = saved(tmp_path / "counts", random_counts(3))
    data = path.read_bytes()
    rng = random.Random(3)
    begin = read_header(path).begin
    places = [*range(0, begin + 40, 3), *rng.sample(range(begin, len(data)), 60), len(data) - 1]
    damaged = [data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] for at in places]
    damaged += [data[:at] for at in (0, 10, begin - 1, begin, begin + 4, len(data) // 2, len(data) - 1)]
    damaged += [data + b"\0", b"PK" + data]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(path) in str(error.value)
    path.write_bytes(data)
    read(path)


def test_damage_leaves_the_old_result(tmp_path):
    path, out = saved(tmp_path / "counts", random_counts(4)), saved(tmp_path / "out", {b"old": 1})
    before = out.read_bytes()
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"merge_counts: .*counts is damaged: the block before byte \d+ does not match"
    ):
        merge_counts([path, out], out)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["counts", "out"]


def block(*entries):
    payload = b"".join(bytes([shared, len(rest)]) + rest + bytes([count]) for shared, rest, count in entries)
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (block((0, b"b", 1), (0, b"a", 1)), "words out of order"),
        (block((0, b"b", 1), (0, b"b", 1)), "words out of order"),
        (block((0, b"b", 1)) + block((0, b"b", 1)), "words out of order"),
        (block((0, b"a", 0)), "a count of 0"),
        (block((1, b"a", 1)), "a word of a wrong length"),
        (block((0, b"a", 1), (2, b"a", 1)), "a word of a wrong length"),
        (block((0, b"", 1)), "a word of a wrong length"),
        (block((0, b"a", 0x80)), "a number that is too long"),
        (struct.pack("<II", 0, 0), "a block of a wrong length"),
        (block((0, b"a", 1))[:-1], "a block of a wrong length"),
        (block((0, b"a", 1)) + b"abc", "a piece of a block"),
    ],
)
def test_a_false_run_with_true_checksums_is_refused(tmp_path, content, reason):
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        _text.RunReader(str(path), 0, len(content)).read(100)


def test_merging_sums(tmp_path):
    parts = [random_counts(seed) for seed in range(5)]
    paths = [saved(tmp_path / f"part-{i}", part) for i, part in enumerate(parts)]
    total = sum(map(Counter, parts), Counter())
    whole = saved(tmp_path / "whole", total).read_bytes()
    for order in (paths, paths[::-1]):
        calls = []
        header = merge_counts(order, tmp_path / "out", progress=lambda *call, calls=calls: calls.append(call))
        assert (tmp_path / "out").read_bytes() == whole
        assert header.num_occurrences == total.total()
        assert calls[-1][0] == calls[-1][1] == sum(read_header(path).num_bytes for path in paths)
    with pytest.raises(RuntimeError, match="enough"):
        merge_counts(paths, tmp_path / "out", progress=lambda *_: (_ for _ in ()).throw(RuntimeError("enough")))
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize(("max_bytes", "max_files"), [(1, 128), (200_000, 128), (1 << 30, 3)])
def test_many_files_are_merged_in_passes(tmp_path, max_bytes, max_files):
    parts = [random_counts(seed, 50) for seed in range(40)]
    paths = [saved(tmp_path / f"part-{i}", part) for i, part in enumerate(parts)]
    headers = [read_header(path) for path in paths]
    factors = [1 + i % 3 for i in range(40)]
    runs = [(str(h.path), h.begin, h.begin + h.num_bytes, f) for h, f in zip(headers, factors)]

    def write(descriptor, begin):
        return _text.merge_runs(runs, 2, max_bytes, max_files, str(tmp_path), descriptor, "out", begin, None)

    if max_bytes == 1:  # two at a time cannot bring three weights together
        with pytest.raises(ValueError, match="different weights"):
            write_counts_file(tmp_path / "out", (), "", write)
        runs = [(*run[:3], 2) for run in runs]
        factors = [2] * 40
    write_counts_file(tmp_path / "out", (), "", write)
    expected = {}
    for part, factor in zip(parts, factors):
        for word, count in part.items():
            expected[word] = expected.get(word, 0) + count * factor
    assert read_naively(tmp_path / "out")[1] == {word: (total + 1) // 2 for word, total in expected.items()}


weights = st.one_of(
    st.integers(0, 5), st.sampled_from([0.1, 0.5, 0.7, 1e-3, 2.5]), st.fractions(0, 10, max_denominator=30)
)


@settings(max_examples=30, deadline=None)
@given(st.lists(weights, min_size=2, max_size=4).filter(any), st.randoms(use_true_random=False))
def test_weights_round_once(tmp_path_factory, factors, rng):
    folder = tmp_path_factory.mktemp("weights")
    parts = [{bytes([rng.randrange(97, 105)]): rng.randrange(1, 9) for _ in range(6)} for _ in factors]
    paths = [saved(folder / f"part-{i}", part) for i, part in enumerate(parts)]
    merge_counts(paths, folder / "out", weights={f"part-{i}": factor for i, factor in enumerate(factors)})
    exact = Counter()
    for part, factor in zip(parts, factors):
        for word, count in part.items():
            exact[word] += count * Fraction(str(factor))
    rounded = {word: int(total + Fraction(1, 2)) for word, total in exact.items()}
    assert dict(iter_counts(folder / "out")) == {word: count for word, count in rounded.items() if count}


def test_weights_by_path_name_and_pattern():
    paths = ["a/de/x.counts", "a/en/x.counts", "b.counts"]
    assert whole_weights(paths, {"*/de/*": 0.5, "b.counts": "1/3"}, "f") == ([3, 6, 2], 6)
    assert whole_weights(paths, {"a/en/x.counts": 2}, "f") == ([1, 2, 1], 1)
    assert whole_weights(paths, {}, "f") == ([1, 1, 1], 1)
    for bad, message in [
        ({"c": 1}, r"weights must fit a file each, got \['c'\]"),
        ({"a/*": 1, "*/de/*": 2}, "one factor to a file"),
        ({"b.counts": -1}, r"a weight must be a number in \[0, 2\*\*63\), got -1"),
        ({"b.counts": "1e999999999"}, r"a weight must be a number in \[0, 2\*\*63\), got '1e999999999'"),
        ({"b.counts": "x"}, "got 'x' for 'b.counts'"),
        ({"b.counts": float("nan")}, "got nan"),
        ({"b.counts": float("inf")}, "got inf"),
        ({"b.counts": 1 << 64}, r"below 2\*\*63"),
    ]:
        with pytest.raises(ValueError, match=message):
            whole_weights(paths, bad, "f")


def test_large_counts(tmp_path):
    half = saved(tmp_path / "half", {b"a": 1 << 62, b"b": 1 << 34})
    other = saved(tmp_path / "other", {b"a": (1 << 62) - 1, b"b": 1})
    header = merge_counts([half, other], tmp_path / "out")
    assert dict(iter_counts(tmp_path / "out")) == {b"a": (1 << 63) - 1, b"b": (1 << 34) + 1}
    assert header.num_occurrences == (1 << 63) + (1 << 34)
    with pytest.raises(OverflowError, match=r"2\*\*63"):
        merge_counts([half, tmp_path / "out"], tmp_path / "more")
    assert not (tmp_path / "more").exists()
    merge_counts([half, tmp_path / "out"], tmp_path / "more", weights={"*": Fraction(1, 2)})
    assert dict(iter_counts(tmp_path / "more"))[b"a"] == ((1 << 62) + (1 << 63) - 1 + 1) // 2


def test_different_patterns_do_not_mix(tmp_path):
    write_counts_file(tmp_path / "words", (r"\S+",), _text.unicode_version, lambda *_: (0, 0, 0, 0, 0))
    llama = saved(tmp_path / "llama3", {b"a": 1})
    with pytest.raises(ValueError, match=r"one split pattern.*llama3 and .*words; count again"):
        merge_counts([llama, tmp_path / "words"], tmp_path / "out")
    write_counts_file(tmp_path / "later", (LLAMA3_SPLIT_PATTERN,), "99.0", lambda *_: (0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="one Unicode version"):
        merge_counts([llama, tmp_path / "later"], tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path):
    counts = WordCounts().add_words(random_counts(5))
    (tmp_path / "full.tmp").symlink_to("/dev/full")  # every write to it fails
    with pytest.raises(OSError, match="No space left on device"):
        counts.save(tmp_path / "full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    part = saved(tmp_path / "part", random_counts(6))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # a write is cut short, the next one fails
    try:
        with pytest.raises(OSError, match="File too large"):
            merge_counts([part], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["part"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is in /proc/self/status")
def test_long_words_are_merged_within_the_budget(tmp_path):
    """24 files, each with one word of a megabyte; all of them at once would take 48 MiB and more."""
    program = """
import re, sys
from pathlib import Path
from herdkern.tokenizer import WordCounts, merge_counts
from herdkern.tokenizer.counts_file import resident_bytes
folder = Path(sys.argv[1])
paths = [folder / str(i) for i in range(24)]
for i, path in enumerate(paths):
    WordCounts().add_words({b"a" * (1 << 20) + b"%d" % i: 1 + i}).save(path)
budget = resident_bytes() + (24 << 20)
print(merge_counts(paths, folder / "out", max_memory=budget).num_occurrences)
print((int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10) / budget)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    total, share = done.stdout.split()
    assert int(total) == sum(range(1, 25))
    assert float(share) <= 1.1
