"""How often to save: the interval that loses least to saving and to work that a failure undoes. Needs no torch.

Source: Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, "A higher order
estimate of the optimum checkpoint interval for restart dumps".
"""

import math


def mean_time_between_failures(devices: int, failures_per_device_day: float) -> float:
    """Seconds between interruptions of a job on `devices`: 10,012 on 16,384 at the rate of the Llama 3 paper."""
    if devices < 1 or failures_per_device_day <= 0:
        raise ValueError(
            "mean_time_between_failures: devices and failures_per_device_day must be positive, "
            f"got {devices}, {failures_per_device_day}"
        )
    return 86_400 / (devices * failures_per_device_day)


def young_daly_interval(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between two checkpoints that stop training for `save_s` each: sqrt(2 save_s mtbf_s).

    Where saving takes longer than half of the time between failures, that time itself (Daly).
    Raises: ValueError for a time that is not positive.
    """
    if save_s <= 0 or mtbf_s <= 0:
        raise ValueError(f"young_daly_interval: save_s and mtbf_s must be positive, got {save_s}, {mtbf_s}")
    return math.sqrt(2 * save_s * mtbf_s) if save_s < mtbf_s / 2 else mtbf_s


def effective_time(interval_s: float, save_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """The share of time that trains, where failures come at random: the rest is saving, work done again, restarts.

    interval_s: work between checkpoints.  Exact for exponential times between failures: a stretch of interval_s +
    save_s takes (mtbf_s + restart_s) (exp(stretch / mtbf_s) - 1) on average.
    Raises: ValueError for an interval or time between failures that is not positive.
    """
    if interval_s <= 0 or mtbf_s <= 0 or save_s < 0 or restart_s < 0:
        raise ValueError(
            "effective_time: interval_s and mtbf_s must be positive, save_s and restart_s not negative, "
            f"got {interval_s}, {mtbf_s}, {save_s}, {restart_s}"
        )
    return interval_s / ((mtbf_s + restart_s) * math.expm1((interval_s + save_s) / mtbf_s))
