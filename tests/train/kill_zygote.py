"""A process that trains in forked children and kills them. Arguments: RUN_DIR MODE SEED KILLS, once for each run.

MODE "random" sends SIGKILL at a random time some steps after the start; MODE "syscall" lets the child kill itself at a
random one of the calls that make a checkpoint durable (open, write, fsync, rename, unlink, mkdir), the moments between
which a crash is most likely to show. Prints one JSON line a run: the steps that the starts after a kill resumed from.
"""

import builtins
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it at its first step; here once for all children

sys.path.insert(0, str(Path(__file__).parent))
from documents_in_memory import VOCAB, ArrayDataset

from herdkern.data.mix import TokenSampler
from herdkern.model.config import ModelConfig
from herdkern.model.transformer import Transformer
from herdkern.train.config import CheckpointConfig, ScheduleConfig, TrainConfig
from herdkern.train.trainer import PackedBatches, Trainer


def train(run_dir: Path, steps: int = 30) -> None:
    torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
    model = ModelConfig(
        vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, max_seq_len=64
    )
    config = TrainConfig(
        steps=steps,
        seq_len=32,
        batch_size=4,
        micro_batch_size=2,
        average_every_steps=3,
        schedule=ScheduleConfig(peak_lr=1e-2, min_lr=1e-3, warmup_steps=4, anneal_steps=12),
        checkpoint=CheckpointConfig(every_steps=2, keep_last=2),
    )
    sources = {"a": ArrayDataset(num_docs=120, seed=1), "b": ArrayDataset(num_docs=40, seed=2)}
    sampler = TokenSampler(sources, {"a": 0.7, "b": 0.3}, seq_len=32, seed=5)
    Trainer(Transformer(model, seed=3), config, PackedBatches(sampler, config), run_dir, progress=False).fit()


def die_at(call: int) -> None:
    """SIGKILL at the call-th call of something that touches the disk."""
    left = [call]

    def wrap(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, counted)

    for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "write"):
        wrap(os, name)
    wrap(builtins, "open")


def child(run_dir: Path, die_call: int = 0) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if die_call:
            die_at(die_call)
        train(run_dir)
        code = 0
    finally:
        os._exit(code)


def wait_for_steps(run_dir: Path, pid: int, step: int) -> None:
    """Until metrics.jsonl reaches `step` in this life of the run, or the child has ended."""
    metrics = run_dir / "metrics.jsonl"
    began = time.time_ns()
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if metrics.exists() and metrics.stat().st_mtime_ns > began and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.001)


def resumed_from(run_dir: Path) -> int:
    steps = [int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return max(steps, default=0)


def main(run_dir: Path, mode: str, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    done: list[int] = []
    while len(done) < kills:
        pid = child(run_dir, rng.randint(1, 120) if mode == "syscall" else 0)
        if mode == "random":
            wait_for_steps(run_dir, pid, resumed_from(run_dir) + rng.randint(1, 6))
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break  # it finished before the kill: nothing is left to disturb
        done.append(resumed_from(run_dir))
    _, status = os.waitpid(child(run_dir), 0)
    print(json.dumps({"resumed_from": done, "status": status}), flush=True)


if __name__ == "__main__":
    for i in range(1, len(sys.argv), 4):
        main(Path(sys.argv[i]), sys.argv[i + 1], int(sys.argv[i + 2]), int(sys.argv[i + 3]))
