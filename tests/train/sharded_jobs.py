"""What the ranks of the sharded checkpoint tests do."""

import torch
import torch.distributed as dist
from pipeline_cases import make_batches, make_model

from herdkern.parallel import ParallelConfig, ParallelModel
from herdkern.train import Saver, latest_sharded, load_sharded

SHAPE = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 44}


class Run:
    """A model in some layout with an optimizer, its tensors under the names of the whole model."""

    def __init__(self, sizes, tied, seed=1):
        self.config = ParallelConfig(**sizes)
        model = make_model(tied, **SHAPE)
        model.init_weights(seed)
        self.tied = tied
        if self.config.world_size == 1:
            self.parallel, self.named = None, dict(model.named_parameters())
        else:
            self.parallel = ParallelModel(model, self.config)
            self.named = self.parallel.named_parameters()
        self.model = model
        if tied and "lm_head.weight" in self.named:
            self.named["embed_tokens.weight"] = self.named.pop("lm_head.weight")
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=1e-3)

    def step(self, seed):
        self.parallel.step(make_batches(2, seed=seed))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fill_optimizer(self):
        """Room for the moments."""
        for param in self.named.values():
            zeros = {key: torch.zeros_like(param.detach()) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}

    def tensors(self):
        moments = {
            f"{key}.{name}": self.optimizer.state[param][key]
            for name, param in self.named.items()
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        return {"model": self.named, "optimizer": moments}


def whole(tensors):
    """All tensors gathered; one rank's share of the names."""
    return {
        f"{stem}.{name}": (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone().numpy()
        for stem, named in tensors.items()
        for name, t in named.items()
    }


def train_and_save(rank, root, sizes, tied, step=3):
    """Some steps, a save, and more steps during the write; what was to be written."""
    run = Run(sizes, tied)
    for seed in range(step):
        run.step(seed)
    expected = whole(run.tensors())
    saver = Saver(root)
    saver.save(step, run.tensors(), {"step": step}, {"rng": rank}, {"config.json": {}})
    run.step(100)
    saver.wait()
    return expected


def load(rank, root, sizes, tied):
    run = Run(sizes, tied, seed=2)
    run.fill_optimizer()
    folder = latest_sharded(root)
    state, rank_state = load_sharded(folder, run.tensors())
    dist.barrier()
    return whole(run.tensors()), state, rank_state
