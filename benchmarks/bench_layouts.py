"""Steps of layouts on 1, 2 and 4 gloo ranks, measured, beside what the projection says of them; how well their orders
agree.

    python benchmarks/bench_layouts.py [--quick] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

All layouts train the same model on the same 2,048 tokens a step in fp32, one thread a rank. The ranks of one size run
together: in every round each layout makes one step from a common start to the end of the last rank, in rotating order;
the median counts. The case "rates" measures what the projection needs to know of this machine (products, attention,
copies, the bandwidth and latency of gloo, the host's time for a block) with two ranks at once. Nothing of it is taken
from a layout's step.

FILE keeps the rows of earlier calls, so that `--case rates`, `--case "1 rank:|2 ranks: tp"` and others can be run
apart; every call projects all rows anew. With --json a picture is written beside the report.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from apart import make_row, parse_options
from harness import OURS, Bench, Case, pytest_cases, write_json
from layouts_picture import save_picture
from machine import describe_machine
from ranks_apart import run_ranks

from herdkern.model import ModelConfig, Transformer
from herdkern.ops import attention
from herdkern.optim import AdamW
from herdkern.parallel import ParallelConfig, ParallelModel
from herdkern.parallel.clusters import GIB, Cluster, Link
from herdkern.parallel.data import local
from herdkern.parallel.layout import Layout
from herdkern.parallel.projection import project
from herdkern.train import build_batch
from herdkern.train.recompute import recompute_activations

CORES = 2  # as many ranks as measure the rates at once
TOKENS, DOCUMENT = 2048, 256  # of a step; of a document
MODEL = ModelConfig(
    vocab_size=2048, dim=256, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=64, ffn_dim=896, max_seq_len=DOCUMENT
)


def layout(num_microbatches: int, recompute: Any = "none", **axes: int) -> Layout:
    """One that takes TOKENS a step in so many micro-batches on each data rank."""
    config = ParallelConfig(**axes)
    size = TOKENS // config.dp // num_microbatches
    return Layout(config, micro_batch_tokens=size, num_microbatches=num_microbatches, dtype="fp32", recompute=recompute)


LAYOUTS = [
    layout(8), layout(2), layout(8, "block"),
    layout(8, tp=2), layout(2, tp=2), layout(8, "block", tp=2),
    layout(4, cp=2), layout(1, cp=2),
    layout(4, dp=2), layout(1, dp=2), layout(4, dp=2, dp_shard=1), layout(4, "block", dp=2),
    layout(8, pp=2), layout(2, pp=2), layout(8, pp=2, num_chunks=2), layout(8, "block", pp=2),
    layout(8, pp=2, num_chunks=2, microbatches_in_flight=8),
    layout(8, tp=4), layout(2, tp=4), layout(2, cp=4), layout(2, dp=4), layout(2, dp=4, dp_shard=2),
    layout(2, "block", dp=4), layout(8, pp=4), layout(4, pp=4), layout(8, pp=4, num_chunks=2),
    layout(4, tp=2, dp=2), layout(8, tp=2, pp=2), layout(4, pp=2, dp=2), layout(2, cp=2, dp=2), layout(4, cp=2, pp=2),
    layout(4, tp=2, cp=2),
]  # fmt: skip
RATES = "rates"


def name_of(one: Layout) -> str:
    """As "2 ranks: tp 2, 8 x 256 tokens"."""
    axes, plain = one.axes, ParallelConfig()
    words = [
        f"{f.name} {getattr(axes, f.name)}"
        for f in dataclasses.fields(axes)
        if getattr(axes, f.name) != getattr(plain, f.name)
    ]
    words += [f"{one.num_microbatches} x {one.micro_batch_tokens} tokens"]
    words += [f"recompute {one.recompute}"] * (one.recompute != "none")
    ranks = "1 rank" if one.world_size == 1 else f"{one.world_size} ranks"
    return f"{ranks}: {', '.join(words)}"


NAMES = {name_of(one): one for one in LAYOUTS}


def make_step(one: Layout, rank: int) -> Callable[[], Any]:
    """A function that makes one training step of this rank."""
    model = Transformer(MODEL, seed=0)
    recompute_activations(model, one.recompute)
    parallel = ParallelModel(model, one.axes)
    params = parallel.parameters()
    parts = [torch.nn.Parameter(local(param.detach())) for param in params]  # of the same memory
    optimizer = AdamW(parts)
    rng = np.random.default_rng(one.axes.place(rank)["dp"])
    borders = np.array([0, DOCUMENT + 1], np.int32)
    count = one.micro_batch_tokens // DOCUMENT
    batches = [
        build_batch([(rng.integers(0, MODEL.vocab_size, DOCUMENT + 1), borders) for _ in range(count)])
        for _ in range(one.num_microbatches)
    ]

    def step() -> None:
        parallel.step(batches)
        for part, param in zip(parts, params, strict=True):
            part.grad, param.grad = local(param.grad), None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(function: Callable[[], Any]) -> float:
    """Wall seconds from a common start to the end of the last rank."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - begin


