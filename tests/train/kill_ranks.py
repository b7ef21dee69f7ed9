"""A process that trains in forked ranks and kills them. Arguments: RUN_DIR LAYOUT MODE SEED KILLS, once for each run.

LAYOUT is the axis of two ranks: dp, tp, pp or cp. MODE "random" sends SIGKILL to one rank or to all at a random time
some steps after the start; MODE "syscall" lets one rank kill itself at a random one of the calls that make a checkpoint
durable. A rank that is left over must end by itself. Prints one JSON line a run: the steps that the starts after a kill
resumed from, and the exit codes of the last start.
"""

import datetime
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it at its first step; here once for all children
import torch._inductor.config  # so does use_deterministic_algorithms
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from kill_zygote import die_at, resumed_from
from parallel_jobs import trainer_of

from herdkern.train.config import CheckpointConfig, ScheduleConfig

STEPS = 12
CHANGES = {
    "steps": STEPS,
    "micro_batch_size": 2,
    "average_every_steps": 3,
    "schedule": ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=2, anneal_steps=6),
    "checkpoint": CheckpointConfig(every_steps=2, keep_last=2),
}
RANKS = 2
PATIENCE = 30.0  # seconds in which a rank must have ended that has lost another


def train(run_dir: Path, layout: str, rank: int, store: str, die_call: int) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
    torch.manual_seed(0)
    trainer = trainer_of(run_dir, {layout: RANKS}, **CHANGES)
    if die_call:  # not before: the other rank would wait its whole patience for the groups of the mesh
        die_at(die_call)
    trainer.fit()
    dist.barrier()  # a rank that has ended would look like a lost one


def start(run_dir: Path, layout: str, store: str, die: tuple[int, int] = (-1, 0)) -> list[int]:
    """The pids of new ranks; die: the rank that kills itself, and at which call."""
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            train(run_dir, layout, rank, store, die[1] if die[0] == rank else 0)
            code = 0
        except BaseException:
            Path(f"{store}.{rank}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return pids


def wait_for_steps(run_dir: Path, pids: list[int], step: int) -> None:
    """Until metrics.jsonl reaches `step` in this life of the run, or a rank has ended."""
    metrics = run_dir / "metrics.jsonl"
    began = time.time_ns()
    while all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids):
        if metrics.exists() and metrics.stat().st_mtime_ns > began and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


def reap(pids: list[int]) -> list[int]:
    """The wait status of each; a rank that does not end in time is killed and counts as hung (-1)."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + 600
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = found[1]
                until = min(until, time.monotonic() + 2 * PATIENCE) if found[1] else until
        if time.monotonic() > until:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = -1
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def main(run_dir: Path, layout: str, mode: str, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    done: list[int] = []
    stores = tempfile.mkdtemp()
    for life in range(kills):
        victim, store = rng.randrange(RANKS), f"{stores}/{life}"
        # the first rank makes folders, manifests and metrics, the other its shards
        call = rng.randint(1, 40 if victim else 70)
        pids = start(run_dir, layout, store, (victim, call) if mode == "syscall" else (-1, 0))
        if mode == "random":
            wait_for_steps(run_dir, pids, resumed_from(run_dir) + rng.randint(1, 4))
            time.sleep(rng.uniform(0.0, 0.05))
            for pid in pids if rng.random() < 0.5 else [pids[victim]]:
                os.kill(pid, signal.SIGKILL)
        statuses = reap(pids)
        if -1 in statuses:
            break  # told by the statuses
        if not any(os.WIFSIGNALED(status) for status in statuses):
            break  # it finished before the kill: nothing is left to disturb
        done.append(resumed_from(run_dir))
    else:
        statuses = reap(start(run_dir, layout, f"{stores}/last"))
    said = [path.read_text() for path in Path(stores).glob("*.txt")] if any(statuses) else []
    print(json.dumps({"resumed_from": done, "statuses": statuses, "said": said}), flush=True)


if __name__ == "__main__":
    for i in range(1, len(sys.argv), 5):
        main(Path(sys.argv[i]), sys.argv[i + 1], sys.argv[i + 2], int(sys.argv[i + 3]), int(sys.argv[i + 4]))
