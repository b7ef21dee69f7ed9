"""Stages: a function over shards, run by any executor, resumable after `kill -9` with byte-identical output.

RUN/data/<stage>/<task>/ holds what a task wrote; RUN/journal.jsonl says how it came about. A task writes to a folder
ending in .tmp, which its worker syncs and hashes. The process that runs the stage then renames it and adds the line to
the journal: what has a line is complete, and a worker that outlives a killed run can touch nothing that counts.
"""

import concurrent.futures
import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from herdkern.engine.executors import SerialExecutor, num_workers
from herdkern.engine.journal import Journal, RunLock, TaskKey, config_sha256, sum_counters
from herdkern.engine.progress import StageBar
from herdkern.engine.shards import (
    TMP_SUFFIX,
    FileRecord,
    describe,
    folder_record,
    is_as_recorded,
    remove_folder,
    replace_folder,
    verified,
)
from herdkern.engine.task import Outcome, StageFunction, Task, default_memory, function_name, run_task

logger = logging.getLogger(__name__)

HASH_THREADS = 8  # of this process, for inputs and for what is resumed; hashlib lets go of the interpreter
_OURS = re.compile(r"task-\d{5,}(?:\..*\.tmp)?")  # all that a run may delete in the folder of a stage


class StageError(RuntimeError):
    """A stage could not finish: the message names stage, task, input and cause. Tasks that finished are kept."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The finished task folders of a stage in task order, their counters summed, and whether all were there already."""

    tasks: list[Path]
    counters: dict[str, Any]
    skipped: bool
    partition_counters: dict[str, Any] = field(default_factory=dict)  # of an exchange's first half

    def files(self, name: str) -> list[Path]:
        """The file (or folder) called `name` of every task that wrote one, in task order."""
        return [task / name for task in self.tasks if (task / name).exists()]


