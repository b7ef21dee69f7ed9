"""What watching a run costs on a real step of two gloo ranks: the flight recorder with the heartbeat, and a check for
silent corruption.

    python benchmarks/reliability_overhead.py [--case "dp 2"] [--rounds N]

Each round makes STEPS steps without and as many with the recorder and the beats, in alternating order; the first after
a change does not count, as Python's caches are cold. Every fifth round makes one step with a check, too. Medians count,
of wall time between barriers and of this thread's processor time. A call's share is measured on blocks of 200
all-reduces of one element. One thread a rank.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks_apart import run_ranks

from herdkern.model import ModelConfig, Transformer
from herdkern.parallel import ParallelConfig
from herdkern.parallel.flight_recorder import arm
from herdkern.parallel.heartbeat import Heartbeat
from herdkern.train.config import TrainConfig
from herdkern.train.corruption import accumulate_checked
from herdkern.train.parallel_engine import ParallelEngine
from herdkern.train.ramp import RampPhase
from herdkern.train.source import PackedBatches, StepData

LAYOUTS = {"dp 2": ParallelConfig(dp=2), "tp 2": ParallelConfig(tp=2)}
SEQ_LEN, BATCH = 128, 2
STEPS = 5
MODEL = ModelConfig(
    vocab_size=2048, dim=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, ffn_dim=896, max_seq_len=SEQ_LEN
)


class RandomTokens:
    """Sequences of one document each."""

    seq_len = SEQ_LEN

    def sequence(self, t: int) -> tuple[Any, Any]:
        """Tokens and borders of sequence t."""
        rng = np.random.default_rng(t)
        return rng.integers(0, MODEL.vocab_size, SEQ_LEN + 1), np.array([0, SEQ_LEN + 1], np.int32)

    def fingerprint(self) -> dict[str, Any]:
        """None: nothing is resumed."""
        return {}


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds from a common start to the end of the last rank, and processor seconds of this thread."""
    dist.barrier()
    begin, used = time.perf_counter(), time.thread_time()
    function()
    used = time.thread_time() - used
    dist.barrier()
    return time.perf_counter() - begin, used


def measure(layout: ParallelConfig, rank: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians for one layout."""
    config = TrainConfig(seq_len=SEQ_LEN, batch_size=BATCH, micro_batch_size=1, dtype="fp32")
    engine = ParallelEngine(Transformer(MODEL, seed=0), config, layout)
    source = PackedBatches(RandomTokens(), config)
    heartbeat, recorder = Heartbeat(folder, rank), arm(folder, rank, 2)
    recorder.stop()
    done = [0]

    def step(beats: bool = False, checks: bool = False) -> None:
        """What the loop does in one step."""
        done[0] += 1
        phase = RampPhase(from_tokens=0, batch_size=BATCH, seq_len=SEQ_LEN)
        position = done[0] * phase.tokens_per_step
        data = StepData(position=position, phase=phase, micro_batch_size=1, by_token=False)
        if beats:
            heartbeat.beat(step=done[0], phase="data")
        batches = engine.micro_batches(source, data)
        if beats:
            heartbeat.beat(step=done[0], phase="step")
        accumulate_checked(engine, source, data, batches, done[0]) if checks else engine.accumulate(batches)
        engine.update(1e-4)
        engine.zero_grad()
        engine.total([1.0, 1.0])
        engine.agree(False, False)

    def watched() -> None:
        step(beats=True)

    kinds: dict[str, Callable[[], Any]] = {"bare": step, "watched": watched, "checked": lambda: step(checks=True)}
    samples: dict[str, list[tuple[Any, ...]]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name in sorted(kinds, reverse=bool(number % 2)):
            if name == "watched":
                recorder.start()
            if name != "checked" or number % 5 == 0:
                times = [timed(kinds[name]) for _ in range(1 + (1 if name == "checked" else STEPS))][1:]
                samples[name].append(tuple(statistics.median(column) for column in zip(*times, strict=True)))
            recorder.stop()
    calls = round(recorder.ring._count / (rounds * (1 + STEPS)) - 2, 1)  # without the barriers of `timed`
    call_us = microseconds_of_a_call(recorder)
    heartbeat.close()
    bare = [statistics.median(column) for column in zip(*samples["bare"], strict=True)]
    share = 100 * calls * call_us / (1e6 * bare[0])
    found: dict[str, Any] = {"step_ms": round(1e3 * bare[0], 2), "calls": calls, "call_us": round(call_us, 2)}
    found["calls_percent"] = round(share, 3)
    for name in ("watched", "checked"):
        others = samples["bare"][:: 5 if name == "checked" else 1]
        pairs = list(zip(samples[name], others, strict=True))
        for column, clock in enumerate(("wall", "processor")):
            extra = [a[column] - b[column] for a, b in pairs]
            share = 100 * statistics.median(extra) / bare[column]
            found[f"{name}_{clock}_percent"] = round(share, 2)
            quarter = 100 * np.percentile(extra, [25, 75]) / bare[column]
            found[f"{name}_{clock}_quartiles"] = [round(float(q), 2) for q in quarter]
    return found


def microseconds_of_a_call(recorder: Any) -> float:
    """What the recorder adds to the processor time of one call."""
    one = torch.zeros(1)

    def some() -> None:
        for _ in range(200):
            dist.all_reduce(one)

    extra = []
    for _ in range(15):
        bare = timed(some)[1]
        recorder.start()
        extra.append(timed(some)[1] - bare)
        recorder.stop()
    return 1e6 * statistics.median(extra) / 200


def work(rank: int, store: str, names: list[str], rounds: int, queue: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    for name in names:
        found = measure(LAYOUTS[name], rank, Path(store).parent / name, rounds)
        if rank == 0:
            queue.put(found)
    dist.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="part of a layout's name")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds")
    options = parser.parse_args()
    names = [name for name in LAYOUTS if options.case in name]
    for name, found in zip(names, run_ranks(work, names, options.rounds, 2, options.limit), strict=True):
        print(json.dumps({"layout": name, **found}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
