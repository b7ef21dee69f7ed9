"""Counting the words of shards within a memory budget, by any executor, so that a killed run goes on where it stopped.

Shards are counted in groups of about TASK_BYTES, each a task of herdkern.engine with a counts file of its own; then the
files are merged. A task's table spills sorted runs when it reaches its share of the budget, csrc/text/word_runs.h.
"""

import concurrent.futures
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from herdkern import _text
from herdkern.data.decompress import DamagedFileError, read_chunks
from herdkern.data.document import (
    BadRecord,
    BadRecordError,
    clean_text,
    document_kind,
    document_of_line,
    read_documents,
)
from herdkern.engine import Run, StageError, atomic_file
from herdkern.tokenizer.counts_file import (
    CountsHeader,
    Weight,
    bytes_left,
    merge_weighted,
    read_header,
    whole_weights,
    write_counts_file,
)
from herdkern.tokenizer.pretokenize import make_splitter, usable_threads

TASK_BYTES = 256 << 20  # of input files, as they lie on disk
LINES_BYTES = 2 << 20  # JSON lines are counted in batches of about this size
TEXTS_BYTES = 2 << 20  # other texts
LINE_SHARE = {"jsonl": 8, "text": 16, "parquet": 8}  # a line may take this part of what the budget leaves ...
LINE_COPIES = {"jsonl": 2, "text": 8, "parquet": 2}  # ... and there are so many copies of it
MAX_LINE = 1 << 31
RESERVED_LINE = 64 << 20  # the buffer of lines begins with room for one of this size
LONG_LINE = 1 << 20  # Python makes many copies of a line: before it reads such a one the table is written out
THREAD_BYTES = 1 << 20  # of the budget, for each thread
LEAST_TABLE_BYTES = 16 << 20
COUNTS = "counts"
RUN_FILES = {".lock", "data", "journal.jsonl"}  # of a run's folder
READER_BYTES = {"jsonl": 20 << 20, "text": 32 << 20, "parquet": 64 << 20}  # of the budget, for reading


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """What the counts depend on besides the text."""

    split_pattern: tuple[str, ...]
    unicode: str


