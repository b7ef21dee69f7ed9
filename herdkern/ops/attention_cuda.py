"""Packed attention by the CUDA kernels of csrc/cuda/attention.h: what they need of strides, and their workspace."""

from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import call_cuda, cuda_module, dtype_name

_STORAGE = {torch.bfloat16: 1, torch.float16: 2}  # enum Storage of csrc/cuda/attention.h


def why_not_cuda(q: Tensor) -> str | None:
    """Return None if `q` is on no GPU or the CUDA kernels have a tile for it, else the reason."""
    if not q.is_cuda:
        return None
    if q.dtype not in _STORAGE:
        return f"dtype must be bfloat16 or float16 on a GPU, got {dtype_name(q.dtype)}"
    return None if q.shape[-1] % 8 == 0 else f"head_dim must be a multiple of 8 on a GPU, got {q.shape[-1]}"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the kernels of csrc/cuda; options: window left, right, softcap, scale."""
    q, k, v = rows_of_16_bytes(q), rows_of_16_bytes(k), rows_of_16_bytes(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    numbers, borders, softmax, kept = _shape(q, k, cu_seqlens, cu_seqlens_k, sinks, options)
    workspace = _workspace(q, numbers, backward=False)
    outputs = out.data_ptr(), lse.data_ptr(), workspace.data_ptr()
    addresses = _operand(q), _operand(k), _operand(v)
    call_cuda(q, "attention_forward", addresses, numbers, borders, *softmax, outputs)
    del kept  # until here what the addresses point to
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dsinks) by the kernels of csrc/cuda; dsinks is empty without sinks."""
    operands = [rows_of_16_bytes(x) for x in (q, k, v, out, dout)]
    q, k, lse = operands[0], operands[1], lse.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    dsinks = q.new_empty((0,) if sinks is None else sinks.shape, dtype=torch.float32)
    numbers, borders, softmax, kept = _shape(q, k, cu_seqlens, cu_seqlens_k, sinks, options)
    workspace = _workspace(q, numbers, backward=True)
    gradients = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0 if sinks is None else dsinks.data_ptr()
    outputs = *gradients, workspace.data_ptr()
    addresses = [_operand(x) for x in operands]
    call_cuda(q, "attention_backward", addresses, lse.data_ptr(), numbers, borders, *softmax, outputs)
    del kept  # until here what the addresses point to
    return dq, dk, dv, dsinks


def rows_of_16_bytes(x: Tensor) -> Tensor:
    """Return `x` (16-bit), copied unless each row is dense and begins at a multiple of 16 bytes."""
    steps = [stride % 8 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.numel() == 0 or (x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(steps)):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # not contiguous(): that keeps an address that is odd


def _operand(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _workspace(q: Tensor, numbers: tuple[int, ...], backward: bool) -> Tensor:
    return q.new_empty(cuda_module().attention_workspace_bytes(numbers, backward), dtype=torch.uint8)


def _shape(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None, options: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, int, int], tuple[float, float], list[Tensor | None]]:
    """Numbers, Addresses and (scale, softcap) of csrc/cuda/bind_attention.cpp, and the tensors they point to."""
    left, right, softcap, scale = options
    cu_seqlens, cu_seqlens_k = cu_seqlens.contiguous(), cu_seqlens_k.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    sizes = (cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2])
    addresses = cu_seqlens.data_ptr(), cu_seqlens_k.data_ptr(), 0 if sinks is None else sinks.data_ptr()
    return (*sizes, left, right, _STORAGE[q.dtype]), addresses, (scale, softcap), [cu_seqlens, cu_seqlens_k, sinks]
