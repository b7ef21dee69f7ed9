"""Runs a pipeline schedule on the ranks of a process group.

Every rank goes through its own list of actions and nothing else orders them: receives are posted some actions ahead, a
send is begun when its action ends and nobody waits for it. What was sent is let go when it is sent (only the graph
behind it stays), what an action keeps for its backward pass when that has run. Gradients add up in fp32 over the
micro-batches in their order, so fp32 losses and gradients have the bits of one process that takes the micro-batches one
by one (but for a tied embedding, whose two parts are summed at the end).

Source: The Llama 3 Herd of Models, section 3.3.2 (arXiv:2407.21783).
"""

import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdkern.parallel.pipeline_links import Links, PipelineError
from herdkern.parallel.pipeline_schedule import Action, PipelineSchedule, interleaved_schedule
from herdkern.parallel.pipeline_simulation import needed_by, simulate
from herdkern.parallel.pipeline_stages import MicroBatch, Stage

AHEAD = 4  # actions; tried 1: the rank that receives is late by the handshake of every send
TIMEOUT = timedelta(minutes=10)
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class Pipeline:
    """The stages of this rank, run together with those of the other ranks of `group`.

    stages: of `stages_of_rank`, by chunk; may be wrapped where they lie (`fully_shard`, tensor parallelism).
    group: the ranks of the pipeline in order of their stages; None: all ranks. One rank is a pipeline too.
    group_size: N of `interleaved_schedule`, cut to the number of micro-batches; None: the best one.
    schedule: instead of group_size, for steps of schedule.num_microbatches micro-batches.
    overlap: False waits for each send before going on and posts all receives at the start: for comparison.
    timeout: the longest wait for one transfer.
    before_backward: called with (stage, is_last) before each backward pass of one of the stages.
    Raises: ValueError if the stages are not those of this rank; PipelineDeadlock or ValueError for a wrong schedule.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        group: dist.ProcessGroup | None = None,
        *,
        group_size: int | None = None,
        schedule: PipelineSchedule | None = None,
        overlap: bool = True,
        timeout: timedelta = TIMEOUT,
        before_backward: Callable[[Stage, bool], None] | None = None,
    ) -> None:
        self.group = group
        self.pp_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.stages = list(stages)
        self._check_stages()
        self.group_size, self.overlap, self.timeout = group_size, overlap, timeout
        self.before_backward = before_backward
        self._schedules: dict[int, PipelineSchedule] = {}
        self._given = schedule
        if schedule is not None:
            check_schedule(schedule, self.pp_size, len(self.stages))
            self._schedules[schedule.num_microbatches] = schedule
        self._num_passes = 0
        self._broken = ""
        for param in self.parameters():
            if param.dtype in _SIXTEEN_BITS:
                _keep_fp32_gradient(param)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this rank's stages, each once."""
        return list({id(p): p for stage in self.stages for p in stage.parameters()}.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this rank's stages under the names that they have in the model."""
        return {name: param for stage in self.stages for name, param in stage.named_parameters()}

    def schedule_of(self, num_microbatches: int) -> PipelineSchedule:
        """The schedule of a step with so many micro-batches. Raises: ValueError if only another number was given."""
        if num_microbatches not in self._schedules:
            if self._given is not None:
                raise ValueError(
                    f"Pipeline: microbatches must be {self._given.num_microbatches}, as in the schedule, "
                    f"got {num_microbatches}; give group_size instead for any number"
                )
            size = None if self.group_size is None else min(self.group_size, num_microbatches)
            made = interleaved_schedule(self.pp_size, len(self.stages), num_microbatches, size)
            self._schedules[num_microbatches] = made
        return self._schedules[num_microbatches]

    def step(self, microbatches: Sequence[MicroBatch], *, num_targets: int = 0) -> Tensor:
        """Forward and backward passes of all micro-batches; gradients are added to `.grad`.

        microbatches: at least one, the same on every rank of the pipeline, of any numbers of tokens.
        num_targets: what the summed loss is divided by; 0: the targets of these micro-batches.  Pass that of all
        data-parallel ranks where their gradients are summed.
        Returns: the mean loss of a target, () fp32, the same on every rank of the pipeline.
        Raises: ValueError if there is no target; PipelineError if the ranks have different batches or schedules, or one
        of them is gone.  The pipeline cannot be used after that: the ranks do not agree on what was sent.
        """
        return self._pass("step", microbatches, num_targets, backward=True)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicroBatch], *, num_targets: int = 0) -> Tensor:
        """The mean loss of a target as `step` returns it, from forward passes only."""
        return self._pass("evaluate", microbatches, num_targets, backward=False)

    def _pass(self, name: str, microbatches: Sequence[MicroBatch], num_targets: int, *, backward: bool) -> Tensor:
        if self._broken:
            raise PipelineError(f"Pipeline.{name}: the pipeline broke before ({self._broken}); start the ranks again")
        if not microbatches:
            raise ValueError(f"Pipeline.{name}: microbatches must have at least one, got none")
        num_targets = num_targets or sum(batch.num_targets for batch in microbatches)
        if num_targets < 1:
            raise ValueError(f"Pipeline.{name}: microbatches must have a target that counts, got none; drop the step")
        schedule = self.schedule_of(len(microbatches))
        try:
            self._agree(name, schedule, microbatches, num_targets)
            self._num_passes += 1
            actions = schedule.actions[self.rank]
            if not backward:
                actions = tuple(action for action in actions if action.kind == "F")
            one = _Pass(self, schedule, actions, microbatches, 1.0 / num_targets if backward else None)
            return self._loss_everywhere(one.run() / num_targets)
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            raise

    def _agree(
        self, name: str, schedule: PipelineSchedule, microbatches: Sequence[MicroBatch], num_targets: int
    ) -> None:
        """Compares what the ranks are about to do: a difference would end in a wait without end, or a wrong sum."""
        if self.pp_size == 1:
            return
        says = [zlib.crc32(name.encode()), _hash_of_schedule(schedule), len(microbatches)]
        says += [_hash_of_batches(microbatches), num_targets]
        mine = torch.tensor(says, dtype=torch.int64, device=self.stages[0].rope_cos.device)
        every = [torch.empty_like(mine) for _ in range(self.pp_size)]
        try:
            dist.all_gather(every, mine, group=self.group)
        except RuntimeError as error:
            raise PipelineError(
                f"Pipeline.{name}: rank {self.rank} of the pipeline found the others gone: {error}"
            ) from error
        whats = ("the same call", "the same schedule", "as many micro-batches", "the same micro-batches", "num_targets")
        for i, what in enumerate(whats):
            found = [int(one[i]) for one in every]
            if len(set(found)) > 1:
                others = [rank for rank, value in enumerate(found) if value != found[0]]
                numbers = f" ({', '.join(map(str, found))})" if i in (2, 4) else ""
                raise PipelineError(
                    f"Pipeline.{name}: all ranks of the pipeline must have {what}, got something else{numbers} on "
                    f"ranks {', '.join(map(str, others))} than on rank 0; give every rank the same batches and settings"
                )

    def _loss_everywhere(self, loss: Tensor) -> Tensor:
        """The last rank has the losses."""
        if self.pp_size > 1:
            source = dist.get_global_rank(self.group or dist.group.WORLD, self.pp_size - 1)  # type: ignore[arg-type]
            dist.broadcast(loss, source, group=self.group)
        return loss.float()

    def _check_stages(self) -> None:
        num_stages = self.pp_size * len(self.stages)
        found = [(stage.index, stage.num_stages) for stage in self.stages]
        wanted = [(index, num_stages) for index in range(self.rank, num_stages, self.pp_size)]
        if not found or found != wanted:
            raise ValueError(
                f"Pipeline: stages must be (index, of how many) {wanted} on rank {self.rank} of {self.pp_size}, "
                f"got {found}; make them by stages_of_rank"
            )


