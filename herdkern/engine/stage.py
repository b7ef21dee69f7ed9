"""Stages: a function over shards, run by any executor, resumable after `kill -9` with byte-identical output.

RUN/data/<stage>/<task>/ holds what a task wrote; RUN/journal.jsonl says how it came about. A task writes to a folder
ending in .tmp, which its worker syncs and hashes. The process that runs the stage then renames it and adds the line to
the journal: what has a line is complete, and a worker that outlives a killed run can touch nothing that counts.
"""

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import pickle
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdkern.engine.executors import SerialExecutor
from herdkern.engine.journal import Journal, RunLock, TaskKey, config_sha256, sum_counters
from herdkern.engine.shards import (
    TMP_SUFFIX,
    FileRecord,
    describe,
    folder_sha256,
    is_intact,
    remove_folder,
    replace_folder,
    seal_folder,
)

logger = logging.getLogger(__name__)

StageFunction = Callable[..., dict[str, Any] | None]
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


@dataclass(frozen=True, kw_only=True)
class _Task:
    key: TaskKey
    inputs: list[Path]
    arguments: tuple[Any, ...]  # after `out`
    folder: Path
    tmp: Path


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What comes back from a worker; an error travels as data because not every exception survives pickling."""

    outputs: list[FileRecord] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    error_number: int = 0
    error_trace: str = ""
    exception: BaseException | None = None


def _run_task(fn: StageFunction, inputs: list[Path], tmp: Path, arguments: tuple[Any, ...]) -> _Outcome:
    """Run one task in a worker: fresh folder, function, sync and hash. Raises neither Exception nor SystemExit."""
    started = time.perf_counter()
    try:
        tmp.mkdir(parents=True)
        counters = fn(inputs, tmp, *arguments) or {}
        counters = json.loads(json.dumps(counters, allow_nan=False))
        if not isinstance(counters, dict):
            raise TypeError(f"a stage function must return a dict of counters, got {type(counters).__name__}")
        return _Outcome(outputs=seal_folder(tmp), counters=counters, seconds=time.perf_counter() - started)
    except (Exception, SystemExit) as e:  # a function that calls sys.exit(0) has not finished its task
        with contextlib.suppress(OSError):  # give the space back; what finished earlier is elsewhere
            remove_folder(tmp)
        try:
            exception = pickle.loads(pickle.dumps(e))
        except Exception:
            exception = None
        return _Outcome(
            error=f"{type(e).__name__}: {e}",
            error_number=(e.errno or 0) if isinstance(e, OSError) else 0,
            error_trace=traceback.format_exc(),
            exception=exception,
        )


class Run:
    """A run folder and the stages in it.

    run_dir: created if missing; used by one process at a time (RuntimeError otherwise).
    executor: who runs the tasks; None runs them one after the other in this process. Closing it is the caller's.
    progress: show a bar on stderr; None shows it on a terminal only.
    Raises: RuntimeError if another process works in run_dir; OSError if it is not writable.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        executor: concurrent.futures.Executor | None = None,
        progress: bool | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.data_dir = self.run_dir / "data"
        self.executor = executor or SerialExecutor()
        self.progress = sys.stderr.isatty() if progress is None else progress
        self._lock: RunLock | None = None
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock.acquire(self.run_dir)
        except OSError as e:
            raise type(e)(e.errno, f"Run: run_dir must be writable, got {self.run_dir}: {e.strerror}") from e
        self.journal = Journal(self.run_dir / "journal.jsonl")
        self._known: dict[Path, FileRecord] = {}  # outputs written or verified by this object: no need to hash again

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
            records = self._describe_inputs(name, groups)
            function = f"{fn.__module__}.{fn.__qualname__}"
            digest = config_sha256([config, list(extra)])
            tasks = []
            for number, (group, group_records) in enumerate(zip(groups, records, strict=True)):
                task = f"task-{number:05d}"
                key = TaskKey(
                    stage=name, task=task, function=function, config_sha256=digest, inputs=tuple(group_records)
                )
                folder = self.data_dir / name / task
                tmp = folder.with_name(f"{task}.{secrets.token_hex(6)}{TMP_SUFFIX}")
                tasks.append(_Task(key=key, inputs=group, arguments=(config, *extra), folder=folder, tmp=tmp))
            todo = [task for task in tasks if not self._is_done(task)]
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
        """Size and hash of every input; those that an earlier stage of this object wrote or verified are known."""
        unknown = list(dict.fromkeys(p for group in groups for p in group if p.absolute() not in self._known))
        found: dict[Path, FileRecord] = {}
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, future in [(p, pool.submit(describe, p)) for p in unknown]:
                try:
                    found[path] = future.result()
                except (OSError, ValueError) as e:
                    raise StageError(f"stage {name!r}: cannot read the input {path}: {e}{self._made_by(path)}") from e
                self._check_against_journal(name, path, found[path])
        return [[found.get(p) or self._known[p.absolute()] for p in group] for group in groups]

    def _origin(self, path: Path) -> tuple[str, str, str] | None:
        """(stage, task, name) if the path lies in a task folder of this run."""
        try:
            parts = path.absolute().relative_to(self.data_dir.absolute()).parts
        except ValueError:
            return None
        return (parts[0], parts[1], "/".join(parts[2:])) if len(parts) > 2 else None

    def _made_by(self, path: Path) -> str:
        origin = self._origin(path)
        return f"; it is an output of stage {origin[0]!r}: run that stage again" if origin else ""

    def _check_against_journal(self, name: str, path: Path, record: FileRecord) -> None:
        """Refuse an input that differs from what the stage that made it wrote."""
        origin = self._origin(path)
        entry = self.journal.entries.get(origin[:2]) if origin else None
        if origin is None or entry is None:
            return
        expected = {o["name"]: o["sha256"] for o in entry["outputs"]}.get(origin[2])
        if expected is not None and expected != record.sha256:
            raise StageError(
                f"stage {name!r}: the input {path} is damaged: SHA-256 {record.sha256[:16]}…, but stage {origin[0]!r} "
                f"wrote {expected[:16]}…; run stage {origin[0]!r} again, it will be made anew"
            )

    def _is_done(self, task: _Task) -> bool:
        entry = self.journal.find(task.key)
        if entry is None:
            return False
        records = [FileRecord(**output) for output in entry["outputs"]]
        if not is_intact(task.folder, records):
            logger.warning("%s is missing or damaged: the task runs again", task.folder)
            return False
        self._remember(task.folder, records)
        return True

    def _remember(self, folder: Path, records: list[FileRecord]) -> None:
        """Keep what is known of a task's outputs: files, and the folders that hold them."""
        below: dict[Path, list[FileRecord]] = {}
        for record in records:
            path = folder / record.name
            self._known[path.absolute()] = _named(record)
            for parent in path.relative_to(folder).parents:
                name = path.relative_to(folder / parent).as_posix()
                inner = FileRecord(name=name, bytes=record.bytes, sha256=record.sha256)
                below.setdefault((folder / parent).absolute(), []).append(inner)
        for parent, inside in below.items():
            total = sum(r.bytes for r in inside)
            self._known[parent] = FileRecord(name=parent.name, bytes=total, sha256=folder_sha256(inside))

    def _run_tasks(self, name: str, fn: StageFunction, tasks: list[_Task], todo: list[_Task]) -> None:
        stale = {task.folder.absolute() for task in todo}  # what is known of the old outputs ends here
        self._known = {p: r for p, r in self._known.items() if p not in stale and stale.isdisjoint(p.parents)}
        pending: dict[concurrent.futures.Future[_Outcome], _Task] = {}
        with self._bar(name, tasks, todo) as advance:
            try:
                for task in todo:
                    future = self.executor.submit(_run_task, fn, task.inputs, task.tmp, task.arguments)
                    pending[future] = task
                    if future.done():
                        self._finish(pending.pop(future), future, advance)
                for future in concurrent.futures.as_completed(list(pending)):
                    self._finish(pending.pop(future), future, advance)
            except BaseException:
                self._wind_down(pending)
                raise

    def _wind_down(self, pending: "dict[concurrent.futures.Future[_Outcome], _Task]") -> None:
        """After a failure: start nothing more, and keep what the tasks in flight still finish."""
        for future in pending:
            future.cancel()
        for future, task in pending.items():
            if not future.cancelled():
                with contextlib.suppress(Exception):
                    self._finish(task, future, lambda _: None)

    def _finish(
        self, task: _Task, future: "concurrent.futures.Future[_Outcome]", advance: Callable[[int], None]
    ) -> None:
        """Journal a finished task, or raise what stopped it."""
        where = f"stage {task.key.stage!r}, {task.key.task} (input {', '.join(map(str, task.inputs[:3]))}"
        where += f" and {len(task.inputs) - 3} more)" if len(task.inputs) > 3 else ")"
        try:
            outcome = future.result()
        except Exception as e:
            raise StageError(
                f"{where}: the worker was lost: {type(e).__name__}: {e}; if memory ran out, use fewer workers or "
                f"smaller inputs. Run again to continue; finished tasks are kept"
            ) from e
        if outcome.error:
            hint = _hint(outcome.error_number, self.run_dir)
            trace = "" if hint or outcome.exception is not None else f"\n{outcome.error_trace}"
            raise StageError(f"{where}: {outcome.error}{hint}{trace}") from outcome.exception
        try:
            replace_folder(task.tmp, task.folder)
            self.journal.append(task.key, outcome.outputs, outcome.counters, outcome.seconds)
        except OSError as e:
            hint = _hint(e.errno or 0, self.run_dir)
            raise StageError(f"{where}: cannot put the result into {self.run_dir}: {e}{hint}") from e
        self._remember(task.folder, outcome.outputs)
        advance(sum(record.bytes for record in task.key.inputs))

    @contextlib.contextmanager
    def _bar(self, name: str, tasks: list[_Task], todo: list[_Task]) -> "Any":
        """A bar over input bytes: what was done before counts as position, not as speed."""
        if not self.progress:
            yield lambda num_bytes: None
            return
        from tqdm import tqdm

        total = sum(record.bytes for task in tasks for record in task.key.inputs)
        left = sum(record.bytes for task in todo for record in task.key.inputs)
        shown = {"desc": name, "unit": "B", "unit_scale": True, "smoothing": 0, "leave": False}
        with tqdm(total=total, initial=total - left, **shown) as bar:
            yield bar.update
            bar.refresh()  # its last state is seen, however quick the stage was

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


def _named(record: FileRecord) -> FileRecord:
    """The record under its file's own name, as it appears when the file is an input."""
    return FileRecord(name=record.name.rpartition("/")[2], bytes=record.bytes, sha256=record.sha256)


def _hint(error_number: int, run_dir: Path) -> str:
    """What to do about an error of the disk, or nothing."""
    if error_number in (errno.ENOSPC, errno.EDQUOT):
        return f"; the disk that holds {run_dir} is full: free space and run again, finished tasks are kept"
    if error_number == errno.EFBIG:
        return f"; a file below {run_dir} may not grow further (ulimit -f, file system): finished tasks are kept"
    if error_number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"; make {run_dir} writable and run again, finished tasks are kept"
    return ""
