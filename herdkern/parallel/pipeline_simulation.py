"""Runs a pipeline schedule on paper: does it end, when does every action happen, what lies in memory.

No devices are needed: a schedule is lists of actions, one a rank, in a fixed order; an action starts when its rank has
finished the one before and what it needs has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herdkern.parallel.pipeline_schedule import Action, PipelineSchedule


class PipelineDeadlock(RuntimeError):
    """No rank can go on. `waiting`: for every rank that has not finished, its next action and the one it waits for."""

    def __init__(self, waiting: "dict[int, tuple[Action, Action | None]]") -> None:
        self.waiting = waiting
        stuck = "; ".join(f"rank {rank} at {action} waits for {need}" for rank, (action, need) in waiting.items())
        super().__init__(f"the schedule cannot end: {stuck}")


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What `simulate` found. Times in the unit of the times given.

    begins, ends: of every action, in the order of `PipelineSchedule.actions`.
    peak_activations: of each rank, the most (chunk, micro-batch) pairs that were forward and not yet backward.
    """

    begins: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    peak_activations: tuple[int, ...]

    @property
    def makespan(self) -> float:
        """When the last rank ends."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        pairs = zip(self.begins, self.ends, strict=True)
        return tuple(sum(end - begin for begin, end in zip(*rank, strict=True)) for rank in pairs)

    @property
    def bubble(self) -> float:
        """Idle time over computing time of the rank that computes most: (pp_size - 1) / (num_chunks num_microbatches)
        at best where all actions take as long."""
        return self.makespan / max(self.busy) - 1.0


def needed_by(action: "Action", num_stages: int) -> "Action | None":
    """The action whose result `action` needs from another stage (the backward of the last stage: its own forward)."""
    if action.kind == "F":
        return action._replace(stage=action.stage - 1) if action.stage else None
    if action.stage == num_stages - 1:
        return action._replace(kind="F")
    return action._replace(stage=action.stage + 1)


def simulate(
    schedule: "PipelineSchedule",
    *,
    forward_time: float | Sequence[float] = 1.0,
    backward_time: float | Sequence[float] = 2.0,
    p2p_latency: float = 0.0,
    overlap_p2p: bool = True,
) -> Simulation:
    """Begin and end of every action of `schedule`, and how much every rank has to keep.

    forward_time, backward_time: of one micro-batch on a stage; one number, or one for each of the pp_size * num_chunks
    stages.  p2p_latency: from the end of an action to where its result is on another rank.
    overlap_p2p: False: the sender waits until it is there (no asynchronous sends).
    Raises: PipelineDeadlock if it cannot end; ValueError for a time below 0 or the wrong number of times.
    """
    num_stages = schedule.num_stages
    times = {
        "F": _of_stages("forward_time", forward_time, num_stages),
        "B": _of_stages("backward_time", backward_time, num_stages),
    }
    if p2p_latency < 0:
        raise ValueError(f"simulate: p2p_latency must be at least 0, got {p2p_latency}")
    ranks = range(schedule.pp_size)
    finished: dict[Action, float] = {}
    begins: list[list[float]] = [[] for _ in ranks]
    ends: list[list[float]] = [[] for _ in ranks]
    free = [0.0] * schedule.pp_size
    latency = p2p_latency if schedule.pp_size > 1 else 0.0
    moved = True
    while moved:  # the times do not depend on the order in which ranks are looked at
        moved = False
        for rank in ranks:
            actions = schedule.actions[rank]
            while len(ends[rank]) < len(actions):
                action = actions[len(ends[rank])]
                need = needed_by(action, num_stages)
                if need is not None and need not in finished:
                    break
                travels = need is not None and need.stage != action.stage
                ready = finished[need] + (latency if travels else 0.0) if need is not None else 0.0
                begin = max(free[rank], ready)
                end = begin + times[action.kind][action.stage]
                finished[action] = end
                begins[rank].append(begin)
                ends[rank].append(end)
                sends = action.stage < num_stages - 1 if action.kind == "F" else action.stage > 0
                free[rank] = end if overlap_p2p or not sends else end + latency
                moved = True
    waiting = {
        rank: (actions[len(done)], needed_by(actions[len(done)], num_stages))
        for rank, (actions, done) in enumerate(zip(schedule.actions, ends, strict=True))
        if len(done) < len(actions)
    }
    if waiting:
        raise PipelineDeadlock(waiting)
    return Simulation(
        begins=tuple(map(tuple, begins)),
        ends=tuple(map(tuple, ends)),
        peak_activations=tuple(_peak(actions) for actions in schedule.actions),
    )


def _of_stages(name: str, time: float | Sequence[float], num_stages: int) -> Sequence[float]:
    times = [time] * num_stages if isinstance(time, int | float) else list(time)
    if len(times) != num_stages:
        raise ValueError(f"simulate: {name} must have one time for each of {num_stages} stages, got {len(times)}")
    if not all(value >= 0 for value in times):
        raise ValueError(f"simulate: {name} must be at least 0, got {min(times)}")
    return times


def _peak(actions: "Sequence[Action]") -> int:
    live = most = 0
    for action in actions:
        live += 1 if action.kind == "F" else -1
        most = max(most, live)
    return most
