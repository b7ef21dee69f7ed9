"""What the benchmarks of tensor ops share: one step of forward and backward, and the proof that all agree with fp64."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]
COMPILED = "torch.compile"


class Step:
    """One forward and backward pass of `function` on leaves of its own."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], dout: Tensor | None) -> None:
        self.function, self.dout = function, dout
        self.leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def __call__(self) -> list[Tensor]:
        """[output, gradient of each input]."""
        out = self.function(*self.leaves)
        dout = None if self.dout is None else self.dout.to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, dout)]


def lazily_compiled(function: Function) -> Function:
    """torch.compile of the function from its first call on: importing the compiler alone takes seconds."""

    @functools.cache
    def compiled() -> Function:
        return torch.compile(function)

    return lambda *args: compiled()(*args)


class Steps(dict[str, Step]):
    """Steps by name of the implementation; torch.compile of the reference is added to them.

    A scalar output is its own loss; any other gets a fixed random gradient. What is checked is the same implementations
    on `checked` (the inputs themselves if None).
    """

    def __init__(
        self,
        implementations: dict[str, Function],
        inputs: Sequence[Tensor],
        reference: Function,
        *,
        checked: Sequence[Tensor] | None = None,
    ) -> None:
        functions = {**implementations, "torch plain": reference, COMPILED: lazily_compiled(reference)}
        dout = _dout(reference, inputs)
        super().__init__({name: Step(function, inputs, dout) for name, function in functions.items()})
        self.reference, self.checked = reference, inputs if checked is None else checked


def _dout(reference: Function, inputs: Sequence[Tensor]) -> Tensor | None:
    with torch.no_grad():
        out = reference(*inputs)
    return torch.randn(out.shape).to(inputs[0].dtype) if out.dim() else None


def same_results(steps: Steps) -> None:
    """Ours keeps the tests' bound, 2 errors of plain torch in the same dtype; a peer may also round in between."""
    dout = _dout(steps.reference, steps.checked)
    true = Step(steps.reference, [x.double() for x in steps.checked], dout)()
    plain = Step(steps.reference, steps.checked, dout)()
    error = [(r.double() - g).abs().max().item() for r, g in zip(plain, true, strict=True)]
    for name, step in steps.items():
        for i, (got, expected) in enumerate(zip(Step(step.function, steps.checked, dout)(), true, strict=True)):
            scale = max(1.0, expected.abs().max().item())
            allowed = 2 * error[i] + 4 * torch.finfo(torch.float32).eps * scale
            if name != "herdkern":
                allowed += 4 * torch.finfo(steps.checked[0].dtype).eps * scale
            actual = (got.double() - expected).abs().max().item()
            assert actual <= allowed, f"{name}: result {i} is off by {actual:.2e}, allowed {allowed:.2e}"
