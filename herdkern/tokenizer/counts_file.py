"""The file of word counts, and merging such files in bounded memory.

Line 1 names the format, line 2 is the CRC-32 of a JSON header and the header itself, padded with spaces; then comes
one sorted run of (word, count) in blocks with checksums, csrc/text/word_runs.h. Equal counts of one split pattern give
equal bytes, however they came about. Format 1 (one JSON line, then lengths, counts and words as arrays) is still read.
"""

import contextlib
import fnmatch
import hashlib
import json
import math
import os
import resource
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from herdkern import _text
from herdkern.engine import atomic_file

MAGIC = b"herdkern word counts 2\n"
MAGIC_1 = b"herdkern word counts 1\n"
MAX_HEADER_BYTES = 1 << 24
MERGE_BYTES = 64 << 20  # of readers, where nobody gave a budget
MERGE_FILES = 128  # open at a time
RESERVE_BYTES = 8 << 20  # of a budget: what Python needs while native code works

Weight = int | float | str | Fraction
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CountsHeader:
    """What a counts file says of itself. split_pattern: regular expressions; num_occurrences: the sum of all counts."""

    path: Path
    split_pattern: tuple[str, ...]
    unicode: str
    num_words: int
    num_occurrences: int
    num_blocks: int
    num_bytes: int  # of the run
    check: int
    begin: int  # of the run in the file
    version: int = 2


def read_header(path: Path | str, where: str = "read_header") -> CountsHeader:
    """The header of a counts file; the size of the file is compared with it, the words are not read.

    Raises: OSError; ValueError naming the file if it is no counts file, cut off or damaged.
    """
    path = Path(path)
    with open(path, "rb") as f:
        magic = f.readline(len(MAGIC) + 1)
        if magic not in (MAGIC, MAGIC_1):
            raise ValueError(f"{where}: {path} must begin with {MAGIC!r}, got {magic[:40]!r}")
        line = f.readline(MAX_HEADER_BYTES)
        size, begin = os.fstat(f.fileno()).st_size, f.tell()
    try:
        if magic == MAGIC_1:
            return _header_1(path, json.loads(line), begin, size)
        digits, _, text = line.partition(b" ")
        if int(digits, 16) != zlib.crc32(text):
            raise ValueError("it does not match its checksum")
        header = CountsHeader(path=path, begin=begin, **_checked(json.loads(text)))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{where}: {path}:2: must be the header of a counts file: {e}") from e
    if size != begin + header.num_bytes:
        raise ValueError(
            f"{where}: {path} is damaged: it has {size} bytes, its header says {begin + header.num_bytes}; make it anew"
        )
    return header


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: values[name] for name in ("num_words", "num_occurrences", "num_blocks", "num_bytes", "check")}
    pattern = values["split_pattern"]
    if not all(isinstance(n, int) and n >= 0 for n in numbers.values()):
        raise ValueError(f"numbers must not be negative, got {numbers}")
    if not isinstance(pattern, list) or not all(isinstance(p, str) for p in pattern):
        raise ValueError(f"split_pattern must be a list of str, got {pattern!r}")
    return {**numbers, "split_pattern": tuple(pattern), "unicode": str(values["unicode"])}


def _header_1(path: Path, values: dict[str, Any], begin: int, size: int) -> CountsHeader:
    num_words, num_bytes = int(values["num_words"]), int(values["num_bytes"])
    if size - begin != 16 * num_words + num_bytes:
        raise ValueError(f"it is damaged: {size - begin} bytes follow, not {16 * num_words + num_bytes}")
    return CountsHeader(
        path=path, split_pattern=(str(values["split_pattern"]),), unicode=str(values["unicode"]), num_words=num_words,
        num_occurrences=-1, num_blocks=0, num_bytes=size - begin, check=0, begin=begin, version=1,
    )  # fmt: skip


def _header_line(fields: dict[str, Any], size: int = 0) -> bytes:
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True).encode().ljust(size) + b"\n"
    return f"{zlib.crc32(text):08x} ".encode() + text


