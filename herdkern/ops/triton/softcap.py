"""The softcap of scores and logits, softcap * tanh(x / softcap), to a few units in the last place."""

import triton
import triton.language as tl


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap) of float32 values."""
    u = x / softcap
    u2 = u * u
    near_zero = u * (1.0 + u2 * (-1 / 3 + u2 * (2 / 15 + u2 * (-17 / 315 + u2 * (62 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(u))  # 1 - e loses digits near zero
    far = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(tl.abs(u) < 0.25, near_zero, tl.where(u < 0.0, -far, far))
