"""How long the ranks of a process group wait for each other, for groups that torch would give half an hour."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


def timeout_of(group: dist.ProcessGroup | None = None) -> timedelta:
    """How long a collective of `group` waits; None: the default group."""
    waiting: Any = group or dist.group.WORLD
    limit: timedelta = waiting._get_backend(waiting._device_types[0]).options._timeout
    return limit


@contextmanager
def as_long_as_the_run() -> Iterator[None]:
    """Groups that are made inside wait as long as the default group, also for a rank that dies while they are made.

    DeviceMesh has no argument for it but options of one backend, with which it does not use the default group either.
    """
    before = distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout_of()
    try:
        yield
    finally:
        distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = before