class Run:
    """A run folder and the stages in it.

    run_dir: created if missing; used by one process at a time (RuntimeError otherwise).
    executor: who runs the tasks; None runs them one after the other in this process. Closing it is the caller's.
    max_memory: bytes that the tasks which run at once may use together (`task_memory` gives a task its share); None:
    half of this machine or container. Nothing that is written depends on it.
    progress: show a bar on stderr; None shows it on a terminal only.
    Raises: RuntimeError if another process works in run_dir; OSError if it is not writable; ValueError for max_memory.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        executor: concurrent.futures.Executor | None = None,
        max_memory: int | None = None,
        progress: bool | None = None,
    ):
        if max_memory is not None and max_memory < 1:
            raise ValueError(f"Run: max_memory must be at least 1 byte or None, got {max_memory}")
        self.run_dir = Path(run_dir)
        self.data_dir = self.run_dir / "data"
        self.executor = executor or SerialExecutor()
        self.max_memory = max_memory or default_memory()
        self.progress = sys.stderr.isatty() if progress is None else progress
        self._lock: RunLock | None = None
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock.acquire(self.run_dir)
        except OSError as e:
            raise type(e)(e.errno, f"Run: run_dir must be writable, got {self.run_dir}: {e.strerror}") from e
        try:
            self.journal = Journal(self.run_dir / "journal.jsonl")
        except OSError as e:
            self.close()
            raise type(e)(e.errno, f"Run: cannot read {self.run_dir / 'journal.jsonl'}: {e.strerror}") from e
        self._known: dict[Path, FileRecord] = {}  # what this object wrote, verified or hashed: not hashed again
        self._first_reader: dict[Path, str] = {}  # of inputs from outside: the stage that hashed them

    def close(self) -> None:
        """Give the run folder back to other processes."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self.close()

    def map(
        self, name: str, fn: StageFunction, inputs: Sequence[Path | str | Sequence[Path | str]], *, config: Any
    ) -> StageResult:
        """Run `fn(inputs, out, config) -> counters` once per entry of `inputs` (a file, a folder or several of them).

        fn: a top-level function that writes files below the fresh folder `out` and returns JSON counters.
        config: a frozen dataclass or dict; a change of it runs the stage again.
        Raises: ValueError for a bad name; StageError if an input is missing or a task fails.
        """
        groups = [[Path(p) for p in ([group] if isinstance(group, str | os.PathLike) else group)] for group in inputs]
        return self._run_stage(name, fn, groups, config, ())

    def once(self, name: str, fn: StageFunction, inputs: Sequence[Path | str], *, config: Any) -> StageResult:
        """Run `fn(inputs, out, config) -> counters` as a single task over all inputs. Raises as `map` does."""
        return self._run_stage(name, fn, [[Path(p) for p in inputs]], config, ())

    def exchange(
        self,
        name: str,
        partition_fn: StageFunction,
        reduce_fn: StageFunction,
        inputs: Sequence[Path | str | Sequence[Path | str]],
        *,
        num_partitions: int,
        config: Any,
    ) -> StageResult:
        """Bring records with equal keys together: every task cuts its input into partitions, then each is reduced.

        partition_fn(inputs, out, config, num_partitions) writes out/part-00000 to out/part-<num_partitions - 1>, files
        or folders. reduce_fn(inputs, out, config) gets one partition's pieces in input order. The pieces stay in
        RUN/data/<name>.partition. Raises as `map` does; StageError if a piece is missing.
        """
        if num_partitions < 1:
            raise ValueError(f"exchange: num_partitions must be at least 1, got {num_partitions}")
        groups = [[Path(p) for p in ([group] if isinstance(group, str | os.PathLike) else group)] for group in inputs]
        first = self._run_stage(f"{name}.partition", partition_fn, groups, config, (num_partitions,))
        pieces = [[task / f"part-{p:05d}" for task in first.tasks] for p in range(num_partitions)]
        missing = [piece for partition in pieces for piece in partition if not piece.exists()]
        if missing:
            raise StageError(
                f"stage {name!r}: the partition function must write out/part-00000 to "
                f"out/part-{num_partitions - 1:05d} in every task, but {missing[0]} is missing"
            )
        second = self._run_stage(name, reduce_fn, pieces, config, ())
        return StageResult(
            tasks=second.tasks,
            counters=second.counters,
            skipped=first.skipped and second.skipped,
            partition_counters=first.counters,
        )

    def _run_stage(
        self, name: str, fn: StageFunction, groups: list[list[Path]], config: Any, extra: tuple[Any, ...]
    ) -> StageResult:
        if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
            raise ValueError(f"Run: a stage name must be letters, digits, '-', '_' and '.', got {name!r}")
        if not hasattr(fn, "__qualname__"):
            raise ValueError(f"Run: a stage function must be a top-level function, got {fn!r}")
        if self._lock is None:
            raise ValueError("Run: the run must be open, got a closed one; make a new Run for the folder")
        with self._lock.stage_lock:
            try:
                return self._run_locked(name, fn, groups, config, extra)
            except OSError as e:  # of the run folder itself: errors of tasks and inputs have become StageError below
                hint = hint_for(e.errno or 0, self.run_dir)
                raise StageError(f"stage {name!r}: cannot work in {self.data_dir / name}: {e}{hint}") from e

    def _run_locked(
        self, name: str, fn: StageFunction, groups: list[list[Path]], config: Any, extra: tuple[Any, ...]
    ) -> StageResult:
        records = self._describe_inputs(name, groups)
        function = function_name(fn)
        digest = config_sha256([config, list(extra)])
        workers = num_workers(self.executor)
        tasks = []
        for number, (group, group_records) in enumerate(zip(groups, records, strict=True)):
            task = f"task-{number:05d}"
            key = TaskKey(stage=name, task=task, function=function, config_sha256=digest, inputs=tuple(group_records))
            memory = max(1, self.max_memory // min(workers, len(groups)))
            folder = self.data_dir / name / task
            tasks.append(Task(key=key, inputs=group, arguments=(config, *extra), folder=folder, max_memory=memory))
        todo = self._not_done(name, tasks)
        if todo:
            self._remove_strays(name, lambda path: path.name.endswith(TMP_SUFFIX))
            self._run_tasks(name, fn, tasks, todo)
        wanted = {task.key.task for task in tasks}
        self._remove_strays(name, lambda path: path.name not in wanted)
        entries = [self.journal.entries[name, task.key.task] for task in tasks]
        return StageResult(
            tasks=[task.folder for task in tasks],
            counters=sum_counters(entry["counters"] for entry in entries),
            skipped=not todo,
        )

    def _describe_inputs(self, name: str, groups: list[list[Path]]) -> list[list[FileRecord]]:
        """Size and hash of every input; those that this object wrote, verified or hashed before are known."""
        paths = list(dict.fromkeys(p for group in groups for p in group))
        unknown = [path for path in paths if not self._is_known(name, path)]
        sizes = {path: size_of(path) for path in unknown} if self.progress else {}
        with self._bar(f"{name}: reading inputs", sizes, HASH_THREADS) as bar, _hash_pool() as pool:
            for path, future in [(p, pool.submit(describe, p)) for p in unknown]:
                try:
                    record = future.result()
                except (OSError, ValueError) as e:
                    raise StageError(f"stage {name!r}: cannot read the input {path}: {e}{self._made_by(path)}") from e
                self._check_against_journal(name, path, record)
                self._known[path.absolute()] = record
                self._first_reader.setdefault(path.absolute(), name)
                bar.advance(sizes.get(path, 0), 0.0)
        return [[self._known[p.absolute()] for p in group] for group in groups]

    def _is_known(self, name: str, path: Path) -> bool:
        """Whether the record of an input is at hand and still true.

        Raises: StageError if the input has changed behind the back of a stage that has worked with it.
        """
        place = path.absolute()
        record = self._known.get(place)
        if record is None or is_as_recorded(path, record):
            return record is not None
        del self._known[place]
        origin = self._origin(path)
        if origin is not None and path.exists():
            raise StageError(
                f"stage {name!r}: the input {path} is damaged: it is not what stage {origin[0]!r} wrote; "
                f"run stage {origin[0]!r} again, it will be made anew"
            )
        first = self._first_reader.get(place, name)
        if first != name:  # the first reader may start over; a later one would mix old and new
            raise StageError(
                f"stage {name!r}: the input {path} has changed since stage {first!r} read it; "
                f"run again from that stage on, with the files as they are now"
            )
        return False

    def _origin(self, path: Path) -> tuple[str, str, str] | None:
        """(stage, task, name, "" for the task's folder itself) if the path is an output of this run."""
        try:
            parts = path.absolute().relative_to(self.data_dir.absolute()).parts
        except ValueError:
            return None
        return (parts[0], parts[1], "/".join(parts[2:])) if len(parts) > 1 else None

    def _made_by(self, path: Path) -> str:
        origin = self._origin(path)
        return f"; it is an output of stage {origin[0]!r}: run that stage again" if origin else ""

    def _check_against_journal(self, name: str, path: Path, record: FileRecord) -> None:
        """Refuse an input that differs from what the stage that made it wrote."""
        origin = self._origin(path)
        entry = self.journal.entries.get(origin[:2]) if origin else None
        if origin is None or entry is None:
            return
        expected = _expected(origin[2], [FileRecord(**output) for output in entry["outputs"]])
        if expected is not None and expected.sha256 != record.sha256:
            raise StageError(
                f"stage {name!r}: the input {path} is damaged: SHA-256 {record.sha256[:16]}…, but stage {origin[0]!r} "
                f"wrote {expected.sha256[:16]}…; run stage {origin[0]!r} again, it will be made anew"
            )

    def _not_done(self, name: str, tasks: list[Task]) -> list[Task]:
        """The tasks whose result is missing, damaged or made from something else; the others' results are verified."""
        entries = [self.journal.find(task.key) for task in tasks]
        found = [
            (task, [FileRecord(**output) for output in entry["outputs"]])
            for task, entry in zip(tasks, entries, strict=True)
            if entry is not None
        ]
        sizes = {task.folder: sum(r.bytes for r in records) for task, records in found}
        done = set()
        with self._bar(f"{name}: checking", sizes, HASH_THREADS) as bar, _hash_pool() as pool:
            jobs = [(task, pool.submit(verified, task.folder, records)) for task, records in found]
            for task, job in jobs:
                records = job.result()
                if records is None:
                    logger.warning("%s is missing or damaged: the task runs again", task.folder)
                else:
                    self._remember(task.folder, records)
                    done.add(task.key.task)
                bar.advance(sizes[task.folder], 0.0)
        return [task for task in tasks if task.key.task not in done]

    def _remember(self, folder: Path, records: list[FileRecord]) -> None:
        """Keep what is known of a task's outputs: files, and the folders that hold them."""
        below: dict[Path, list[FileRecord]] = {}
        for record in records:
            path = folder / record.name
            self._known[path.absolute()] = _named(record)
            for parent in path.relative_to(folder).parents:
                name = path.relative_to(folder / parent).as_posix()
                inner = replace(record, name=name)
                below.setdefault((folder / parent).absolute(), []).append(inner)
        for parent, inside in below.items():
            self._known[parent] = folder_record(parent.name, inside)

    def _forget(self, folders: set[Path]) -> None:
        names = {str(folder) for folder in folders}

        def is_below(path: str) -> bool:  # by strings: the parents of a Path cost 20 times as much
            while path not in names:
                if path == (path := os.path.dirname(path)):
                    return False
            return True

        self._known = {p: r for p, r in self._known.items() if not is_below(str(p))}

    def _run_tasks(self, name: str, fn: StageFunction, tasks: list[Task], todo: list[Task]) -> None:
        self._forget({task.folder.absolute() for task in todo})  # what is known of the old outputs ends here
        pending: dict[concurrent.futures.Future[Outcome], Task] = {}
        done = sum(r.bytes for task in tasks for r in task.key.inputs)
        sizes = {task.folder: sum(r.bytes for r in task.key.inputs) for task in todo}
        with self._bar(name, sizes, num_workers(self.executor), done - sum(sizes.values())) as bar:
            try:
                for task in todo:
                    try:
                        future = self.executor.submit(run_task, fn, task)
                    except Exception as e:  # a pool that is broken or closed refuses work
                        raise self._lost(e, task, pending) from e
                    pending[future] = task
                    if future.done():
                        self._finish(future, pending, bar)
                for future in concurrent.futures.as_completed(list(pending)):
                    self._finish(future, pending, bar)
            except BaseException:
                self._wind_down(pending)
                raise

    def _wind_down(self, pending: "dict[concurrent.futures.Future[Outcome], Task]") -> None:
        """After a failure: start nothing more, and keep what the tasks in flight still finish."""
        for future in pending:
            future.cancel()
        for future in list(pending):
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(Exception):
                    self._finish(future, pending, None)

    def _finish(
        self,
        future: "concurrent.futures.Future[Outcome]",
        pending: "dict[concurrent.futures.Future[Outcome], Task]",
        bar: StageBar | None,
    ) -> None:
        """Journal a finished task, or raise what stopped it."""
        task = pending[future]
        where = f"stage {task.key.stage!r}, {task.where()}"
        try:
            outcome = future.result()
        except Exception as e:
            raise self._lost(e, task, pending) from e
        del pending[future]
        if outcome.tmp is None:
            hint = hint_for(outcome.error_number, self.run_dir)
            if outcome.is_memory:
                hint = f"; memory ran out: {_LESS_MEMORY}. Run again to continue; finished tasks are kept"
            trace = "" if hint or outcome.exception is not None else f"\n{outcome.error_trace}"
            raise StageError(f"{where}: {outcome.error}{hint}{trace}") from outcome.exception
        try:
            replace_folder(outcome.tmp, task.folder)
            self.journal.append(task.key, outcome.outputs, outcome.counters, outcome.seconds)
        except OSError as e:
            hint = hint_for(e.errno or 0, self.run_dir)
            raise StageError(f"{where}: cannot put the result into {self.run_dir}: {e}{hint}") from e
        self._remember(task.folder, outcome.outputs)
        if bar is not None:
            bar.advance(sum(record.bytes for record in task.key.inputs), outcome.seconds)

    def _lost(self, e: Exception, task: Task, pending: "dict[concurrent.futures.Future[Outcome], Task]") -> StageError:
        """What to say of an executor that gives back no outcome: which tasks were in its hands, and what to do."""
        stage, what = task.key.stage, f"{type(e).__name__}: {e}"
        if _is_pickling(e):
            return StageError(
                f"stage {stage!r}, {task.where()}: cannot be sent to a worker: {what}; the stage function must be a "
                f"top-level function of a module, the configuration plain data"
            )
        present = {path.name.partition(".")[0] for path in task.folder.parent.glob(f"task-*.*{TMP_SUFFIX}")}
        begun = [t for t in pending.values() if t.key.task in present]
        named = "; ".join(t.where() for t in begun[:8]) or task.where()
        more = f"; and {len(begun) - 8} more" if len(begun) > 8 else ""
        return StageError(
            f"stage {stage!r}: the worker was lost: {what}. At work: {named}{more}. If memory ran out (dmesg names "
            f"what the system killed): {_LESS_MEMORY}. Run again with a new executor to continue; finished tasks are "
            f"kept"
        )

    def _bar(self, label: str, sizes: dict[Path, int], workers: int, done: int = 0) -> StageBar:
        shown = self.progress and bool(sizes)
        todo = sum(sizes.values())
        return StageBar(label, done=done, todo=todo, num_tasks=len(sizes), num_workers=workers, shown=shown)

    def _remove_strays(self, name: str, is_stray: Callable[[Path], bool]) -> None:
        """Delete unfinished tasks and tasks of inputs that are no more; what no run has made is left alone."""
        folder = self.data_dir / name
        if folder.is_dir():
            for path in folder.iterdir():
                if not _OURS.fullmatch(path.name) or not is_stray(path):
                    continue
                try:
                    remove_folder(path)
                except OSError:  # a worker of a killed run may still be writing there until it notices
                    if not path.name.endswith(TMP_SUFFIX):
                        raise


_LESS_MEMORY = "use fewer workers, smaller inputs or a lower max_memory"


@contextlib.contextmanager
def _hash_pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads for hashing; what is not begun when an error leaves the block is not begun any more."""
    pool = concurrent.futures.ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def size_of(path: Path) -> int:
    """Bytes of a file or of all below a folder; 0 for what cannot be read."""
    try:
        return sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _expected(name: str, outputs: list[FileRecord]) -> FileRecord | None:
    """The record of the file or folder `name` (the whole task folder if "") from those of a task's files."""
    for record in outputs:
        if record.name == name:
            return record
    prefix = f"{name}/" if name else ""
    inside = [
        replace(record, name=record.name.removeprefix(prefix)) for record in outputs if record.name.startswith(prefix)
    ]
    return folder_record(name, inside) if inside or not name else None


def _is_pickling(e: Exception) -> bool:
    return type(e).__name__ == "PicklingError" or (
        isinstance(e, AttributeError | TypeError) and "pickle" in str(e).lower()
    )


def _named(record: FileRecord) -> FileRecord:
    """The record under its file's own name, as it appears when the file is an input."""
    return replace(record, name=record.name.rpartition("/")[2])


def hint_for(error_number: int, run_dir: Path) -> str:
    """What to do about an error of the disk, or nothing."""
    if error_number in (errno.ENOSPC, errno.EDQUOT):
        return f"; the disk that holds {run_dir} is full: free space and run again, finished tasks are kept"
    if error_number == errno.EFBIG:
        return f"; a file below {run_dir} may not grow further (ulimit -f, file system): finished tasks are kept"
    if error_number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"; check the permissions there and below {run_dir} and run again, finished tasks are kept"
    if error_number == errno.EIO:
        return f"; the disk failed: check it (inputs, and {run_dir}) and run again, finished tasks are kept"
    return ""
