"""The ranks that save or load together: what all of them said, and one error for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Agreed:
    """What a function returned: here, and (what is kept of it) on every rank."""

    mine: Any
    of_all: list[Any]


class Ranks:
    """The ranks of a group that act together; one if there is no group."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, own: bool = False) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            members = dist.get_process_group_ranks(group)
            self.rank, self.size = dist.get_rank(group), len(members)
            if own:  # not disturbed by the collectives of training, and on the host
                self.group = dist.new_group(members, backend="gloo", use_local_synchronization=True)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave. Raises: RuntimeError if a rank is gone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(
        self,
        function: Callable[[], Any],
        error: type[Exception],
        what: str,
        keep: Callable[[Any], Any] = lambda value: value,
    ) -> Agreed:
        """Call a function on every rank. Raises: `error` on all of them if it raised an exception on one."""
        mine, said = None, ""
        try:
            mine = function()
        except Exception as e:
            said = f"{type(e).__name__}: {e}" if not isinstance(e, OSError | ValueError) else str(e)
        answers = self.gather((said, None if said else keep(mine)))
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if failed:
            raise error(f"{what} failed on {len(failed)} of {self.size} ranks; {failed[0]}")
        return Agreed(mine, [value for _, value in answers])
