"""What holds while the loop runs and is put back behind it: the lock, signals, memory, deterministic operations."""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from herdkern import memory

_FILL: Any = torch.utils.deterministic  # a module class of torch that declares its setting at run time
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
)  # schedulers send the first or the last before a time limit


class StopSignals:
    """`with StopSignals() as stop:` a signal of STOP_SIGNALS sets stop.came; only the main thread may say so."""

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: Any) -> None:
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.came = True


def take_lock(path: Path) -> IO[str]:
    """The open file whose lock this process holds until it is closed.

    Raises: RuntimeError if another process holds it.
    """
    f = open(path, "a")  # noqa: SIM115 -- the caller closes it
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        f.close()
        raise RuntimeError(f"train: {path.parent} must have one process training in it, another holds {path}") from e
    return f


@contextlib.contextmanager
def memory_reuse(wanted: bool) -> Iterator[str]:
    """Freed memory is kept for the next step if wanted and possible, until the loop ends; yields what holds."""
    if not wanted or memory.is_reused():
        yield "reused" if memory.is_reused() else "fresh"
        return
    reason = memory.why_not()
    if reason is not None:
        yield f"fresh: {reason}"
        return
    memory.reuse()
    try:
        yield "reused"
    finally:
        memory.stop_reuse()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch refuses operations whose bits vary; new memory stays unfilled, which costs nothing here."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), _FILL.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _FILL.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        _FILL.fill_uninitialized_memory = fill
