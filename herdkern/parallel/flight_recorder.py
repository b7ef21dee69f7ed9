"""The flight recorder of collectives: who called what, where in the code, how large, when it ended.

torch's own recorder lives in the process and dies with it (gloo aborts a rank that receives a wrong size), and on gloo
it keeps no end of an operation. Here each call is noted in shared memory before it starts (flight_ring), at the two
doors that all Python code goes through: the methods of ProcessGroup and the functional collectives.
"""

import contextlib
import faulthandler
import inspect
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
import typing_extensions
from torch import Tensor
from torch.distributed import _functional_collectives as functional

from herdkern.parallel.flight_ring import ENDED, SLOTS, STARTED, WAITING, RingWriter, ring_folder

STACKS_SIGNAL = signal.SIGUSR2  # a rank that gets it writes the stacks of its threads, wherever it is stuck
# code of these places is not where a collective is "called"; the last two hold the wrappers of torch's decorators
_INSIDE = (str(Path(torch.__file__).parent), __file__, contextlib.__file__, typing_extensions.__file__)
_MAX_DEPTH = 60
_MAX_OPEN = 4096  # operations of which nobody has waited for the end

# method of ProcessGroup -> its name for readers, the argument with this rank's data, and whether sizes may differ
_COLLECTIVES = {
    "allreduce": ("all_reduce", 0, False),
    "allreduce_coalesced": ("all_reduce_coalesced", 0, False),
    "broadcast": ("broadcast", 0, False),
    "reduce": ("reduce", 0, False),
    "allgather": ("all_gather", 1, False),
    "all_gather_single": ("all_gather_single", 1, False),
    "_allgather_base": ("all_gather_single", 1, False),
    "allgather_into_tensor_coalesced": ("all_gather_coalesced", 1, False),
    "all_gather_single_coalesced": ("all_gather_coalesced", 1, False),
    "gather": ("gather", 1, False),
    "scatter": ("scatter", 0, False),
    "reduce_scatter": ("reduce_scatter", 0, False),
    "reduce_scatter_single": ("reduce_scatter_single", 0, False),
    "_reduce_scatter_base": ("reduce_scatter_single", 0, False),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_coalesced", 0, False),
    "reduce_scatter_single_coalesced": ("reduce_scatter_coalesced", 0, False),
    "all_to_all_single": ("all_to_all_single", 1, True),
    "alltoall_base": ("all_to_all_single", 1, True),
    "alltoall": ("all_to_all", 1, True),
    "barrier": ("barrier", None, False),
    "send": ("send", 0, False),
    "recv": ("recv", 0, False),
}
# of two names the first that this torch has is the one that does the work; argument with the group
_FUNCTIONAL = {
    ("all_reduce",): ("all_reduce", 2),
    ("broadcast",): ("broadcast", 2),
    ("all_gather_single", "all_gather_tensor"): ("all_gather_single", 2),
    ("reduce_scatter_single", "reduce_scatter_tensor"): ("reduce_scatter_single", 3),
    ("all_to_all_single",): ("all_to_all_single", 3),
}


