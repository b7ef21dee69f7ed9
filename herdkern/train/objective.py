"""What a run minimises: an objective maps (model, batch) to a summed loss and metrics.

The trainer divides the sum by batch.num_targets over all micro-batches of a step, so the loss of a step does not
depend on how the step is cut.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from herdkern.model.transformer import Transformer
from herdkern.train.batch import Batch

Objective = Callable[[Any, Batch], tuple[Tensor, dict[str, float]]]


def next_token_loss(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The summed cross entropy of the next tokens in nats, a fp32 scalar, and no further metrics."""
    hidden = model(batch.tokens, batch.cu_seqlens, batch.positions)  # (total_tokens, dim)
    return model.loss(hidden, batch.targets, reduction="sum"), {}