@dataclass(frozen=True)
class ShardCounter:
    """The stage function; its fields cannot change the counts, so they are no part of the configuration."""

    max_memory: int | None
    num_threads: int | None
    show: Callable[[Path, int], None] | None = None  # (file, bytes of it that are read), in this process alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "__qualname__", "ShardCounter")  # by which the journal knows a function

    def __call__(self, inputs: list[Path], out: Path, config: CountConfig) -> dict[str, Any]:
        """Stage: the words of the inputs into out/counts."""
        kinds = {document_kind(path) for path in inputs}
        if "parquet" in kinds:
            import pyarrow.parquet  # noqa: F401  # before memory is measured

        threads = usable_threads(self.num_threads)
        table_bytes, max_line = 1 << 62, MAX_LINE
        if self.max_memory is not None:
            reserve = max(READER_BYTES[kind] for kind in kinds) + threads * THREAD_BYTES
            left = bytes_left(self.max_memory, "count_shards", reserve, LEAST_TABLE_BYTES)
            max_line = min(left // max(LINE_SHARE[kind] for kind in kinds), MAX_LINE)
            table_bytes = left - max_line * max(LINE_COPIES[kind] for kind in kinds)
        splitter = make_splitter(config.split_pattern, "count_shards")
        counter = _text.BudgetCounter(splitter, table_bytes, os.fspath(out), threads)
        if self.max_memory is not None:
            counter.expect_lines(min(max_line, RESERVED_LINE) + 2 * LINES_BYTES)
        show = self.show or (lambda path, position: None)
        for path in inputs:
            if document_kind(path) == "jsonl":
                _count_json_lines(counter, path, max_line, partial(show, path))
            else:
                _count_texts(counter, path, max_line)
            show(path, path.stat().st_size)

        def merge_bytes() -> int:
            return (64 << 20) if self.max_memory is None else bytes_left(self.max_memory, "count_shards")

        def write(descriptor: int, begin: int) -> tuple[int, ...]:
            return counter.finish(descriptor, os.fspath(out / COUNTS), begin, merge_bytes, os.fspath(out), None)

        header = write_counts_file(out / COUNTS, config.split_pattern, config.unicode, write)
        return {"words": header.num_words, "occurrences": header.num_occurrences}


def _count_json_lines(
    counter: _text.BudgetCounter, path: Path, max_line: int, on_position: Callable[[int], None]
) -> None:
    """The kernel reads the lines; what it does not understand is read, or refused, as read_documents does."""

    def count(pieces: list[bytes], last: bool = False) -> None:
        for number, line in counter.add_json_lines(pieces, "text", last):
            if len(line) >= LONG_LINE:
                counter.spill()
            document = document_of_line(line, path, number)
            if isinstance(document, BadRecord):
                raise BadRecordError(document)
            counter.add_texts([document.text], 0)
        if counter.num_pending_bytes > max_line:
            number = counter.num_lines + 1
            detail = f"{path}, line {number}: longer than {max_line} bytes; split it or raise max_memory"
            raise BadRecordError(BadRecord(f"{path.name}#{number}", "line_too_long", detail))

    try:
        for pieces in _read_ahead(_batches_of_pieces(path, on_position)):
            count(pieces)
    except DamagedFileError as error:
        raise BadRecordError(BadRecord(f"{path.name}#{error.offset}", error.reason, str(error))) from error
    count([], last=True)


def _batches_of_pieces(path: Path, on_position: Callable[[int], None]) -> Iterator[list[bytes]]:
    pieces: list[bytes] = []
    size = 0
    for piece in read_chunks(path, max_expansion=1 << 62, on_position=on_position):
        pieces.append(piece)
        size += len(piece)
        if size >= LINES_BYTES:
            yield pieces
            pieces, size = [], 0
    yield pieces


def _read_ahead(batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """The same batches; a thread reads and decompresses the next one while this one is counted."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def _count_texts(counter: _text.BudgetCounter, path: Path, max_line: int) -> None:
    texts = (
        _parquet_texts(path)
        if document_kind(path) == "parquet"
        else (document.text for document in read_documents(path, max_line_bytes=max_line))
    )
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TEXTS_BYTES:
            counter.add_texts(batch, 0)
            batch, size = [], 0
    counter.add_texts(batch, 0)


def _parquet_texts(path: Path) -> Iterator[str]:
    """The texts that read_documents would give, from the one column and in small pieces."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 18, pre_buffer=False) as file:
            if "text" in file.schema_arrow.names:
                rows = max(1, min(128, file.metadata.num_rows * TEXTS_BYTES // max(1, _column_bytes(file.metadata))))
                for batch in file.iter_batches(batch_size=rows, columns=["text"], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if not isinstance(text, str):
                            detail = f"{path}, row {row}: must have a string 'text', got {type(text).__name__}"
                            raise BadRecordError(BadRecord(f"{path.name}#{row - 1}", "no_text", detail))
                        yield clean_text(text)
                return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        detail = f"{path}, near row {row}: {error}"
        raise BadRecordError(BadRecord(f"{path.name}#{row}", "corrupt_parquet", detail)) from error
    for document in read_documents(path):  # says what is wrong
        yield document.text


def _column_bytes(metadata: Any) -> int:
    """The bytes of all texts of a Parquet file, decompressed."""
    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
    columns = (group.column(column) for group in groups for column in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")


class _Bar:
    """A bar over input bytes. Files that were counted before the first one shown are position, not speed."""

    def __init__(self, groups: Sequence[Sequence[Path]]):
        from tqdm import tqdm

        self.before: dict[Path, int] = {}
        total = 0
        for path in (path for group in groups for path in group):
            self.before[path] = total
            total += path.stat().st_size
        self.bar = tqdm(total=total, desc="count", unit="B", unit_scale=True, smoothing=0, leave=False)
        self.started = False

    def show(self, path: Path, position: int) -> None:
        """Move to a position in a file."""
        if not self.started:
            self.bar.initial = self.bar.n = self.before[path]
            self.started = True
        self.bar.update(self.before[path] + position - self.bar.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def count_shards(
    paths: Sequence[Path | str],
    out: Path | str,
    *,
    split_pattern: str | Sequence[str] = "llama3",
    max_memory: int | None = None,
    num_threads: int | None = None,
    executor: concurrent.futures.Executor | None = None,
    weights: Mapping[str, Weight] | None = None,
    work: Path | str | None = None,
) -> CountsHeader:
    """Count the words of JSONL, Parquet and text files into one counts file.

    paths: the files that read_documents knows, plain or compressed, each once. Their order, the number of threads and
        the executor do not change a byte of the result.
    max_memory: bytes that a process may hold, all in all; None: no limit. A line may take an eighth of what Python and
        the reading leave of it, a line of a text file a sixteenth.
    num_threads: in each process; None: the usable cores, or 1 if an executor is given.
    executor: who counts groups of files, as herdkern.engine.make_executor gives; None: this process.
    weights: factors by path, name or glob pattern, as in merge_counts. Counting does not depend on them.
    work: folder of the groups' counts and of the journal. After a kill the same call goes on from there. None:
        `<out>.work`, which is removed in the end; a folder that is given is kept, and a later call with the same files
        and more counts only what is new, as long as the groups stay the same.
    Raises: StageError naming file, line and cause if one cannot be read; OSError, FileExistsError if `<out>.work` is
        no such folder; ValueError for bad arguments, a pool of threads with max_memory among them.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("count_shards: paths must name at least one file, got none")
    if len(set(files)) < len(files):
        twice = sorted({str(path) for path in files if files.count(path) > 1})
        raise ValueError(f"count_shards: paths must name each file once, got {twice[:3]} more than once")
    if max_memory is not None and isinstance(executor, concurrent.futures.ThreadPoolExecutor):
        raise ValueError(
            "count_shards: executor must not be a pool of threads where max_memory is given, its tasks would each take "
            "all of it; use num_threads, which share one table"
        )
    for path in files:
        document_kind(path)  # refuses what nobody can read
    factors, denominator = whole_weights(files, weights or {}, "count_shards")
    patterns = tuple(make_splitter(split_pattern, "count_shards").patterns)
    threads = num_threads if num_threads is not None or executor is None else 1
    folder = Path(f"{os.fspath(out)}.work") if work is None else Path(work)
    groups = group_files(files, factors)
    if work is None and folder.exists() and not {path.name for path in folder.iterdir()} <= RUN_FILES:
        raise FileExistsError(
            f"count_shards: {folder} must not hold other files, as it is removed in the end; move it or pass work"
        )
    config = CountConfig(split_pattern=patterns, unicode=_text.unicode_version)
    inputs = [group for group, _ in groups]
    bar = _Bar(inputs) if executor is None and sys.stderr.isatty() else None
    with Run(folder, executor=executor, progress=False if executor is None else None) as run, bar or nullcontext():
        counter = ShardCounter(max_memory, threads, bar.show if bar else None)
        with _told_shortly():
            result = run.map("count", counter, inputs, config=config)
        parts = [task / COUNTS for task in result.tasks]
        header = _merged(parts, [factor for _, factor in groups], denominator, out, max_memory)
    if work is None:
        shutil.rmtree(folder)
    return header


def _merged(
    parts: Sequence[Path], factors: Sequence[int], denominator: int, out: Path | str, max_memory: int | None
) -> CountsHeader:
    """The counts of all groups. That of a single one is copied: its blocks have checksums, which whoever reads them
    compares."""
    if list(factors) != [denominator]:
        return merge_weighted(parts, factors, denominator, out, max_memory=max_memory)
    with open(parts[0], "rb") as source, atomic_file(out) as f:
        shutil.copyfileobj(source, f, 1 << 20)
    return read_header(out, "count_shards")


@contextmanager
def _told_shortly() -> Iterator[None]:
    """A StageError about a record or an argument says that, and no more of the stage."""
    try:
        yield
    except StageError as error:
        cause = error.__cause__
        if isinstance(cause, BadRecordError):
            bad = cause.bad
            raise StageError(
                f"count_shards: {bad.record} must be a readable document, got {bad.reason}: {bad.detail}; mend or "
                f"remove it and run again, files counted so far are kept"
            ) from cause
        if isinstance(cause, ValueError) and str(cause).startswith("count_shards: "):
            raise StageError(str(cause)) from cause
        raise


def group_files(files: Sequence[Path], factors: Sequence[int]) -> list[tuple[list[Path], int]]:
    """Files of one factor each in groups of about TASK_BYTES, in their order; those of factor 0 are left out."""
    groups: list[tuple[list[Path], int]] = []
    last: dict[int, list[Path]] = {}
    size: dict[int, int] = {}
    for path, factor in zip(files, factors):
        if factor == 0:
            continue
        if size.get(factor, TASK_BYTES) >= TASK_BYTES:
            last[factor], size[factor] = [], 0
            groups.append((last[factor], factor))
        last[factor].append(path)
        size[factor] += path.stat().st_size
    if not groups:
        raise ValueError("count_shards: weights must leave a file, got 0 for all of them")
    return groups
