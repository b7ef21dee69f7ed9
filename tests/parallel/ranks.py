"""Processes of a gloo group for tests: start once, run many functions, end for certain."""

import contextlib
import datetime
import itertools
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 60  # the longest that a function may run
# once, not in every process; the second is what use_deterministic_algorithms imports
PRELOADED = ["torch.distributed", "torch._inductor.config", "herdkern.parallel.compose"]


def every_composition():
    """(sizes, whether to tie) of all layouts of 2, 4 and 8 ranks that fit a model of 4 heads and 5 layers."""
    for world_size in (2, 4, 8):
        for tp, cp, pp, dp in itertools.product((1, 2, 4, 8), repeat=4):
            if tp * cp * pp * dp == world_size and tp <= 4 and pp <= 7:
                sizes = {name: size for name, size in zip(("tp", "cp", "pp", "dp"), (tp, cp, pp, dp)) if size > 1}
                yield sizes, (tp + cp + pp + dp) % 2 == 0


class RankFailure(AssertionError):
    """Some ranks raised, died or did not answer. `said`: of each of them, the traceback or what became of it."""

    def __init__(self, said):
        self.said = said
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(said.items())))


class Ranks:
    """`size` processes, each with one thread. A function that fails ends its process, and with it the group."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.connections, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function, *args, seconds=SECONDS, lost=()):
        """function(rank, *args) on every rank; returns what each returned. Does not wait for the ranks `lost`.

        Raises: RankFailure.
        """
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send((function, args))
        until = time.monotonic() + seconds
        answers, said = {}, {}
        waiting = {rank: connection for rank, connection in enumerate(self.connections) if rank not in lost}
        while waiting and (left := until - time.monotonic()) > 0:
            ready = multiprocessing.connection.wait(list(waiting.values()), left)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    failed, answer = waiting.pop(rank).recv()
                except EOFError:
                    self.processes[rank].join(5)
                    failed, answer = True, f"died with exit code {self.processes[rank].exitcode}"
                (said if failed else answers)[rank] = answer
        said |= dict.fromkeys(waiting, f"no answer in {seconds} s")
        if said:
            raise RankFailure(said)
        return [answers[rank] for rank in sorted(answers)]

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(1)
            process.kill()
            process.join()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _serve(rank, size, store, connection):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            torch.manual_seed(0)
            answer = function(rank, *args)
        except BaseException:
            connection.send((True, traceback.format_exc()))
            os._exit(1)  # its sockets close: whoever waits for it sees that
        connection.send((False, answer))
