"""SwiGLU in Triton: one pass over gate and up; the backward pass computes the sigmoid again instead of saving it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.native_op import rows
from herdkern.ops.swiglu import forward_fake, gradients_fake, halves, register_swiglu

_BLOCK = 2048  # elements of a program: 16 bytes a load, two loads of each input in flight


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, dim, gate_stride, up_stride, blocks_per_row, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    col = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < dim
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * dim + col, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dim,
    dout_stride,
    gate_stride,
    up_stride,
    grad_stride,
    blocks_per_row,
    NEED_DGATE: tl.constexpr,
    NEED_DUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    col = (program % blocks_per_row).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = col < dim
    dout = tl.load(dout_ptr + row * dout_stride + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if NEED_DUP:
        tl.store(dup_ptr + row * grad_stride + col, (dout * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=mask)
    if NEED_DGATE:
        up = tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
        dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dgate_ptr + row * grad_stride + col, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def _extent(num_rows: int, dim: int, *strides: int) -> tuple[int, int, int]:
    """Rows, their length and the blocks of each; rows that follow each other without a gap are one."""
    if all(stride == dim for stride in strides):
        num_rows, dim = 1, num_rows * dim
    return num_rows, dim, triton.cdiv(dim, _BLOCK)


def _forward_cuda(gate: Tensor, up: Tensor | None) -> Tensor:
    out = forward_fake(gate, up)
    gate, gate_stride, up, up_stride = halves(gate, up)
    num_rows, dim, blocks_per_row = _extent(out.numel() // max(out.shape[-1], 1), out.shape[-1], gate_stride, up_stride)
    if out.numel():
        with torch.cuda.device_of(gate):
            _forward_kernel[(num_rows * blocks_per_row,)](
                gate, up, out, dim, gate_stride, up_stride, blocks_per_row, BLOCK=_BLOCK, num_warps=8
            )
    return out


def _backward_cuda(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    dgate, dup = gradients_fake(dout, gate, up, need_dgate, need_dup)
    if not dout.numel():
        return dgate, dup
    ffn_dim = dout.shape[-1]
    dout, dout_stride = rows(dout)
    if up is None:
        dgate_rows, grad_stride, dup_rows, _ = halves(dgate, None)
        need_dup = True
    else:
        dgate_rows, dup_rows, grad_stride = dgate, dup, ffn_dim
    gate, gate_stride, up, up_stride = halves(gate, up)
    num_rows, dim, blocks_per_row = _extent(
        dout.numel() // ffn_dim, ffn_dim, dout_stride, gate_stride, up_stride, grad_stride
    )
    with torch.cuda.device_of(gate):
        _backward_kernel[(num_rows * blocks_per_row,)](
            dout,
            gate,
            up,
            dgate_rows,
            dup_rows,
            dim,
            dout_stride,
            gate_stride,
            up_stride,
            grad_stride,
            blocks_per_row,
            NEED_DGATE=need_dgate,
            NEED_DUP=need_dup,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return dgate, dup


forward = register_swiglu("triton_swiglu", _forward_cuda, _backward_cuda, ("CUDA", "CPU"))  # CPU: interpreted
