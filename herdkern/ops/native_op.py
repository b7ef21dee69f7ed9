"""Registers native functions with torch: a short path in eager mode, a torch.library op everywhere else.

An op that goes through torch's dispatcher costs 12 to 28 us a call from Python; the short path costs 3 to 10 us.
Whatever is not plain eager mode (torch.compile, export, fake tensors, subclasses, dispatch modes, functorch) takes the
registered op.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("herdkern", "DEF")


def native_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    devices: Sequence[str] = ("CPU",),
) -> Callable[..., Any]:
    """Register herdkern::<schema> and return the function to call; its arguments are positional, as in the schema.

    implementation: runs it on tensors of `devices`.  fake: shapes and dtypes alone.  setup_context(ctx, inputs, output)
    and backward(ctx, *douts): the gradient, as for torch.library.register_autograd; without them there is none.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in devices:
        _LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"herdkern::{name}", fake, lib=_LIBRARY)
    registered = getattr(torch.ops.herdkern, name).default
    if setup_context is None or backward is None:

        def call(*args: Any) -> Any:
            return implementation(*args) if is_plain_eager(args) else registered(*args)

        return call

    torch.library.register_autograd(f"herdkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    setup, gradient = setup_context, backward

    def forward(ctx: Any, *args: Any) -> Any:
        output = implementation(*args)
        setup(ctx, args, output)
        return output

    def gradients(ctx: Any, *douts: Tensor) -> Any:
        return gradient(ctx, *douts)

    # The same op without the dispatcher; profiles show it, and its backward, by its name.
    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    make: Any = type(torch.autograd.Function)
    eager = make(name, (torch.autograd.Function,), members)

    def call_with_gradient(*args: Any) -> Any:
        if not is_plain_eager(args):
            refuse_forward_mode(name, args)
            return registered(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return eager.apply(*args)
        return implementation(*args)

    return call_with_gradient


def differentiable_gradients(reference: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[Any]:
    """Return the gradients of `reference(*inputs)` with a graph of their own: the backward of the backward.

    The kernels have no second derivative; a backward pass that is itself recorded (create_graph=True) uses this.
    """
    with torch.enable_grad():
        # Aliases: one tensor may be two inputs, or one input may be made from another; each has a gradient of its own.
        aliases = [x.view_as(x) for x in inputs]
        wanted = [alias for x, alias in zip(inputs, aliases, strict=True) if x.requires_grad]
        gradients = iter(torch.autograd.grad(reference(*aliases), wanted, dout, create_graph=True))
    return [next(gradients) if x.requires_grad else None for x in inputs]


def empty_gradients(x: Tensor, y: Tensor, need_dx: bool, need_dy: bool) -> tuple[Tensor, Tensor]:
    """Return contiguous tensors for the gradients of two inputs, without an element where none is needed."""
    return x.new_empty(x.shape if need_dx else 0), y.new_empty(y.shape if need_dy else 0)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` and the distance in elements between its rows (last dim); copies if that is not one number.

    x: (..., dim). Its rows are contiguous in the result.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]


try:  # private names of torch: without one of them every call takes the registered op
    _num_dispatch_modes = torch._C._len_torch_dispatch_stack
    _num_function_modes = torch._C._len_torch_function_stack
    _functorch_level = torch._C._functorch.maybe_current_level
except AttributeError:

    def _num_dispatch_modes() -> int:
        return 1


def refuse_forward_mode(op: str, args: Sequence[Any]) -> None:
    """Raise NotImplementedError if a forward-mode derivative is asked for: torch would take it as zero, in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args):
        raise NotImplementedError(
            f"{op}: no backend can run this call in forward mode (torch.func.jvp, dual tensors); "
            'use reverse mode, or backend="reference"'
        )


def is_plain_eager(args: Sequence[Any]) -> bool:
    """Return whether a call with `args` may skip torch's dispatcher: nobody traces, intercepts or transforms it."""
    if (
        torch.compiler.is_compiling()
        or _num_dispatch_modes()
        or _num_function_modes()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for arg in args:
        if isinstance(arg, Tensor) and not (
            (type(arg) is Tensor or type(arg) is torch.nn.Parameter)
            and (arg.is_cpu or arg.is_cuda)
            and not arg.is_neg()
        ):
            return False
    return True
