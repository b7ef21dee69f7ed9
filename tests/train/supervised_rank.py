"""A rank of a small parallel run, started by the supervisor: RUN STEPS SAVE_EVERY [FAULT STEP RANK].

A fault happens once in a run: in that step (0 based) of that rank.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from documents_in_memory import PARALLEL_MODEL, PARALLEL_RUN, sampler_of

from herdkern.model.transformer import Transformer
from herdkern.parallel import ParallelConfig
from herdkern.train import one_process, parallel_engine
from herdkern.train.config import CheckpointConfig
from herdkern.train.trainer import PackedBatches, Trainer

for module in (one_process, parallel_engine):  # a rate is not what these tests look at
    module.measured_peak_flops = lambda *_, **__: 1e11


class Faulty(PackedBatches):
    """Batches at one of which the rank comes to harm."""

    def __init__(self, sampler, config, run, fault, at, rank, pause):
        super().__init__(sampler, config)
        self.run, self.fault, self.at, self.rank, self.pause = run, fault, at, rank, pause

    def batch(self, first, count):
        time.sleep(self.pause)
        once = self.run / "fault.happened"
        here = dist.get_rank() == self.rank and first // self.config.batch_size == self.at
        if self.fault and here and not once.exists():
            once.touch()
            self.harm()
        return super().batch(first, count)

    def harm(self):
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.fault == "sleep":
            time.sleep(600)
        elif self.fault == "raise":
            raise RuntimeError("planted")
        elif self.fault == "skip":
            dist.all_reduce = lambda *_, **__: None
        elif self.fault == "size":
            dist.all_reduce(torch.zeros(3))


def train(run, steps, every, fault="", at="0", rank="0", pause="0"):
    """The run, on the ranks of the process group."""
    run = Path(run)
    checkpoint = CheckpointConfig(every_steps=int(every), keep_last=2)
    config = dataclasses.replace(
        PARALLEL_RUN, steps=int(steps), batch_size=12, average_every_steps=0, checkpoint=checkpoint
    )
    source = Faulty(sampler_of(), config, run, fault, int(at), int(rank), float(pause))
    model = Transformer(PARALLEL_MODEL, seed=3)
    layout = ParallelConfig(dp=dist.get_world_size())
    Trainer(model, config, source, run, parallel=layout, progress=False).fit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(*sys.argv[1:])