class _Pass:
    """One pass of a rank over its actions. `scale` is the gradient of each summed loss; None: no backward passes."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: PipelineSchedule,
        actions: Sequence[Action],
        microbatches: Sequence[MicroBatch],
        scale: float | None,
    ) -> None:
        self.pipeline, self.schedule, self.actions, self.microbatches = pipeline, schedule, actions, microbatches
        self.pp_size, self.rank, self.scale = pipeline.pp_size, pipeline.rank, scale
        self.stages = {stage.index: stage for stage in pipeline.stages}
        self.links = Links(pipeline.group, partial(_tag, schedule, pipeline._num_passes), pipeline.timeout)
        self.here: dict[Action, Tensor] = {}  # results for another stage of this rank: there is only one rank
        self.kept: dict[tuple[int, int], tuple[Tensor | None, Tensor, _Slot]] = {}
        self.total = torch.zeros((), dtype=torch.float64, device=pipeline.stages[0].rope_cos.device)
        self.num_posted = 0

    def run(self) -> Tensor:
        """The summed loss of this rank's last stage, () fp64; 0 on ranks that do not have it."""
        for i, action in enumerate(self.actions):
            self._post(i + 1 + AHEAD if self.pipeline.overlap else len(self.actions))
            if action.kind == "F":
                self._forward(action)
            else:
                self._backward(action)
        if self.scale is not None:
            self._sum_tied()
        self.links.finish()
        return self.total

    def _post(self, until: int) -> None:
        """Begins the receives of the actions before number `until`."""
        for action in self.actions[self.num_posted : until]:
            need = needed_by(action, self.schedule.num_stages)
            if need is not None and self._rank_of(need) != self.rank:
                buffer = self.stages[action.stage].new_hidden(self.microbatches[action.microbatch])
                self.links.post(need, buffer, self._rank_of(need))
        self.num_posted = max(self.num_posted, until)

    def _forward(self, action: Action) -> None:
        stage, batch = self.stages[action.stage], self.microbatches[action.microbatch]
        need = needed_by(action, self.schedule.num_stages)
        x = None if need is None else self._take(need)
        if x is not None and self.scale is not None:
            x.requires_grad_()
        out = stage(x, batch)
        if stage.is_last:
            self.total += out.detach()
        if self.scale is not None:
            slot = _Slot()
            self.kept[action[1:]] = (x, _Sent.apply(out, slot), slot)
        if not stage.is_last:
            self._give(action, out.detach(), action.stage + 1)

    def _backward(self, action: Action) -> None:
        assert self.scale is not None
        stage = self.stages[action.stage]
        x, ticket, slot = self.kept.pop(action[1:])
        if stage.is_last:
            slot.gradient = torch.full((), self.scale, dtype=torch.float32, device=self.total.device)
        else:
            slot.gradient = self._take(Action("B", action.stage + 1, action.microbatch))
        if self.pipeline.before_backward is not None:
            self.pipeline.before_backward(stage, action.microbatch == len(self.microbatches) - 1)
        ticket.backward(ticket.new_empty(0))
        if x is not None:
            assert x.grad is not None
            self._give(action, x.grad, action.stage - 1)

    def _take(self, need: Action) -> Tensor:
        return self.here.pop(need) if need in self.here else self.links.receive(need)

    def _give(self, action: Action, result: Tensor, to_stage: int) -> None:
        peer = to_stage % self.pp_size
        if peer == self.rank:
            self.here[action] = result
        else:
            self.links.send(action, result.contiguous(), peer, wait=not self.pipeline.overlap)

    def _rank_of(self, action: Action) -> int:
        return action.stage % self.pp_size

    def _sum_tied(self) -> None:
        """The gradients of the embedding on the first rank and of the head that is tied to it on the last are summed,
        on both in the same order."""
        first, last = self.pipeline.stages[0], self.pipeline.stages[-1]
        if self.pp_size == 1 or not first.config.tied_embeddings or not (first.is_first or last.is_last):
            return
        param: Any = first.embed_tokens.weight if first.is_first else last.lm_head.weight
        mine = param.grad.to_local() if hasattr(param.grad, "to_local") else param.grad
        tied = [Action("B", self.schedule.num_stages, end) for end in (0, 1)]  # a stage that is not there
        me, peer = (0, self.pp_size - 1) if first.is_first else (1, 0)
        self.links.post(tied[1 - me], torch.empty_like(mine), peer)
        self.links.send(tied[me], mine.clone(), peer)
        other = self.links.receive(tied[1 - me])
        mine.copy_(mine + other if me == 0 else other + mine)


