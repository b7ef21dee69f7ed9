"""RMSNorm. Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467)."""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native, why_not_triton
from herdkern.ops.native_op import differentiable_gradients, native_op, rows

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
        "native": why_not_native(x, *ELEMENTS),
        "triton": why_not_triton(x, backend, *ELEMENTS) or _too_long(x),
        "reference": None,
    }
    chosen = choose("rms_norm", backend, why_not)
    if chosen == "reference":
        return rms_norm_reference(x, weight, residual=residual, eps=eps, casting=casting, weight_offset=weight_offset)
    if chosen == "triton":
        from herdkern.ops.triton import rms_norm as triton_rms_norm

        return triton_rms_norm.rms_norm(x, weight, residual, eps, casting, weight_offset)
    if residual is None:
        out: Tensor = _forward(x, weight, eps, casting, weight_offset)[0]
        return out
    out, new_residual, _rstd = _add_forward(x, residual, weight, eps, casting, weight_offset)
    return out, new_residual


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
    """num_rows, dim, element of x, element of weight, casting, threads: what both kernels take."""
    dim = x.shape[-1]
    num_rows = x.numel() // dim if dim else x.shape[:-1].numel()
    elements = ELEMENTS.index(x.dtype), ELEMENTS.index(weight.dtype)
    return num_rows, dim, *elements, CASTINGS.index(casting), num_threads()


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, x_stride = rows(x)
    residual, residual_stride = (None, 0) if residual is None else rows(residual)
    weight = weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    new_residual = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    native_module().rms_norm_forward(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        (out.data_ptr(), 0 if new_residual is None else new_residual.data_ptr(), rstd.data_ptr()),
        _shape_of(x, weight, casting),
        (x_stride, residual_stride),
        eps,
        weight_offset,
    )
    return out, new_residual, rstd


def _forward_cpu(
    x: Tensor, weight: Tensor, eps: float, casting: str = "llama", weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    out, _, rstd = _run_forward(x, None, weight, eps, casting, weight_offset)
    return out, rstd


def _forward_fake(x: Tensor, weight: Tensor, eps: float, casting: str, weight_offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_forward_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, new_residual, rstd = _run_forward(x, residual, weight, eps, casting, weight_offset)
    assert new_residual is not None
    return out, new_residual, rstd


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


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
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype)
    dweight = torch.empty(weight.shape if need_dweight else 0, dtype=weight.dtype)
    native_module().rms_norm_backward(
        dout.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        (dx.data_ptr() if need_dx else 0, dweight.data_ptr() if need_dweight else 0),
        _shape_of(x, weight, casting),
        (dout_stride, dresidual_stride, x_stride),
        weight_offset,
    )
    return dx, dweight


def _backward_fake(
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
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape if need_dweight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, ctx.casting, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _either_gradients(ctx, dout, None, x, weight, rstd, need_dx, need_dweight)
    return dx, dweight, None, None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _x, _residual, weight, ctx.eps, ctx.casting, ctx.weight_offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _add_gradients(ctx: Any, dout: Tensor | None, dresidual: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    need_dx, need_dresidual, need_dweight = ctx.needs_input_grad[:3]
    if dout is None:
        dx, dweight = dresidual, None
    else:
        hidden, weight, rstd = ctx.saved_tensors
        need_either = need_dx or need_dresidual
        dx, dweight = _either_gradients(ctx, dout, dresidual, hidden, weight, rstd, need_either, need_dweight)
    return dx if need_dx else None, dx if need_dresidual else None, dweight, None, None, None


def _either_gradients(
    ctx: Any,
    dout: Tensor,
    dresidual: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of what was normed, gradient of weight); None for what is not needed."""
    modes = ctx.casting, ctx.weight_offset
    if torch.is_grad_enabled():
        return _recorded_gradients(ctx.eps, *modes, dout, dresidual, hidden, weight)
    dx, dweight = _backward(dout, dresidual, hidden, weight, rstd, *modes, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None


def _recorded_gradients(
    eps: float,
    casting: Casting,
    weight_offset: float,
    dout: Tensor,
    dresidual: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """_either_gradients by the reference, with a graph of their own."""

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = rms_norm_reference(hidden, weight, eps=eps, casting=casting, weight_offset=weight_offset)
        return out

    dx, dweight = differentiable_gradients(reference, (hidden, weight), dout)
    return dx if dx is None or dresidual is None else dx + dresidual, dweight


_MODES = "str casting, float weight_offset"
_backward = native_op(
    "rms_norm_backward(Tensor dout, Tensor? dresidual, Tensor x, Tensor weight, Tensor rstd,"
    f" {_MODES}, bool need_dx, bool need_dweight) -> (Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
_forward = native_op(
    f"rms_norm_forward(Tensor x, Tensor weight, float eps, {_MODES}) -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _gradients,
)
_add_forward = native_op(
    f"add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, {_MODES}) -> (Tensor, Tensor, Tensor)",
    _add_forward_cpu,
    _add_forward_fake,
    _add_setup_context,
    _add_gradients,
)
