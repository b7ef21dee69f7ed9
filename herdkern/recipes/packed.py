"""Training from packed tokens on all axes: what `herdkern pretrain` does on every rank that torchrun starts.

The run folder of `herdkern run` (or any folder with tokens/ and tokenizer/) gives the data; each data-parallel rank
reads its own sequences. The same command goes on where a run was stopped, on other numbers of ranks too.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from herdkern.data.pack import TokenDataset
from herdkern.model.transformer import Transformer
from herdkern.parallel.compose import ParallelModel
from herdkern.parallel.config import ParallelConfig
from herdkern.recipes.config import Recipe
from herdkern.recipes.model_stages import (
    EVAL_TOKENS_WHILE_TRAINING,
    ShardBatches,
    heldout_loss,
    make_probe,
    open_shards,
    resolve_model,
    token_bytes,
    token_folders,
)
from herdkern.tokenizer import Tokenizer
from herdkern.train.batch import IGNORE, Batch, build_batch
from herdkern.train.config import TrainConfig
from herdkern.train.trainer import Trainer, TrainResult

# of a collective, and of making a group; a supervisor finds a hung rank earlier
TIMEOUT = timedelta(minutes=10)


def pretrain_packed(recipe: Recipe, run_dir: Path, tokens: Path, parallel: ParallelConfig) -> TrainResult:
    """Train `recipe` in `run_dir` on the tokens and the tokenizer of the folder `tokens`; to be called on all ranks.

    Under torchrun (WORLD_SIZE is set) the ranks train together, as `parallel` says; else this process trains alone.
    Returns: where training ended; interrupted by SIGTERM or SIGUSR1, it has left a checkpoint.
    Raises: ValueError for settings that cannot work, or that are not those of the run in run_dir; FileNotFoundError
    without tokens.
    """
    if not (tokens / "tokens" / "train").is_dir() or not (tokens / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"pretrain: {tokens} must hold tokens/train and tokenizer, got none; make them by `herdkern run`"
        )
    with _ranks(parallel) as ranks:
        trainer = _trainer(recipe, run_dir, tokens, parallel if ranks else None)
        trainer.settings = {**dataclasses.asdict(recipe), "parallel": dataclasses.asdict(parallel)}
        return trainer.fit()


def _trainer(recipe: Recipe, run_dir: Path, tokens: Path, parallel: ParallelConfig | None) -> Trainer:
    tokenizer, folders = Tokenizer.load(tokens / "tokenizer"), token_folders(tokens)
    batches = ShardBatches(recipe, folders)
    heldout = [open_shards(folder) for folder in folders.heldout.values()]
    torch.manual_seed(recipe.train.seed)  # the state of the generator is part of a checkpoint
    model = Transformer(resolve_model(recipe, tokenizer), seed=recipe.train.seed)
    evaluate = _evaluation(recipe.train, heldout, token_bytes(tokenizer), on_ranks=parallel is not None)
    trainer = Trainer(model, recipe.train, batches, run_dir, evaluate=evaluate, parallel=parallel)
    trainer.probe = make_probe(recipe.train, heldout, tokenizer)
    return trainer


def _evaluation(
    train: TrainConfig, heldout: Sequence[TokenDataset], sizes: NDArray[np.int64], *, on_ranks: bool
) -> Callable[[Any], dict[str, float]] | None:
    """What the loop calls from time to time; None if it never does, or nothing was held out."""
    if not heldout or not train.eval_every_steps:
        return None
    return (_LossOfRanks if on_ranks else heldout_loss)(heldout, train.seq_len, sizes)


class _LossOfRanks:
    """Held-out loss as `heldout_loss` gives it, each data-parallel rank computing its windows."""

    def __init__(self, datasets: Sequence[TokenDataset], seq_len: int, sizes: NDArray[np.int64]) -> None:
        self.batches: list[Batch] = []
        for dataset in datasets:
            share = max(EVAL_TOKENS_WHILE_TRAINING // len(datasets), seq_len)
            end = min(dataset.num_tokens - 1, share)
            starts = range(0, end, seq_len)
            self.batches += [build_batch([dataset.window(s, min(seq_len, end - s) + 1)]) for s in starts]
        targets = torch.cat([batch.targets for batch in self.batches])
        self.num_bytes = int(sizes[targets[targets != IGNORE].numpy()].sum())
        self.num_targets = sum(batch.num_targets for batch in self.batches)

    def __call__(self, model: ParallelModel) -> dict[str, float]:
        size, rank = model.config.dp, model.mesh["dp"].get_local_rank()
        rounds = -(-len(self.batches) // size)
        # all ranks run as many: those without a window of their own repeat one whose targets do not count
        mine = self.batches[rank::size] + [_uncounted(self.batches[0])] * (rounds - len(self.batches[rank::size]))
        nats = float(model.evaluate(mine)) * self.num_targets
        return {
            "heldout_loss": nats / self.num_targets,
            "heldout_bits_per_byte": nats / math.log(2.0) / self.num_bytes,
        }


def _uncounted(batch: Batch) -> Batch:
    return dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE), num_targets=0)


@contextmanager
def _ranks(parallel: ParallelConfig) -> Iterator[bool]:
    """The process group of torchrun's ranks; yields whether there is one."""
    if "WORLD_SIZE" not in os.environ:
        if parallel.world_size > 1:
            raise ValueError(
                f"pretrain: parallel must be one rank in one process, got {parallel.world_size}; start it by "
                f"torchrun --nproc-per-node {parallel.world_size} -m herdkern pretrain ..."
            )
        yield False
        return
    parallel.check_world_size(int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield True
    finally:
        dist.destroy_process_group()
