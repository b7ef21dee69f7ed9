"""Rotary position embedding.

Source: Su et al. 2021, eq. 34 (arXiv:2104.09864); frequency scaling: Llama 3.1 release, as in `rope_type="llama3"`.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native
from herdkern.ops.native_op import native_op


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the low frequencies, which makes a model of a short context usable at a longer one.

    Wavelengths above original_max_position / low_freq_factor are divided by factor, those below
    original_max_position / high_freq_factor are kept, those between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"RopeScaling: factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            got = f"{self.low_freq_factor} and {self.high_freq_factor}"
            raise ValueError(f"RopeScaling: 0 < low_freq_factor < high_freq_factor must hold, got {got}")


def rope_table(
    max_position: int,
    head_dim: int,
    *,
    theta: float = 500000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency, each (max_position, head_dim // 2) float32; angles are float64.

    Raises: ValueError for an odd head_dim or a theta that is not positive.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rope_table: head_dim must be positive and even, got {head_dim}")
    if theta <= 0:
        raise ValueError(f"rope_table: theta must be positive, got {theta}")
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is not None:
        # rotations within the original context decide: few -> interpolate, many -> keep
        rotations = scaling.original_max_position * frequency / (2 * math.pi)
        keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        frequency = frequency * keep + frequency / scaling.factor * (1 - keep)
    angle = torch.outer(torch.arange(max_position, dtype=torch.float64, device=device), frequency)
    return angle.cos().float(), angle.sin().float()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return rope in plain torch, computed in fp32 or the dtype of `x` if that is wider."""
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    c, s = (table[positions.long()].to(acc.dtype).unsqueeze(1) for table in (cos, sin))  # (total_tokens, 1, head_dim/2)
    a, b = acc.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else acc.chunk(2, dim=-1)
    turned = (a * c - b * s, b * c + a * s)
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Return `x` with pair i of each head turned by the angle of row positions[t] of the table.

    x: (total_tokens, num_heads, head_dim), float32 | bfloat16; head_dim contiguous, so slices of a fused projection
    need no copy.  cos, sin: (max_position, head_dim // 2) float32, see rope_table.  positions: (total_tokens,) int32 |
    int64.  interleaved: pairs are neighbours (2i, 2i + 1) instead of the two halves (i, i + head_dim // 2).
    Returns: shape and dtype of x, contiguous.
    Raises: ValueError if the arguments do not fit each other or a position lies outside the table;
    NotImplementedError if no backend can run the call.
    """
    _check(x, cos, sin, positions)
    why_not = {"native": why_not_native(x, torch.float32, torch.bfloat16), "reference": None}
    if choose("rope", backend, why_not) == "reference":
        if x.is_cpu and not torch.compiler.is_compiling():
            outside = ((positions < 0) | (positions >= cos.shape[0])).nonzero()
            _check_range(positions, cos.shape[0], int(outside[0]) if len(outside) else -1)
        return rope_reference(x, cos, sin, positions, interleaved=interleaved)
    return _forward(x, cos, sin, positions, interleaved, False)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"rope: x must be (total_tokens, num_heads, even head_dim), got {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != x.shape[2] // 2 or table.shape[0] != cos.shape[0]:
            expected = f"(max_position, {x.shape[2] // 2})"
            raise ValueError(f"rope: {name} must have shape {expected}, got {tuple(table.shape)}")
        if table.dtype != torch.promote_types(x.dtype, torch.float32) and table.dtype != torch.float32:
            raise ValueError(f"rope: {name} must be float32, got {dtype_name(table.dtype)}")
        if table.requires_grad:
            raise ValueError(f"rope: {name} must not require a gradient, got requires_grad=True; there is none")
    if positions.shape != x.shape[:1]:
        raise ValueError(f"rope: positions must have shape ({x.shape[0]},), got {tuple(positions.shape)}")
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rope: positions must be int32 or int64, got {dtype_name(positions.dtype)}")
    for name, other in (("cos", cos), ("sin", sin), ("positions", positions)):
        if other.device != x.device:
            raise ValueError(f"rope: {name} must be on {x.device}, got {other.device}")


def _check_range(positions: Tensor, max_position: int, bad: int) -> None:
    if bad >= 0:
        got = f"{int(positions[bad])} at index {bad}"
        raise ValueError(f"rope: positions must lie in [0, {max_position}), got {got}; make a longer rope_table")


def _rope_cpu(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    positions = positions.contiguous()
    wide = positions.dtype == torch.int64
    bad = native_module().find_bad_position(positions.data_ptr(), positions.numel(), cos.shape[0], wide)
    _check_range(positions, cos.shape[0], bad)
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    native_module().rope(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        out.data_ptr(),
        *x.shape,
        x.stride(0),
        x.stride(1),
        x.dtype == torch.bfloat16,
        interleaved,
        inverse,
        wide,
        num_threads(),
    )
    return out


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
    # a rotation is orthogonal: its transpose is the turn by the negative angle, which is differentiable in its turn
    dx = None if dout is None else _forward(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None


_forward = native_op(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved, bool inverse) -> Tensor",
    _rope_cpu,
    _rope_fake,
    _setup_context,
    _gradients,
)
