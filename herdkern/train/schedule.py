"""The learning rate of every update. Source: Llama 3 (arXiv:2407.21783) sections 3.4.1 and 3.4.3."""

import math

from herdkern.train.config import ScheduleConfig


def learning_rate(update: int, config: ScheduleConfig, *, steps: int) -> float:
    """The rate of update number `update` (from 1) of `steps`; 0.0 exactly for every number above `steps`.

    peak * s / warmup while s < warmup; min + (peak - min) (1 + cos(pi (s - warmup) / (end - warmup))) / 2 after
    that; and in the last anneal_steps, with t of them done, the rate reached before times (1 - t / anneal_steps).
    """
    anneal_start = steps - config.anneal_steps
    if update > steps:
        return 0.0
    if update > anneal_start:
        done = update - anneal_start - 1
        return _warmup_cosine(anneal_start, config, anneal_start) * (1 - done / config.anneal_steps)
    return _warmup_cosine(update, config, anneal_start)


def _warmup_cosine(update: int, config: ScheduleConfig, anneal_start: int) -> float:
    if update < config.warmup_steps:
        return config.peak_lr * update / config.warmup_steps
    end = config.cosine_steps or anneal_start
    if update >= end:
        return config.min_lr if end > config.warmup_steps else config.peak_lr
    progress = (update - config.warmup_steps) / (end - config.warmup_steps)
    return config.min_lr + 0.5 * (config.peak_lr - config.min_lr) * (1 + math.cos(math.pi * progress))
