"""RMSNorm. Source: Zhang & Sennrich 2019, eq. 4 (arXiv:1910.07467)."""

from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native
from herdkern.ops.native_op import differentiable_gradients, native_op, rows


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return rms_norm in plain torch, computed in fp32 or the dtype of `x` if that is wider."""
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    return (acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps) * weight.to(acc.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: Backend = "auto") -> Tensor:
    """Return each row of `x` scaled to unit root mean square, then by `weight`.

    x: (..., dim), float32 | bfloat16.  weight: (dim,), dtype of x or float32.
    Returns: shape and dtype of x, contiguous.  Sums are fp32.
    Raises: ValueError if weight does not fit x; NotImplementedError if no backend can run the call.
    """
    _check(x, weight)
    why_not = {"native": why_not_native(x, torch.float32, torch.bfloat16), "reference": None}
    if choose("rms_norm", backend, why_not) == "reference":
        return rms_norm_reference(x, weight, eps=eps)
    return _forward(x, weight, eps)[0]


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        expected = " or ".join(dict.fromkeys((dtype_name(x.dtype), "float32")))
        raise ValueError(f"rms_norm: weight must be {expected}, got {dtype_name(weight.dtype)}")
    if weight.device != x.device:
        raise ValueError(f"rms_norm: weight must be on {x.device}, got {weight.device}")


def _forward_cpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, x_stride = rows(x)
    weight = weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    native_module().rms_norm_forward(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        x.shape[-1],
        x_stride,
        eps,
        x.dtype == torch.bfloat16,
        weight.dtype == torch.bfloat16,
        num_threads(),
    )
    return out, rstd


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward_cpu(
    dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dout, dout_stride = rows(dout)
    x, x_stride = rows(x)
    weight = weight.contiguous()
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype)
    dweight = torch.empty(weight.shape if need_dweight else 0, dtype=weight.dtype)
    native_module().rms_norm_backward(
        dout.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        dweight.data_ptr() if need_dweight else 0,
        rstd.numel(),
        x.shape[-1],
        dout_stride,
        x_stride,
        x.dtype == torch.bfloat16,
        weight.dtype == torch.bfloat16,
        num_threads(),
    )
    return dx, dweight


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else 0), weight.new_empty(weight.shape if need_dweight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    if dout is None:
        return None, None, None
    if torch.is_grad_enabled():
        dx, dweight = differentiable_gradients(
            lambda x, weight: rms_norm_reference(x, weight, eps=ctx.eps), (x, weight), dout
        )
        return dx, dweight, None
    need_dx, need_dweight, _eps = ctx.needs_input_grad
    dx, dweight = _backward(dout, x, weight, rstd, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None


_backward = native_op(
    "rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor rstd, bool need_dx, bool need_dweight)"
    " -> (Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
_forward = native_op(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _gradients,
)
