"""What the programs of packed attention have in common: their list of tiles, its sizes, and how rows are loaded.

The list is made on the device from the borders, by one launch; its capacity follows from shapes alone, so that nothing
waits for the GPU and a captured graph takes other borders. Documents with the longest tiles come first, the tiles of a
document from long to short.

Query heads that share a key head are folded into the rows of a tile: row r is token r // FOLD, head r % FOLD. They
share the keys that are loaded, short documents fill their tiles better, and the gradients of keys are their sums.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = tl.constexpr(5)  # first token in the document; begin and length of the document; the same of the other side
_MAX_FOLD = 16

# (kernel, head_dim as padded): rows, keys, warps, stages
_HOPPER_SHAPES = {
    ("forward", 64): (128, 64, 4, 3),
    ("forward", 128): (128, 64, 8, 3),
    ("forward", 256): (128, 32, 8, 2),
    ("dq", 64): (128, 64, 8, 2),
    ("dq", 128): (128, 64, 8, 2),
    ("dq", 256): (64, 32, 8, 2),
    ("dkdv", 64): (32, 128, 8, 2),
    ("dkdv", 128): (32, 64, 8, 2),  # 64 rows or 128 keys spill: their masked phases need more than 255 registers
    ("dkdv", 256): (32, 32, 8, 2),
}
_BLACKWELL_SHAPES = _HOPPER_SHAPES | {("forward", 64): (128, 64, 8, 3), ("dq", 64): (128, 32, 8, 2)}
_AMPERE_SHAPES = _HOPPER_SHAPES | {
    ("forward", 64): (128, 64, 8, 3),
    ("forward", 128): (128, 32, 8, 3),
    ("dq", 128): (64, 64, 8, 2),
}
_SMALL_SHAPES = _AMPERE_SHAPES | {  # 99 KiB of shared memory for a program; the others have 163 or more
    ("forward", 256): (32, 32, 4, 2),
    ("dq", 256): (32, 32, 8, 1),
    ("dkdv", 64): (32, 64, 4, 2),
    ("dkdv", 256): (32, 32, 8, 1),
}
_FP32_SHAPES = {  # products of float32 are made without tensor cores
    ("forward", 64): (64, 32, 8, 2),
    ("forward", 128): (32, 32, 8, 2),
    ("forward", 256): (32, 32, 8, 1),
    ("dq", 64): (32, 32, 8, 1),
    ("dq", 128): (32, 32, 8, 1),
    ("dq", 256): (16, 16, 8, 1),
    ("dkdv", 64): (32, 32, 8, 1),
    ("dkdv", 128): (32, 32, 8, 1),
    ("dkdv", 256): (16, 16, 8, 1),
}


@triton.jit
def _document(cu_ptr, number, here, total):
    """Begin and length of documents; borders that are none are cut to what can be read."""
    begin = tl.load(cu_ptr + number, mask=here, other=0)
    end = tl.load(cu_ptr + number + 1, mask=here, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total) - begin


@triton.jit(do_not_specialize=["num_docs", "total", "total_other", "capacity"])
def _tile_list_kernel(
    cu_ptr,
    cu_other_ptr,
    list_ptr,
    num_docs,
    total,
    total_other,
    capacity,
    TOKENS: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    document = tl.program_id(0)
    begin, length = _document(cu_ptr, document, document < num_docs, total)
    begin_other, length_other = _document(cu_other_ptr, document, document < num_docs, total_other)
    place = document * 0  # of its first tile: behind those of all documents that come before it
    count = document * 0
    for start in range(0, num_docs, BLOCK):
        number = start + tl.arange(0, BLOCK)
        _, lengths = _document(cu_ptr, number, number < num_docs, total)
        _, works = _document(cu_other_ptr, number, number < num_docs, total_other)
        tiles = (lengths + TOKENS - 1) // TOKENS
        before = (works > length_other) | ((works == length_other) & (number < document))
        place += tl.sum(tl.where(before, tiles, 0), axis=0)
        count += tl.sum(tiles, axis=0)
    if document == 0:
        tl.store(list_ptr + FIELDS * capacity, tl.minimum(count, capacity))
    tiles = (length + TOKENS - 1) // TOKENS
    for start in range(0, tiles, BLOCK):
        number = start + tl.arange(0, BLOCK)
        at = list_ptr + place + number
        inside = (number < tiles) & (place + number < capacity)
        first = (tiles - 1 - number if REVERSED else number) * TOKENS
        tl.store(at, first, mask=inside)
        tl.store(at + capacity, number * 0 + begin, mask=inside)
        tl.store(at + 2 * capacity, number * 0 + length, mask=inside)
        tl.store(at + 3 * capacity, number * 0 + begin_other, mask=inside)
        tl.store(at + 4 * capacity, number * 0 + length_other, mask=inside)


@triton.jit
def load_tile(list_ptr, place, capacity):
    """The fields of one tile of the list."""
    at = list_ptr + place
    first, begin, length = tl.load(at), tl.load(at + capacity), tl.load(at + 2 * capacity)
    return first, begin, length, tl.load(at + 3 * capacity), tl.load(at + 4 * capacity)


@triton.jit
def split_range(lowest, highest, full_lowest, full_highest, BLOCK: tl.constexpr):
    """Where blocks from `lowest` on begin and stop to lie in [full_lowest, full_highest), where nothing is masked."""
    highest = tl.maximum(highest, lowest)
    begin = lowest + (tl.maximum(full_lowest - lowest, 0) + BLOCK - 1) // BLOCK * BLOCK
    end = lowest + tl.maximum(full_highest - lowest, 0) // BLOCK * BLOCK
    return tl.minimum(begin, highest), tl.maximum(tl.minimum(begin, highest), end)


@triton.jit
def load_rows(base, offsets, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK_D) at base + offsets; 0 beyond HEAD_DIM and, if MASKED, in rows that are not live."""
    dim = tl.arange(0, BLOCK_D)
    pointers = base + offsets[:, None] + dim[None, :]
    if MASKED and BLOCK_D != HEAD_DIM:
        x = tl.load(pointers, mask=live[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=live[:, None], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        x = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def load_numbers(base, row, live, MASKED: tl.constexpr):
    """One number for each row; 0 where a row is not live, if MASKED."""
    if MASKED:
        x = tl.load(base + row, mask=live, other=0.0)
    else:
        x = tl.load(base + row)
    return x


@triton.jit
def store_rows(base, offsets, live, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the live rows of x, rounded to what they are written to."""
    dim = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(base + offsets[:, None] + dim[None, :], x.to(base.dtype.element_ty), mask=mask)


def tile_list(cu: Tensor, cu_other: Tensor, totals: tuple[int, int], tokens: int, is_reversed: bool) -> tuple[Any, int]:
    """The tiles of `tokens` tokens of every document of `cu`, and the capacity of the list.

    totals: tokens of both sides.  Returns (list, capacity), a list of (FIELDS * capacity + 1,) int32: fields, one after
    the other, and the number of tiles.
    """
    num_docs, (total, total_other) = cu.shape[0] - 1, totals
    capacity = min(total // tokens + num_docs, total)
    tiles = torch.empty(FIELDS.value * capacity + 1, dtype=torch.int32, device=cu.device)
    if capacity:
        _tile_list_kernel[(num_docs,)](
            cu, cu_other, tiles, num_docs, total, total_other, capacity, tokens, is_reversed, BLOCK=256, num_warps=4
        )
    return tiles, capacity


def fold_of(group: int) -> int:
    """How many of the query heads of a key head share a tile."""
    return max(fold for fold in range(1, _MAX_FOLD + 1) if group % fold == 0)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def target_of(x: Tensor) -> int:
    """The compute capability to choose tiles for, as 90; interpreted kernels take those of 90."""
    return _capability(x.device.index) if x.is_cuda else 90


def launch_shape(kernel: str, block_d: int, is_fp32: bool, target: int) -> dict[str, int]:
    """BLOCK_M rows and BLOCK_N keys of a tile, warps and stages of a kernel ("forward", "dq" or "dkdv").

    Chosen by what tools/check_gpu_build.py shows: no spills, and the shared memory of the target.
    """
    if is_fp32:
        shapes = _FP32_SHAPES
    elif target in (80, 87):
        shapes = _AMPERE_SHAPES
    else:
        shapes = {9: _HOPPER_SHAPES, 10: _BLACKWELL_SHAPES}.get(target // 10, _SMALL_SHAPES)
    rows, keys, warps, stages = shapes[kernel, max(block_d, 64)]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def mask_options(left: int, right: int, softcap: float, longest: int) -> dict[str, Any]:
    """What the kernels are told of mask and scores; windows are cut to what int32 holds, `longest` or more sees all."""
    return {
        "softcap": softcap,
        "left": min(max(left, 0), longest),
        "right": min(max(right, 0), longest),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_SOFTCAP": softcap > 0,
    }
