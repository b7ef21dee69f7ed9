"""What the ranks of the sharded checkpoint tests do."""

import os
import pickle
import resource
import signal
import time

import torch
import torch.distributed as dist
from pipeline_cases import make_batches, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import herdkern.train.sharded_checkpoint as module
from herdkern.model.hf_weights import config_to_hf
from herdkern.parallel import ParallelConfig, ParallelModel
from herdkern.train import Saver, latest_sharded, load_sharded
from herdkern.train.checkpoint import CorruptCheckpointError

SHAPE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 44}
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Run:
    """A model in some layout with an optimizer, its tensors under the names of the whole model."""

    def __init__(self, sizes, tied, seed=1):
        config = ParallelConfig(**sizes)
        model = make_model(tied, **SHAPE)
        model.init_weights(seed)
        if config.world_size == 1:
            self.named = dict(model.named_parameters())
        else:
            self.parallel = ParallelModel(model, config)
            self.named = self.parallel.named_parameters()
        if tied and "lm_head.weight" in self.named:  # of a last stage
            self.named["embed_tokens.weight"] = self.named.pop("lm_head.weight")
        self.hf_config = config_to_hf(model.config)
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=1e-3)

    def step(self, seed):
        self.parallel.step(make_batches(2, seed=seed))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill_optimizer(self):
        """Room for the moments."""
        for param in self.named.values():
            zeros = {key: torch.zeros_like(param.detach()) for key in MOMENTS[:2]}
            self.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}

    def tensors(self):
        moments = {
            f"{key}.{name}": self.optimizer.state[param][key] for name, param in self.named.items() for key in MOMENTS
        }
        return {"model": self.named, "optimizer": moments}


def whole(tensors):
    """All tensors of this rank's stages, gathered."""
    return {
        f"{stem}.{name}": (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone().numpy()
        for stem, named in tensors.items()
        for name, t in named.items()
    }


def train_and_save(rank, root, sizes, tied):
    """A step, a save, and a step during the write; what was to be written."""
    run = Run(sizes, tied)
    run.step(0)
    expected = whole(run.tensors())
    saver = Saver(root)
    saver.save(3, run.tensors(), {"step": 3}, {"rng": rank}, {"config.json": run.hf_config})
    run.step(100)
    saver.wait()
    return expected


def load(rank, root, sizes, tied):
    run = Run(sizes, tied, seed=2)
    run.fill_optimizer()
    state, rank_state = load_sharded(latest_sharded(root), run.tensors())
    return whole(run.tensors()), state, rank_state


def rows(step, count=3):
    """Small tensors whose entries tell the step: rows over all ranks, and one that is whole on each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = torch.full((count, 5), float(step))
    return {
        "model": {"a": DTensor.from_local(part, mesh, [Shard(0)]), "b": torch.full((700,), float(step))},
        "optimizer": {"step.a": torch.tensor(float(step))},
    }


def save_steps(rank, root, steps, **options):
    saver = Saver(root, **options)
    for step in steps:
        saver.save(step, rows(step), {"step": step}, {"rng": rank})
    saver.wait()


def latest(rank, root):
    return latest_sharded(root)


def load_rows(rank, folder):
    tensors = rows(-1)
    try:
        state, _ = load_sharded(folder, tensors)
    except (CorruptCheckpointError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    assert torch.equal(tensors["model"]["a"].to_local(), torch.full((3, 5), float(state["step"])))
    assert torch.equal(tensors["model"]["b"], torch.full((700,), float(state["step"])))
    assert tensors["optimizer"]["step.a"].item() == state["step"]
    return state["step"]


def save_with_small_files(rank, root, who, limit):
    """Step 1 is saved, step 2 meets a limit of the system on one rank, step 3 does not; what each wait said."""
    saver = Saver(root)
    said = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and rank == who:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        saver.save(step, rows(step, 300), {"step": step}, {})
        try:
            saver.wait()
            said.append("")
        except OSError as e:
            said.append(str(e))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return said


def said_by(function):
    try:
        function()
    except (ValueError, OSError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def wrong_calls(rank, root):
    """What each rank is told when one of them gives something wrong; and that the saver still works."""
    saver = Saver(root)
    good = rows(1)
    said = [
        said_by(lambda: saver.save(1, good, {}, {"rng": float("nan") if rank == 1 else 0})),
        said_by(lambda: saver.save(1, {"a.b": good["model"]}, {}, {})),
        # as if rank 1 had forgotten a stage
        said_by(lambda: saver.save(1, {"model": {} if rank else {"a": good["model"]["a"]}}, {}, {})),
    ]
    saver.save(1, good, {"step": 1}, {})
    saver.wait()
    return said


def die_at(rank, root, who, where, steps):
    """Save step after step; rank `who` kills itself when it comes to `where` in the last one."""
    saver = Saver(root)
    for step in steps:
        if step == steps[-1] and rank == who:
            setattr(module, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        saver.save(step, rows(step), {"step": step}, {})
        try:
            saver.wait()
        except RuntimeError as e:
            return str(e)
    return "saved"


def go_on(rank, root, until):
    """Resume from the newest checkpoint and save every step until a time; notes what is known to be saved."""
    folder = latest_sharded(root)
    step = 0 if folder is None else load_rows(rank, folder)
    saver = Saver(root)
    while time.time() < until:
        step += 1
        saver.save(step, rows(step), {"step": step}, {})
        (root / f"saved-{rank}").write_text(str(step - 1))  # save has waited for the one before
    saver.wait()
    return step


def bytes_sent(rank, root):
    """The largest object that a rank sends while large tensors are saved twice and loaded."""
    sent = []

    def spy(value, *args, of=dist.gather_object, **options):
        sent.append(len(pickle.dumps(value)))
        return of(value, *args, **options)

    dist.gather_object = spy
    try:
        tensors = rows(1, 100_000)
        saver = Saver(root)
        for step in (1, 2):
            saver.save(step, tensors, {"step": step}, {})
        saver.wait()
        load_sharded(latest_sharded(root), tensors)
    finally:
        dist.gather_object = spy.__kwdefaults__["of"]
    return max(sent)