def write_counts_file(
    path: Path | str, split_pattern: tuple[str, ...], unicode: str, write_run: Callable[[int, int], tuple[int, ...]]
) -> CountsHeader:
    """Write a counts file, whole or not at all. write_run(descriptor, begin) writes the run there and returns
    (num_words, num_occurrences, num_blocks, num_bytes, check). Raises: OSError, and what write_run raises.
    """
    names = ("num_words", "num_occurrences", "num_blocks", "num_bytes", "check")
    common = {"split_pattern": list(split_pattern), "unicode": unicode}
    size = (
        len(_header_line(common | dict.fromkeys(names, 1 << 127))) - 10
    )  # of the JSON text, with room for all numbers
    with atomic_file(path) as f:
        begin = f.write(MAGIC + _header_line(common | dict.fromkeys(names, 0), size))
        f.flush()
        numbers = dict(zip(names, write_run(f.fileno(), begin), strict=True))
        f.seek(len(MAGIC))
        f.write(_header_line(common | numbers, size))
    return CountsHeader(path=Path(path), split_pattern=split_pattern, unicode=unicode, begin=begin, **numbers)


def load_into(table: _text.WordTable, header: CountsHeader, where: str) -> None:
    """Add the words of a counts file to a table. Raises: OSError; ValueError naming the file if it is damaged."""
    if header.version == 1:
        table.add_words(*_read_1(header, where))
        return
    try:
        totals = table.add_run(os.fspath(header.path), header.begin, header.begin + header.num_bytes)
    except ValueError as e:
        raise ValueError(f"{where}: {e}; make it anew") from e
    _compare(header, totals, where)


def _compare(header: CountsHeader, totals: tuple[int, ...], where: str) -> None:
    _, num_occurrences, num_blocks, _, check = totals
    if (num_occurrences, num_blocks, check) != (header.num_occurrences, header.num_blocks, header.check):
        raise ValueError(f"{where}: {header.path} is damaged: its blocks are not those of its header; make it anew")


