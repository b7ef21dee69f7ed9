"""Context parallelism: how even the work is, what travels, how long planning takes, and wall times on two ranks.

    python benchmarks/bench_context_parallel.py [--quick] [--case PART] [--json FILE] [--rounds N] [--limit SECONDS]

Three parts, each a list of cases of the report:
"layouts"  131,072 tokens in five layouts of documents. Of each way to cut them: the greatest attention work of a rank
           over the mean, the same of tokens, and keys that travel as a share of what an all-gather moves.
           "all-gather": Llama 3's head/tail cut, everything moves. "zigzag": that cut, and only keys that are needed.
           "padded": every document cut by itself into 2 * cp equal chunks, padded to a multiple, everything moves; the
           way of torch's per-document balancer and of TransformerEngine. "herdkern": mode "needed".
"plans"    milliseconds of a plan on the host, for 4,096 documents and fewer, and of what one rank derives from it.
"wall"     forward and backward on two gloo ranks of one thread, milliseconds: both of our modes, torch's
           context_parallel where it runs, and for comparison one process with the whole batch.
Before times are taken, results are compared with one process: "needed" bit for bit in the forward pass.
"""

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from apart import make_row, parse_options, print_row
from context_picture import save_picture
from harness import OURS, Bench, Case, pytest_cases, reason, write_json
from machine import describe_machine
from ranks_apart import run_ranks

from herdkern.ops import attention
from herdkern.parallel import ContextPlan, context_parallel_attention, query_alignment
from herdkern.parallel.context_exchange import RankLayout

TOTAL = 131072
ALL_GATHER, TORCH, ONE = "all-gather", "torch context_parallel", "one process"
RANKS = 2
HEADS = (8, 2, 64)  # num_heads, num_kv_heads, head_dim


def scaled(weights: np.ndarray, total: int) -> np.ndarray:
    """Lengths in these proportions, at least 1, that sum to total."""
    lengths = np.maximum(1, np.floor(weights / weights.sum() * total)).astype(np.int64)
    lengths[lengths.argmax()] += total - lengths.sum()
    return lengths


def lengths_of(name: str, total: int = TOTAL) -> np.ndarray:
    """Documents of a layout: one; 16 by Zipf's law, the longest 37 %; a heavy tail; 128 of similar length."""
    rng = np.random.default_rng(7)
    if name == "one":
        return np.array([total])
    if name == "skew16":
        return scaled(rng.permutation(np.arange(1, 17) ** -1.2), total)
    if name == "web":
        return scaled(rng.lognormal(0, 1.35, 133), total)
    return scaled(rng.lognormal(0, 0.6, 128), total)


def borders_of(lengths: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)


LAYOUTS = {  # name -> (documents, ranks)
    "one document, cp 8": ("one", 8),
    "skew16, cp 8": ("skew16", 8),
    "web mix, cp 8": ("web", 8),
    "web mix, cp 16": ("web", 16),
    "128 short, cp 16": ("short128", 16),
}


def layout_row(name: str) -> tuple[dict[str, Any], list[ContextPlan]]:
    """Balance and bytes of each way to cut the layout; and our plans, head/tail first."""
    documents, size = LAYOUTS[name]
    lengths = lengths_of(documents)
    align = query_alignment(32, 8, 128)  # Llama 3 8B
    paper = ContextPlan.make(borders_of(lengths), size, mode="allgather")
    ours = ContextPlan.make(borders_of(lengths), size, align=align)
    everything = sum(map(paper.rows_received, range(size)))
    padded = np.ceil(lengths / (2 * size)).astype(np.int64) * 2 * size

    def share(rows: float) -> float:
        return round(rows / everything, 4)

    def needed(plan: ContextPlan) -> float:
        return share(sum(map(plan.rows_needed, range(size))))

    ways = {
        "herdkern": (ours.work_imbalance, ours.token_imbalance, share(sum(map(ours.rows_received, range(size))))),
        "all-gather": (paper.work_imbalance, paper.token_imbalance, 1.0),
        "zigzag": (paper.work_imbalance, paper.token_imbalance, needed(paper)),
        "padded": (1.0, 1.0, share((size - 1) * padded.sum())),
    }
    kib = [ours.bytes_of(rank, num_kv_heads=8, head_dim=128).forward_received / 1024 for rank in range(size)]
    row = {
        "case": name,
        "documents": len(lengths),
        "longest": int(lengths.max()),
        "ranks": size,
        "work_max_over_mean": {way: round(found[0], 3) for way, found in ways.items()},
        "tokens_max_over_mean": {way: round(found[1], 3) for way, found in ways.items()},
        "bytes_of_all_gather": {way: found[2] for way, found in ways.items()},
        "bytes_over_needed": round(1.0 if not needed(ours) else ways["herdkern"][2] / needed(ours), 3),
        "padding": round(float(padded.sum() / lengths.sum() - 1), 4),
        "received_mib_8b_layer": [round(k / 1024, 1) for k in kib],
    }
    return row, [paper, ours]