def alone(function: Callable[[], Any], rounds: int = 9) -> float:
    """CPU seconds with all ranks at work; what else runs on the machine does not count."""
    samples = []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.process_time()
        function()
        samples.append(time.process_time() - begin)
    return statistics.median(samples[1:])


def measured_rates() -> dict[str, float]:
    """What this machine reaches with all ranks at work, each on one thread."""
    tokens, dim, ffn = DOCUMENT, MODEL.dim, MODEL.ffn_dim
    x, y, weight = torch.randn(tokens, dim), torch.randn(tokens, ffn), torch.randn(ffn, dim)
    out, dx, dweight = (torch.empty_like(one) for one in (y, x, weight))  # fresh memory would take as long again

    def products() -> None:
        for _ in range(10):
            torch.mm(x, weight.T, out=out)
            torch.mm(y, weight, out=dx)
            torch.mm(y.T, x, out=dweight)

    found = {"gemm_flops": 10 * 3 * 2.0 * tokens * dim * ffn / alone(products)}
    heads, width = MODEL.num_heads, MODEL.head_dim
    q, k, v = (torch.randn(TOKENS, heads, width, requires_grad=True) for _ in range(3))
    borders = torch.arange(0, TOKENS + 1, DOCUMENT, dtype=torch.int32)
    work = 4.0 * TOKENS * DOCUMENT / 2 * heads * width
    ahead = alone(lambda: attention(q, k, v, borders))
    both = alone(lambda: attention(q, k, v, borders).backward(v.detach()))
    found |= {"attention_forward_flops": work / ahead, "attention_backward_flops": 2.5 * work / (both - ahead)}
    source = torch.randn(tokens * ffn * 4)
    target = torch.empty_like(source)
    found["memory_bytes_per_s"] = 2.0 * source.nbytes / alone(lambda: target.copy_(source))
    found["host_block_s"] = host_seconds() / 3
    kinds = [(size, rounds) for size in (1 << i for i in range(12, 23)) for rounds in (1, 2)]
    seconds = np.array([collective_seconds(size, scatters=rounds == 2) for size, rounds in kinds])
    columns = np.array([[rounds, rounds * size / 2] for size, rounds in kinds])  # as scatters_by_reducing says
    latency, per_byte = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(kinds)), rcond=None)[0]
    return found | {"latency_s": float(max(latency, 1e-6)), "bytes_per_s": float(1 / per_byte)}


def host_seconds() -> float:
    """Forward and backward pass of a tiny block with one token."""
    config = dataclasses.replace(MODEL, num_layers=8, max_seq_len=8, dim=32, num_heads=1, num_kv_heads=1, ffn_dim=64)
    model, few = Transformer(config, seed=0), Transformer(dataclasses.replace(config, num_layers=1), seed=0)
    ids, borders = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
    for one in (model, few):
        for param in one.parameters():
            param.requires_grad_(False)

    def passes(one: Transformer) -> None:
        for _ in range(10):
            x = one.embed_tokens(ids).requires_grad_()
            branch = None
            for block in one.layers:
                x, branch = block(x, branch, borders, ids, (one.rope_cos, one.rope_sin))
            (x + branch).sum().backward()

    return (alone(lambda: passes(model)) - alone(lambda: passes(few))) / 70


