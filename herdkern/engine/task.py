"""The worker's side of a stage: one task, run in a fresh folder, synced and hashed; and what a task may ask for."""

import contextlib
import contextvars
import json
import os
import pickle
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from herdkern.engine.journal import TaskKey
from herdkern.engine.shards import TMP_SUFFIX, FileRecord, is_as_recorded, remove_folder, seal_folder, sealed_later

StageFunction = Callable[..., dict[str, Any] | None]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

_memory: "contextvars.ContextVar[int]" = contextvars.ContextVar("herdkern_task_memory", default=0)


def code_version(version: int) -> Callable[[AnyFunction], AnyFunction]:
    """Decorator of a stage function: the version of what it computes. Another number makes finished tasks run again.

    The journal knows a stage by the function's name, configuration and inputs; it cannot see its code. Whoever changes
    what a stage function writes, or a kernel below it, raises the number. Without the decorator there is none.
    """

    def mark(fn: AnyFunction) -> AnyFunction:
        fn.code_version = version  # type: ignore[attr-defined]
        return fn

    return mark


def function_name(fn: StageFunction) -> str:
    """How the journal knows a stage function: module, name, and "@<version>" where it has one."""
    version = getattr(fn, "code_version", None)
    return f"{fn.__module__}.{fn.__qualname__}" + (f"@{version}" if version is not None else "")


def task_memory() -> int:
    """Bytes of memory that the task which asks may use: the run's `max_memory` shared by the tasks that run at once.

    Outside of a task it is the default of a run, half of what this machine or container has. What a task writes must
    not depend on it; it says how much to hold before spilling to a file below `out`, or how large a batch to make.
    """
    return _memory.get() or default_memory()


def default_memory() -> int:
    """Half of the memory of this machine, or of the container (cgroup) if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit, and there may be no such file
            total = min(total, int(Path(path).read_text()))
    return total // 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a stage function, as it travels to a worker."""

    key: TaskKey
    inputs: list[Path]
    arguments: tuple[Any, ...]  # after `out`
    folder: Path
    max_memory: int

    def where(self) -> str:
        """ "task-00003 (input a, b, c and 4 more)" for messages."""
        more = f" and {len(self.inputs) - 3} more" if len(self.inputs) > 3 else ""
        return f"{self.key.task} (input {', '.join(map(str, self.inputs[:3]))}{more})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What comes back from a worker; an error travels as data because not every exception survives pickling."""

    tmp: Path | None = None  # where the result lies
    outputs: list[FileRecord] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    error_number: int = 0
    error_trace: str = ""
    is_memory: bool = False
    exception: BaseException | None = None


def run_task(fn: StageFunction, task: Task) -> Outcome:
    """Run one task in a worker: fresh folder, function, sync and hash. Raises neither Exception nor SystemExit.

    The folder has a name of its own at every attempt: an executor may start a task twice, and a worker may outlive the
    run that sent the task.
    """
    started = time.perf_counter()
    tmp = task.folder.with_name(f"{task.folder.name}.{secrets.token_hex(6)}{TMP_SUFFIX}")
    token = _memory.set(task.max_memory)
    try:
        tmp.mkdir(parents=True)
        with sealed_later() as hashed:
            counters = fn(task.inputs, tmp, *task.arguments) or {}
        counters = json.loads(json.dumps(counters, allow_nan=False))
        if not isinstance(counters, dict):
            raise TypeError(f"a stage function must return a dict of counters, got {type(counters).__name__}")
        outputs = seal_folder(tmp, hashed)
        if changed := _changed_input(task):
            raise ValueError(f"the input {changed} was written to or damaged while the stage ran")
        return Outcome(tmp=tmp, outputs=outputs, counters=counters, seconds=time.perf_counter() - started)
    except (Exception, SystemExit) as e:  # a function that calls sys.exit(0) has not finished its task
        with contextlib.suppress(OSError):  # give the space back; what finished earlier is elsewhere
            remove_folder(tmp)
        return _failed(e, _changed_input(task))
    finally:
        _memory.reset(token)


def _changed_input(task: Task) -> Path | None:
    for path, record in zip(task.inputs, task.key.inputs, strict=True):
        if not is_as_recorded(path, record):
            return path
    return None


def _failed(e: BaseException, changed: Path | None) -> Outcome:
    try:
        exception = pickle.loads(pickle.dumps(e))
    except Exception:
        exception = None
    error = f"{type(e).__name__}: {e}"
    if changed is not None and str(changed) not in error:
        error += f" (the input {changed} is not what it was when the stage began)"
    return Outcome(
        error=error,
        error_number=(e.errno or 0) if isinstance(e, OSError) else 0,
        error_trace=traceback.format_exc(),
        is_memory=isinstance(e, MemoryError),
        exception=exception,
    )
