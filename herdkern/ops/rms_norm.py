"""RMSNorm. Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

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
from herdkern.ops.native_op import differentiable_gradients, empty_gradients, native_op, rows

Casting = Literal["llama", "gemma", "none"]
CASTINGS: tuple[str, ...] = get_args(Casting)  # in the order of Casting in csrc/cpu/rms_norm.h
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/element.h


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    casting: Casting = "llama",
    weight_offset: float = 0.0,
) -> Any:
    """Return rms_norm in plain torch: the formula of Hugging Face's Llama ("llama") or Gemma ("gemma"), or no casts."""
    hidden = x if residual is None else x + residual
    wide = hidden.dtype if casting == "none" else torch.promote_types(hidden.dtype, torch.float32)
    normed = hidden.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        normed = normed.to(x.dtype)
    if casting != "llama" or weight_offset:
        weight = weight.to(wide)
    if weight_offset:
        weight = weight + weight_offset
    out = (normed * weight).to(x.dtype)
    return out if residual is None else (out, hidden)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: None = None,
    eps: float = 1e-5,
    casting: Casting = "llama",
    weight_offset: float = 0.0,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor,
    eps: float = 1e-5,
    casting: Casting = "llama",
    weight_offset: float = 0.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    casting: Casting = "llama",
    weight_offset: float = 0.0,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return each row of `x` (of x + residual) scaled to unit root mean square, then by weight + weight_offset.

    x, residual: (..., dim), float32 | bfloat16 | float16.  weight: (dim,), dtype of x or float32.
    casting: what is rounded to the dtype of x on the way. "llama": the normed row, before the weight (Hugging Face and
    Meta Llama); "gemma": nothing (Hugging Face Gemma with weight_offset=1.0); "none": every step. One for float32.
    Returns: shape and dtype of x, contiguous; with a residual (out, new_residual), new_residual = x + residual.
    Sums are fp32. On x86-64 the output has the bits of each mode's eager formula: squares are added up in the order in
    which torch (AVX2 and above) adds the last dimension of a contiguous tensor of more rows than threads. In "none" the
    rows beyond the last multiple of 32 are excepted: there torch rounds the square root as well.
    Gradients are fp32 throughout and rounded once, whatever the mode; eager rounds more often.
    Saved for the backward pass: x (or new_residual), weight and one fp32 number per row.
    Raises: ValueError if weight or residual does not fit x or casting is unknown; NotImplementedError if no backend
    can run the call.
    """
    _check(x, weight, residual, casting)
    why_not = {
        "native": why_not_native(x, *ELEMENTS, cuda="rms_norm_backward"),
        "triton": why_not_triton(x, backend, *ELEMENTS) or _too_long(x),
        "reference": None,
    }
    chosen = choose("rms_norm", backend, why_not)
    if chosen == "reference":
        return rms_norm_reference(x, weight, residual=residual, eps=eps, casting=casting, weight_offset=weight_offset)
    out, new_residual, _rstd = _forward_of(chosen)(x, residual, weight, eps, casting, weight_offset)
    return out if residual is None else (out, new_residual)


def _forward_of(chosen: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The registered op of a backend."""
    if chosen == "triton":
        from herdkern.ops.triton import rms_norm as triton_rms_norm

        return triton_rms_norm.forward
    return _forward


def _too_long(x: Tensor) -> str | None:
    """A Triton program holds whole rows in registers."""
    return f"dim must be at most 16384, got {x.shape[-1]}" if x.shape[-1] > 16384 else None


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, casting: str) -> None:
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        expected = " or ".join(dict.fromkeys((dtype_name(x.dtype), "float32")))
        raise ValueError(f"rms_norm: weight must be {expected}, got {dtype_name(weight.dtype)}")
    if weight.device != x.device:
        raise ValueError(f"rms_norm: weight must be on {x.device}, got {weight.device}")
    if casting not in CASTINGS:
        raise ValueError(f"rms_norm: casting must be one of {', '.join(CASTINGS)}, got {casting!r}")
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise ValueError(f"rms_norm: residual must be {dtype_name(x.dtype)} as x is, got {dtype_name(residual.dtype)}")
    if residual.device != x.device:
        raise ValueError(f"rms_norm: residual must be on {x.device}, got {residual.device}")


def _shape_of(x: Tensor, weight: Tensor, casting: str) -> tuple[int, ...]:
    """num_rows, dim, element of x, element of weight, casting: what all kernels take."""
    dim = x.shape[-1]
    num_rows = x.numel() // dim if dim else x.shape[:-1].numel()
    elements = ELEMENTS.index(x.dtype), ELEMENTS.index(weight.dtype)
    return num_rows, dim, *elements, CASTINGS.index(casting)


