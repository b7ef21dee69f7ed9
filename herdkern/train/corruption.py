"""Silent corruption: what must have the same bits on several ranks, or twice on one, and has not.

Two checks, every config.corruption_check_every_steps steps, before the weights change. Replay: the first micro-batch of
a rank is also computed by a data-parallel neighbour (another one each time; alone: by the same process again), and all
outputs and gradients must have the same bits. Copies: ranks that hold the same part of a weight, its reduced gradient,
the optimizer's state or the average must hold the same bits; so a fault at any earlier step is still seen. A difference
is computed once more by all, and the majority tells whose machine is at fault.

Source: The Llama 3 Herd of Models, section 3.3.4 (arXiv:2407.21783): six interruptions of 419 were silent corruption.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from herdkern.parallel.data import local
from herdkern.train.batch import Batch
from herdkern.train.metrics import MetricsLog
from herdkern.train.source import BatchSource, StepData

Key = tuple[int, int, str]  # of a traced tensor: way, stage (backwards: minus it), what
Sums = dict[Key, int]  # in the order of computing
_FORWARD, _BACKWARD = 0, 1
K = TypeVar("K")


class SilentCorruptionError(RuntimeError):
    """Bits differ that must be the same. ranks: those at fault, or all that differ where nobody can say which is."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        super().__init__(message)


class Checked(Protocol):
    """What a check asks of a run: an engine of `Trainer`."""

    is_first: bool

    def replicas(self) -> tuple[int, int]:
        """This rank's place among the data-parallel ranks, and their number."""

    def traced(self) -> Sequence[tuple[int, nn.Module]]:
        """The modules that compute here, with the number of their stage."""

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of a step; the loss and further metrics."""

    def replay(self, batch: Batch, batches: Sequence[Batch]) -> None:
        """Compute gradients of one micro-batch as in a step of `batches`, and let them go."""

    def copies(self, *, gradients: bool) -> Mapping[str, Mapping[str, Tensor]]:
        """Group of ranks -> name -> a tensor whose bits are the same on all ranks of the group: gradients, or what
        stays from step to step."""

    def gather(self, value: Any) -> list[Any]:
        """What all ranks gave, in their order."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """The sum of the 8-byte words of this rank's part, () int64: any change of one word changes it."""
    octets = local(tensor.detach()).reshape(-1).contiguous().view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = octets.numel() // 8 * 8
    return octets[:whole].view(torch.int64).sum() + octets[whole:].sum(dtype=torch.int64)


