"""SwiGLU. Source: Shazeer 2020, section 2 (arXiv:2002.05202)."""

from collections.abc import Callable, Sequence
from typing import Any

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

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/element.h


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return swiglu in plain torch, computed in fp32 or the dtype of `gate` if that is wider."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    acc = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (torch.nn.functional.silu(acc) * up.to(acc.dtype)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Return silu(gate) * up, with silu(g) = g / (1 + exp(-g)), in fp32 and rounded once.

    gate, up: (..., ffn_dim), float32 | bfloat16 | float16. Without `up`, gate is (..., 2 * ffn_dim), [gate | up] of one
    projection, and so is its gradient: one tensor, which nothing has to put together.
    Returns: (..., ffn_dim), dtype of gate, contiguous.  Saved for the backward pass: the inputs alone.
    Raises: ValueError if up does not fit gate; NotImplementedError if no backend can run the call.
    """
    _check(gate, up)
    why_not = {
        "native": why_not_native(gate, *ELEMENTS, cuda="swiglu_backward"),
        "triton": why_not_triton(gate, backend, *ELEMENTS),
        "reference": None,
    }
    chosen = choose("swiglu", backend, why_not)
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "triton":
        from herdkern.ops.triton import swiglu as triton_swiglu

        return triton_swiglu.forward(gate, up)
    return _forward(gate, up)


def _check(gate: Tensor, up: Tensor | None) -> None:
    if gate.dim() == 0:
        raise ValueError("swiglu: gate must have at least one dimension, got a scalar")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"swiglu: gate must have an even last dimension [gate | up], got {gate.shape[-1]}; pass up as well"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise ValueError(f"swiglu: up must be {dtype_name(gate.dtype)} as gate is, got {dtype_name(up.dtype)}")
    if up.device != gate.device:
        raise ValueError(f"swiglu: up must be on {gate.device}, got {up.device}")


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, int, Tensor, int]:
    """Return gate and up with the distances between their rows; those of a packed tensor are views of it."""
    if up is not None:
        return *rows(gate), *rows(up)
    packed, stride = rows(gate)
    ffn_dim = gate.shape[-1] // 2
    return packed[..., :ffn_dim], stride, packed[..., ffn_dim:], stride


def _forward_cpu(gate: Tensor, up: Tensor | None) -> Tensor:
    out = forward_fake(gate, up)
    gate, gate_stride, up, up_stride = halves(gate, up)
    native_module().swiglu_forward(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        *_extent(out),
        (gate_stride, up_stride),
        ELEMENTS.index(gate.dtype),
        num_threads(),
    )
    return out


def _backward_cpu(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    dgate, dup = results = gradients_fake(dout, gate, up, need_dgate, need_dup)
    dout, dout_stride = rows(dout)
    if up is None:
        dgate, grad_stride, dup, _ = halves(dgate, None)
        need_dup = True
    else:
        grad_stride = dout.shape[-1]
    gate, gate_stride, up, up_stride = halves(gate, up)
    native_module().swiglu_backward(
        dout.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr() if need_dgate else 0,
        dup.data_ptr() if need_dup else 0,
        *_extent(dout),
        (dout_stride, gate_stride, up_stride, grad_stride, grad_stride),
        ELEMENTS.index(gate.dtype),
        num_threads(),
    )
    return results


def forward_cuda(gate: Tensor, up: Tensor | None) -> Tensor:
    """Return swiglu by the kernel of csrc/cuda."""
    out = forward_fake(gate, up)
    gate, gate_stride, up, up_stride = halves(gate, up)
    pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr()
    strides, element = (gate_stride, up_stride), ELEMENTS.index(gate.dtype)
    call_cuda(gate, "swiglu_forward", *pointers, *_extent(out), strides, element)
    return out


def backward_cuda(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup) by the kernel of csrc/cuda."""
    dgate, dup = results = gradients_fake(dout, gate, up, need_dgate, need_dup)
    dout, dout_stride = rows(dout)
    grad_stride = dout.shape[-1]
    if up is None:
        dgate, grad_stride, dup, _ = halves(dgate, None)
        need_dup = True
    gate, gate_stride, up, up_stride = halves(gate, up)
    call_cuda(
        gate,
        "swiglu_backward",
        dout.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr() if need_dgate else 0,
        dup.data_ptr() if need_dup else 0,
        *_extent(dout),
        (dout_stride, gate_stride, up_stride, grad_stride),
        ELEMENTS.index(gate.dtype),
    )
    return results


def _forward_native(gate: Tensor, *rest: Any) -> Tensor:
    return (forward_cuda if gate.is_cuda else _forward_cpu)(gate, *rest)


def _backward_native(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (backward_cuda if dout.is_cuda else _backward_cpu)(dout, *rest)


def _extent(out: Tensor) -> tuple[int, int]:
    """Number and length of rows."""
    return out.numel() // max(out.shape[-1], 1), out.shape[-1]


def register_swiglu(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., Any], devices: Sequence[str] = ("CPU",)
) -> Callable[..., Tensor]:
    """Register herdkern::<name> and herdkern::<name>_backward, implemented as _forward_cpu and _backward_cpu are.

    Returns the call of the first.
    """
    backward_op = native_op(
        f"{name}_backward(Tensor dout, Tensor gate, Tensor? up, bool need_dgate, bool need_dup) -> (Tensor, Tensor)",
        backward,
        gradients_fake,
        devices=devices,
    )

    def gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if dout is None:
            return None, None
        gate, up = ctx.saved_tensors
        need_dgate, need_dup = ctx.needs_input_grad
        if torch.is_grad_enabled():
            given = (gate,) if up is None else (gate, up)
            dgate, dup = (*differentiable_gradients(swiglu_reference, given, dout), None)[:2]
        else:
            dgate, dup = backward_op(dout, gate, up, need_dgate, need_dup)
        return dgate if need_dgate else None, dup if need_dup else None

    return native_op(
        f"{name}(Tensor gate, Tensor? up) -> Tensor", forward, forward_fake, _setup_context, gradients, devices
    )


def forward_fake(gate: Tensor, up: Tensor | None) -> Tensor:
    """Return a tensor for the result."""
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def gradients_fake(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """Return tensors for the gradients, empty where not needed; that of a packed tensor is the first."""
    return empty_gradients(gate, gate, need_dgate, up is not None and need_dup)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


_forward = register_swiglu("swiglu", _forward_native, _backward_native, ("CPU", "CUDA"))
