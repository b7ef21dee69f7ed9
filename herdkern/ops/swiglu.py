"""SwiGLU. Source: Shazeer 2020, section 2 (arXiv:2002.05202)."""

from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native
from herdkern.ops.native_op import differentiable_gradients, native_op, rows


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return swiglu in plain torch, computed in fp32 or the dtype of `gate` if that is wider."""
    acc = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (torch.nn.functional.silu(acc) * up.to(acc.dtype)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

    gate, up: (..., ffn_dim), float32 | bfloat16; the two halves of one projection need no copy if that is 2-D.
    Returns: shape and dtype of gate, contiguous.
    Raises: ValueError if up does not fit gate; NotImplementedError if no backend can run the call.
    """
    _check(gate, up)
    why_not = {"native": why_not_native(gate, torch.float32, torch.bfloat16), "reference": None}
    if choose("swiglu", backend, why_not) == "reference":
        return swiglu_reference(gate, up)
    return _forward(gate, up)


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.dim() == 0:
        raise ValueError("swiglu: gate must have at least one dimension, got a scalar")
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up must have the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise ValueError(f"swiglu: up must be {dtype_name(gate.dtype)} as gate is, got {dtype_name(up.dtype)}")
    if up.device != gate.device:
        raise ValueError(f"swiglu: up must be on {gate.device}, got {up.device}")


def _forward_cpu(gate: Tensor, up: Tensor) -> Tensor:
    gate, gate_stride = rows(gate)
    up, up_stride = rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    dim = gate.shape[-1]
    native_module().swiglu_forward(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.numel() // max(dim, 1),
        dim,
        gate_stride,
        up_stride,
        gate.dtype == torch.bfloat16,
        num_threads(),
    )
    return out


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_cpu(dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool) -> tuple[Tensor, Tensor]:
    dout, dout_stride = rows(dout)
    gate, gate_stride = rows(gate)
    up, up_stride = rows(up)
    dgate = torch.empty(gate.shape if need_dgate else 0, dtype=gate.dtype)
    dup = torch.empty(gate.shape if need_dup else 0, dtype=gate.dtype)
    dim = gate.shape[-1]
    native_module().swiglu_backward(
        dout.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        dgate.data_ptr() if need_dgate else 0,
        dup.data_ptr() if need_dup else 0,
        gate.numel() // max(dim, 1),
        dim,
        dout_stride,
        gate_stride,
        up_stride,
        gate.dtype == torch.bfloat16,
        num_threads(),
    )
    return dgate, dup


def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if need_dgate else 0), gate.new_empty(gate.shape if need_dup else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dout is None:
        return None, None
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():
        dgate, dup = differentiable_gradients(swiglu_reference, (gate, up), dout)
        return dgate, dup
    need_dgate, need_dup = ctx.needs_input_grad
    dgate, dup = _backward(dout, gate, up, need_dgate, need_dup)
    return dgate if need_dgate else None, dup if need_dup else None


_backward = native_op(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up, bool need_dgate, bool need_dup) -> (Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
_forward = native_op(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor", _forward_cpu, _forward_fake, _setup_context, _gradients
)
