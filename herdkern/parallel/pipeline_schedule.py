"""The interleaved pipeline schedule with a free number of micro-batches, as lists of actions, one a rank.

Source: The Llama 3 Herd of Models, section 3.3.2 and figure 6 (arXiv:2407.21783): the number N of consecutive
micro-batches that a stage computes is free, where earlier schedules fixed it to the number of ranks (depth first) or of
micro-batches (breadth first), and the batch may be any multiple of a micro-batch. The first and the last stage hold one
layer fewer, for the embedding and the head. Interleaving: Narayanan et al. 2021 (arXiv:2104.04473).

Stage s of pp_size * num_chunks lies on rank s mod pp_size as its chunk s div pp_size. A rank runs some forwards first
(warm-up), then one forward and one backward in turn, then the backwards that are left. The usual length of the warm-up
deadlocks where N or the last group is smaller than the number of ranks; the smallest number of further forwards with
which the simulation ends is added on every rank.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """The forward ("F") or backward ("B") pass of one micro-batch through one stage."""

    kind: Literal["F", "B"]
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, micro-batch {self.microbatch})"


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """Who computes what in which order.

    actions: of each rank.  warmup: how many forwards each rank runs before its first backward.  extra: how many of them
    are there because the schedule would deadlock.
    """

    pp_size: int
    num_chunks: int
    num_microbatches: int
    group_size: int
    actions: tuple[tuple[Action, ...], ...]
    warmup: tuple[int, ...]
    extra: int

    @property
    def num_stages(self) -> int:
        """Stages on all ranks."""
        return self.pp_size * self.num_chunks

    @property
    def ideal_bubble(self) -> float:
        """(pp_size - 1) / (num_chunks * num_microbatches), what no schedule of this kind can beat with equal stages."""
        return (self.pp_size - 1) / (self.num_chunks * self.num_microbatches)


def interleaved_schedule(
    pp_size: int, num_chunks: int, num_microbatches: int, group_size: int | None = None
) -> PipelineSchedule:
    """The schedule of `pp_size` ranks with `num_chunks` stages each.

    num_microbatches: any number, fewer than ranks too.  group_size: N, the micro-batches that a stage computes one
    after the other, 1 to num_microbatches; None: `best_group_size`. More than pp_size hides the time of sends and keeps
    more activations; pp_size is Megatron's depth-first order, num_microbatches breadth first.
    Raises: ValueError for a number out of its range.
    """
    _check(pp_size, num_chunks, num_microbatches)
    if group_size is None:
        group_size = best_group_size(pp_size, num_chunks, num_microbatches)
    if not 1 <= group_size <= num_microbatches:
        raise ValueError(
            f"interleaved_schedule: group_size must lie in [1, num_microbatches = {num_microbatches}], got {group_size}"
        )
    most = num_chunks * num_microbatches
    # one by one: a schedule that ends with one number may deadlock with the next (5 ranks, 2 chunks, 10 in groups of 4)
    for extra in range(most + 1):  # with `most` all forwards come before all backwards, which always ends
        schedule = _with_extra(pp_size, num_chunks, num_microbatches, group_size, extra)
        if _can_end(schedule):
            return schedule
    raise AssertionError("a schedule of all forwards before all backwards must end")


def _check(pp_size: int, num_chunks: int, num_microbatches: int) -> None:
    sizes = {"pp_size": pp_size, "num_chunks": num_chunks, "num_microbatches": num_microbatches}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"interleaved_schedule: {name} must be at least 1, got {value}")


def _with_extra(pp_size: int, num_chunks: int, num_microbatches: int, group_size: int, extra: int) -> PipelineSchedule:
    groups = [
        range(begin, min(begin + group_size, num_microbatches)) for begin in range(0, num_microbatches, group_size)
    ]
    forwards = [(chunk, m) for group in groups for chunk in range(num_chunks) for m in group]
    backwards = [(chunk, m) for group in groups for chunk in reversed(range(num_chunks)) for m in group]
    actions, warmup = [], []
    for rank in range(pp_size):
        fs = [Action("F", chunk * pp_size + rank, m) for chunk, m in forwards]
        bs = [Action("B", chunk * pp_size + rank, m) for chunk, m in backwards]
        first = pp_size - rank - 1
        if num_chunks > 1:
            first = 2 * first + (num_chunks - 1) * len(groups[0])
        first = min(first + extra, len(fs))
        order = fs[:first]
        for f, b in zip(fs[first:], bs, strict=False):
            order += [f, b]
        order += bs[len(fs) - first :]
        actions.append(tuple(order))
        warmup.append(first)
    return PipelineSchedule(
        pp_size=pp_size,
        num_chunks=num_chunks,
        num_microbatches=num_microbatches,
        group_size=group_size,
        actions=tuple(actions),
        warmup=tuple(warmup),
        extra=extra,
    )


def _can_end(schedule: PipelineSchedule) -> bool:
    """Whether no rank waits for ever. Every stage takes its micro-batches in order: counts tell what is finished."""
    last = schedule.num_stages - 1
    forward, backward = [0] * (last + 1), [0] * (last + 1)
    places = [0] * schedule.pp_size
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            begin = place = places[rank]
            while place < len(actions):
                kind, stage, m = actions[place]
                if kind == "F":
                    if stage and forward[stage - 1] <= m:
                        break
                    forward[stage] += 1
                else:
                    if (forward[last] if stage == last else backward[stage + 1]) <= m:
                        break
                    backward[stage] += 1
                place += 1
            places[rank] = place
            moved = moved or place > begin
    return all(place == len(actions) for place, actions in zip(places, schedule.actions, strict=True))


def best_group_size(pp_size: int, num_chunks: int, num_microbatches: int) -> int:
    """The group size of the smallest bubble with equal stages; of equal ones that of the fewest activations.

    That is the smallest from pp_size on whose last group has pp_size micro-batches or more; with fewer micro-batches
    than ranks it is num_microbatches, the only size that never needs further forwards.
    Raises: ValueError for a number below 1.
    """
    _check(pp_size, num_chunks, num_microbatches)
    sizes = range(min(pp_size, num_microbatches), num_microbatches)
    fitting = (size for size in sizes if not 0 < num_microbatches % size < pp_size)
    return num_microbatches if num_chunks > 1 and num_microbatches < pp_size else next(fitting, num_microbatches)


def layers_of_stages(num_layers: int, pp_size: int, num_chunks: int = 1) -> list[range]:
    """The layers of every stage; the embedding counts as a layer of the first stage, the head as one of the last.

    126 layers on 16 ranks with 8 chunks each leave the first stage the embedding alone and the last one the head. What
    is left over goes to stages behind the first.
    Raises: ValueError if there are more stages than layers, embedding and head together.
    """
    num_stages = pp_size * num_chunks
    if pp_size < 1 or num_chunks < 1 or num_layers < 0:
        given = f"{num_layers}, {pp_size}, {num_chunks}"
        raise ValueError(f"layers_of_stages: num_layers, pp_size and num_chunks must be positive, got {given}")
    units, left = divmod(num_layers + 2, num_stages)
    if num_stages > 1 and units < 1:
        most = f"num_layers + 2 = {num_layers + 2}"
        raise ValueError(f"layers_of_stages: pp_size * num_chunks must be at most {most}, got {num_stages}")
    sizes = [units] * num_stages
    for i in range(left):
        sizes[(i + 1) % num_stages] += 1
    sizes[0] -= 1
    sizes[-1] -= 1
    stages, begin = [], 0
    for size in sizes:
        stages.append(range(begin, begin + size))
        begin += size
    return stages