class Trace:
    """`with Trace(modules) as trace:` checksums of the first output of every module and the first gradient of every
    parameter, which are those of the first micro-batch; trace.sums holds them at the end."""

    def __init__(self, modules: Iterable[tuple[int, nn.Module]]) -> None:
        self.modules = list(modules)
        self.sums: Sums = {}
        self._found: dict[Key, Tensor] = {}
        self._watched: set[int] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> "Trace":
        for stage, whole in self.modules:
            for name, module in whole.named_modules():
                self._hooks.append(module.register_forward_pre_hook(self._before(stage, name)))
                self._hooks.append(module.register_forward_hook(self._behind(stage, name)))
            self._watch(stage, "", whole)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.sums = _values(self._found)

    def _before(self, stage: int, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, _inputs: Any) -> None:
            self._watch(stage, name, module)  # FSDP puts other parameters here while it computes

        return hook

    def _behind(self, stage: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            key = (_FORWARD, stage, f"output of {name or 'the model'}")
            if key not in self._found:
                sums = [checksum(one) for one in outputs if isinstance(one, Tensor)]
                if sums:
                    self._found[key] = torch.stack(sums).sum()

        return hook

    def _watch(self, stage: int, prefix: str, module: nn.Module) -> None:
        for name, param in module.named_parameters(prefix):
            if param.requires_grad and param.is_leaf and id(param) not in self._watched:
                self._watched.add(id(param))
                self._hooks.append(param.register_hook(self._gradient(stage, name)))

    def _gradient(self, stage: int, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            key = (_BACKWARD, -stage, f"gradient of {name}")
            if key not in self._found:
                self._found[key] = checksum(gradient)

        return hook


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first tensor that differs, the ranks that are at fault, and those that agree with each other; where nobody
    can say who is at fault, `ranks` are all that differ and `agreeing` is empty."""

    what: str
    ranks: tuple[int, ...]
    agreeing: tuple[int, ...]

    def __str__(self) -> str:
        here = f"{self.what} on {_ranks(self.ranks)}"
        if self.agreeing:
            return f"{here} must have the bits of {_ranks(self.agreeing)}"
        if len(self.ranks) == 1:
            return f"{here} must have the same bits each time that it is computed"
        return f"{here} must have the same bits, and there is no majority that says whose are wrong"


def accumulate_checked(
    engine: Checked, source: BatchSource, data: StepData, batches: Sequence[Batch], turn: int
) -> tuple[float, dict[str, float]]:
    """As `engine.accumulate(batches)`, compared with a replay on a neighbour, and of the copies behind it.

    data: of the step that `batches` are this rank's part of.  turn: 0, 1, ...: says how far away the neighbour is.
    Raises: SilentCorruptionError, on all ranks.
    """
    mine, size = engine.replicas()
    shift = 1 + turn % (size - 1) if size > 1 else 0
    begin = time.perf_counter()
    check_copies(engine)  # first: a wrong weight makes wrong outputs
    again = _replay(engine, source, data, batches, (mine - shift) % size)
    replayed = time.perf_counter()
    with Trace(engine.traced()) as own:
        loss, extra = engine.accumulate(batches)
    computed = time.perf_counter()
    digests = engine.gather((mine, _digest(own.sums), _digest(again)))
    owners = _disputed(digests, shift, size)
    if owners:
        owner = min(owners)
        votes = {"first": own.sums} if mine == owner else {}
        if mine == (owner + shift) % size:
            votes["replay"] = again
        votes["third"] = _replay(engine, source, data, batches, owner)
        finding = judge_replays(engine.gather((mine, votes)), size)
        raise SilentCorruptionError(str(finding), finding.ranks)
    check_copies(engine, gradients=True)
    seconds = replayed - begin + time.perf_counter() - computed
    return loss, {**extra, "corruption_check_seconds": seconds}


def _replay(engine: Checked, source: BatchSource, data: StepData, batches: Sequence[Batch], owner: int) -> Sums:
    """Checksums of the first micro-batch of data-parallel rank `owner`, computed here."""
    batch = data.micro_batches(source, owner, engine.replicas()[1])[0]
    devices = [batch.tokens.device] if batch.tokens.is_cuda else []
    with torch.random.fork_rng(devices), Trace(engine.traced()) as trace:
        engine.replay(batch, batches)
    return trace.sums


def _disputed(digests: Sequence[tuple[int, str, str]], shift: int, size: int) -> set[int]:
    """The data-parallel ranks whose micro-batch had other bits on the neighbour, on any rank of the model."""
    per_replica: dict[int, list[tuple[str, str]]] = {}
    for replica, own, again in digests:  # ranks of a replica stand in the same order in each
        per_replica.setdefault(replica, []).append((own, again))
    return {
        owner
        for owner, some in per_replica.items()
        for (own, _), (_, again) in zip(some, per_replica[(owner + shift) % size], strict=True)
        if own != again
    }


def judge_replays(gathered: Sequence[tuple[int, Mapping[str, Sums]]], size: int) -> Finding:
    """Who is at fault, from what every rank (its place among `size` replicas, its computations of one micro-batch)
    gave."""
    columns: dict[int, list[tuple[int, Sums]]] = {}  # place within the replica -> (rank, sums)
    seen = [0] * size
    for rank, (replica, votes) in enumerate(gathered):
        columns.setdefault(seen[replica], []).extend((rank, sums) for sums in votes.values())
        seen[replica] += 1
    found = [one for votes in columns.values() if (one := _first_difference(votes)) is not None]
    # of a model cut over ranks all see a difference sooner or later: it came to be on those that had it first
    place, first = min(found, key=lambda one: one[0])
    ranks = {rank for other, finding in found if other == place for rank in finding.ranks}
    return Finding(what=first.what, ranks=tuple(sorted(ranks)), agreeing=first.agreeing)


def _first_difference(votes: Sequence[tuple[int, Sums]]) -> tuple[tuple[int, int, int], Finding] | None:
    """Where computations of the same differ first (way, stage, number), and who has it wrong."""
    keys = sorted(votes[0][1], key=lambda key: key[:2])  # stable
    for number, key in enumerate(keys):
        finding = _odd_ones(key[2], [(rank, sums.get(key)) for rank, sums in votes])
        if finding is not None:
            return (*key[:2], number), finding
    return None


def _odd_ones(what: str, said: Sequence[tuple[int, int | None]]) -> Finding | None:
    """Who differs from the majority; None if nobody does."""
    counts = Counter(value for _, value in said).most_common()
    if len(counts) == 1:
        return None
    everybody = tuple(sorted({rank for rank, _ in said}))
    if counts[0][1] == counts[1][1]:
        return Finding(what=what, ranks=everybody, agreeing=())
    odd = tuple(sorted({rank for rank, value in said if value != counts[0][0]}))
    others = tuple(sorted({rank for rank, value in said if value == counts[0][0]} - set(odd)))
    return Finding(what=what, ranks=odd, agreeing=others)


def check_copies(engine: Checked, *, gradients: bool = False) -> None:
    """Compare what several ranks hold.

    Raises: SilentCorruptionError, on all ranks.
    """
    held = {
        group: _values({name: checksum(one) for name, one in tensors.items()})
        for group, tensors in engine.copies(gradients=gradients).items()
    }
    digests = engine.gather({group: _digest(sums) for group, sums in held.items()})
    said: dict[str, set[str]] = {}
    for one in digests:
        for group, digest in one.items():
            said.setdefault(group, set()).add(digest)
    bad = sorted(group for group, found in said.items() if len(found) > 1)
    if not bad:
        return
    gathered = engine.gather(held.get(bad[0]))
    votes = [(rank, sums) for rank, sums in enumerate(gathered) if sums is not None]
    findings = (_odd_ones(name, [(rank, sums.get(name)) for rank, sums in votes]) for name in votes[0][1])
    finding = next(one for one in findings if one is not None)
    raise SilentCorruptionError(str(finding), finding.ranks)


def _values(sums: Mapping[K, Tensor]) -> dict[K, int]:
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def _digest(sums: Mapping[Any, int]) -> str:
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {' '.join(map(str, ranks))}"


class CorruptionChecks:
    """The checks of one run, every `every_steps` steps (0: never).

    What they find is also a line of RUN/corruption.jsonl, for those who look at the run from outside.
    """

    def __init__(self, engine: Checked, run_dir: Path, every_steps: int) -> None:
        self.engine, self.log, self.every_steps = engine, corruption_log(run_dir), every_steps
        self.passed = 0  # the last step whose check found nothing, in this start of the run

    def accumulate(
        self, step: int, source: BatchSource, data: StepData, batches: Sequence[Batch]
    ) -> tuple[float, dict[str, float]]:
        """As the engine's, checked if it is time for it. Raises: SilentCorruptionError, on all ranks."""
        if not self.every_steps or step % self.every_steps:
            return self.engine.accumulate(batches)
        try:
            found = accumulate_checked(self.engine, source, data, batches, step // self.every_steps)
        except SilentCorruptionError as error:
            raise self._told(step, error) from None
        self.passed = step
        return found

    def before_save(self, step: int) -> None:
        """A checkpoint takes one of the copies: they must be equal. Raises: SilentCorruptionError, on all ranks."""
        if not self.every_steps:
            return
        try:
            check_copies(self.engine)
        except SilentCorruptionError as error:
            raise self._told(step, error) from None

    def _told(self, step: int, error: SilentCorruptionError) -> SilentCorruptionError:
        passed = f"the last check that found nothing was at step {self.passed}" if self.passed else "it was the first"
        told = SilentCorruptionError(f"train: step {step}: {error}; {passed}", error.ranks)
        if self.engine.is_first:
            self.log.append({"time": time.time(), "step": step, "ranks": list(error.ranks), "reason": str(told)})
            self.log.sync()
        return told


def corruption_log(run_dir: Path) -> MetricsLog:
    """RUN/corruption.jsonl. Lines: time (seconds since 1970), step, ranks, reason."""
    return MetricsLog(run_dir / "corruption.jsonl")