def _forward_cpu(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, x_stride = rows(x)
    has_residual = residual is not None
    residual, residual_stride = (x, 0) if residual is None else rows(residual)
    weight = weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    new_residual = torch.empty(x.shape if has_residual else 0, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    native_module().rms_norm_forward(
        x.data_ptr(),
        residual.data_ptr() if has_residual else 0,
        weight.data_ptr(),
        (out.data_ptr(), new_residual.data_ptr() if has_residual else 0, rstd.data_ptr()),
        (*_shape_of(x, weight, casting), num_threads()),
        (x_stride, residual_stride),
        eps,
        weight_offset,
    )
    return out, new_residual, rstd


def forward_cuda(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, new_residual, rstd) by the kernels of csrc/cuda."""
    out, new_residual, rstd = _forward_fake(x, residual, weight)
    x, x_stride = rows(x)
    has_residual = residual is not None
    residual, residual_stride = (x, 0) if residual is None else rows(residual)
    weight = weight.contiguous()
    call_cuda(
        x,
        "rms_norm_forward",
        x.data_ptr(),
        residual.data_ptr() if has_residual else 0,
        weight.data_ptr(),
        (out.data_ptr(), new_residual.data_ptr() if has_residual else 0, rstd.data_ptr()),
        _shape_of(x, weight, casting),
        (x_stride, residual_stride),
        eps,
        weight_offset,
    )
    return out, new_residual, rstd


def _backward_cpu(
    dout: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    casting: str,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dout, dout_stride = rows(dout)
    dresidual, dresidual_stride = (None, 0) if dresidual is None else rows(dresidual)
    x, x_stride = rows(x)
    weight = weight.contiguous()
    dx, dweight = empty_gradients(x, weight, need_dx, need_dweight)
    native_module().rms_norm_backward(
        dout.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        (dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0),
        (*_shape_of(x, weight, casting), num_threads()),
        (dout_stride, dresidual_stride, x_stride),
        weight_offset,
    )
    return dx, dweight


_MAX_RUNS = 512  # of rows whose dweight is summed at a time: enough to fill a GPU, and their sums stay in its cache


def backward_cuda(
    dout: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    casting: str,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) by the kernels of csrc/cuda; sums are cut by the number of rows alone."""
    dout, dout_stride = rows(dout)
    dresidual, dresidual_stride = (None, 0) if dresidual is None else rows(dresidual)
    x, x_stride = rows(x)
    weight = weight.contiguous()
    dx, dweight = empty_gradients(x, weight, need_dx, need_dweight)
    num_rows, dim, *kinds = _shape_of(x, weight, casting)
    rows_per_sum = max(-(-num_rows // _MAX_RUNS), min(num_rows, 8), 1)
    sums = x.new_empty((-(-num_rows // rows_per_sum), dim) if need_dweight else 0, dtype=torch.float32)
    call_cuda(
        x,
        "rms_norm_backward",
        dout.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        (dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0, sums.data_ptr()),
        rows_per_sum,
        (num_rows, dim, *kinds),
        (dout_stride, dresidual_stride, x_stride),
        weight_offset,
    )
    return dx, dweight


def _forward_native(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (forward_cuda if x.is_cuda else _forward_cpu)(x, *rest)


def _backward_native(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (backward_cuda if dout.is_cuda else _backward_cpu)(dout, *rest)


def register_rms_norm(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], devices: Sequence[str] = ("CPU",)
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Register herdkern::<name> and herdkern::<name>_backward, implemented as _forward_cpu and _backward_cpu are.

    Returns the call of the first: (out, new_residual, rstd), new_residual empty without a residual.
    """
    modes = "str casting, float weight_offset"
    backward_op = native_op(
        f"{name}_backward(Tensor dout, Tensor? dresidual, Tensor x, Tensor weight, Tensor rstd, {modes}, bool need_dx,"
        " bool need_dweight) -> (Tensor, Tensor)",
        backward,
        lambda dout, dresidual, x, weight, rstd, casting, offset, *needs: empty_gradients(x, weight, *needs),
        devices=devices,
    )

    def gradients(ctx: Any, dout: Tensor | None, dresidual: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_dweight = ctx.needs_input_grad[:3]
        dx, dweight = dresidual, None
        if dout is not None and torch.is_grad_enabled():
            dx, dweight = _recorded_gradients(ctx, dout, dresidual)
        elif dout is not None:
            needs = need_x or need_residual, need_dweight
            dx, dweight = backward_op(dout, dresidual, *ctx.saved_tensors, ctx.casting, ctx.weight_offset, *needs)
        no_gradients = (None,) * 3
        return dx if need_x else None, dx if need_residual else None, dweight if need_dweight else None, *no_gradients

    return native_op(
        f"{name}(Tensor x, Tensor? residual, Tensor weight, float eps, {modes}) -> (Tensor, Tensor, Tensor)",
        forward,
        _forward_fake,
        _setup_context,
        gradients,
        devices,
    )


def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    new_residual = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), new_residual, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps, ctx.casting, ctx.weight_offset = inputs
    _out, new_residual, rstd = output
    ctx.save_for_backward(x if residual is None else new_residual, weight, rstd)
    ctx.mark_non_differentiable(*((new_residual, rstd) if residual is None else (rstd,)))
    ctx.set_materialize_grads(False)


def _recorded_gradients(ctx: Any, dout: Tensor, dresidual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of what was normed and of weight by the reference, with a graph of their own."""
    hidden, weight, _rstd = ctx.saved_tensors

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        modes = {"casting": ctx.casting, "weight_offset": ctx.weight_offset}
        out: Tensor = rms_norm_reference(hidden, weight, eps=ctx.eps, **modes)
        return out

    dx, dweight = differentiable_gradients(reference, (hidden, weight), dout)
    return dx if dx is None or dresidual is None else dx + dresidual, dweight


_forward = register_rms_norm("rms_norm", _forward_native, _backward_native, ("CPU", "CUDA"))
