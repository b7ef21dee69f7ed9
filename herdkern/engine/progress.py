"""The bar of a stage on stderr: input bytes of finished tasks, and an estimate that knows of the tasks in flight."""

import time
from types import TracebackType
from typing import Any


def seconds_left(
    *, bytes_done: int, seconds_done: float, bytes_in_all: int, num_workers: int, elapsed: float
) -> float | None:
    """How long the tasks of this run will still take, or None before the first has finished.

    bytes_done, seconds_done: of the finished tasks, the seconds as their workers measured them.  bytes_in_all: of all
    tasks that this run has to do.  The seconds that all need, shared by the workers, less those that have passed: what
    is half done counts as half done, which bytes of finished tasks over elapsed seconds would leave out.
    """
    if not bytes_done or not seconds_done:
        return None
    return max(0.0, bytes_in_all * seconds_done / bytes_done / max(1, num_workers) - elapsed)


class StageBar:
    """A bar over input bytes, as a context manager: what was done before counts as position, not as speed.

    label: name of the stage.  done, todo: bytes of the tasks found finished and to do.  num_tasks: to do.
    num_workers: how many tasks run at once.  shown: False makes all of it do nothing.
    """

    def __init__(self, label: str, *, done: int, todo: int, num_tasks: int, num_workers: int, shown: bool):
        self.todo, self.num_tasks, self.num_workers = todo, num_tasks, min(num_workers, max(1, num_tasks))
        self._finished = self._bytes = 0
        self._seconds = 0.0
        self._started = time.monotonic()
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B [{elapsed}{postfix}]"
            self._bar = tqdm(
                total=done + todo, initial=done, desc=label, unit_scale=True, leave=False, bar_format=form, miniters=0
            )
            self._bar.set_postfix_str(f"0 of {num_tasks} tasks")

    def advance(self, num_bytes: int, seconds: float) -> None:
        """A task over `num_bytes` of input has finished; its worker took `seconds`."""
        self._finished += 1
        self._bytes += num_bytes
        self._seconds += seconds
        if self._bar is not None:
            self._bar.set_postfix_str(self._state(), refresh=False)
            self._bar.update(num_bytes)

    def _state(self) -> str:
        left = seconds_left(
            bytes_done=self._bytes,
            seconds_done=self._seconds,
            bytes_in_all=self.todo,
            num_workers=self.num_workers,
            elapsed=time.monotonic() - self._started,
        )
        state = f"{self._finished} of {self.num_tasks} tasks"
        if left is None or self._finished == self.num_tasks:
            return state
        minutes, seconds = divmod(round(left), 60)
        return f"{state}, about {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.refresh()  # its last state is seen, however quick the stage was
            self._bar.close()
