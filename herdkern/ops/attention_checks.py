"""What the arguments of packed attention must be; every error names the function, the argument and the remedy."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herdkern.documents import check_border_values
from herdkern.ops.backend import dtype_name

MAX_HEAD_DIM = 256
_FLOAT32_MIN, _FLOAT32_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # what kernels compute in
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(function: str, name: str, x: Any) -> None:
    """Raise TypeError unless `x` is a tensor, ValueError unless its elements lie in memory at strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        layout = "a nested tensor" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ValueError(f"{function}: {name} must be dense, got {layout}")


def check_operands(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check q: (total_q, num_heads, head_dim) and k, v: (total_k, num_kv_heads, head_dim) against each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(function, name, x)
    check_queries(function, q)
    if k.dim() != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(f"{function}: k must be (total_k, num_kv_heads, {q.shape[2]}), got {tuple(k.shape)}")
    check_keys_match(function, q, {"k": k, "v": v})


def check_queries(function: str, q: Tensor) -> None:
    """Check q: (total_q, num_heads, head_dim)."""
    if q.dim() != 3:
        raise ValueError(f"{function}: q must be (total_q, num_heads, head_dim), got {tuple(q.shape)}")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"{function}: head_dim of q must be 1 to {MAX_HEAD_DIM}, got {q.shape[2]}")
    if q.dtype not in FLOATS:
        names = ", ".join(map(dtype_name, FLOATS))
        raise ValueError(f"{function}: q must be one of {names}, got {dtype_name(q.dtype)}")


def check_keys_match(function: str, q: Tensor, keys: dict[str, Tensor]) -> None:
    """Check k and v (or their caches, under those names): heads in dimension -2, dtype and device of q, one shape."""
    (k_name, k), (v_name, v) = keys.items()
    if v.shape != k.shape:
        raise ValueError(f"{function}: {v_name} must have the shape of {k_name} {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[-2] == 0:
        raise ValueError(f"{function}: {k_name} must have at least one head, got {tuple(k.shape)}")
    if q.shape[1] == 0 or q.shape[1] % k.shape[-2] != 0:
        raise ValueError(
            f"{function}: num_heads of q must be a positive multiple of num_kv_heads={k.shape[-2]}, got {q.shape[1]}"
        )
    for name, x in keys.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{function}: {name} must be {dtype_name(q.dtype)} as q, got {dtype_name(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{function}: {name} must be on {q.device} as q, got {x.device}")


def check_borders(function: str, name: str, borders: Tensor, q: Tensor) -> None:
    """Check the form of document borders; their values are checked where they are read."""
    check_tensor(function, name, borders)
    if borders.dtype != torch.int32:
        raise ValueError(f"{function}: {name} must be int32, got {dtype_name(borders.dtype)}")
    if borders.dim() != 1 or borders.shape[0] < 1:
        raise ValueError(f"{function}: {name} must have shape (num_docs + 1,), got {tuple(borders.shape)}")
    if not borders.is_contiguous():
        raise ValueError(f"{function}: {name} must be contiguous, got stride {borders.stride(0)}; call .contiguous()")
    if borders.device != q.device:
        raise ValueError(f"{function}: {name} must be on {q.device} as q, got {borders.device}")


def check_max_seqlen(function: str, max_seqlen: Any) -> None:
    """Check an upper bound of document lengths, None or an integer."""
    if max_seqlen is None:
        return
    if not is_integer(max_seqlen):
        raise ValueError(f"{function}: max_seqlen must be an integer, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{function}: max_seqlen must be at least 0, got {max_seqlen}")


def is_integer(x: Any) -> bool:
    """Return whether x is an integer, also one that is only a symbol while tracing; a bool is none."""
    return isinstance(x, Integral | torch.SymInt) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Return whether x is a real number, also one that is only a symbol while tracing; a bool is none."""
    return isinstance(x, Real | torch.SymInt | torch.SymFloat) and not isinstance(x, bool)


def check_softmax(
    function: str,
    q: Tensor,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    softmax_scale: float | None,
    **flags: Any,
) -> None:
    """Check what shapes the softmax of q: (total_q, num_heads, head_dim); flags: options that are on or off."""
    for name, value in flags.items():
        if value is not True and value is not False:  # a string such as "no" would be on
            raise ValueError(f"{function}: {name} must be True or False, got {value!r}")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"{function}: window_size must be (left, right), got {window_size!r}")
    if not all(is_integer(side) and -1 <= side < 2**63 for side in window_size):
        raise ValueError(f"{function}: window_size must hold integers of at least -1 (no limit), got {window_size!r}")
    if not is_number(softcap) or (softcap != 0 and not _FLOAT32_MIN <= softcap <= _FLOAT32_MAX):
        raise ValueError(f"{function}: softcap must be 0 (none) or positive and finite, got {softcap!r}")
    if softmax_scale is not None and not (is_number(softmax_scale) and _FLOAT32_MIN <= softmax_scale <= _FLOAT32_MAX):
        raise ValueError(f"{function}: softmax_scale must be positive and finite, got {softmax_scale!r}")
    if sinks is None:
        return
    check_tensor(function, "sinks", sinks)
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"{function}: sinks must have shape (num_heads,) = ({q.shape[1]},), got {tuple(sinks.shape)}")
    if sinks.dtype not in FLOATS:
        raise ValueError(f"{function}: sinks must be floating point, got {dtype_name(sinks.dtype)}")
    if sinks.device != q.device:
        raise ValueError(f"{function}: sinks must be on {q.device} as q, got {sinks.device}")


def border_values(function: str, name: str, borders: Tensor, total: int) -> list[int]:
    """The borders as a list, checked as the native op checks them."""
    values: list[int] = borders.tolist()
    check_border_values(function, name, np.asarray(values))
    if values[-1] != total:
        raise ValueError(f"{function}: {name} must end with the number of tokens {total}, got {values[-1]}")
    return values
