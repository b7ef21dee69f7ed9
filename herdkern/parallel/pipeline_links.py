"""Transfers between ranks of a pipeline: receives posted ahead, sends that nobody waits for, errors that name the peer.

Both sides name a transfer by the action that makes it; its tag follows from that, so the order in which two ranks post
does not matter to gloo and no pair of them can wait for each other. A tensor that was sent is let go as soon as it is
sent: gloo tells only a caller that waits, so a thread does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist
from torch import Tensor

from herdkern.parallel.pipeline_schedule import Action


class PipelineError(RuntimeError):
    """A rank of the pipeline is gone, too late, or does something else than this one."""


class Links:
    """The transfers of one rank in one pass over its actions. `tag_of` gives each action's transfer a number.

    timeout: the longest wait for one transfer (gloo does not apply that of the group to them).
    """

    def __init__(self, group: dist.ProcessGroup | None, tag_of: Callable[[Action], int], timeout: timedelta) -> None:
        self.group, self.tag_of, self.timeout = group, tag_of, timeout
        self.rank = dist.get_rank(group)
        self.received: dict[Action, tuple[Any, Tensor, int]] = {}
        self.failed: list[BaseException] = []
        self.sent: SimpleQueue[Any] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def post(self, action: Action, buffer: Tensor, peer: int) -> None:
        """Begin to receive the result of `action` from `peer` into `buffer`."""
        with self._named("receive", action, peer):
            work = dist.irecv(buffer, group=self.group, group_src=peer, tag=self.tag_of(action))
        self.received[action] = (work, buffer, peer)

    def receive(self, action: Action) -> Tensor:
        """What was posted for the result of `action`, once it is there."""
        work, buffer, peer = self.received.pop(action)
        self._raise_failed()
        with self._named("receive", action, peer):
            work.wait(self.timeout)
        return buffer

    def send(self, action: Action, tensor: Tensor, peer: int, *, wait: bool = False) -> None:
        """Begin to send the result of `action`; wait=True: return when it is sent."""
        self._raise_failed()
        with self._named("send", action, peer):
            work = dist.isend(tensor, group=self.group, group_dst=peer, tag=self.tag_of(action))
            assert work is not None
            if wait:
                work.wait(self.timeout)
                return
        if self.thread is None:
            self.thread = threading.Thread(target=self._let_go, name="pipeline sends", daemon=True)
            self.thread.start()
        self.sent.put((work, tensor, action, peer))

    def finish(self) -> None:
        """Return when all is sent."""
        if self.thread is not None:
            self.sent.put(None)
            self.thread.join()
            self.thread = None
        self._raise_failed()

    def _let_go(self) -> None:
        while (item := self.sent.get()) is not None:
            work, _, action, peer = item
            if self.failed:
                continue
            try:
                with self._named("send", action, peer):
                    work.wait(self.timeout)
            except PipelineError as error:
                self.failed.append(error)
            del work, item, _  # not only when the next one comes

    def _raise_failed(self) -> None:
        if self.failed:
            raise self.failed[0]

    @contextmanager
    def _named(self, what: str, action: Action, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            word = "from" if what == "receive" else "to"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PipelineError(
                f"Pipeline: rank {self.rank} of the pipeline could not {what} the result of {action} {word} rank "
                f"{peer}: {reason}; if that rank has ended, its own message says why"
            ) from error
