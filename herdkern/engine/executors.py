"""Who runs the tasks of a stage: anything that is a `concurrent.futures.Executor`. The output is the same for all."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

ExecutorKind = Literal["serial", "threads", "processes", "mpi", "ray", "dask"]


class SerialExecutor(concurrent.futures.Executor):
    """Runs each call at once in the calling thread."""

    num_workers = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        """A finished future: `fn` has run when this returns. KeyboardInterrupt and SystemExit pass through."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future


class RayExecutor(concurrent.futures.Executor):
    """Ray tasks behind the standard interface. Uses the Ray that is running, or starts one with `num_workers` CPUs.

    A worker that is lost fails its task, as in a process pool: Ray would try again, after an OOM kill without an end.
    """

    def __init__(self, num_workers: int):
        import ray

        self._ray, self.num_workers = ray, num_workers
        self._remote: dict[Callable[..., Any], Any] = {}  # making one sends the function to the cluster
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(num_cpus=num_workers, include_dashboard=False, configure_logging=False, log_to_driver=False)
        else:
            self.num_workers = max(1, int(ray.cluster_resources().get("CPU", num_workers)))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        """A future of `fn(*args, **kwargs)` on some worker."""
        if fn not in self._remote:
            self._remote[fn] = self._ray.remote(max_retries=0)(fn)
        return self._remote[fn].remote(*args, **kwargs).future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the Ray that this executor started; a Ray that was running before is left alone."""
        if self._started:
            self._ray.shutdown()
            self._started = False


class DaskExecutor(concurrent.futures.Executor):
    """A local Dask cluster behind the standard interface. For another cluster pass its `client.get_executor()`.

    A worker that is lost fails its task, as in a process pool.
    """

    def __init__(self, num_workers: int):
        import dask
        from distributed import Client

        self.num_workers = num_workers
        dask.config.set({"distributed.scheduler.allowed-failures": 0})  # read when the scheduler starts
        self._client = Client(n_workers=num_workers, threads_per_worker=1, dashboard_address=None)
        self._executor = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        """A future of `fn(*args, **kwargs)` on some worker."""
        return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop the workers and the cluster."""
        self._executor.shutdown(wait=wait)
        self._client.close()


def num_workers(executor: concurrent.futures.Executor) -> int:
    """How many calls `executor` runs at once; of one that does not tell, the number of usable cores."""
    for name in ("num_workers", "_max_workers"):  # ours and mpi4py's; the standard library's pools
        value = getattr(executor, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return len(os.sched_getaffinity(0))


def _end_with_parent() -> None:
    """In a worker process: end when the process that started it does, even by SIGKILL."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _ProcessPool(concurrent.futures.ProcessPoolExecutor):
    """The standard library's, for workers that die while the next one is being started: that one is never told to end,
    and the pool joins it for ever; or the pool says only that a pipe or a handle is closed."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        """A future of `fn(*args, **kwargs)`. Raises: BrokenProcessPool if a worker is lost."""
        try:
            return super().submit(fn, *args, **kwargs)
        except (OSError, ValueError) as e:  # of a pipe, a handle or a descriptor that the end of the pool has closed
            raise BrokenProcessPool(f"a worker ended while another was being started ({e})") from e

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the workers, those of a broken pool at once."""
        workers = list((getattr(self, "_processes", None) or {}).values())
        if getattr(self, "_broken", False):
            for worker in workers:
                worker.kill()
        super().shutdown(wait=wait, cancel_futures=cancel_futures)


def make_executor(kind: ExecutorKind, num_workers: int | None = None) -> concurrent.futures.Executor:
    """An executor of the named kind; close it after use (`with make_executor(...) as executor:`).

    num_workers: at least 1; None means the number of usable cores. "mpi" takes the ranks that mpiexec started.
    Raises: ValueError for an unknown kind or count; ImportError naming the extra that is missing.
    """
    kinds = ("serial", "threads", "processes", "mpi", "ray", "dask")
    if kind not in kinds:
        raise ValueError(f"make_executor: kind must be one of {', '.join(kinds)}, got {kind!r}")
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise ValueError(f"make_executor: num_workers must be at least 1, got {num_workers}")
    if kind == "serial":
        return SerialExecutor()
    if kind == "threads":
        return concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="herdkern")
    if kind == "processes":  # spawn: a forked copy of a process with threads may hang
        context = multiprocessing.get_context("spawn")
        return _ProcessPool(num_workers, mp_context=context, initializer=_end_with_parent)
    try:
        if kind == "mpi":
            from mpi4py.futures import MPIPoolExecutor

            return MPIPoolExecutor(max_workers=num_workers)
        return RayExecutor(num_workers) if kind == "ray" else DaskExecutor(num_workers)
    except ImportError as e:
        raise ImportError(f"make_executor: {kind!r} needs the extra herdkern[{kind}] ({e})") from e
