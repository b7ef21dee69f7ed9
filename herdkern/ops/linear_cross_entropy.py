"""Cross entropy of a linear layer that never holds all logits at once.

Source: Liger-Kernel technical report 2024, section 3.2 (arXiv:2410.10989): the gradient is made in the forward pass;
z-loss: PaLM 2022, section 5 (arXiv:2204.02311); softcap: Gemma 2 2024, section 2 (arXiv:2408.00118).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from herdkern.ops.backend import Backend, choose, dtype_name, native_module, num_threads, why_not_native, why_not_triton
from herdkern.ops.native_op import differentiable_gradients, empty_gradients, is_plain_eager, native_op, rows

Reduction = Literal["none", "sum", "mean"]


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_logps: bool = False,
) -> Any:
    """Return linear_cross_entropy in plain torch, computed in fp32 or the dtype of `hidden` if that is wider."""
    acc = torch.promote_types(hidden.dtype, torch.float32)
    wide = weight.to(acc)
    if weight.dtype != hidden.dtype:  # the value is rounded, the gradient is not
        wide = wide + (weight.to(hidden.dtype).to(acc) - wide).detach()
    logits = hidden.to(acc) @ wide.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    counts = targets != ignore_index
    if z_loss:
        losses = losses + z_loss * torch.where(counts, logits.logsumexp(1).square(), 0)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / counts.sum()
    if not return_logps:
        return loss
    return loss, -torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_logps: bool = False,
    backend: Backend = "auto",
) -> Any:
    """Return the float32 cross entropy of the logits hidden @ weight.T against `targets`, never holding n x vocab_size.

    hidden: (n, dim), float32 | bfloat16.  weight: (vocab_size, dim), dtype of hidden, or float32 with bfloat16 hidden:
    its values are rounded to bfloat16 as they are used; its gradient is summed and returned in float32, but is made of
    bfloat16 products and keeps the bound of a bfloat16 gradient.
    targets: (n,) int64, token ids or ignore_index.
    softcap c > 0 replaces each logit z by c tanh(z / c). label_smoothing as in torch; z_loss adds
    z_loss * logsumexp(logits)^2 to each token's loss.
    Under autocast hidden and a 16-bit weight are cast as for a linear layer; a float32 weight needs no copy.
    Returns: the loss, a scalar, or (n,) with 0 where ignored for reduction="none"; with return_logps (loss, logps),
    logps: (n,) float32 log-probabilities of the targets, 0 where ignored. Both are differentiable. The mean is over the
    targets that count; it is NaN when all are ignored, as in torch, and the gradients are then zero.
    Gradients: exact, none is filtered. For a scalar loss they are made in the forward pass and only scaled in the
    backward pass, in place unless the graph is kept; a bfloat16 gradient meets one more rounding where the scale (the
    gradient of the loss) is no power of two. For reduction="none", and where logps get a gradient, they are made in the
    backward pass, rounded once, from logits that are computed again. A frozen hidden or weight skips its half of the
    work.
    Memory on a CPU beyond inputs and gradients: up to 64 MiB. A bfloat16 weight's gradient is summed in float32 within
    its own memory and that; what does not fit (half of the rows at worst) costs a second computation of its logits, and
    so does a vocabulary of more than 400,000.
    Raises: ValueError if the arguments do not fit each other or a target is no token id; NotImplementedError if no
    backend can run the call.
    """
    options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    device = "cuda" if hidden.is_cuda else "cpu"
    if hidden.device.type == device and torch.is_autocast_enabled(device):
        hidden, weight = _autocast(hidden, weight)
    check(hidden, weight, targets, options)
    why_not = {
        "native": why_not_native(hidden, torch.float32, torch.bfloat16),
        "triton": why_not_triton(hidden, backend, torch.float32, torch.bfloat16, torch.float16),
        "reference": None,
    }
    with torch.autocast(device, enabled=False):
        chosen = choose("linear_cross_entropy", backend, why_not)
        if chosen == "reference":
            if hidden.is_cpu and not torch.compiler.is_compiling():
                bad = ((targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))).nonzero()
                check_range(targets, weight.shape[0], ignore_index, int(bad[0]) if len(bad) else -1)
            return linear_cross_entropy_reference(
                hidden, weight, targets, **options.as_keywords(), return_logps=return_logps
            )
        # the gradient of a row is not known before dloss is, so "none" makes it in the backward pass
        early = torch.is_grad_enabled() and reduction != "none"
        needs = early and hidden.requires_grad, early and weight.requires_grad
        loss, logps, *_ = _forward_of(chosen)(hidden, weight, targets, *options.as_numbers(), *needs)
        return (loss, logps) if return_logps else loss


def _forward_of(chosen: str) -> Any:
    """The registered op of a backend."""
    if chosen == "triton":
        from herdkern.ops.triton import linear_cross_entropy as triton_linear_cross_entropy

        return triton_linear_cross_entropy.forward
    return _forward


@dataclasses.dataclass(frozen=True)
class Options:
    """What the loss is, as the public functions take it."""

    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    z_loss: float
    softcap: float

    def as_keywords(self) -> dict[str, Any]:
        """Return the arguments of the reference."""
        return dataclasses.asdict(self)

    def as_numbers(self) -> tuple[int, int, float, float, float]:
        """Return the arguments of the registered op."""
        reduction = get_args(Reduction).index(self.reduction)
        return self.ignore_index, reduction, float(self.label_smoothing), float(self.z_loss), float(self.softcap)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.get_autocast_dtype(hidden.device.type)
    keeps = dtype == torch.bfloat16 and weight.dtype == torch.float32  # rounded where it is used
    return hidden.to(dtype), weight if keeps else weight.to(dtype)


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    op: str = "linear_cross_entropy",
    *,
    may_be_empty: bool = False,
) -> None:
    """Raise ValueError, in the name of `op`, if the arguments do not fit each other; targets' values are not read.

    may_be_empty: weight may have no rows.
    """
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"{op}: hidden must be (n, dim), got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or (weight.shape[0] == 0 and not may_be_empty):
        raise ValueError(f"{op}: weight must have shape (vocab_size, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype and (hidden.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
        allowed = " or float32" if hidden.dtype == torch.bfloat16 else ""
        got = dtype_name(weight.dtype)
        raise ValueError(f"{op}: weight must be {dtype_name(hidden.dtype)} as hidden is{allowed}, got {got}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: targets must have shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets must be int64, got {dtype_name(targets.dtype)}")
    for name, other in (("weight", weight), ("targets", targets)):
        if other.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on {hidden.device}, got {other.device}")
    if options.reduction not in get_args(Reduction):
        raise ValueError(f"{op}: reduction must be none, sum or mean, got {options.reduction!r}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {options.label_smoothing}")
    for name in ("z_loss", "softcap"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise ValueError(f"{op}: {name} must be 0 (off) or positive, got {getattr(options, name)}")


def check_range(targets: Tensor, vocab_size: int, ignore_index: int, bad: int) -> None:
    """Raise ValueError for the target at index `bad`, if that is no -1."""
    if bad >= 0:
        got = f"{int(targets[bad])} at index {bad}"
        expected = f"lie in [0, {vocab_size}) or be ignore_index={ignore_index}"
        raise ValueError(f"linear_cross_entropy: targets must {expected}, got {got}")


def run_kernel(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    stats: Tensor,
    options: tuple[int, int, float, float, float],
    *,
    has_stats: bool = False,
    losses: Tensor | None = None,
    logps: Tensor | None = None,
    loss: Tensor | None = None,
    dlosses: Tensor | None = None,
    dlogps: Tensor | None = None,
    dhidden: Tensor | None = None,
    dweight: Tensor | None = None,
    total_vocab_size: int = 0,
) -> None:
    """Call the native kernel (csrc/cpu/linear_cross_entropy.h): it writes losses, logps, loss and gradients if given.

    dhidden may be float32 for bfloat16 hidden.
    """

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    hidden, hidden_stride = rows(hidden)
    weight, weight_stride = rows(weight)
    targets = targets.contiguous()
    dlosses, dlogps = (None if d is None else d.float().contiguous() for d in (dlosses, dlogps))
    ignore_index, reduction, *numbers = options
    native_module().linear_cross_entropy(
        *map(address, (hidden, weight, targets, stats)),
        has_stats,
        *map(address, (losses, logps, loss, dlosses, dlogps, dhidden, dweight)),
        *(*hidden.shape, weight.shape[0], total_vocab_size or weight.shape[0], hidden_stride, weight_stride),
        *(x is not None and x.dtype == torch.bfloat16 for x in (hidden, weight, dhidden)),
        *(ignore_index, reduction),
        *numbers,
        num_threads(),
    )


def _forward_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, need_dhidden, need_dweight = rest
    given = targets.contiguous()
    bad = native_module().find_bad_target(given.data_ptr(), given.numel(), weight.shape[0], ignore_index)
    check_range(given, weight.shape[0], ignore_index, bad)
    results = empty_results(4, hidden, weight, given, reduction, need_dhidden, need_dweight)
    loss, logps, stats, dhidden, dweight = results
    run_kernel(
        hidden,
        weight,
        given,
        stats,
        (ignore_index, reduction, *numbers),
        losses=loss if reduction == 0 else torch.empty_like(logps),
        logps=logps,
        loss=loss if reduction else None,
        dhidden=dhidden if need_dhidden else None,
        dweight=dweight if need_dweight else None,
    )
    return results


def _gradients_cpu(
    dlosses: Tensor | None,
    dlogps: Tensor | None,
    stats: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *numbers, need_dhidden, need_dweight = rest
    dhidden, dweight = empty_gradients(hidden, weight, need_dhidden, need_dweight)
    run_kernel(
        hidden,
        weight,
        targets,
        stats,
        (ignore_index, 0, *numbers),
        has_stats=True,
        dlosses=torch.zeros_like(stats[0]) if dlosses is None else dlosses,
        dlogps=dlogps,
        dhidden=dhidden if need_dhidden else None,
        dweight=dweight if need_dweight else None,
    )
    return dhidden, dweight


def empty_results(
    num_stats: int,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: int,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, ...]:
    """Return tensors for what the registered op returns."""
    logps = hidden.new_empty(targets.shape, dtype=torch.float32)
    loss = torch.empty_like(logps) if reduction == 0 else logps.new_empty(())
    stats = logps.new_empty((num_stats, *targets.shape))
    return loss, logps, stats, *empty_gradients(hidden, weight, need_dhidden, need_dweight)


def register_linear_cross_entropy(
    name: str,
    num_stats: int,
    forward: Callable[..., Any],
    gradients: Callable[..., Any],
    devices: Sequence[str] = ("CPU",),
) -> Callable[..., tuple[Tensor, ...]]:
    """Register herdkern::<name> and herdkern::<name>_gradients, implemented as _forward_cpu and _gradients_cpu are.

    num_stats: how many numbers of each token the second wants to know from the first.
    Returns the call of the first: (loss, log-probabilities, stats, dhidden, dweight), the gradients of the loss in the
    forward pass, empty where not needed.
    """
    options = "float label_smoothing, float z_loss, float softcap, bool need_dhidden, bool need_dweight"
    gradients_op = native_op(
        f"{name}_gradients(Tensor? dlosses, Tensor? dlogps, Tensor stats, Tensor hidden, Tensor weight,"
        f" Tensor targets, int ignore_index, {options}) -> (Tensor, Tensor)",
        gradients,
        lambda dlosses, dlogps, stats, hidden, weight, *rest: empty_gradients(hidden, weight, *rest[-2:]),
        devices=devices,
    )

    def backward(ctx: Any, dloss: Tensor | None, dlogps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        if dloss is None and dlogps is None:
            return None, None, *rest
        if torch.is_grad_enabled():
            return *_second_order(ctx, dloss, dlogps), *rest
        ignore_index, reduction, *numbers = ctx.numbers
        if reduction != 0 and dlogps is None:
            assert dloss is not None
            return *_scaled(ctx, dloss), *rest
        hidden, weight, targets, stats = ctx.saved_tensors[:4]
        if dloss is not None and reduction:
            scale = dloss / (targets != ignore_index).sum() if reduction == 2 else dloss
            dloss = scale.expand(targets.shape)
        needs = ctx.needs_input_grad[:2]
        found = gradients_op(dloss, dlogps, stats, hidden, weight, targets, ignore_index, *numbers, *needs)
        return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), *rest

    return native_op(
        f"{name}(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, int reduction,"
        f" {options}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        forward,
        lambda hidden, weight, targets, ignore_index, reduction, *rest: empty_results(
            num_stats, hidden, weight, targets, reduction, *rest[-2:]
        ),
        _setup_context,
        backward,
        devices,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, *ctx.numbers = inputs[:8]
    _, _, stats, dhidden, dweight = output
    ctx.mark_non_differentiable(stats, dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.early = None
    if is_plain_eager((hidden, weight, targets)):
        # Not among the saved tensors, which would stay referred to: the backward pass hands them on as they are.
        ctx.early = dhidden, dweight
        ctx.save_for_backward(hidden, weight, targets, stats)
    else:
        ctx.save_for_backward(hidden, weight, targets, stats, dhidden, dweight)


def _scaled(ctx: Any, dloss: Tensor) -> list[Tensor | None]:
    """The early gradients times dloss: themselves unless the graph is kept, so that a leaf takes them uncopied."""
    needs = ctx.needs_input_grad[:2]
    early = ctx.saved_tensors[4:]
    if early:
        return [g * dloss.to(torch.float32) if need else None for g, need in zip(early, needs, strict=True)]
    scale = dloss.item() if dloss.is_cpu else dloss  # no waiting for a GPU
    keep = _keeps_graph()
    found: list[Tensor | None] = []
    for gradient, need in zip(ctx.early, needs, strict=True):
        if not need:
            found.append(None)
        elif keep:
            found.append(gradient * scale)
        else:
            found.append(gradient if dloss.is_cpu and scale == 1.0 else gradient.mul_(scale))
    if not keep:
        ctx.early = None
    return found


def _keeps_graph() -> bool:
    """Whether the backward pass in progress may be followed by another of the same graph."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # a private name of torch: without it there is one copy more
        return True


def _second_order(ctx: Any, dloss: Tensor | None, dlogps: Tensor | None) -> list[Any]:
    hidden, weight, targets = ctx.saved_tensors[:3]
    ignore_index, reduction, label_smoothing, z_loss, softcap = ctx.numbers
    options = Options(ignore_index, get_args(Reduction)[reduction], label_smoothing, z_loss, softcap)

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        outputs = linear_cross_entropy_reference(hidden, weight, targets, **options.as_keywords(), return_logps=True)
        parts = [(out * d).sum() for out, d in zip(outputs, (dloss, dlogps), strict=True) if d is not None]
        return torch.stack(parts).sum()

    return differentiable_gradients(reference, (hidden, weight), hidden.new_ones((), dtype=torch.float32))


_forward = register_linear_cross_entropy("linear_cross_entropy", 4, _forward_cpu, _gradients_cpu)
