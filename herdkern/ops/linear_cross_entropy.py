"""Cross entropy of a linear layer that never holds all logits at once.

Source: Liger-Kernel technical report 2024, section 3.2 (arXiv:2410.10989): the gradient is made in the forward pass.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native
from herdkern.ops.native_op import differentiable_gradients, native_op, rows

Reduction = Literal["none", "sum", "mean"]


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Return linear_cross_entropy in plain torch, computed in fp32 or the dtype of `x` if that is wider."""
    acc = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(acc) @ weight.to(acc).T
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Return the float32 cross entropy of the logits x @ weight.T against `targets`, never holding n x vocab_size.

    x: (n, dim), float32 | bfloat16.  weight: (vocab_size, dim), dtype of x.  targets: (n,) int64, token ids or
    ignore_index.  Under autocast x and weight are cast as for a linear layer.
    Returns: a scalar, or (n,) with 0 where ignored for reduction="none".  The mean is over the targets that count;
    it is NaN when all are ignored, as in torch, and the gradients are then zero.
    Raises: ValueError if the arguments do not fit each other or a target is no token id; NotImplementedError if no
    backend can run the call.
    """
    if x.is_cpu and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return linear_cross_entropy(
                x.to(dtype),
                weight.to(dtype),
                targets,
                ignore_index=ignore_index,
                reduction=reduction,
                backend=backend,
            )
    _check(x, weight, targets, reduction)
    why_not = {"native": why_not_native(x, torch.float32, torch.bfloat16), "reference": None}
    if choose("linear_cross_entropy", backend, why_not) == "reference":
        if x.is_cpu and not torch.compiler.is_compiling():
            bad = ((targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))).nonzero()
            _check_range(targets, weight.shape[0], ignore_index, int(bad[0]) if len(bad) else -1)
        return linear_cross_entropy_reference(x, weight, targets, ignore_index=ignore_index, reduction=reduction)
    # the gradient of a row is not known before dloss is, so "none" makes it in the backward pass
    early = torch.is_grad_enabled() and reduction != "none"
    return _forward(
        x,
        weight,
        targets,
        ignore_index,
        get_args(Reduction).index(reduction),
        early and x.requires_grad,
        early and weight.requires_grad,
    )[0]


def _check(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"linear_cross_entropy: x must be (n, dim), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        expected = f"(vocab_size, {x.shape[1]})"
        raise ValueError(f"linear_cross_entropy: weight must have shape {expected}, got {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        got = dtype_name(weight.dtype)
        raise ValueError(f"linear_cross_entropy: weight must be {dtype_name(x.dtype)} as x is, got {got}")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: targets must have shape ({x.shape[0]},), got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets must be int64, got {dtype_name(targets.dtype)}")
    for name, other in (("weight", weight), ("targets", targets)):
        if other.device != x.device:
            raise ValueError(f"linear_cross_entropy: {name} must be on {x.device}, got {other.device}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"linear_cross_entropy: reduction must be none, sum or mean, got {reduction!r}")


def _check_range(targets: Tensor, vocab_size: int, ignore_index: int, bad: int) -> None:
    if bad >= 0:
        got = f"{int(targets[bad])} at index {bad}"
        expected = f"lie in [0, {vocab_size}) or be ignore_index={ignore_index}"
        raise ValueError(f"linear_cross_entropy: targets must {expected}, got {got}")


def _run(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: int,
    dlosses: Tensor | None,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the kernel: the loss (per token or reduced) and the gradients in fp32, empty where not needed."""
    x, x_stride = rows(x)
    weight, weight_stride = rows(weight)
    targets = targets.contiguous()
    vocab_size, dim = weight.shape
    bad = native_module().find_bad_target(targets.data_ptr(), targets.numel(), vocab_size, ignore_index)
    _check_range(targets, vocab_size, ignore_index, bad)
    losses = torch.empty(targets.shape, dtype=torch.float32)
    loss = losses if reduction == 0 else torch.empty((), dtype=torch.float32)
    dx = torch.empty(x.shape if need_dx else 0, dtype=torch.float32)
    dweight = torch.empty(weight.shape if need_dweight else 0, dtype=torch.float32)
    native_module().linear_cross_entropy(
        x.data_ptr(),
        weight.data_ptr(),
        targets.data_ptr(),
        0 if dlosses is None else dlosses.data_ptr(),
        losses.data_ptr(),
        0 if reduction == 0 else loss.data_ptr(),
        dx.data_ptr() if need_dx else 0,
        dweight.data_ptr() if need_dweight else 0,
        x.shape[0],
        dim,
        vocab_size,
        x_stride,
        weight_stride,
        ignore_index,
        reduction,
        x.dtype == torch.bfloat16,
        num_threads(),
    )
    return loss, dx, dweight


def _forward_cpu(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(x, weight, targets, ignore_index, reduction, None, need_dx, need_dweight)


def _forward_fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty(targets.shape if reduction == 0 else (), dtype=torch.float32)
    return loss, *_gradients_fake(loss, x, weight, targets, ignore_index, need_dx, need_dweight)


def _gradients_cpu(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return _run(x, weight, targets, ignore_index, 0, dlosses.contiguous(), need_dx, need_dweight)[1:]


def _gradients_fake(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0, dtype=torch.float32)
    return dx, x.new_empty(weight.shape if need_dweight else 0, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets, ctx.ignore_index, ctx.reduction, *_ = inputs
    _, dx, dweight = output
    ctx.save_for_backward(x, weight, targets, dx, dweight)
    ctx.mark_non_differentiable(dx, dweight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, targets, dx, dweight = ctx.saved_tensors
    rest = (None,) * 5
    if dloss is None:
        return None, None, *rest
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():
        reduction = get_args(Reduction)[ctx.reduction]

        def reference(x: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy_reference(
                x, weight, targets, ignore_index=ctx.ignore_index, reduction=reduction
            )

        return *differentiable_gradients(reference, (x, weight), dloss), *rest
    if ctx.reduction == 0:
        dx, dweight = _gradients(dloss, x, weight, targets, ctx.ignore_index, need_dx, need_dweight)
    else:
        dx, dweight = dx * dloss, dweight * dloss
    return dx.to(x.dtype) if need_dx else None, dweight.to(x.dtype) if need_dweight else None, *rest


_gradients = native_op(
    "linear_cross_entropy_gradients(Tensor dlosses, Tensor x, Tensor weight, Tensor targets, int ignore_index,"
    " bool need_dx, bool need_dweight) -> (Tensor, Tensor)",
    _gradients_cpu,
    _gradients_fake,
)
_forward = native_op(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, int ignore_index, int reduction,"
    " bool need_dx, bool need_dweight) -> (Tensor, Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
