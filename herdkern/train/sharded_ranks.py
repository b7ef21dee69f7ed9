"""The ranks that save or load together: what the first makes of all that they say, and one error for all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from herdkern.parallel.group_timeout import timeout_of


class Ranks:
    """The ranks of a group that act together; one if there is no group."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, own: bool = False) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self._first = 0
        if dist.is_available() and dist.is_initialized():
            members = dist.get_process_group_ranks(group)
            self.rank, self.size, self._first = dist.get_rank(group), len(members), members[0]
            if own:  # not disturbed by the collectives of training, and on the host
                self.group = dist.new_group(
                    members, timeout=timeout_of(group), backend="gloo", use_local_synchronization=True
                )

    def agree(
        self,
        function: Callable[[], Any],
        error: type[Exception],
        what: str,
        join: Callable[[list[Any]], Any] | None = None,
    ) -> tuple[Any, Any]:
        """Call a function on every rank; returns what it gave here, and what `join` made of all that on the first rank.

        Without `join` only errors are sent.

        Raises: `error`, the same on all ranks, if one of the two raised an exception on any; RuntimeError if a rank is
        gone.
        """
        mine, said = _try(function)
        answers = self._to_first((said, mine if join is not None and not said else None))
        failed, joined = "", None
        if answers is not None:
            bad = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
            if bad:
                failed = f"{what} failed on {len(bad)} of {self.size} ranks; {bad[0]}"
            elif join is not None:
                joined, said = _try(partial(join, [value for _, value in answers]))
                failed = f"{what} failed; {said}" if said else ""
        failed, joined = self._from_first((failed, joined))
        if failed:
            raise error(failed)
        return mine, joined

    def join(self, value: Any, join: Callable[[list[Any]], Any]) -> Any:
        """What `join` makes on the first rank of what all gave, on every rank."""
        values = self._to_first(value)
        return self._from_first(None if values is None else join(values))

    def scatter(self, values: Sequence[Any]) -> Any:
        """This rank's of `values`, which the first rank gives."""
        if self.size == 1:
            return values[0]
        out: list[Any] = [None]
        dist.scatter_object_list(out, list(values) if self.rank == 0 else None, src=self._first, group=self.group)
        return out[0]

    def _to_first(self, value: Any) -> list[Any] | None:
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=self._first, group=self.group)
        return values

    def _from_first(self, value: Any) -> Any:
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self._first, group=self.group)
        return values[0]


def _try(function: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return function(), ""
    except (OSError, ValueError) as e:
        return None, str(e) or type(e).__name__
    except Exception as e:
        return None, f"{type(e).__name__}: {e}"
