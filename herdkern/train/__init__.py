"""One training loop: configuration, schedule, optimizer, batches, objectives, checkpoints, evaluation.

`config` needs no torch; the other names load it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from herdkern.train.config import CheckpointConfig, LongContextConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from herdkern.train.ramp import LLAMA3_RAMP, Ramp, RampPhase

if TYPE_CHECKING:
    from herdkern.train.average import WeightAverage
    from herdkern.train.batch import Batch, build_batch
    from herdkern.train.checkpoint import CorruptCheckpointError, latest_checkpoint, load_checkpoint, verify_checkpoint
    from herdkern.train.evaluate import HeldOut, token_counts, unigram_baseline
    from herdkern.train.guard import NonFiniteError
    from herdkern.train.long_context import LongContextGate, LongContextStalledError
    from herdkern.train.objective import next_token_loss
    from herdkern.train.recompute import recompute_activations
    from herdkern.train.sharded_checkpoint import Saver
    from herdkern.train.sharded_load import latest_sharded, load_sharded
    from herdkern.train.trainer import PackedBatches, Trainer, TrainResult

__all__ = [
    "LLAMA3_RAMP",
    "Batch",
    "CheckpointConfig",
    "CorruptCheckpointError",
    "HeldOut",
    "LongContextConfig",
    "LongContextGate",
    "LongContextStalledError",
    "NonFiniteError",
    "OptimizerConfig",
    "PackedBatches",
    "Ramp",
    "RampPhase",
    "Saver",
    "ScheduleConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "WeightAverage",
    "build_batch",
    "latest_checkpoint",
    "latest_sharded",
    "load_checkpoint",
    "load_sharded",
    "next_token_loss",
    "recompute_activations",
    "token_counts",
    "unigram_baseline",
    "verify_checkpoint",
]

_HOMES = {
    "Batch": "batch",
    "CorruptCheckpointError": "checkpoint",
    "HeldOut": "evaluate",
    "LongContextGate": "long_context",
    "LongContextStalledError": "long_context",
    "NonFiniteError": "guard",
    "PackedBatches": "trainer",
    "Saver": "sharded_checkpoint",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "WeightAverage": "average",
    "build_batch": "batch",
    "latest_checkpoint": "checkpoint",
    "latest_sharded": "sharded_load",
    "load_checkpoint": "checkpoint",
    "load_sharded": "sharded_load",
    "next_token_loss": "objective",
    "recompute_activations": "recompute",
    "token_counts": "evaluate",
    "unigram_baseline": "evaluate",
    "verify_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
