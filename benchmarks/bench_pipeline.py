"""One training step of a pipeline of four ranks with 5 ms of latency on every transfer; ours, synchronous, torch's.

    python benchmarks/bench_pipeline.py [--quick] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

Four processes of one thread each form a gloo group. Every `dist.isend` of every candidate is held back for 5 ms by the
same wrapper, in a thread, so that whoever overlaps transfers can. All candidates run the same stages of the same model:
"herdkern" a schedule of interleaved_schedule whose N is the one that the simulation finds best for these times;
"synchronous" the same actions, but each sender waits for its transfer; "torch Interleaved1F1B" is
torch.distributed.pipelining. Times are wall seconds of a step from a common start to the end of the last rank.

Where a case is named after times, a stage also sleeps so long: sleeping ranks do not compete for the processor, so four
of them can be compared on two cores. Its own arithmetic is tiny. The case "compute" does not sleep; with fewer cores
than ranks it is bounded by the processor, too.
Before any time is taken, the losses and all gradients of the candidates are compared with one process.
With --json, one more step of ours in the last case of that kind is drawn as it ran, into an SVG beside the report.
"""

import argparse
import datetime
import heapq
import itertools
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from apart import make_row, parse_options, print_row
from harness import OURS, Bench, Case, pytest_cases, reason, write_json
from machine import describe_machine
from ranks_apart import run_ranks
from torch import nn

from herdkern.model import ModelConfig, Transformer
from herdkern.parallel import Pipeline, Simulation, Stage, interleaved_schedule, layers_of_stages, simulate
from herdkern.parallel.pipeline_picture import as_svg
from herdkern.train import Batch

RANKS, CHUNKS = 4, 2
SYNCHRONOUS, TORCH = "synchronous", "torch Interleaved1F1B"
LATENCY = 0.005
SMALL = {"vocab_size": 128, "dim": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "ffn_dim": 128}
LARGE = {"vocab_size": 2048, "dim": 192, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "ffn_dim": 672}
# name -> (seconds of a forward pass, of a backward pass, micro-batches, tokens of one, widths of the model)
CASES: dict[str, tuple[float, float, int, int, dict[str, int]]] = {
    "10+20ms-16": (0.010, 0.020, 16, 32, SMALL),
    "5+10ms-16": (0.005, 0.010, 16, 32, SMALL),
    "10+20ms-9": (0.010, 0.020, 9, 32, SMALL),
    "compute-16": (0.0, 0.0, 16, 64, LARGE),
}


class Delayed:
    """A send that begins `LATENCY` later."""

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments, self.keywords = arguments, keywords
        self.begun = threading.Event()

    def begin(self) -> None:
        self.work = send_now(*self.arguments, **self.keywords)
        self.begun.set()

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        self.begun.wait()
        return self.work.wait() if timeout is None else self.work.wait(timeout)

    def is_completed(self) -> bool:
        return self.begun.is_set() and self.work.is_completed()


class Wire:
    """Replaces dist.isend for everybody in this process."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.queue: list[tuple[float, int, Delayed]] = []
        self.changed, self.numbers = threading.Condition(), itertools.count()
        dist.isend = dist.distributed_c10d.isend = self.isend  # type: ignore[assignment]
        threading.Thread(target=self.carry, daemon=True).start()

    def isend(self, *arguments: Any, **keywords: Any) -> Any:
        if not self.latency:
            return send_now(*arguments, **keywords)
        sent = Delayed(arguments, keywords)
        with self.changed:
            heapq.heappush(self.queue, (time.perf_counter() + self.latency, next(self.numbers), sent))
            self.changed.notify()
        return sent

    def carry(self) -> None:
        while True:
            with self.changed:
                while not self.queue:
                    self.changed.wait()
                left = self.queue[0][0] - time.perf_counter()
                if left > 0:
                    self.changed.wait(left)
                    continue
                sent = heapq.heappop(self.queue)[2]
            sent.begin()


send_now = dist.isend


seen: list[float] = []  # begin and end of each action of this rank, in turn


class Takes(torch.autograd.Function):
    """Sleeps in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.seconds)
        seen.append(time.perf_counter())
        return dx, None, None


class TimedStage(Stage):
    """A stage that also sleeps."""

    seconds = (0.0, 0.0)

    def forward(self, x: torch.Tensor | None, batch: Any) -> torch.Tensor:
        seen.append(time.perf_counter())
        out = super().forward(x, batch)
        out = Takes.apply(out, *self.seconds) if any(self.seconds) else out
        seen.append(time.perf_counter())
        return out


