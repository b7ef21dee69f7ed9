"""AdamW over many tensors in one call, with the clip by the global norm inside it.

Source: Loshchilov & Hutter 2019, algorithm 2 (arXiv:1711.05101); stochastic rounding by Philox4x32-10, Salmon et al.
2011 (doi:10.1145/2063384.2063405).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from herdkern.ops.backend import (
    Backend,
    call_cuda,
    choose,
    cuda_module,
    dtype_name,
    native_module,
    num_threads,
    why_not_native,
    why_not_triton,
)

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Float of csrc/cpu/adamw.h, Element
_MASK = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamwSettings:
    """The numbers of one update; tensors may have different ones."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"AdamW: {name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdamW: {name} must lie in [0, 1), got {getattr(self, name)}")


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamwSettings,
    *,
    master: Tensor | None = None,
    grad_scale: float = 1.0,
    seed: int | None = None,
    stream: int = 0,
) -> None:
    """Update one tensor in place in plain torch, computed in fp32 or the dtype of `param` if that is wider."""
    acc = torch.promote_types(param.dtype, torch.float32)
    step += 1
    count, s = float(step), settings
    g = grad.to(acc) * (-grad_scale if s.maximize else grad_scale)
    m, v = exp_avg.to(acc).lerp(g, 1 - s.beta1), exp_avg_sq.to(acc) * s.beta2 + (1 - s.beta2) * g * g
    root = v.sqrt() / math.sqrt(1 - s.beta2**count) + s.eps
    w = (param if master is None else master).to(acc) * (1 - s.lr * s.weight_decay)
    w = w + -s.lr / (1 - s.beta1**count) * m / root
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if master is not None:
        master.copy_(w)
    elif seed is not None and param.dtype == torch.bfloat16:
        w = round_at_random(w, seed, int(count), stream)
    param.copy_(w)


