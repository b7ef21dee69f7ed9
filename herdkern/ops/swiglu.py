"""SwiGLU. Source: Shazeer 2020, section 2 (arXiv:2002.05202)."""

from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native, why_not_triton
from herdkern.ops.native_op import differentiable_gradients, native_op, rows

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
        "native": why_not_native(gate, *ELEMENTS),
        "triton": why_not_triton(gate, backend, *ELEMENTS),
        "reference": None,
    }
    chosen = choose("swiglu", backend, why_not)
    if chosen == "reference":
        return swiglu_reference(gate, up)
    if chosen == "triton":
        from herdkern.ops.triton import swiglu as triton_swiglu

        return triton_swiglu.swiglu(gate, up)
    out: Tensor = _packed_forward(gate) if up is None else _forward(gate, up)
    return out


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
        (gate_stride, up_stride),
        ELEMENTS.index(gate.dtype),
        num_threads(),
    )
    return out


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _packed_forward_cpu(packed: Tensor) -> Tensor:
    packed, stride = rows(packed)
    dim = packed.shape[-1] // 2
    out = torch.empty((*packed.shape[:-1], dim), dtype=packed.dtype)
    native_module().swiglu_forward(
        packed.data_ptr(),
        packed.data_ptr() + dim * packed.element_size(),
        out.data_ptr(),
        out.numel() // max(dim, 1),
        dim,
        (stride, stride),
        ELEMENTS.index(packed.dtype),
        num_threads(),
    )
    return out


def _packed_forward_fake(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


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
        (dout_stride, gate_stride, up_stride, dim, dim),
        ELEMENTS.index(gate.dtype),
        num_threads(),
    )
    return dgate, dup


def _backward_fake(dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape if need_dgate else 0), gate.new_empty(gate.shape if need_dup else 0)


def _packed_backward_cpu(dout: Tensor, packed: Tensor) -> Tensor:
    dout, dout_stride = rows(dout)
    packed, stride = rows(packed)
    dpacked = torch.empty(packed.shape, dtype=packed.dtype)
    dim = packed.shape[-1] // 2
    half = dim * packed.element_size()
    native_module().swiglu_backward(
        dout.data_ptr(),
        packed.data_ptr(),
        packed.data_ptr() + half,
        dpacked.data_ptr(),
        dpacked.data_ptr() + half,
        packed.numel() // max(2 * dim, 1),
        dim,
        (dout_stride, stride, stride, 2 * dim, 2 * dim),
        ELEMENTS.index(packed.dtype),
        num_threads(),
    )
    return dpacked


def _packed_backward_fake(dout: Tensor, packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


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


def _packed_gradients(ctx: Any, dout: Tensor | None) -> Tensor | None:
    if dout is None:
        return None
    (packed,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        (dpacked,) = differentiable_gradients(swiglu_reference, (packed,), dout)
        return dpacked
    dpacked = _packed_backward(dout, packed)
    return dpacked


_backward = native_op(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up, bool need_dgate, bool need_dup) -> (Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
_forward = native_op(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor", _forward_cpu, _forward_fake, _setup_context, _gradients
)
_packed_backward = native_op(
    "swiglu_packed_backward(Tensor dout, Tensor packed) -> Tensor", _packed_backward_cpu, _packed_backward_fake
)
_packed_forward = native_op(
    "swiglu_packed_forward(Tensor packed) -> Tensor",
    _packed_forward_cpu,
    _packed_forward_fake,
    _setup_context,
    _packed_gradients,
)