def print_layout(row: dict[str, Any]) -> None:
    print(f"\n{row['case']}: {row['documents']} documents, the longest {row['longest']}; padded: +{row['padding']:.1%}")
    print(f"  {'':12}{'work':>8}{'tokens':>8}{'bytes':>9}   (max over mean; share of all-gather)")
    for way, work in row["work_max_over_mean"].items():
        tokens, moved = row["tokens_max_over_mean"][way], row["bytes_of_all_gather"][way]
        print(f"  {way:12}{work:8.3f}{tokens:8.3f}{moved:9.4f}")


def milliseconds(function: Any, rounds: int) -> tuple[float, float]:
    """Median and least of CPU time: a plan is made by one thread, and a busy machine shall not count."""
    samples = []
    for _ in range(rounds):
        begin = time.process_time()
        function()
        samples.append(1e3 * (time.process_time() - begin))
    return round(statistics.median(samples), 4), round(min(samples), 4)


def plan_row(num_docs: int, size: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    borders = borders_of(scaled(rng.lognormal(0, 1.0, num_docs), max(TOTAL, 32 * num_docs)))
    align = query_alignment(32, 8, 128)
    plan = ContextPlan.make(borders, size, align=align)

    def derived() -> None:
        RankLayout(ContextPlan.make(borders, size, align=align), size // 2, torch.device("cpu"))

    make, least = milliseconds(lambda: ContextPlan.make(borders, size, align=align), rounds)
    both, both_least = milliseconds(derived, rounds)
    row = {"case": f"plan of {num_docs} documents, cp {size}", "plan_ms": make, "plan_least_ms": least}
    row |= {"plan_and_indices_ms": both, "plan_and_indices_least_ms": both_least}
    row["work_max_over_mean"] = {OURS: round(plan.work_imbalance, 3)}
    print(f"  {row['case']}: {make} ms (least {least}), with the indices of one rank {both} ms (least {both_least})")
    return row


WALL = {  # name -> (documents, tokens)
    "wall one document 4096": ("one", 4096),
    "wall web mix 8192": ("web", 8192),
    "wall skew16 8192": ("skew16", 8192),
}


def make_candidates(rank: int, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Functions that run forward and backward and return what the rank has, in batch order where it can be compared."""
    documents, total = WALL[name]
    borders = borders_of(lengths_of(documents, total))
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_dim = HEADS
    whole = [torch.randn(total, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    candidates: dict[str, Any] = {}

    def ours(mode: Any) -> Any:
        plan = ContextPlan.make(borders, RANKS, mode=mode, align=query_alignment(*HEADS))
        inputs = [plan.shard(x, rank) for x in whole]

        def step() -> Any:
            q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
            out = context_parallel_attention(q, k, v, borders, plan=plan)
            out.backward(inputs[3])
            return plan.tokens_of(rank), [out.detach(), q.grad, k.grad, v.grad]

        return step

    candidates[OURS], candidates[ALL_GATHER] = ours("needed"), ours("allgather")

    def one() -> Any:
        q, k, v = (x.detach().requires_grad_() for x in whole[:3])
        out = attention(q, k, v, borders)
        out.backward(whole[3])
        return torch.arange(total), [out.detach(), q.grad, k.grad, v.grad]

    candidates[ONE] = one
    failed: dict[str, str] = {}
    if documents == "one":
        candidates[TORCH] = torch_step(whole)
    else:
        failed[TORCH] = "has no documents on CPU: its ring attends over the whole row"
    return candidates, failed


def torch_step(whole: list[torch.Tensor]) -> Any:
    """torch's context_parallel over scaled_dot_product_attention, keys expanded to the heads of q."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (RANKS,))
    group = whole[0].shape[1] // whole[1].shape[1]
    q, k, v, dout = (x.transpose(0, 1)[None] for x in whole)  # (1, heads, tokens, head_dim)
    wide = [q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout]

    def step() -> Any:
        buffers = [x.clone() for x in wide]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
            q, k, v = (x.detach().requires_grad_() for x in buffers[:3])
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(buffers[3])
        return None, [out.detach(), q.grad, k.grad, v.grad]

    return step


def check(candidates: dict[str, Any], failed: dict[str, str]) -> None:
    """Against one process: "needed" keeps every bit forward; gradients and the other mode to 1e-5 and 1e-6."""
    gold = candidates[ONE]()[1]
    for name in [name for name in candidates if name != ONE]:
        try:
            tokens, found = candidates[name]()
            broken = ""
        except Exception as error:
            broken = reason(error)
        flag = torch.tensor(float(bool(broken)))
        dist.all_reduce(flag)
        if flag:
            assert name == TORCH, broken
            failed[name] = broken or "another rank failed"
            del candidates[name]
            continue
        for i, (x, whole) in enumerate(zip(found, gold, strict=True)):
            if tokens is None:  # torch's own order and heads: only the sum can be compared
                continue
            wanted = whole[tokens]
            if name == OURS and i == 0:
                assert torch.equal(x, wanted), "the forward pass must have the bits of one process"
            off = float((x - wanted).abs().max() / wanted.abs().max())
            assert off <= (1e-5 if i else 1e-6), (name, i, off)


def work(rank: int, store: str, names: list[str], rounds: int, results: Any) -> None:
    """Runs in each of the processes; rank 0 reports."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for name in names:
        candidates, failed = make_candidates(rank, name)
        check(candidates, failed)
        samples: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        order = list(candidates)
        for _ in range(rounds):
            for candidate in order:
                dist.barrier()
                begin = time.perf_counter()
                if candidate != ONE or rank == 0:
                    candidates[candidate]()
                took = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                samples[candidate].append(float(took))
            order = order[1:] + order[:1]
        if rank == 0:
            results.put((name, samples, failed))
        dist.barrier()
    results.close()
    results.join_thread()
    os._exit(0)  # a mesh of torch's ends its threads with noise


def wall_row(name: str, samples: dict[str, list[float]], failed: dict[str, str]) -> dict[str, Any]:
    documents, total = WALL[name]
    aside = {ONE: "the whole batch on one core"}
    row = make_row(name, samples, aside=aside, tokens=total, heads=HEADS, ranks=RANKS)
    medians = {candidate: statistics.median(taken) for candidate, taken in samples.items()}
    row["speed_up_over_one_process"] = round(medians[ONE] / medians[OURS], 3)
    plans = [ContextPlan.make(borders_of(lengths_of(documents, total)), RANKS, mode=m) for m in ("needed", "allgather")]
    row["work_max_over_mean"] = [round(plan.work_imbalance, 3) for plan in plans]
    row["rows_received"] = [[plan.rows_received(rank) for rank in range(RANKS)] for plan in plans]
    if failed:
        row["failed"] = failed
    print_row(row)
    return row


def main() -> int:
    options = parse_options([*LAYOUTS, "plan", *WALL], limit=55, quick_limit=40)
    torch.set_num_threads(1)
    machine = describe_machine(1) | {"clock": "wall; plans: CPU"}
    print(f"context parallel on {machine['cpu']}, {machine['cores']} cores, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    report = {"bench": "context_parallel", "unit": "ms", "quick": options.quick, "cases": rows, "machine": machine}
    pictured = {}
    for name in (name for name in LAYOUTS if options.case in name):
        row, pictured[name] = layout_row(name)
        print_layout(row)
        rows.append(row)
    if pictured and len(pictured) == len(LAYOUTS) and not options.quick:
        save_picture(Path(__file__).parent.parent / "docs" / "context-balance.svg", pictured)
    print("\nplans, CPU time")
    for num_docs, size in ((1, 8), (133, 16), (4096, 8), (4096, 16), (4096, 64)):
        if options.case in f"plan of {num_docs} documents, cp {size}":
            rows.append(plan_row(num_docs, size, 20 if options.quick else 100))
    names = [name for name in WALL if options.case in name][: 1 if options.quick else None]
    rounds = 3 if options.quick else max(options.rounds, 5)
    for name, samples, failed in run_ranks(work, names, rounds, RANKS, options.limit) if names else ():
        rows.append(wall_row(name, samples, failed))
        write_json(options.json, report | {"unfinished": True})
    write_json(options.json, report)
    print("\n" + json.dumps(report))
    return 0


def small() -> dict[str, Any]:
    """A plan of 4,096 documents, for pytest-benchmark."""
    borders = borders_of(scaled(np.random.default_rng(3).lognormal(0, 1.0, 4096), TOTAL))
    assert math.isclose(float(borders[-1]), TOTAL)
    return {OURS: lambda: ContextPlan.make(borders, 16)}


test_context_parallel = pytest_cases(Bench("context_parallel", [Case(name="plan of 4096 documents", setup=small)]))

if __name__ == "__main__":
    sys.exit(main())