def round_at_random(x: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """Return float32 `x` rounded to bfloat16, up with a probability of what is cut off; the bits of the native kernel.

    x is numbered in the order of its memory if that is dense, else row by row.  seed, step, stream: see adamw_step.
    """
    lies, order = _in_memory_order(x)
    flat = lies.reshape(-1)
    number = torch.arange(flat.numel(), device=x.device)
    lane, part = number % 16, number % 128 // 16
    index = number // 128 * 16 + lane
    counter = [index & _MASK, index >> 32, torch.full_like(index, step & _MASK), torch.full_like(index, stream)]
    words = torch.stack(_philox(counter, seed)).gather(0, (part // 2)[None])[0]
    random = (words >> (part % 2 * 16)) & 0xFFFF
    bits = flat.view(torch.int32).long() & _MASK
    high = (bits + random) >> 16 << 16
    signed = torch.where(high >= 2**31, high - 2**32, high).to(torch.int32)
    cut = torch.where(flat.isfinite(), signed.view(torch.float32), flat).to(torch.bfloat16)
    return cut.view(lies.shape).permute(sorted(range(x.dim()), key=order.__getitem__))


def _philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10: four words for every four, 32 bits each in int64."""
    c, key = counter, [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # wrap at 64 bits, which the masks do not see
        c = [b >> 32 & _MASK ^ c[1] ^ key[0], b & _MASK, a >> 32 & _MASK ^ c[3] ^ key[1], a & _MASK]
        key = [key[0] + 0x9E3779B9 & _MASK, key[1] + 0xBB67AE85 & _MASK]
    return c


def grad_norm(grads: Sequence[Tensor], *, backend: Backend = "auto") -> float:
    """Return the 2-norm of all elements of `grads` together, summed in float64 in a fixed order.

    grads: float32 | bfloat16 | float16, any shapes.
    Raises: ValueError for sparse or complex tensors; NotImplementedError if no backend can run the call.
    """
    _check_grads("grad_norm", grads)
    chosen = _chosen("grad_norm", grads, backend)
    if chosen == "triton":
        from herdkern.ops.triton import adamw as triton_adamw

        return triton_adamw.grad_norm(grads)
    if chosen == "reference":
        return math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    dense = [_in_memory_order(g)[0].contiguous() for g in grads]
    if dense and dense[0].is_cuda:
        return norm_cuda(dense)
    return float(native_module().grad_norm([(g.data_ptr(), g.numel(), _FLOATS[g.dtype]) for g in dense], num_threads()))


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    settings: Sequence[AdamwSettings],
    *,
    masters: Sequence[Tensor | None] | None = None,
    max_grad_norm: float = 0.0,
    seed: int | None = None,
    streams: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> float | None:
    """Update params, moments, masters and steps in place; return the norm of all gradients before the clip.

    params, grads: float32 | bfloat16 | float16, a pair of one shape each.  exp_avgs, exp_avg_sqs: float32, same shapes.
    steps: one float32 number each, on the CPU, how many updates there were.  settings: one for each tensor.
    masters: float32, the value behind a 16-bit parameter, which is then its rounding; None: the parameter is all.
    max_grad_norm: gradients count as scaled to this global norm if theirs is above it (they are not written); 0: no
        clip, and the norm is not computed (None is returned); inf: it is computed alone.
    seed: bfloat16 parameters without a master are rounded at random by (seed, step, stream, number of the element),
        which is right in the mean; None: to nearest.  streams: one number below 2 ** 32 for each tensor; its place if
        None.
    If the norm is not finite nothing is changed. No bit depends on the number of threads. Not for torch.compile.
    Raises: ValueError if the tensors do not fit each other; NotImplementedError if no backend can run the call.
    """
    masters = [None] * len(params) if masters is None else masters
    streams = range(len(params)) if streams is None else streams
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "settings": settings}
    for name, values in {**lists, "masters": masters, "streams": streams}.items():
        if len(values) != len(params):
            raise ValueError(f"adamw_step: {name} must have {len(params)} entries as params, got {len(values)}")
    _check_grads("adamw_step", grads)
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, masters, steps, strict=True))
    _check_apart(params)
    for i, row in enumerate(rows):
        _check_row(i, *row)
    chosen = _chosen("adamw_step", [*params, *grads], backend)
    if chosen == "triton":
        from herdkern.ops.triton import adamw as triton_adamw

        norm = triton_adamw.adamw_step(rows, settings, streams, max_grad_norm, seed)
        return norm if max_grad_norm > 0 else None
    if chosen == "native":
        norm = _step_native(rows, settings, streams, max_grad_norm, seed)
        return norm if max_grad_norm > 0 else None
    scale, found = 1.0, None
    if max_grad_norm > 0:
        found = grad_norm(grads, backend="reference")
        if not math.isfinite(found):
            return found
        scale = min(1.0, max_grad_norm / (found + 1e-6))
    for (p, g, m, v, master, step), s, stream in zip(rows, settings, streams, strict=True):
        adamw_reference(p, g, m, v, step, s, master=master, grad_scale=scale, seed=seed, stream=stream)
    return found


def _chosen(function: str, tensors: Sequence[Tensor], backend: Backend) -> str:
    types = {x.device.type for x in tensors}
    if len(types) > 1:
        mixed = f"tensors must all be on the CPU or all on GPUs, got {' and '.join(sorted(types))}"
        return choose(function, backend, {"native": mixed, "triton": mixed, "reference": None})
    native = (_not_plain(x) or why_not_native(x, *_FLOATS, cuda="adamw_step") for x in tensors)
    triton = (why_not_triton(x, backend, *_FLOATS) for x in tensors)
    why_not = {name: next(filter(None, reasons), None) for name, reasons in (("native", native), ("triton", triton))}
    return choose(function, backend, {**why_not, "reference": None})


def _not_plain(x: Tensor) -> str | None:
    """The reason why `x` has no memory that a kernel could be told of."""
    if x.is_meta:
        return "device must be cpu, got meta"
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"tensors must be plain, got {type(x).__name__}"
    return None


def _check_grads(function: str, grads: Sequence[Tensor]) -> None:
    for i, g in enumerate(grads):
        if g.layout is not torch.strided:
            got = str(g.layout).removeprefix("torch.")
            remedy = "use sparse=False in the embedding, or torch.optim.SparseAdam"
            raise ValueError(f"{function}: grads must be dense, got {got} at index {i}; {remedy}")
        if not g.is_floating_point():
            remedy = "; give torch.view_as_real of the parameter" if g.is_complex() else ""
            raise ValueError(f"{function}: grads must be real, got {dtype_name(g.dtype)} at index {i}{remedy}")


def _check_apart(params: Sequence[Tensor]) -> None:
    """Two tensors of one memory would be updated at the same time, by several threads."""
    places: dict[int, int] = {}
    for i, p in enumerate(params):
        if _not_plain(p) or p.numel() == 0:
            continue
        first = places.setdefault(p.data_ptr(), i)
        if first != i:
            got = f"one address at indices {first} and {i}"
            raise ValueError(f"adamw_step: params must not share memory, got {got}; give the one tensor alone")


def _check_row(i: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor, master: Tensor | None, step: Tensor) -> None:
    for name, x in (("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v), ("masters", master)):
        if x is None:
            continue
        if x.shape != p.shape:
            got = f"{tuple(x.shape)} at index {i}"
            raise ValueError(f"adamw_step: {name} must have shape {tuple(p.shape)} as params, got {got}")
        if x.device != p.device:
            raise ValueError(f"adamw_step: {name} must be on {p.device} as params, got {x.device} at index {i}")
        if name != "grads" and x.dtype != torch.promote_types(p.dtype, torch.float32):
            expected = dtype_name(torch.promote_types(p.dtype, torch.float32))
            raise ValueError(f"adamw_step: {name} must be {expected}, got {dtype_name(x.dtype)} at index {i}")
    if step.numel() != 1 or step.dtype != torch.float32 or not step.is_cpu:
        got = f"{tuple(step.shape)} {dtype_name(step.dtype)} on {step.device} at index {i}"
        raise ValueError(f"adamw_step: steps must be one float32 number on the CPU, got {got}")


def _in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """(a view of `x` with the strides falling, the order of its dimensions): contiguous if `x` is dense."""
    order = list(range(x.dim()))
    if x.is_contiguous():
        return x, order
    order.sort(key=x.stride().__getitem__, reverse=True)
    lies = x.permute(order)
    return (lies, order) if lies.is_contiguous() else (x, list(range(x.dim())))


def _step_native(
    rows: Sequence[tuple[Any, ...]],
    settings: Sequence[AdamwSettings],
    streams: Sequence[int],
    max_grad_norm: float,
    seed: int | None,
) -> float:
    numbers: dict[AdamwSettings, int] = {}
    native_rows, keep, back = [], [], []
    for (p, g, m, v, master, step), s, stream in zip(rows, settings, streams, strict=True):
        tensors = [p, g, m, v] if master is None else [p, g, m, v, master]
        if not all(x.is_contiguous() for x in tensors):
            order = _in_memory_order(p)[1]
            for i, x in enumerate(tensors):
                lies = x.permute(order)
                tensors[i] = dense = lies.contiguous()
                if dense.data_ptr() != lies.data_ptr() and i != 1:
                    back.append((lies, dense))
            keep.append(tensors)
        pointers = [x.data_ptr() for x in tensors]
        if master is None:
            pointers.append(0)
        types = _FLOATS[p.dtype], _FLOATS[g.dtype]
        number = numbers.setdefault(s, len(numbers))
        native_rows.append((*pointers, step.data_ptr(), p.numel(), *types, stream, number))
    values = [(s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, float(s.maximize)) for s in numbers]
    step_of_device = _step_cuda if rows and rows[0][0].is_cuda else _step_cpu
    norm = step_of_device(rows, native_rows, values, max_grad_norm, seed)
    if math.isfinite(norm):
        for lies, dense in back:
            lies.copy_(dense)
        changed = [x for p, _, m, v, master, step in rows for x in (p, m, v, master, step) if x is not None]
        torch.autograd.graph.increment_version(changed)
    return float(norm)


def _step_cpu(
    rows: Sequence[tuple[Any, ...]], native_rows: Any, values: Any, max_grad_norm: float, seed: int | None
) -> float:
    seeded = seed is not None, (seed or 0) % 2**64
    return float(native_module().adamw_step(native_rows, values, max_grad_norm, *seeded, num_threads()))


@dataclasses.dataclass(frozen=True)
class _Table:
    """What the kernels of one GPU read of its tensors: AdamwRow of csrc/cuda/adamw.h for each."""

    data: Tensor
    num_tensors: int
    num_blocks: int

    @classmethod
    def on(cls, device: torch.device, maker: str, rows: Sequence[Any], *values: Any) -> "_Table":
        """Let `maker` of herdkern._cuda write it on the host and copy it: no wait, since it is staged."""
        module = cuda_module()
        data = torch.empty(len(rows) * module.adamw_row_bytes, dtype=torch.uint8)
        num_blocks = getattr(module, maker)(rows, *values, data.data_ptr())
        return cls(data.to(device, non_blocking=True), len(rows), num_blocks)

    def norm_and_scale(self, max_grad_norm: float) -> Tensor:
        """The norm of the gradients and the factor that clips them, float64 on the device."""
        sums = torch.empty(self.num_blocks, dtype=torch.float64, device=self.data.device)
        result = torch.empty(2, dtype=torch.float64, device=self.data.device)
        table = self.data.data_ptr(), self.num_tensors, self.num_blocks
        call_cuda(self.data, "grad_norm", *table, sums.data_ptr(), result.data_ptr(), max_grad_norm)
        return result


def _by_device(tensors: Sequence[Tensor], rows: Sequence[Any]) -> dict[torch.device, list[Any]]:
    groups: dict[torch.device, list[Any]] = {}
    for x, row in zip(tensors, rows, strict=True):
        groups.setdefault(x.device, []).append(row)
    return groups


def norm_cuda(grads: Sequence[Tensor]) -> float:
    """Return the 2-norm of contiguous `grads` by the kernels of csrc/cuda."""
    groups = _by_device(grads, [(g.data_ptr(), g.numel(), _FLOATS[g.dtype]) for g in grads])
    tables = [_Table.on(device, "grad_norm_table", rows) for device, rows in groups.items()]
    return math.hypot(*(float(norm[0]) for norm in [table.norm_and_scale(math.inf) for table in tables]))


def _step_cuda(
    rows: Sequence[tuple[Any, ...]], native_rows: Any, values: Any, max_grad_norm: float, seed: int | None
) -> float:
    """The update by the kernels of csrc/cuda: it is launched before the norm is waited for, and itself looks at it."""
    groups = _by_device([row[0] for row in rows], native_rows)
    tables = [_Table.on(device, "adamw_table", group, values) for device, group in groups.items()]
    norms = [table.norm_and_scale(max_grad_norm) for table in tables if max_grad_norm > 0]
    if len(norms) > 1:  # one norm over several GPUs
        total = math.hypot(*(float(norm[0]) for norm in norms))
        scale = min(1.0, max_grad_norm / (total + 1e-6))
        norms = [norm.new_tensor([total, scale]) for norm in norms]
    for i, table in enumerate(tables):
        clip = norms[i].data_ptr() if norms else 0
        numbers = (
            table.data.data_ptr(),
            table.num_tensors,
            table.num_blocks,
            clip,
            seed is not None,
            (seed or 0) % 2**64,
        )
        call_cuda(table.data, "adamw_step", *numbers)
    norm = float(norms[0][0]) if norms else 0.0
    if math.isfinite(norm):
        for row in rows:
            row[5].add_(1)
    return norm