class FlightRecorder:
    """Notes the collectives of this process in a ring, from `start` to `stop`."""

    def __init__(self, path: Path, rank: int, world_size: int, slots: int = SLOTS) -> None:
        self.ring = RingWriter(path, rank, world_size, slots)
        self._groups: dict[str, int] = {}
        self._ops = {name: self.ring.name("op", name, name) for name, *_ in [*_COLLECTIVES.values()]}
        self._dtypes: dict[Any, int] = {None: self.ring.name("dtype", "", "")}
        self._places: dict[tuple[CodeType, int], int] = {}
        self._inside: dict[CodeType, bool] = {}
        self._next: dict[tuple[int, int, int, int], Any] = {}
        self._open: dict[int, int] = {}  # work or storage -> its record, oldest first
        self._undo: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        """Note every collective from here on."""
        for method, (name, data, free) in _COLLECTIVES.items():
            if hasattr(dist.ProcessGroup, method):
                self._replace(dist.ProcessGroup, method, self._method(method, name, data, free))
        self._replace(dist.Work, "wait", self._wait())
        for names, (name, group_at) in _FUNCTIONAL.items():
            method = next(n for n in names if hasattr(functional, n))
            self._replace(functional, method, self._function(method, name, group_at))
        self._replace(functional, "wait_tensor", self._wait_tensor())

    def stop(self) -> None:
        """Leave torch as it was."""
        while self._undo:
            setattr(*self._undo.pop())

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        self._undo.append((owner, name, inspect.getattr_static(owner, name)))  # the descriptor, not what it gives
        setattr(owner, name, new)

    def _method(self, method: str, name: str, data_at: int | None, free: bool) -> Callable[..., Any]:
        call = getattr(dist.ProcessGroup, method)
        is_pair = name in ("send", "recv")

        def noted(group: Any, *args: Any, **kwargs: Any) -> Any:
            data = args[data_at] if data_at is not None and len(args) > data_at else None
            peer, tag = (args[1], args[2]) if is_pair else (-1, 0)
            uneven = free and (len(args) < 4 or bool(args[2]) or bool(args[3]))
            at = self._note(group, name, data, uneven, peer, tag)
            work = call(group, *args, **kwargs)
            if work is None:
                self.ring.mark(at, ENDED, time.time_ns())
            else:
                self._remember(id(work), at)
            return work

        return noted

    def _wait(self) -> Callable[..., Any]:
        call = dist.Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            at = self._open.pop(id(work), None)
            if at is None:
                return call(work, *args, **kwargs)
            self.ring.mark(at, WAITING, 0)
            answer = call(work, *args, **kwargs)  # one that raises stays noted as waited for
            self.ring.mark(at, ENDED, time.time_ns())
            return answer

        return wait

    def _function(self, method: str, name: str, group_at: int) -> Callable[..., Any]:
        call = getattr(functional, method)

        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            group: Any = kwargs.get("group", args[group_at - 1] if len(args) >= group_at else None)
            if torch.compiler.is_compiling():
                return call(tensor, *args, **kwargs)
            resolved = dist.distributed_c10d._resolve_process_group(functional._resolve_group_name(group))
            at = self._note(resolved, name, tensor, name == "all_to_all_single")
            out = call(tensor, *args, **kwargs)
            self._remember(_storage(out), at)
            return out

        return noted

    def _wait_tensor(self) -> Callable[..., Any]:
        call = functional.wait_tensor

        def wait_tensor(tensor: Tensor) -> Any:
            at = self._open.pop(_storage(tensor), None)
            if at is None:
                return call(tensor)
            self.ring.mark(at, WAITING, 0)
            out = call(tensor)
            self.ring.mark(at, ENDED, time.time_ns())
            return out

        return wait_tensor

    def _remember(self, key: int, at: int) -> None:
        self._open[key] = at
        if len(self._open) > _MAX_OPEN:
            del self._open[next(iter(self._open))]

    def _note(self, group: Any, name: str, data: Any, free: bool, peer: int = -1, tag: int = 0) -> int:
        number = self._groups.get(group.group_name)
        if number is None:
            number = self._groups[group.group_name] = self._group(group)
        tensor, numel = _largest(data)
        dtype, ndim, shape = None, 0, 0
        if tensor is not None:
            dtype, ndim = tensor.dtype, tensor.dim()
            for i, size in enumerate(tensor.shape[:4]):
                shape |= min(size, 65535) << (16 * i)
        if dtype not in self._dtypes:
            self._dtypes[dtype] = self.ring.name("dtype", str(dtype), str(dtype).removeprefix("torch."))
        op = self._ops[name]
        key = (number, peer, op, tag) if peer >= 0 else (number, -1, 0, 0)
        counter = self._next.get(key)
        if counter is None:
            counter = self._next[key] = count()
        place = self._place(sys._getframe(2))
        now = time.time_ns()
        return self.ring.append(
            (
                *(next(counter), self.ring.step, number, op, place, self._dtypes[dtype], peer, STARTED, free, ndim),
                *(numel, now, 0, shape, tag),
            )
        )

    def _group(self, group: Any) -> int:
        ranks = dist.get_process_group_ranks(group)
        about = {"name": group.group_name, "about": group.group_desc, "ranks": ranks}
        return self.ring.name("group", group.group_name, about)

    def _place(self, frame: FrameType | None) -> int:
        """Where our or the user's code is; the innermost place if all of it is torch (a backward of its own thread)."""
        first, depth = frame, 0
        while frame is not None and depth < _MAX_DEPTH:
            code = frame.f_code
            inside = self._inside.get(code)
            if inside is None:
                inside = self._inside[code] = code.co_filename.startswith(_INSIDE)
            if not inside:
                break
            frame, depth = frame.f_back, depth + 1
        frame = first if frame is None or depth == _MAX_DEPTH else frame
        if frame is None:
            return 0
        key = (frame.f_code, frame.f_lasti)  # its line is decoded each time that it is asked for
        number = self._places.get(key)
        if number is None:
            text = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            number = self._places[key] = self.ring.name("place", text, text)
        return number


def _storage(out: Any) -> int:
    tensor = getattr(out, "elem", out)  # of an AsyncCollectiveTensor
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0


def _largest(data: Any) -> tuple[Tensor | None, int]:
    """The first tensor in `data` (a tensor, or lists of them) and the number of elements of all."""
    if data is None:
        return None, 0
    if isinstance(data, Tensor):
        return data, data.numel()
    first, numel = None, 0
    for part in data:
        tensor, more = _largest(part)
        first, numel = first if first is not None else tensor, numel + more
    return first, numel


_armed: FlightRecorder | None = None


def arm(run_dir: Path | str, rank: int, world_size: int) -> FlightRecorder:
    """Record this process's collectives for the run in `run_dir`; a second call for it returns the same recorder.

    SIGUSR2 and fatal errors write the stacks of all threads beside the ring.
    """
    global _armed
    path = ring_folder(run_dir) / f"rank-{rank}.ring"
    if _armed is not None:
        if _armed.ring.path == path:
            return _armed
        disarm()
    _armed = FlightRecorder(path, rank, world_size)
    _armed.start()
    stacks = open(path.with_suffix(".stacks"), "w")  # noqa: SIM115 - faulthandler writes to it until the process ends
    faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
    faulthandler.enable(stacks, all_threads=True)
    return _armed


def disarm() -> None:
    """Stop what `arm` started and remove its files: shared memory is not to fill up with runs that have ended."""
    global _armed
    if _armed is None:
        return
    _armed.stop()
    faulthandler.unregister(STACKS_SIGNAL)
    faulthandler.disable()
    path, _armed = _armed.ring.path, None
    for file in (path, path.with_suffix(".stacks")):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other ranks still have theirs there
        path.parent.rmdir()