def _read_1(header: CountsHeader, where: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    with open(header.path, "rb") as f:
        f.readline()
        sha256 = json.loads(f.readline()).get("sha256")
        body = f.read()
    if hashlib.sha256(body).hexdigest() != sha256:
        raise ValueError(f"{where}: {header.path} is damaged: it does not match its checksum; make it anew")
    lengths = np.frombuffer(body, "<i8", header.num_words)
    counts = np.frombuffer(body, "<i8", header.num_words, 8 * header.num_words)
    return body[16 * header.num_words :], lengths, counts


def words_of(blob: bytes, lengths: np.ndarray, counts: np.ndarray) -> Iterator[tuple[bytes, int]]:
    """(word, count) from words joined, their lengths and their counts."""
    for (begin, end), count in zip(pairwise(accumulate(lengths.tolist(), initial=0)), counts.tolist()):
        yield blob[begin:end], count


def iter_counts(path: Path | str) -> Iterator[tuple[bytes, int]]:
    """(word, count) of a counts file in byte order, read as a stream.

    Raises: OSError; ValueError naming the file and the place when it meets damage.
    """
    header = read_header(path, "iter_counts")
    if header.version == 1:
        yield from words_of(*_read_1(header, "iter_counts"))
        return
    reader = _text.RunReader(os.fspath(path), header.begin, header.begin + header.num_bytes)
    while len((batch := reader.read(1 << 14))[1]):
        yield from words_of(*batch)
    _compare(header, reader.totals(), "iter_counts")


def merge_counts(
    paths: Sequence[Path | str],
    out: Path | str,
    *,
    max_memory: int | None = None,
    weights: Mapping[str, Weight] | None = None,
    progress: Progress | None = None,
) -> CountsHeader:
    """Sum counts files into one, streaming; the order of the files does not matter.

    max_memory: bytes that this process may hold; None: what it holds and 64 MiB more.
    weights: factor of the files whose path or name is the key, or matches it as a glob pattern; 1 for the others, 0
        leaves a file out. Whole numbers, Fractions, text ("1/3", "0.7") or floats, which stand for the decimal they
        print as. A word's count is the exact sum of count times factor, rounded once to the nearest whole number, a
        half upwards; words that come out as 0 are left out.
    progress: called with (bytes read, bytes to read) now and then.
    Raises: OSError; ValueError if a file is damaged, files are of different split patterns or Unicode versions, a key
        of weights fits no file or two keys fit one; OverflowError if a count would reach 2**63.
    """
    if not paths:
        raise ValueError("merge_counts: paths must name at least one counts file, got none")
    factors, denominator = whole_weights(paths, weights or {}, "merge_counts")
    return merge_weighted(paths, factors, denominator, out, max_memory=max_memory, progress=progress)


def merge_weighted(
    paths: Sequence[Path | str],
    factors: Sequence[int],
    denominator: int,
    out: Path | str,
    *,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> CountsHeader:
    """merge_counts with the factor of each file in units of 1 / denominator."""
    headers = [read_header(path, "merge_counts") for path in paths]
    check_same_pattern(headers, "merge_counts")
    folder = os.fspath(Path(out).absolute().parent)
    total = sum(header.num_bytes for header, factor in zip(headers, factors) if factor)
    left = MERGE_BYTES if max_memory is None else bytes_left(max_memory, "merge_counts")

    def show(num_bytes: int) -> None:
        if progress is not None:
            progress(min(num_bytes, total), total)

    with contextlib.ExitStack() as stack:
        runs = [(*_run_of(header, folder, stack), factor) for header, factor in zip(headers, factors) if factor]

        def write(descriptor: int, begin: int) -> tuple[int, ...]:
            return _text.merge_runs(
                runs, denominator, left, MERGE_FILES, folder, descriptor, os.fspath(out), begin, show
            )

        try:
            merged = write_counts_file(out, headers[0].split_pattern, headers[0].unicode, write)
        except ValueError as e:
            raise ValueError(f"merge_counts: {e}") from e
    show(total)
    return merged


def _run_of(header: CountsHeader, folder: str, stack: contextlib.ExitStack) -> tuple[str, int, int]:
    """(path, begin, end) of the run in a counts file; one of format 1 is first written as a run."""
    if header.version == 2:
        return os.fspath(header.path), header.begin, header.begin + header.num_bytes
    import tempfile

    table = _text.WordTable(_text.Splitter(list(header.split_pattern)))
    load_into(table, header, "merge_counts")
    file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp"))  # noqa: SIM115
    return file.name, 0, table.write_run(file.fileno(), file.name, 0)[3]


def check_same_pattern(headers: Sequence[CountsHeader], where: str) -> None:
    """Raises: ValueError naming both files if two were split differently."""
    first = headers[0]
    for header in headers:
        if header.split_pattern != first.split_pattern:
            raise ValueError(
                f"{where}: counts of one split pattern can be summed, got {first.split_pattern} in {first.path} and "
                f"{header.split_pattern} in {header.path}; count again with one pattern"
            )
        if header.unicode != first.unicode:
            raise ValueError(
                f"{where}: counts of one Unicode version can be summed, got {first.unicode} in {first.path} and "
                f"{header.unicode} in {header.path}; count again with one version of herdkern"
            )


def whole_weights(paths: Sequence[Path | str], weights: Mapping[str, Weight], where: str) -> tuple[list[int], int]:
    """(whole factor of each path, common denominator) of weights by path, name or glob pattern."""
    found = [Fraction(1)] * len(paths)
    by_key = {key: _fraction(key, weight, where) for key, weight in weights.items()}
    unused = set(by_key)
    for i, path in enumerate(map(Path, paths)):
        keys = [key for key in by_key if key in (str(path), path.name) or fnmatch.fnmatchcase(str(path), key)]
        if len(keys) > 1:
            raise ValueError(f"{where}: weights must give one factor to a file, got {keys} for {path}")
        if keys:
            found[i] = by_key[keys[0]]
            unused.discard(keys[0])
    if unused:
        raise ValueError(
            f"{where}: weights must fit a file each, got {sorted(unused)}; the files are {[*map(str, paths)]}"
        )
    denominator = math.lcm(*(weight.denominator for weight in found))
    factors = [int(weight * denominator) for weight in found]
    if max(denominator, *factors) >= 1 << 63:
        raise ValueError(f"{where}: weights must have a common denominator below 2**63, got {dict(weights)}")
    return factors, denominator


def _fraction(key: str, weight: Weight, where: str) -> Fraction:
    try:
        text = str(weight)
        if "/" not in text and abs(Decimal(text).adjusted()) > 400:  # 1e999999999 would be computed digit by digit
            raise ValueError
        fraction = Fraction(text if isinstance(weight, float) else weight)
    except (ValueError, TypeError, ArithmeticError):
        fraction = Fraction(-1)
    if fraction < 0:
        raise ValueError(f"{where}: a weight must be a number in [0, 2**63), got {weight!r} for {key!r}")
    return fraction


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def bytes_left(max_memory: int, where: str, reserve: int = RESERVE_BYTES, least: int = 4 << 20) -> int:
    """What a budget leaves beyond what the process holds and `reserve`. Raises: ValueError if that is below `least`."""
    held = resident_bytes()
    left = max_memory - held - reserve
    if left < least:
        raise ValueError(
            f"{where}: max_memory must be at least {(held + reserve + least) >> 20} MiB here (this process already "
            f"holds {held >> 20} MiB), got {max_memory >> 20} MiB"
        )
    return left
