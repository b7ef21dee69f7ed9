"""Rotary position embedding.

Source: Su et al. 2021, eq. 34 (arXiv:2104.09864); frequency scaling: Llama 3.1 release, as in `rope_type="llama3"`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from herdkern.ops.attention_checks import border_values, check_borders
from herdkern.ops.backend import (
    Backend,
    call_cuda,
    choose,
    dtype_name,
    native_module,
    num_threads,
    why_not_native,
    why_not_triton,
)
from herdkern.ops.native_op import is_plain_eager, native_op


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


def rope_qk_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return rope_qk in plain torch: rope_reference of q and of k."""
    if positions is None:
        positions = torch.arange(q.shape[0], device=q.device)
        if cu_seqlens is not None:
            borders = cu_seqlens.long()
            positions -= torch.repeat_interleave(borders[:-1], borders.diff(), output_size=q.shape[0])
    turned_q, turned_k = (rope_reference(x, cos, sin, positions, interleaved=interleaved) for x in (q, k))
    return turned_q, turned_k


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return `x` with pair i of each head turned by the angle of row positions[t] of the table.

    x: (total_tokens, num_heads, head_dim), float32 | bfloat16, on a GPU also float16; head_dim contiguous, so slices of
    a fused projection need no copy.  cos, sin: (max_position, head_dim // 2) float32, see rope_table.  positions:
    (total_tokens,) int32 | int64.  interleaved: pairs are neighbours (2i, 2i + 1) instead of the two halves
    (i, i + head_dim // 2).
    inplace: write the result into x and return x, as said at rope_qk.
    Returns: shape and dtype of x, contiguous.
    Raises: ValueError if the arguments do not fit each other or a position lies outside the table;
    NotImplementedError if no backend can run the call.
    """
    _check("rope", {"x": x}, cos, sin, positions)
    chosen = _chosen("rope", x, backend)
    if chosen == "reference":
        _check_places("rope", x, cos, positions, None)
        out = rope_reference(x, cos, sin, positions, interleaved=interleaved)
        return _write_back("rope", {"x": x}, (out,))[0] if inplace else out
    if inplace:
        return _turn_in_place("rope", {"x": x}, cos, sin, positions, None, interleaved, _kernels(chosen))[0]
    return _kernels(chosen)[0](x, _no_heads(x), cos, sin, positions, None, interleaved, False)[0]


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `rope` of queries and keys by one kernel call.

    q: (total_tokens, num_heads, head_dim), k: (total_tokens, num_kv_heads, head_dim), cos, sin, positions, interleaved:
    as x and the rest in `rope`.
    cu_seqlens: (num_docs + 1,) int32, borders of documents, in place of positions: each counts from 0. Without either,
        tokens count from 0 to total_tokens - 1.
    inplace: write the results into q and k and return them. With autograd, q and k are marked as changed: a leaf that
        requires a gradient is refused, and torch raises where the old values are still needed or where a view comes
        from a function with several results (split, unbind). For a view (unflatten of a projection) torch copies the
        gradient of its base twice, so that in place is for inference and for tensors that are no views. Under
        torch.compile it is a new tensor and a copy.
    Returns: shapes and dtype of q and k; contiguous, or q and k themselves.
    Raises: ValueError if the arguments do not fit each other, a position lies outside the table, or inplace cannot be;
    NotImplementedError if no backend can run the call.
    """
    both = {"q": q, "k": k}
    _check("rope_qk", both, cos, sin, positions, cu_seqlens)
    chosen = _chosen("rope_qk", q, backend)
    if chosen == "reference":
        _check_places("rope_qk", q, cos, positions, cu_seqlens)
        turned = rope_qk_reference(q, k, cos, sin, positions, cu_seqlens=cu_seqlens, interleaved=interleaved)
        return _write_back("rope_qk", both, turned) if inplace else turned
    if inplace:
        return _turn_in_place("rope_qk", both, cos, sin, positions, cu_seqlens, interleaved, _kernels(chosen))
    return _kernels(chosen)[0](q, k, cos, sin, positions, cu_seqlens, interleaved, False)


_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/element.h


def _chosen(function: str, x: Tensor, backend: Backend) -> str:
    why_not = {
        "native": why_not_native(x, *(_ELEMENTS if x.is_cuda else _ELEMENTS[:2]), cuda="rope"),
        "triton": why_not_triton(x, backend, *_ELEMENTS),
        "reference": None,
    }
    return choose(function, backend, why_not)


def _kernels(chosen: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]:
    """The functions that turn q and k, into new tensors and where they are told to."""
    if chosen == "triton":
        from herdkern.ops.triton import rope as triton_rope

        return triton_rope.rope_qk, triton_rope.launch
    return _forward_qk, _launch_native


def _check(
    function: str,
    operands: dict[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> None:
    first = next(iter(operands.values()))
    for name, x in operands.items():
        if x.dim() != 3 or x.shape[2] % 2:
            expected = "(total_tokens, num_heads, even head_dim)"
            raise ValueError(f"{function}: {name} must be {expected}, got {tuple(x.shape)}")
        if (x.shape[0], x.shape[2]) != (first.shape[0], first.shape[2]):
            expected = f"({first.shape[0]}, num_kv_heads, {first.shape[2]}) as q"
            raise ValueError(f"{function}: {name} must be {expected}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise ValueError(f"{function}: {name} must be {dtype_name(first.dtype)} as q, got {dtype_name(x.dtype)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != first.shape[2] // 2 or table.shape[0] != cos.shape[0]:
            expected = f"(max_position, {first.shape[2] // 2})"
            raise ValueError(f"{function}: {name} must have shape {expected}, got {tuple(table.shape)}")
        if table.dtype != torch.promote_types(first.dtype, torch.float32) and table.dtype != torch.float32:
            raise ValueError(f"{function}: {name} must be float32, got {dtype_name(table.dtype)}")
        if table.requires_grad:
            raise ValueError(f"{function}: {name} must not require a gradient, got requires_grad=True; there is none")
    if positions is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{function}: cu_seqlens must be None where positions are given, got both; drop one")
        if positions.shape != first.shape[:1]:
            raise ValueError(f"{function}: positions must have shape ({first.shape[0]},), got {tuple(positions.shape)}")
        if positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{function}: positions must be int32 or int64, got {dtype_name(positions.dtype)}")
    elif cu_seqlens is not None:
        check_borders(function, "cu_seqlens", cu_seqlens, first)
    others = {"cos": cos, "sin": sin, "positions": positions, **operands}
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(f"{function}: {name} must be on {first.device}, got {other.device}")


def _check_range(function: str, positions: Tensor, max_position: int, bad: int) -> None:
    if bad >= 0:
        got = f"{int(positions[bad])} at index {bad}"
        raise ValueError(f"{function}: positions must lie in [0, {max_position}), got {got}; make a longer rope_table")


def _check_places(
    function: str, x: Tensor, cos: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, *, native: bool = False
) -> None:
    """Check the values of positions or borders against the table; not where they are traced or on another device."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return
    if positions is not None:
        if native:
            wide = positions.dtype == torch.int64
            bad = native_module().find_bad_position(positions.data_ptr(), positions.numel(), cos.shape[0], wide)
        else:
            outside = ((positions < 0) | (positions >= cos.shape[0])).nonzero()
            bad = int(outside[0]) if len(outside) else -1
        _check_range(function, positions, cos.shape[0], bad)
        return
    longest = x.shape[0]
    if cu_seqlens is not None:
        borders = border_values(function, "cu_seqlens", cu_seqlens, x.shape[0])
        longest = max((end - begin for begin, end in pairwise(borders)), default=0)
    if longest > cos.shape[0]:
        got = f"{longest} tokens in a row"
        raise ValueError(f"{function}: positions must lie in [0, {cos.shape[0]}), got {got}; make a longer rope_table")


def _heads(x: Tensor, out: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), out.data_ptr(), x.shape[1], x.stride(0), x.stride(1), out.stride(0), out.stride(1)


def _launch(
    function: str,
    operands: list[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turn x into out for each (x, out); the last dimension of all is contiguous, and out may be x."""
    positions = None if positions is None else positions.contiguous()
    x = operands[0][0]
    _check_places(function, x, cos, positions, cu_seqlens, native=True)
    cos, sin = cos.contiguous(), sin.contiguous()
    places = (
        0 if positions is None else positions.data_ptr(),
        positions is not None and positions.dtype == torch.int64,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )
    native_module().rope(
        [_heads(x, out) for x, out in operands],
        cos.data_ptr(),
        sin.data_ptr(),
        places,
        x.shape[0],
        x.shape[2],
        x.dtype == torch.bfloat16,
        interleaved,
        inverse,
        num_threads(),
    )


def launch_cuda(
    function: str,
    operands: list[tuple[Tensor, Tensor]],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turn x into out for each (x, out) by the kernel of csrc/cuda, as _launch does. NaN beyond the table."""
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    x = operands[0][0]
    places = (
        0 if positions is None else positions.data_ptr(),
        positions is not None and positions.dtype == torch.int64,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )
    heads = [_heads(x, out) for x, out in operands]
    sizes = x.shape[0], x.shape[2], cos.shape[0], _ELEMENTS.index(x.dtype)
    call_cuda(x, "rope", heads, cos.data_ptr(), sin.data_ptr(), places, sizes, interleaved, inverse)


def _launch_native(function: str, operands: list[tuple[Tensor, Tensor]], *rest: Any) -> None:
    (launch_cuda if operands[0][0].is_cuda else _launch)(function, operands, *rest)


def _turn_in_place(
    function: str,
    operands: dict[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    kernels: tuple[Any, Any],
) -> Any:
    """The operands, turned where they lie."""
    forward_qk, launch = kernels
    _check_in_place(function, operands)
    x, *more = operands.values()
    rest = (cos, sin, positions, cu_seqlens, interleaved)
    if not is_plain_eager((*operands.values(), cos, sin, positions, cu_seqlens)):
        k = more[0] if more else _no_heads(x)
        return _write_back(function, operands, forward_qk(x, k, *rest, False)[: len(operands)])
    recorded = [x.requires_grad and torch.is_grad_enabled() for x in operands.values()]
    if any(recorded):  # values first: where they are refused, no graph has changed
        _check_places(function, x, cos, positions, cu_seqlens)
    # Autograd next: where it refuses, nothing has been written.
    results = [
        _InPlace.apply(x, *rest, forward_qk) if is_recorded else x
        for x, is_recorded in zip(operands.values(), recorded, strict=True)
    ]
    with torch.no_grad():
        targets = [x.detach() if x.stride(2) == 1 else x.contiguous() for x in results]
        launch(function, [(x, x) for x in targets], *rest, False)
        for x, target in zip(results, targets, strict=True):
            if x.data_ptr() != target.data_ptr():
                x.copy_(target)
    torch.autograd.graph.increment_version(results)
    return tuple(results)


def _check_in_place(function: str, operands: dict[str, Tensor]) -> None:
    for name, x in operands.items():
        root = x if x._base is None else x._base
        if torch.is_grad_enabled() and root.is_leaf and root.requires_grad:
            got = "a leaf" if root is x else "a view of one"
            raise ValueError(
                f"{function}: {name} must not be a leaf that requires a gradient with inplace=True, got {got}; "
                "use inplace=False"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            got = f"strides {x.stride()}"
            raise ValueError(f"{function}: {name} must not repeat elements with inplace=True, got {got}; clone it")
    both = tuple(x for x in operands.values() if x.numel())
    if len(both) == 2 and (both[0] is both[1] or (is_plain_eager(both) and both[0].data_ptr() == both[1].data_ptr())):
        raise ValueError(
            f"{function}: k must not lie where q lies with inplace=True, got one address; use inplace=False"
        )


def _write_back(function: str, operands: dict[str, Tensor], turned: tuple[Tensor, ...]) -> Any:
    _check_in_place(function, operands)
    return tuple(x.copy_(out) for x, out in zip(operands.values(), turned, strict=True))


class _InPlace(torch.autograd.Function):
    """What autograd has to know of a tensor that is turned where it lies. One for each: of a function with two results
    torch takes no views. The writing is done by the caller."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        interleaved: bool,
        forward_qk: Any,
    ) -> Tensor:
        ctx.interleaved, ctx.forward_qk = interleaved, forward_qk
        ctx.save_for_backward(cos, sin, positions, cu_seqlens)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return ctx.forward_qk(dout, _no_heads(dout), *ctx.saved_tensors, ctx.interleaved, True)[0], *(None,) * 6


def register_rope_qk(
    name: str, launch: Callable[..., None], devices: Sequence[str] = ("CPU",)
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register herdkern::<name>, which turns q and k into new tensors by `launch` (see _launch), and return its call.

    k without heads is for a caller that has but one tensor.
    """

    def implementation(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        interleaved: bool,
        inverse: bool,
    ) -> tuple[Tensor, Tensor]:
        turned = [(x if x.stride(2) == 1 else x.contiguous(), x.new_empty(x.shape)) for x in (q, k)]
        if k.shape[1]:
            launch("rope_qk", turned, cos, sin, positions, cu_seqlens, interleaved, inverse)
        else:
            launch("rope", turned[:1], cos, sin, positions, cu_seqlens, interleaved, inverse)
        return turned[0][1], turned[1][1]

    def gradients(ctx: Any, dout_q: Tensor | None, dout_k: Tensor | None) -> tuple[Any, ...]:
        # a rotation is orthogonal: its transpose is the turn by the negative angle, which is differentiable in its turn
        douts = [dout if needed else None for dout, needed in zip((dout_q, dout_k), ctx.needs_input_grad, strict=False)]
        shown = next((dout for dout in douts if dout is not None), None)
        if shown is None:
            return (None,) * 8
        dq, dk = (_no_heads(shown) if dout is None else dout for dout in douts)
        turned = op(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        return *(None if dout is None else dx for dout, dx in zip(douts, turned, strict=True)), *(None,) * 6

    op = native_op(
        f"{name}(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, bool interleaved,"
        " bool inverse) -> (Tensor, Tensor)",
        implementation,
        lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
        _setup_context,
        gradients,
        devices,
    )
    return op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _q, _k, cos, sin, positions, cu_seqlens, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)
    ctx.set_materialize_grads(False)


def _no_heads(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 0, x.shape[2])


_forward_qk = register_rope_qk("rope_qk", _launch_native, ("CPU", "CUDA"))