def collective_seconds(size: int, *, scatters: bool) -> float:
    """An all-gather of `size` bytes, of which a rank has its part, or a reduce-scatter."""
    part = torch.zeros(size // dist.get_world_size() // 4)
    whole = torch.zeros(size // 4)

    def some() -> None:
        for _ in range(10):
            if scatters:
                dist.reduce_scatter_tensor(part, whole)
            else:
                dist.all_gather_into_tensor(whole, part)

    return min(timed(some) for _ in range(9)) / 10  # whoever disturbs it only makes it slower


def work(rank: int, store: str, names: list[str], rounds: int, queue: Any) -> None:
    """One rank: prepares its layouts, times them in rotating order."""
    torch.set_num_threads(1)
    size = CORES if names == [RATES] else NAMES[names[0]].world_size
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    if names == [RATES]:
        found: list[Any] = [measured_rates()]
    else:
        steps = [make_step(NAMES[name], rank) for name in names]
        for step in steps:
            timed(step)
        samples: list[list[float]] = [[] for _ in steps]
        for number in range(rounds):
            for i in range(len(steps)):
                at = (i + number) % len(steps)
                samples[at].append(timed(steps[at]))
        found = list(samples)
    if rank == 0:
        for one in found:
            queue.put(one)
    dist.barrier()


def this_machine(rates: dict[str, float]) -> Cluster:
    """The Cluster of these rates: ranks are threads of `CORES` cores."""
    link = Link(bytes_per_s=rates["bytes_per_s"], latency_s=rates["latency_s"], scatters_by_reducing=True)
    names = ("gemm_flops", "attention_forward_flops", "attention_backward_flops", "memory_bytes_per_s", "host_block_s")
    return Cluster(
        name="this host",
        about=f"gloo ranks on {CORES} cores",
        devices_per_node=64,
        memory_bytes=16 * GIB,
        reserved_bytes=0,
        peak_flops=rates["gemm_flops"],
        processors=1,
        node_link=link,
        network=link,
        failures_per_device_day=0.0,
        checkpoint_bytes_per_s=1e9,
        cores=CORES,
        **{name: rates[name] for name in names},
    )


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def project_rows(rows: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, float]:
    """Fills in what the projection says of each measured row; returns how well both agree."""
    cluster = this_machine(rates)
    for row in rows:
        found = project(MODEL, NAMES[row["case"]], cluster, seq_len=DOCUMENT)
        row["projected_ms"] = round(1e3 * found.step_s, 2)
        row["parts_ms"] = {part: round(1e3 * seconds, 2) for part, seconds in found.seconds.items() if seconds}
    pairs = [(row[OURS], row["projected_ms"]) for row in rows]
    ratios = [projected / measured for measured, projected in pairs]
    agreement = {"layouts": len(rows), "projected_over_measured_median": round(statistics.median(ratios), 3)}
    for ranks in ("", "1 rank:", "2 ranks:", "4 ranks:"):
        some = [pair for pair, row in zip(pairs, rows, strict=True) if row["case"].startswith(ranks)]
        if len(some) > 2:
            agreement[f"spearman {ranks.rstrip(':')}".strip()] = round(
                rank_correlation(*map(list, zip(*some, strict=True))), 3
            )
    return agreement


def measure(options: argparse.Namespace, rows: dict[str, dict[str, Any]], rates: dict[str, float]) -> None:
    """Runs what --case names, size after size."""
    wanted = options.case.split("|")
    if any(part in RATES for part in wanted):
        rates.update(next(run_ranks(work, [RATES], 1, CORES, options.limit)))
    rounds = 3 if options.quick else max(options.rounds, 5)
    for size in (1, 2, 4):
        names = [name for name, one in NAMES.items() if one.world_size == size and any(part in name for part in wanted)]
        if not names:
            continue
        for name, samples in zip(names, run_ranks(work, names, rounds, size, options.limit), strict=True):
            rows[name] = make_row(name, {OURS: samples})


def main() -> int:
    options = parse_options([RATES, *NAMES], limit=120, quick_limit=60)
    report: dict[str, Any] = {
        "bench": "layouts",
        "unit": "ms",
        "quick": options.quick,
        "machine": describe_machine(1) | {"clock": "wall"},
    }
    rows: dict[str, dict[str, Any]] = {}
    rates: dict[str, float] = {}
    if options.json and Path(options.json).exists():
        before = json.loads(Path(options.json).read_text(encoding="utf-8"))
        rows, rates = {row["case"]: row for row in before["cases"] if row["case"] in NAMES}, before["rates"]
    measure(options, rows, rates)
    ordered = sorted(rows.values(), key=lambda row: row[OURS])
    report |= {"rates": rates, "cases": ordered}
    print("rates: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    if rates and ordered:
        report["agreement"] = project_rows(ordered, rates)
        print(f"{'measured':>9}{'spread':>8}{'projected':>11}  (ms)")
        for row in ordered:
            parts = sorted(row["parts_ms"].items(), key=lambda part: -part[1])[:3]
            most = ", ".join(f"{part} {value:g}" for part, value in parts)
            print(f"{row[OURS]:9.1f}{row['spread'][OURS]:8.1f}{row['projected_ms']:11.1f}  {row['case']:62} {most}")
        print(", ".join(f"{name} {value:g}" for name, value in report["agreement"].items()))
        if options.json:
            save_picture(Path(options.json).with_suffix(".svg"), ordered, report["agreement"])
    write_json(options.json, report)
    print("\n" + json.dumps(report))
    return 0


def small() -> dict[str, Any]:
    """The projection of all layouts, for pytest-benchmark."""
    rates = {"gemm_flops": 1e11, "attention_forward_flops": 5e10, "attention_backward_flops": 5e10}
    rates |= {"memory_bytes_per_s": 1e10, "host_block_s": 1e-4, "latency_s": 1e-4, "bytes_per_s": 1e9}
    cluster = this_machine(rates)
    return {OURS: lambda: [project(MODEL, one, cluster, seq_len=DOCUMENT).step_s for one in LAYOUTS]}


test_layouts = pytest_cases(Bench("layouts", [Case(name="projection", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
