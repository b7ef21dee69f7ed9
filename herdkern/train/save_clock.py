"""When the next checkpoint is due: every so many steps, or as often as saving and failures make it worth."""

import time

from herdkern.parallel.checkpoint_interval import mean_time_between_failures, young_daly_interval
from herdkern.train.config import CheckpointConfig

# unexpected interruptions of a device in a day: 419 in 54 days on 16,384 (Llama 3, arXiv:2407.21783, section 3.3.4)
FAILURES_PER_DEVICE_DAY = 419 / 54 / 16_384


class SaveClock:
    """Tells after every step whether to save. With every_steps="auto" that is after the first step, which measures how
    long training stands still for it, then at intervals of Young and Daly."""

    def __init__(self, config: CheckpointConfig, num_ranks: int) -> None:
        self.every_steps = config.every_steps
        self.between_failures_s = config.between_failures_s or mean_time_between_failures(
            num_ranks, FAILURES_PER_DEVICE_DAY
        )
        self._interval_s = 0.0
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step`; with "auto" the answer of one rank must be that of all."""
        if self.every_steps == "auto":
            return time.monotonic() - self._saved_at >= self._interval_s
        return self.every_steps > 0 and step % self.every_steps == 0

    def saved(self, seconds: float) -> None:
        """A checkpoint was written and training stood still for so long."""
        self._interval_s = young_daly_interval(max(seconds, 1e-3), self.between_failures_s)
        self._saved_at = time.monotonic()