class _Slot:
    """Where a stage's output waits for its gradient."""

    gradient: Tensor | None = None


class _Sent(torch.autograd.Function):
    """Stands for an output that is gone: has no elements, and its backward pass hands on the gradient in `slot`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, slot: _Slot) -> Tensor:
        ctx.slot = slot
        return out.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        gradient, ctx.slot.gradient = ctx.slot.gradient, None
        return gradient, None


def check_schedule(schedule: PipelineSchedule, pp_size: int, num_chunks: int) -> None:
    """Proves that a schedule fits the ranks, does everything once and ends.

    Raises: ValueError if it is for other ranks or chunks or an action is missing, too much or before its forward pass;
    PipelineDeadlock if it does not end.
    """
    if (schedule.pp_size, schedule.num_chunks) != (pp_size, num_chunks):
        raise ValueError(
            f"Pipeline: schedule must be for {pp_size} ranks with {num_chunks} chunks, "
            f"got {schedule.pp_size} with {schedule.num_chunks}"
        )
    for rank, actions in enumerate(schedule.actions):
        stages = range(rank, schedule.num_stages, pp_size)
        wanted = {Action(k, s, m) for k in ("F", "B") for s in stages for m in range(schedule.num_microbatches)}
        if wrong := (wanted ^ set(actions)) or (len(actions) != len(wanted) and set(actions)):
            raise ValueError(
                f"Pipeline: schedule must have every action of rank {rank} once, got {min(wrong)} missing or too much"
            )
        places = {action: i for i, action in enumerate(actions)}
        for action, i in places.items():
            if action.kind == "B" and places[action._replace(kind="F")] > i:
                raise ValueError(f"Pipeline: schedule must have {action} of rank {rank} behind its forward pass")
    simulate(schedule)


def _tag(schedule: PipelineSchedule, num_passes: int, action: Action) -> int:
    """A number for each transfer of a pass; those of neighbouring passes differ."""
    width = 2 * (schedule.num_stages + 1) * max(2, schedule.num_microbatches)
    place = (action.stage * max(2, schedule.num_microbatches) + action.microbatch) * 2 + (action.kind == "B")
    return (num_passes % 64) * width + place


def _hash_of_schedule(schedule: PipelineSchedule) -> int:
    return zlib.crc32(repr(schedule.actions).encode())


def _hash_of_batches(microbatches: Sequence[MicroBatch]) -> int:
    """Of what they hold, on the CPU; on a GPU, which would have to wait, of their sizes."""
    found = 0
    for batch in microbatches:
        for tensor in (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens):
            found = zlib.crc32(str(tuple(tensor.shape)).encode(), found)
            if tensor.is_cpu:
                found = zlib.crc32(tensor.contiguous().numpy().tobytes(), found)
    return found


def _keep_fp32_gradient(param: nn.Parameter) -> None:
    """Lets the gradient of a 16-bit parameter add up in fp32."""
    if not hasattr(param, "grad_dtype"):
        raise NotImplementedError(
            f"Pipeline: parameters must be fp32 with torch {torch.__version__}, got {param.dtype}, whose "
            "gradients add up in 16 bits; keep them fp32 and set the model's compute_dtype"
        )
    param.grad_dtype = torch.float32
