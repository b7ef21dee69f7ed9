"""RMSNorm in Triton: one program holds whole rows in registers, so that x is read once and written once.

The gradient of the weight is summed in two steps of fixed order: each program adds up its own rows, then the sums of
the programs are added. How rows are cut depends on their number alone: the same bits on every run and every GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from herdkern.ops.native_op import empty_gradients, rows
from herdkern.ops.rms_norm import register_rms_norm

_MAX_PARTIAL_SUMS = 512  # fills a GPU of 132 processors four times over; their sums stay in its L2 cache


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    new_residual_ptr,
    rstd_ptr,
    num_rows,
    dim,
    x_stride,
    residual_stride,
    eps,
    weight_offset,
    CASTING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < num_rows)[:, None] & (col < dim)[None, :]
    dtype = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(new_residual_ptr + row[:, None] * dim + col[None, :], total, mask=mask)
        x = total.to(tl.float32)  # what is normed is what is stored
    weight = tl.load(weight_ptr + col, mask=col < dim, other=0.0).to(tl.float32)[None, :]
    if HAS_OFFSET:
        if CASTING == "none":
            weight = (weight.to(dtype).to(tl.float32) + weight_offset).to(dtype).to(tl.float32)
        else:
            weight += weight_offset

    if CASTING == "none":  # every step is rounded
        mean = (tl.sum((x * x).to(dtype).to(tl.float32), axis=1) / dim).to(dtype).to(tl.float32)
        root = tl.sqrt_rn((mean + eps).to(dtype).to(tl.float32))
        rstd = (1.0 / root).to(dtype).to(tl.float32)
    else:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / dim + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    xhat = x * rstd[:, None]
    if CASTING != "gemma":
        xhat = xhat.to(dtype).to(tl.float32)
    tl.store(out_ptr + row[:, None] * dim + col[None, :], (xhat * weight).to(dtype), mask=mask)


@triton.jit
def _backward_kernel(
    dout_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    dim,
    dout_stride,
    dtotal_stride,
    x_stride,
    tiles_per_program,
    weight_offset,
    HAS_DTOTAL: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    ROUND_XHAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    if NEED_DX:
        weight = tl.load(weight_ptr + col, mask=col < dim, other=0.0).to(tl.float32)[None, :] + weight_offset
    dweight = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for tile in range(0, tiles_per_program):
        row = (program * tiles_per_program + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (col < dim)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row[:, None] * dout_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        xhat = x * rstd
        if ROUND_XHAT:  # casting "none": what the weight was multiplied by
            xhat = xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        if NEED_DWEIGHT:
            dweight += dout * xhat
        if NEED_DX:
            dxhat = dout * weight
            dx = rstd * (dxhat - xhat * (tl.sum(dxhat * xhat, axis=1) / dim)[:, None])
            if HAS_DTOTAL:
                dtotal_at = dtotal_ptr + row[:, None] * dtotal_stride + col[None, :]
                dx += tl.load(dtotal_at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row[:, None] * dim + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_DWEIGHT:
        tl.store(partial_ptr + program * dim + col, tl.sum(dweight, axis=0), mask=col < dim)


@triton.jit
def _sum_columns_kernel(partial_ptr, out_ptr, num_partials, dim, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, num_partials, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_partials)[:, None] & (col < dim)[None, :]
        total += tl.load(partial_ptr + row[:, None].to(tl.int64) * dim + col[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col < dim)


def _tile(dim: int) -> dict[str, int]:
    """The rows and columns of a program's tile, and its warps: 16 elements a thread, 32 in the longest rows."""
    cols = triton.next_power_of_2(max(dim, 1))
    num_rows = max(1, 2048 // cols)
    return {"ROWS": num_rows, "COLS": cols, "num_warps": min(max(num_rows * cols // 512, 4), 16)}


def _forward_cuda(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, casting: str, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, x_stride = rows(x)
    has_residual = residual is not None
    residual, residual_stride = (x, 0) if residual is None else rows(residual)
    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty(x.shape if has_residual else 0, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tile = _tile(dim)
    if rstd.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(rstd.numel(), tile["ROWS"]),)](
                x,
                residual,
                weight.contiguous(),
                out,
                new_residual,
                rstd,
                rstd.numel(),
                dim,
                x_stride,
                residual_stride,
                eps,
                weight_offset,
                CASTING=casting,
                HAS_RESIDUAL=has_residual,
                HAS_OFFSET=weight_offset != 0,
                **tile,
            )
    return out, new_residual, rstd


def _backward_cuda(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    casting: str,
    weight_offset: float,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dout, dout_stride = rows(dout)
    has_dtotal = dtotal is not None
    dtotal, dtotal_stride = (dout, 0) if dtotal is None else rows(dtotal)
    x, x_stride = rows(x)
    dim, num_rows = x.shape[-1], rstd.numel()
    tile = _tile(dim)
    num_tiles = triton.cdiv(num_rows, tile["ROWS"])
    per_sum = max(triton.cdiv(num_tiles, _MAX_PARTIAL_SUMS), min(num_tiles, 8), 1)  # tiles that one program adds up
    num_sums = triton.cdiv(num_tiles, per_sum)
    dx, dweight = empty_gradients(x, weight, need_dx, need_dweight)
    partial = torch.empty((num_sums, dim) if need_dweight else 0, dtype=torch.float32, device=x.device)
    passes = [(need_dx, need_dweight)]
    if dim > 8192:  # the registers do not hold the row and the sum: x is read twice
        passes = [(need_dx, False), (False, need_dweight)]
    with torch.cuda.device_of(x):
        for makes_dx, makes_dweight in passes if num_rows and dim else []:
            if not (makes_dx or makes_dweight):
                continue
            _backward_kernel[(num_sums if makes_dweight else num_tiles,)](
                dout,
                dtotal,
                x,
                weight.contiguous(),
                rstd,
                dx,
                partial,
                num_rows,
                dim,
                dout_stride,
                dtotal_stride,
                x_stride,
                per_sum if makes_dweight else 1,
                weight_offset,
                HAS_DTOTAL=has_dtotal,
                NEED_DX=makes_dx,
                NEED_DWEIGHT=makes_dweight,
                ROUND_XHAT=casting == "none",
                **tile,
            )
        if need_dweight and dim:
            _sum_columns_kernel[(triton.cdiv(dim, 32),)](partial, dweight, num_sums, dim, ROWS=64, COLS=32, num_warps=4)
    return dx, dweight


forward = register_rms_norm("triton_rms_norm", _forward_cuda, _backward_cuda, ("CUDA", "CPU"))  # CPU: interpreted