class StageForTorch(nn.Module):
    """The same stage as torch's pipeline calls it: hidden states with a leading 1, the loss outside."""

    def __init__(self, stage: Stage, batch: Batch) -> None:
        super().__init__()
        self.stage, self.batch = stage, batch
        if stage.is_last:
            stage.cross_entropy = lambda hidden, weight, targets: hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.stage.is_first:
            return self.stage(x[0], self.batch)[None]  # type: ignore[no-any-return]
        batch = Batch(**{**vars(self.batch), "tokens": x[0]})
        return self.stage(None, batch)[None]  # type: ignore[no-any-return]


def make_batches(num_microbatches: int, tokens: int, vocab_size: int) -> list[Batch]:
    """Micro-batches of one document each: torch's pipeline wants equal shapes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (num_microbatches, tokens + 1), generator=generator)
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    positions = torch.arange(tokens)
    return [
        Batch(
            tokens=row[:-1].contiguous(),
            targets=row[1:].contiguous(),
            cu_seqlens=borders,
            positions=positions,
            num_targets=tokens,
            document_lengths=(tokens,),
        )
        for row in ids
    ]


def make_stages(model: Transformer, rank: int, forward: float, backward: float) -> list[TimedStage]:
    layers = layers_of_stages(len(model.layers), RANKS, CHUNKS)
    stages = [TimedStage(model, i, len(layers), layers[i]) for i in range(rank, len(layers), RANKS)]
    for stage in stages:
        stage.seconds = (forward, backward)
    return stages


def best_size(forward: float, backward: float, num_microbatches: int) -> int:
    """The N of the shortest step with these times and the latency; of equal ones the smallest."""
    times = {"forward_time": forward or 0.01, "backward_time": backward or 0.02, "p2p_latency": LATENCY}
    spans = {
        n: round(simulate(interleaved_schedule(RANKS, CHUNKS, num_microbatches, n), **times).makespan, 6)
        for n in range(1, num_microbatches + 1)
    }
    return min(spans, key=lambda n: (spans[n], n))


def torch_pipeline(stages: list[TimedStage], batches: list[Batch], group: Any) -> Any:
    """A function that runs one step of torch's schedule and returns the loss on the last rank."""
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    num_targets = sum(batch.num_targets for batch in batches)
    head = stages[-1].lm_head if stages[-1].is_last else None

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from herdkern.parallel.pipeline_stages import summed_cross_entropy

        assert head is not None
        return summed_cross_entropy(hidden[0], head.weight, targets[0]) / num_targets

    cpu = torch.device("cpu")
    wrapped = [StageForTorch(stage, batches[0]) for stage in stages]
    parts = [PipelineStage(w, w.stage.index, w.stage.num_stages, cpu, group=group) for w in wrapped]
    schedule = ScheduleInterleaved1F1B(parts, len(batches), loss_fn=loss_of, scale_grads=False)
    tokens, targets = (torch.stack([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets"))

    def step() -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        arguments = (tokens,) if stages[0].is_first else ()
        schedule.step(*arguments, target=targets, losses=losses) if head else schedule.step(*arguments)
        return torch.stack(losses).sum() if losses else None

    return step


def make_steps(rank: int, name: str) -> tuple[dict[str, Any], dict[str, list[TimedStage]], dict[str, str], list[Batch]]:
    """The candidates' steps and stages, and those that cannot run the case."""
    forward, backward, num_microbatches, tokens, widths = CASES[name]
    config = ModelConfig(num_layers=RANKS * CHUNKS - 2, max_seq_len=tokens, **widths)
    batches = make_batches(num_microbatches, tokens, config.vocab_size)
    size = best_size(forward, backward, num_microbatches)
    steps, stages, failed = {}, {}, {}
    for candidate in (OURS, SYNCHRONOUS, TORCH):
        group = dist.new_group(list(range(RANKS)))
        stages[candidate] = make_stages(Transformer(config, seed=0), rank, forward, backward)
        if candidate == TORCH:
            try:
                steps[candidate] = torch_pipeline(stages[candidate], batches, group)
            except ValueError as error:
                failed[candidate] = reason(error)
        else:
            overlap = candidate == OURS
            note = lambda stage, is_last: seen.append(time.perf_counter())  # noqa: E731
            pipeline = Pipeline(stages[candidate], group, group_size=size, overlap=overlap, before_backward=note)
            steps[candidate] = lambda pipeline=pipeline: pipeline.step(batches)
    return steps, stages, failed, batches


def check(rank: int, steps: dict[str, Any], stages: dict[str, list[TimedStage]], batches: list[Batch]) -> None:
    """Loss and all gradients of one process, to 1e-6 of their largest entry."""
    model = Transformer(stages[OURS][0].config, seed=0)
    num_targets = sum(batch.num_targets for batch in batches)
    wanted = torch.zeros(())
    for batch in batches:
        loss = model.loss(model(batch.tokens, batch.cu_seqlens, batch.positions), batch.targets, reduction="sum")
        (loss / num_targets).backward()
        wanted += loss.detach() / num_targets
    expected = dict(model.named_parameters())
    for candidate, step in steps.items():
        found = step()
        if found is not None:
            assert abs(float(found.detach()) - float(wanted)) <= 1e-6 * float(wanted), (rank, candidate, found, wanted)
        for stage in stages[candidate]:
            for name, param in stage.named_parameters():
                gold = expected[name].grad
                assert gold is not None
                assert param.grad is not None, (candidate, name)
                off = float((param.grad - gold).abs().max() / gold.abs().max())
                assert off <= 1e-6, (rank, candidate, name, off)


def work(rank: int, store: str, names: list[str], rounds: int, results: Any) -> None:
    """Runs in each of the processes; rank 0 reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    wire = Wire()
    for name in names:
        wire.latency = 0.0
        steps, stages, failed, batches = make_steps(rank, name)
        check(rank, steps, stages, batches)
        wire.latency = LATENCY
        samples: dict[str, list[float]] = {candidate: [] for candidate in steps}
        order = list(steps)
        for turn in range(rounds + 1):
            for candidate in order:
                dist.barrier()
                begin = time.perf_counter()
                steps[candidate]()
                took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                samples[candidate] += [float(took)] * (turn > 0)  # the first warms up
            order = order[1:] + order[:1]
        dist.barrier()
        seen.clear()
        steps[OURS]()
        times: list[list[float]] = [[]] * RANKS
        dist.all_gather_object(times, list(seen))
        if rank == 0:
            results.put((name, samples, failed, times))
        dist.barrier()
    dist.destroy_process_group()


def make_case_row(name: str, samples: dict[str, list[float]], failed: dict[str, str]) -> dict[str, Any]:
    """The row, with what the simulation says of ours and of the time that a rank is busy at least."""
    forward, backward, num_microbatches, tokens, _ = CASES[name]
    size = best_size(forward, backward, num_microbatches)
    more: dict[str, Any] = {"p2p_latency_ms": 1e3 * LATENCY, "n": size, "m": num_microbatches, "tokens": tokens}
    if forward:
        schedule = interleaved_schedule(RANKS, CHUNKS, num_microbatches, size)
        times = {"forward_time": 1e3 * forward, "backward_time": 1e3 * backward, "p2p_latency": 1e3 * LATENCY}
        more["simulated_ms"] = simulate(schedule, **times).makespan
        more["simulated_synchronous_ms"] = simulate(schedule, **times, overlap_p2p=False).makespan
        more["busy_ms"] = simulate(schedule, **times).busy[0]
    row = make_row(name, samples, **more)
    for peer in (SYNCHRONOUS, TORCH):
        if peer in samples:
            row[f"over_{peer.split()[0]}"] = round(
                statistics.median(samples[peer]) / statistics.median(samples[OURS]), 3
            )
    if failed:
        row["failed"] = failed
    print_row(row)
    return row


def draw(name: str, times: list[list[float]], path: Path) -> None:
    """The step as it ran."""
    schedule = interleaved_schedule(RANKS, CHUNKS, CASES[name][2], best_size(*CASES[name][:3]))
    start = min(some[0] for some in times)
    begins, ends = (tuple(tuple(1e3 * (t - start) for t in some[i::2]) for some in times) for i in (0, 1))
    most = tuple(max(warmup + 1, 1) for warmup in schedule.warmup)
    path.write_text(as_svg(schedule, Simulation(begins=begins, ends=ends, peak_activations=most)))


def main() -> int:
    options: argparse.Namespace = parse_options(CASES, limit=300, quick_limit=45)
    names = [name for name in CASES if options.case in name][: 1 if options.quick else None]
    machine = describe_machine(1) | {"ranks": RANKS, "clock": "wall"}
    ranks = f"{RANKS} ranks of one thread, torch {torch.__version__}"
    print(f"pipeline on {machine['cpu']}, {machine['cores']} cores, {ranks}")
    rows: list[dict[str, Any]] = []
    report = {"bench": "pipeline", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    rounds = 3 if options.quick else max(options.rounds, 5)
    for name, samples, failed, times in run_ranks(work, names, rounds, RANKS, options.limit):
        rows.append(make_case_row(name, samples, failed))
        if options.json and CASES[name][0]:
            draw(name, times, Path(options.json).with_suffix(".svg"))
        write_json(options.json, report | {"unfinished": True})
    write_json(options.json, report)
    import json

    print("\n" + json.dumps(report))
    return 0


def small() -> dict[str, Any]:
    """One step of one rank, for pytest-benchmark: no transfers."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = ModelConfig(num_layers=4, max_seq_len=32, **SMALL)
    model = Transformer(config, seed=0)
    stages = [Stage(model, 0, 1, range(4))]
    pipeline, batches = Pipeline(stages), make_batches(4, 32, config.vocab_size)
    return {OURS: lambda: pipeline.step(batches)}


test_pipeline = pytest_cases(Bench("pipeline", [Case(name="one rank", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
