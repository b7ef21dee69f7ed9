"""Ranks of a benchmark as processes of their own, and what the first of them reports."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def run_ranks(work: Callable[..., None], names: list[str], rounds: int, num_ranks: int, limit: float) -> Iterator[Any]:
    """What rank 0 puts into its queue, once for each name, as it comes.

    work: a top-level function (rank, path for a file store, names, rounds, queue).
    Raises: RuntimeError if a rank ends badly, or all together take more than limit seconds.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), names, rounds, results)
        processes = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        until = time.monotonic() + limit
        try:
            for _ in names:
                while results.empty():
                    dead = [process.exitcode for process in processes if process.exitcode]
                    if dead or time.monotonic() > until:
                        raise RuntimeError(f"ranks ended with {dead}" if dead else f"not finished in {limit:.0f} s")
                    time.sleep(0.05)
                yield results.get()
            for process in processes:
                process.join(30)
        finally:
            for process in processes:
                process.kill()
